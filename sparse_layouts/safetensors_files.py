"""State dicts with layouts in safetensors files: `sl.save_safetensors`, `sl.load_safetensors`."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_layouts.file_errors import PathLike, file_size
from sparse_layouts.layout_records import keys_of, layout_from, record_of
from sparse_layouts.layout_tensor import LayoutTensor
from sparse_layouts.tensor_store import TensorStore

METADATA = "sparse_layouts"  # the entry of a file's metadata that holds the records
VERSION = 1
RESERVED = "__metadata__"  # safetensors' own entry among the names


def save_safetensors(
    state_dict: Mapping[str, Tensor], path: PathLike, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a state dict, in which layouts and plain tensors lie side by side, as one safetensors
    file.

    A layout's tensors become entries `<name>.<field>` (with `_` behind, should the state dict have
    that name), which every reader of safetensors sees; class, shape and sizes are JSON in the
    file's metadata. A tensor that several entries share (one pattern under many weights, tied
    weights) is written once and shared again by `load_safetensors`; views that overlap without
    being equal are written one by one. `metadata` adds texts of your own.

    Tensors alone are stored: no `requires_grad`, no Parameter, which `load_state_dict` gives back.
    A state dict of an optimizer holds numbers and lists as well: that is `torch.save`'s business.
    The file replaces an older one when it is complete, not before.

    Raises `TypeError` for what is neither a layout nor a plain strided tensor or has a static field
    that is no number, text or tuple, `ValueError` for names that safetensors reserves, tensors
    without data (meta) and dtypes that safetensors lacks. Needs the extra `safetensors`. Format:
    https://github.com/huggingface/safetensors.

    >>> import os, tempfile, torch, sparse_layouts as sl
    >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
    >>> w = sl.bsr(torch.eye(64), block_size=16)
    >>> sl.save_safetensors({"weight": w, "bias": torch.zeros(64)}, path)
    >>> sl.load_safetensors(path)["weight"]
    BSRTensor([64, 64], float32, cpu, block 16, 4 blocks, density 25.00%)
    """
    safetensors = _package("save_safetensors")
    own = _checked_metadata(metadata)
    _check_state_dict(state_dict)
    store = TensorStore({*state_dict, RESERVED})
    # layouts first: what a plain tensor shares with one is stored under the layout's key
    layouts = {
        name: record_of(value, store.add_layout(name, value), f"save_safetensors: {name!r}")
        for name, value in state_dict.items()
        if isinstance(value, LayoutTensor)
    }
    aliases = {}
    for name, value in state_dict.items():
        if name not in layouts:
            key = store.add(value, name, f"{name!r}")
            if key != name:
                aliases[name] = key
    records = {
        "version": VERSION,
        "names": list(state_dict),
        "layouts": layouts,
        "aliases": aliases,
    }
    text = {"format": "pt", **own, METADATA: json.dumps(records, allow_nan=False)}
    target = os.path.realpath(path)
    with tempfile.TemporaryDirectory(
        dir=os.path.dirname(target), prefix=".save_safetensors-"
    ) as folder:
        written = os.path.join(folder, "file")
        try:
            safetensors.torch.save_file(store.separate(), written, text)
        except KeyError as error:  # its table of dtypes
            raise ValueError(
                f"save_safetensors: expected dtypes that safetensors {safetensors.__version__} "
                f"stores, got {error.args[0]}; torch.save stores it"
            ) from error
        os.replace(written, target)


def load_safetensors(
    path: PathLike, *, device: torch.device | str | int = "cpu"
) -> dict[str, Tensor]:
    """The state dict of a safetensors file: layouts as they were saved, other tensors plain, in
    the order in which they were saved.

    Tensors that were shared are shared again. Files without layouts, from whatever writer, load as
    `safetensors.torch.load_file` loads them. No tensor requires a gradient. Tensors on the CPU are
    mapped from the file: do not change it while they are alive (`save_safetensors` does not, it
    replaces it).

    Nothing in the file is executed or imported: a layout's class is looked up by name among those
    that exist, so import the module that defines a layout of your own first. The file is not
    trusted: every layout is checked with `validate()`, and no memory is taken for a size that is
    only claimed.

    Raises `ValueError` that names file, layout and field for all that does not fit: cut off, no
    safetensors file, metadata that is no JSON, names twice, unknown classes, fields that are
    missing or of another dtype or shape, static fields of another type, indices out of range.

    >>> import os, tempfile, torch, sparse_layouts as sl
    >>> path = os.path.join(tempfile.mkdtemp(), "masks.safetensors")
    >>> sl.save_safetensors({"mask": sl.causal(100, block_size=32)}, path)
    >>> sl.load_safetensors(path)["mask"].nnz
    5050
    """
    safetensors = _package("load_safetensors")
    file_size(path)
    where = os.fspath(path)
    try:
        with safetensors.safe_open(where, framework="pt", device="cpu") as file:
            # of a name that is there twice, this is the last one; such files are refused below
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{where}: expected a safetensors file, got: {error}") from error
    with open(path, "rb") as header:
        _json(header.read(int.from_bytes(header.read(8), "little")).decode(), f"{where}: header")
    records: dict[str, Any] = {}
    if METADATA in metadata:
        records = _checked_records(metadata[METADATA], tensors, f"{where}: metadata {METADATA!r}")
    layouts = {
        name: layout_from(record, tensors, f"{where}: layout {name!r}")
        for name, record in records.get("layouts", {}).items()
    }
    moved = {key: tensor.to(device) for key, tensor in tensors.items()}
    inner = {key for record in records.get("layouts", {}).values() for key in keys_of(record)}
    loaded: dict[str, Tensor] = {}
    for name in records.get("names", []):
        if name in layouts:
            loaded[name] = _on_tensors(layouts[name], records["layouts"][name], moved)
        elif name in records["aliases"]:
            loaded[name] = moved[records["aliases"][name]].detach()
        else:
            loaded[name] = moved[name]
    others = (key for key in moved if key not in inner and key not in loaded)
    return {**loaded, **{key: moved[key] for key in others}}


