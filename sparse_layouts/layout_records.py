"""A layout as a record for JSON with its tensors beside it, and back.

A record comes from a file and is not trusted: classes are looked up among those that exist, every
field is checked against the record and by the layout's own `validate`, and nothing is allocated by
what a record says.
"""

from __future__ import annotations

import inspect
import math
import sys
import types
import typing
from typing import Any, NoReturn

import torch
from torch import Tensor

from sparse_layouts.bsr_tensor import BSRTensor
from sparse_layouts.layout_tensor import LayoutTensor
from sparse_layouts.reordered_tensor import ReorderedTensor

RECORD = frozenset({"class", "shape", "dtype", "fields", "static"})
FIELD = frozenset({"key", "dtype", "shape"})
SMALL_BLOCK = 2**26  # entries that a block may have although no tensor of the file holds as many
NOT_FINITE = ("nan", "inf", "-inf")

# What a constructor or `validate` may raise when it meets what no constructor would have made.
BROKEN = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError)


def class_name(cls: type) -> str:
    """`sparse_layouts.BSRTensor`: module and qualified name, of the library's own without the file.

    So files stay readable when a layout of the library moves to another file.
    """
    package = cls.__module__.partition(".")[0]
    return f"{package if package == 'sparse_layouts' else cls.__module__}.{cls.__qualname__}"


def known_layouts() -> dict[str, type[LayoutTensor]]:
    """Every layout class that exists now, by name; of two with one name the later one."""
    waiting: list[type[LayoutTensor]] = [LayoutTensor]
    for cls in waiting:  # grows while it is read
        waiting.extend(cls.__subclasses__())
    return {class_name(cls): cls for cls in waiting[1:]}


def record_of(layout: LayoutTensor, keys: dict[str, str], where: str) -> dict[str, Any]:
    """The record of a layout; `keys` names, by field, the tensor that the file holds."""
    fields = {
        name: None
        if tensor is None
        else {"key": keys[name], "dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape)}
        for name, tensor in zip(layout.fields, layout.inner_tensors(), strict=True)
    }
    return {
        "class": class_name(type(layout)),
        "shape": list(layout.shape),
        "dtype": dtype_name(layout.dtype),
        "fields": fields,
        "static": {
            name: _encoded(value, f"{where}: static field {name!r}")
            for name, value in layout.static().items()
        },
    }


def keys_of(record: Any) -> list[str]:
    """The names of the tensors that a record mentions, as far as it is one."""
    fields = record.get("fields") if isinstance(record, dict) else None
    entries = fields.values() if isinstance(fields, dict) else ()
    found = [entry.get("key") for entry in entries if isinstance(entry, dict)]
    return [key for key in found if isinstance(key, str)]


def layout_from(record: Any, tensors: dict[str, Tensor], where: str) -> LayoutTensor:
    """The layout of a record, checked; raises `ValueError` that begins with `where` and names the
    field.
    """
    _check_names(record, RECORD, where)
    name = record["class"]
    cls = known_layouts().get(name) if isinstance(name, str) else None
    if cls is None:
        raise ValueError(
            f"{where}: class: expected a layout that is defined in this process, got {name!r}. "
            "Import the module that defines it first; nothing is imported because a file names it"
        )
    shape = _sizes(record["shape"], f"{where}: shape")
    inner = _inner_tensors(cls, record["fields"], tensors, where)
    dtype = dtypes().get(record["dtype"]) if isinstance(record["dtype"], str) else None
    if dtype is None:
        _refuse(f"{where}: dtype", "the name of a torch dtype", record["dtype"])
    if inner[0] is not None and inner[0].dtype != dtype:
        _refuse(f"{where}: dtype", f"that of field {cls.fields[0]!r}, {inner[0].dtype}", dtype)
    static = _static(cls, record["static"], where)
    if issubclass(cls, (BSRTensor, ReorderedTensor)):
        _check_blocks(shape, inner[0], static["block_size"], where)
    try:
        made = cls(*inner, shape=shape, dtype=dtype, **static)
        made.validate()
        again = made.like_self(made.stored_values)  # a batch, for one, is the values' own
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    except BROKEN as error:
        raise ValueError(
            f"{where}: expected the fields of a {cls.__name__}, got what it cannot be made of: "
            f"{type(error).__name__}: {error}"
        ) from error
    if again.shape != made.shape:
        _refuse(f"{where}: shape", f"{tuple(again.shape)}, which the fields make", shape)
    for name, value in again.static().items():
        if repr(value) != repr(static[name]):  # by text: nan is not equal to itself
            _refuse(f"{where}: static field {name!r}", f"{value!r} for shape {shape}", static[name])
    return made


def _inner_tensors(
    cls: type[LayoutTensor], fields: Any, tensors: dict[str, Tensor], where: str
) -> list[Tensor | None]:
    _check_names(fields, frozenset(cls.fields), f"{where}: fields of {cls.__name__}")
    inner = [_inner_tensor(fields[n], tensors, f"{where}: field {n!r}") for n in cls.fields]
    if all(tensor is None for tensor in inner):
        _refuse(f"{where}: fields", "at least one tensor", fields)
    return inner


def _inner_tensor(entry: Any, tensors: dict[str, Tensor], where: str) -> Tensor | None:
    if entry is None:
        return None
    _check_names(entry, FIELD, where)
    key = entry["key"]
    if not isinstance(key, str) or key not in tensors:
        _refuse(where, "the name of a tensor of the file", key)
    tensor, shape = tensors[key], _sizes(entry["shape"], where)
    if dtype_name(tensor.dtype) != entry["dtype"]:
        _refuse(f"{where} ({key!r})", f"dtype {entry['dtype']!r:.50}", dtype_name(tensor.dtype))
    if tuple(tensor.shape) != shape:
        _refuse(f"{where} ({key!r})", f"shape {shape}", tuple(tensor.shape))
    return tensor


def _static(cls: type[LayoutTensor], static: Any, where: str) -> dict[str, Any]:
    _check_names(static, frozenset(cls.static_fields), f"{where}: static fields of {cls.__name__}")
    values = {}
    for name in cls.static_fields:
        at = f"{where}: static field {name!r}"
        values[name] = _decoded(static[name], at)
        hint = _annotation(cls, name)
        if not _conforms(values[name], hint):
            _refuse(at, getattr(hint, "__name__", None) or str(hint), values[name])
    return values


def _check_blocks(
    shape: tuple[int, ...], values: Tensor | None, block_size: tuple[int, int], where: str
) -> None:
    """The sizes by which a layout of blocks divides, and which one block alone takes in memory."""
    if len(shape) < 2:
        _refuse(f"{where}: shape", "at least (M, N)", shape)
    most = SMALL_BLOCK if values is None else max(SMALL_BLOCK, values.numel())
    if min(block_size) < 1 or math.prod(block_size) > most:
        at = f"{where}: static field 'block_size'"
        _refuse(at, f"positive sizes of at most {most} entries a block", block_size)


# --- static values --------------------------------------------------------------------------------


def _encoded(value: Any, where: str) -> Any:
    """A static value as JSON has it: a tuple as a list, and what JSON lacks as a named value."""
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if type(value) in (tuple, torch.Size):
        return [_encoded(item, where) for item in value]
    if isinstance(value, torch.dtype):
        return {"dtype": dtype_name(value)}
    raise TypeError(
        f"{where}: expected None, bool, int, float, str, torch.dtype or a tuple of such, got "
        f"{type(value).__name__}; torch.save stores other values"
    )


def _decoded(value: Any, where: str) -> Any:
    if isinstance(value, list):
        return tuple(_decoded(item, where) for item in value)
    if not isinstance(value, dict):
        return value
    if list(value) == ["float"] and value["float"] in NOT_FINITE:
        return float(value["float"])
    if list(value) == ["dtype"] and isinstance(value["dtype"], str):
        found = dtypes().get(value["dtype"])
        if found is not None:
            return found
    _refuse(where, "a value, a list, or a float or dtype by name", value)


def _annotation(cls: type, name: str) -> Any:
    """The type that a class declares for a static field; Any where it declares none."""
    for base in cls.__mro__:
        declared = inspect.get_annotations(base).get(name)
        if declared is not None:
            module = sys.modules.get(base.__module__)
            holder = types.SimpleNamespace(__annotations__={name: declared})
            try:
                return typing.get_type_hints(holder, vars(module) if module else {})[name]
            except NameError:  # a name that only a type checker imports
                return Any
    return Any


def _conforms(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type; True where the annotation says nothing of it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_conforms(value, option) for option in arguments)
    if origin is typing.Literal:
        return any(value == option and type(value) is type(option) for option in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if arguments[-1:] == (...,):
            return all(_conforms(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(_conforms, value, arguments))
    if hint is Any or not isinstance(hint, type):
        return True
    if hint in (int, bool):
        return type(value) is hint
    return isinstance(value, (int, float) if hint is float else hint) and (
        hint is not float or not isinstance(value, bool)
    )


# --- words ----------------------------------------------------------------------------------------


def dtypes() -> dict[str, torch.dtype]:
    """Every dtype of torch by name; `getattr` would let a file name a module to import."""
    return {dtype_name(d): d for d in vars(torch).values() if isinstance(d, torch.dtype)}


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` of `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def _sizes(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(size) is int and size >= 0 for size in value):
        _refuse(where, "a list of sizes from 0", value)
    if math.prod(max(size, 1) for size in value) >= 2**63:
        _refuse(where, "fewer than 2**63 entries", value)
    return tuple(value)


def _check_names(value: Any, names: frozenset[str], where: str) -> None:
    if not isinstance(value, dict):
        _refuse(where, f"an object with {', '.join(sorted(names))}", value)
    missing, unknown = sorted(names - set(value)), sorted(set(value) - names)
    if missing or unknown:
        got = f"{', '.join(missing)} missing" if missing else f"also {', '.join(unknown)}"
        raise ValueError(f"{where}: expected {', '.join(sorted(names))}, got {got[:200]}")


def _refuse(where: str, expected: str, got: Any) -> NoReturn:
    raise ValueError(f"{where}: expected {expected}, got {got!r:.200}")