def _package(what: str) -> Any:
    """The package safetensors, which is optional."""
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{what}: needs the package safetensors: pip install 'sparse_layouts[safetensors]'"
        ) from error
    return safetensors


def _check_state_dict(state_dict: Any) -> None:
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            "save_safetensors: expected a mapping of names to tensors, such as "
            f"model.state_dict(), got {type(state_dict).__name__}"
        )
    for name in state_dict:
        if not isinstance(name, str):
            raise TypeError(
                f"save_safetensors: expected names that are str, got {type(name).__name__}"
            )
        if name == RESERVED:
            raise ValueError(f"save_safetensors: the name {RESERVED!r} is the format's own")


def _checked_metadata(metadata: Any) -> dict[str, str]:
    own = {} if metadata is None else dict(metadata)
    for key, text in own.items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise TypeError(
                "save_safetensors: metadata is text by text, got "
                f"{type(key).__name__}: {type(text).__name__}"
            )
    if METADATA in own:
        raise ValueError(
            f"save_safetensors: the metadata entry {METADATA!r} holds the layouts; use another name"
        )
    return own


def _checked_records(text: str, tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """version, names, layouts and aliases of a file; each name stands for one thing that exists."""
    records = _json(text, where)
    if not isinstance(records, dict) or records.get("version") != VERSION:
        got = records.get("version") if isinstance(records, dict) else type(records).__name__
        raise ValueError(
            f"{where}: expected version {VERSION} of this format, got {got!r}; a newer "
            "sparse_layouts may have written it"
        )
    for part, kind in (("names", list), ("layouts", dict), ("aliases", dict)):
        if not isinstance(records.get(part), kind):
            got = type(records.get(part)).__name__
            raise ValueError(f"{where}: {part}: expected a {kind.__name__}, got {got}")
    names, layouts, aliases = records["names"], records["layouts"], records["aliases"]
    inner = {key for record in layouts.values() for key in keys_of(record)}
    seen = set()
    for name in names:
        if not isinstance(name, str) or name in seen:
            raise ValueError(f"{where}: names: expected texts, each once, got {name!r}")
        seen.add(name)
        stored = name in tensors and name not in inner
        if (name in layouts) + (name in aliases) + stored != 1:
            raise ValueError(
                f"{where}: {name!r}: expected one of a layout, an alias and a tensor of that name, "
                f"got {(name in layouts) + (name in aliases) + stored} of them"
            )
    for name in (*layouts, *aliases):
        if name not in seen:
            raise ValueError(f"{where}: {name!r}: expected a name that `names` lists")
    for name, key in aliases.items():
        if not isinstance(key, str) or key not in tensors:
            raise ValueError(
                f"{where}: alias {name!r}: expected the name of a tensor of the file, got {key!r}"
            )
    return records


def _json(text: str, where: str) -> Any:
    """Parses JSON in which no name stands twice and every number is one of JSON's."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for name, value in pairs:
            if name in made:
                raise ValueError(f"the name {name[:100]!r} is there twice")
            made[name] = value
        return made

    def no_number(constant: str) -> Any:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected JSON, got: {error}") from error


def _on_tensors(layout: LayoutTensor, record: Any, tensors: Mapping[str, Tensor]) -> LayoutTensor:
    """A checked layout, on the tensors that were moved to its device."""
    entries = (record["fields"][field] for field in layout.fields)
    inner = [None if entry is None else tensors[entry["key"]] for entry in entries]
    if all(a is b for a, b in zip(inner, layout.inner_tensors(), strict=True)):
        return layout
    return type(layout)(*inner, shape=layout.shape, dtype=layout.dtype, **layout.static())
