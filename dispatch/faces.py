"""One canonical name for each computation, and the faces under which torch offers it.

`w @ x`, `torch.matmul`, `Tensor.mm`, `F.linear` are distinct objects with distinct signatures.
:func:`readings` reads a call under every canonical name that its shapes allow, the closest first,
so that a route registered for one serves all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_layouts.dispatch.layout import Layout

Function = Callable[..., Any]


class Reading(NamedTuple):
    """A call read as a call of a canonical function; `finish` turns that one's result into this
    one's.
    """

    function: Function
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    finish: Callable[[Any], Any] | None = None


# The parameters by which routes name operands. Ours, and not torch's own signatures: those gain
# arguments.
PARAMETERS: dict[Function, tuple[str, ...]] = {
    torch.matmul: ("input", "other"),
    torch.mm: ("input", "mat2"),
    torch.bmm: ("input", "mat2"),
    torch.addmm: ("input", "mat1", "mat2"),
    torch.baddbmm: ("input", "batch1", "batch2"),
    torch.softmax: ("input", "dim", "dtype"),
    torch.log_softmax: ("input", "dim", "dtype"),
    torch.transpose: ("input", "dim0", "dim1"),
    torch.sum: ("input", "dim", "keepdim"),
    torch.add: ("input", "other"),
    torch.sub: ("input", "other"),
    torch.mul: ("input", "other"),
    torch.div: ("input", "other"),
    torch.bitwise_and: ("input", "other"),
    torch.bitwise_or: ("input", "other"),
    torch.bitwise_not: ("input",),
    torch.einsum: ("equation", "operands"),
    torch.sparse.sampled_addmm: ("input", "mat1", "mat2"),
    F.linear: ("input", "weight", "bias"),
    F.scaled_dot_product_attention: (
        "query",
        "key",
        "value",
        "attn_mask",
        "dropout_p",
        "is_causal",
    ),
}

# Faces with the canonical function's own arguments.
_SAME: dict[Function, Function] = {
    torch.Tensor.matmul: torch.matmul,
    torch.Tensor.__matmul__: torch.matmul,
    torch.linalg.matmul: torch.matmul,
    torch.Tensor.mm: torch.mm,
    torch.Tensor.bmm: torch.bmm,
    torch.Tensor.addmm: torch.addmm,
    torch.Tensor.baddbmm: torch.baddbmm,
    torch.Tensor.softmax: torch.softmax,
    torch.special.softmax: torch.softmax,
    torch.Tensor.log_softmax: torch.log_softmax,
    torch.special.log_softmax: torch.log_softmax,
    torch.Tensor.transpose: torch.transpose,
    torch.swapaxes: torch.transpose,
    torch.swapdims: torch.transpose,
    torch.Tensor.swapaxes: torch.transpose,
    torch.Tensor.swapdims: torch.transpose,
    torch.Tensor.sum: torch.sum,
    torch.Tensor.add: torch.add,
    torch.Tensor.__add__: torch.add,
    torch.Tensor.__radd__: torch.add,
    torch.Tensor.sub: torch.sub,
    torch.Tensor.__sub__: torch.sub,
    torch.subtract: torch.sub,
    torch.Tensor.subtract: torch.sub,
    torch.Tensor.mul: torch.mul,
    torch.Tensor.__mul__: torch.mul,
    torch.Tensor.__rmul__: torch.mul,
    torch.multiply: torch.mul,
    torch.Tensor.multiply: torch.mul,
    torch.Tensor.div: torch.div,
    torch.Tensor.__truediv__: torch.div,
    torch.Tensor.true_divide: torch.div,
    torch.true_divide: torch.div,
    torch.divide: torch.div,
    torch.Tensor.divide: torch.div,
    torch.Tensor.bitwise_and: torch.bitwise_and,
    torch.Tensor.__and__: torch.bitwise_and,
    torch.Tensor.__rand__: torch.bitwise_and,
    torch.logical_and: torch.bitwise_and,
    torch.Tensor.logical_and: torch.bitwise_and,
    torch.Tensor.bitwise_or: torch.bitwise_or,
    torch.Tensor.__or__: torch.bitwise_or,
    torch.Tensor.__ror__: torch.bitwise_or,
    torch.logical_or: torch.bitwise_or,
    torch.Tensor.logical_or: torch.bitwise_or,
    torch.Tensor.bitwise_not: torch.bitwise_not,
    torch.Tensor.__invert__: torch.bitwise_not,
    torch.logical_not: torch.bitwise_not,
    torch.Tensor.logical_not: torch.bitwise_not,
}


def _reversed(function: Function) -> Callable[..., Reading]:
    def read(input: Any, other: Any, **rest: Any) -> Reading:
        return Reading(function, (other, input), rest)

    return read


def _functional_softmax(function: Function) -> Callable[..., Reading]:
    def read(
        input: Any, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
    ) -> Reading:
        return Reading(function, (input, dim), {"dtype": dtype})

    return read


def _flipped(dims: int | None, conjugates: bool = False) -> Callable[..., Reading]:
    """Reads `.mT` and `.T`: the last two dimensions change places; `dims` None allows any number of
    them. What `conjugates` (`.mH`) is that only for real entries.
    """

    def read(input: Any) -> Reading:
        if (dims is not None and input.dim() != dims) or (conjugates and input.dtype.is_complex):
            return Reading(torch.Tensor.T.__get__, (input,), {})  # type: ignore[attr-defined]
        return Reading(torch.transpose, (input, -2, -1), {})

    return read


def _matrix_vector(input: Any, vec: Any, **rest: Any) -> Reading:
    if vec.dim() != 1:  # torch says so
        return Reading(torch.mv, (input, vec), rest)
    return Reading(torch.matmul, (input, vec), rest)


def _permute(input: Any, *order: Any, dims: Any = None) -> Reading:
    if dims is not None:
        order = (dims,)
    if len(order) == 1 and isinstance(order[0], (tuple, list)):
        order = tuple(order[0])
    n = input.dim()
    if all(-n <= d < n for d in order):
        order = tuple(d % n for d in order)
    if order == (*range(n - 2), n - 1, n - 2):
        return Reading(torch.transpose, (input, -2, -1), {})
    return Reading(torch.permute, (input, order), {})


_READ: dict[Function, Callable[..., Reading]] = {
    torch.Tensor.__rmatmul__: _reversed(torch.matmul),
    torch.Tensor.__rsub__: _reversed(torch.sub),
    torch.rsub: _reversed(torch.sub),
    torch.Tensor.__rtruediv__: _reversed(torch.div),
    F.softmax: _functional_softmax(torch.softmax),
    F.log_softmax: _functional_softmax(torch.log_softmax),
    torch.Tensor.mT.__get__: _flipped(None),  # type: ignore[attr-defined]
    torch.Tensor.mH.__get__: _flipped(None, conjugates=True),  # type: ignore[attr-defined]
    torch.Tensor.T.__get__: _flipped(2),  # type: ignore[attr-defined]
    torch.Tensor.H.__get__: _flipped(2, conjugates=True),  # type: ignore[attr-defined]
    torch.t: _flipped(2),
    torch.Tensor.t: _flipped(2),
    torch.adjoint: _flipped(None, conjugates=True),
    torch.Tensor.adjoint: _flipped(None, conjugates=True),
    torch.mv: _matrix_vector,
    torch.Tensor.mv: _matrix_vector,
    torch.permute: _permute,
    torch.Tensor.permute: _permute,
}


# Names that torch takes for an argument besides its own: numpy's, and those of swapaxes.
_OTHER_NAMES = {"axis": "dim", "keepdims": "keepdim", "axis0": "dim0", "axis1": "dim1"}


def canonical(function: Function) -> Function:
    """The function whose routes serve `function` first."""
    return _SAME.get(function, function)


def read_call(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reading:
    """The call under its canonical name, without an `out=None`."""
    if "out" in kwargs and kwargs["out"] is None:
        kwargs = {name: value for name, value in kwargs.items() if name != "out"}
    read = _READ.get(function)
    if read is not None:
        return read(*args, **kwargs)
    if not _OTHER_NAMES.keys().isdisjoint(kwargs):
        kwargs = {_OTHER_NAMES.get(name, name): value for name, value in kwargs.items()}
    return Reading(_SAME.get(function, function), args, kwargs)


def name_of(function: Function) -> str:
    """A name that a person would write: `torch.matmul`, `Tensor.mT`, `F.linear`."""
    name = getattr(function, "__name__", repr(function))
    if name in ("__get__", "__set__"):
        descriptor = getattr(function, "__self__", None)
        written = " = x" if name == "__set__" else ""
        return f"Tensor.{getattr(descriptor, '__name__', 'property')}{written}"
    module = getattr(function, "__module__", None) or "torch"
    if "Tensor" in type(function).__name__ or getattr(function, "__objclass__", None) is not None:
        return f"Tensor.{name}"
    if getattr(torch.Tensor, name, None) is function:
        return f"Tensor.{name}"
    if getattr(F, name, None) is function and getattr(torch, name, None) is not function:
        return f"F.{name}"
    module = module.removeprefix("torch._C.").removeprefix("_")
    if module in ("linalg", "special"):
        return f"torch.{module}.{name.removeprefix(module + '_')}"
    return f"torch.{name}" if module in ("torch", "VariableFunctions") else f"{module}.{name}"


def wider_readings(reading: Reading) -> list[Reading]:
    """Other canonical calls of the same result, where shapes allow, closest first."""
    widen = _WIDER.get(reading.function)
    return [] if widen is None else widen(*reading.args, **reading.kwargs)


def _is_matrix(*tensors: Any) -> bool:
    return all(isinstance(t, Tensor) and t.dim() == 2 for t in tensors)


def _of_matmul(input: Any, other: Any, **rest: Any) -> list[Reading]:
    if rest:
        return []
    if _is_matrix(input, other):
        return [Reading(torch.mm, (input, other), {})]
    if input.dim() == 3 and other.dim() == 3 and input.shape[0] == other.shape[0]:
        return [Reading(torch.bmm, (input, other), {})]
    if input.dim() == 2 and other.dim() == 1:
        return [Reading(torch.mm, (input, other[:, None]), {}, lambda out: out[:, 0])]
    return []


def _product(a: Any, b: Any, finish: Callable[[Any], Any] | None) -> list[Reading]:
    """`finish(a @ b)` as a matmul, and under the narrower names that the shapes allow."""

    def both(narrow: Callable[[Any], Any] | None) -> Callable[[Any], Any] | None:
        if narrow is None or finish is None:
            return finish or narrow
        return lambda out: finish(narrow(out))

    narrower = [r._replace(finish=both(r.finish)) for r in _of_matmul(a, b)]
    return [Reading(torch.matmul, (a, b), {}, finish), *narrower]


def _of_mm(input: Any, mat2: Any, **rest: Any) -> list[Reading]:
    if rest or not _is_matrix(input, mat2):
        return []
    return [Reading(torch.matmul, (input, mat2), {})]


def _of_bmm(input: Any, mat2: Any, **rest: Any) -> list[Reading]:
    if rest or input.dim() != 3 or mat2.dim() != 3 or input.shape[0] != mat2.shape[0]:
        return []
    return [Reading(torch.matmul, (input, mat2), {})]


def _of_addmm(
    input: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1, **rest: Any
) -> list[Reading]:
    if rest or isinstance(input, Layout):
        return []

    def finish(product: Tensor) -> Tensor:
        scaled = product if alpha == 1 else alpha * product
        if beta == 0:
            return scaled  # torch ignores input then, NaN included
        if tuple(torch.broadcast_shapes(input.shape, scaled.shape)) != tuple(scaled.shape):
            raise ValueError(
                f"addmm: expected an input that expands to the product's shape "
                f"{tuple(scaled.shape)}, got {tuple(input.shape)}"
            )
        return scaled + (input if beta == 1 else beta * input)

    return _product(a, b, finish)


def _of_linear(input: Any, weight: Any, bias: Any = None, **rest: Any) -> list[Reading]:
    if rest or isinstance(bias, Layout) or weight.dim() != 2:
        return []
    if not isinstance(weight, Layout):
        plus = None if bias is None else lambda out: out + bias
        return _product(input, weight.mT, plus)
    rows = input.reshape(-1, input.shape[-1])

    def finish(product: Tensor) -> Tensor:
        out = product.mT.reshape(*input.shape[:-1], weight.shape[0])
        return out if bias is None else out + bias

    # weight @ input.mT needs no transposed layout, which a user's own layout may not have
    return _product(weight, rows.mT, finish)


def _of_einsum(equation: Any, *operands: Any) -> list[Reading]:
    """Reads a product of two operands with one contracted index, the layout's last or last but one,
    as a matmul.
    """
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "." in equation:
        return []
    if sum(isinstance(t, Layout) for t in operands) != 1:
        return []
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != 2 or any(len(set(t)) != len(t) for t in (*terms, out)):
        return []
    if not arrow:
        both = set(terms[0]) & set(terms[1])
        out = "".join(sorted((set(terms[0]) | set(terms[1])) - both))
    which = 0 if isinstance(operands[0], Layout) else 1
    layout, dense = operands[which], operands[1 - which]
    of_layout, of_dense = terms[which], terms[1 - which]
    if len(of_layout) != layout.dim() or len(of_dense) != dense.dim() or len(of_layout) < 2:
        return []
    lead, row, column = of_layout[:-2], of_layout[-2], of_layout[-1]
    contracted = (set(of_layout) & set(of_dense)) - set(out)
    if contracted == {row}:
        layout, row, column = layout.mT, column, row
    elif contracted != {column}:
        return []
    free = "".join(c for c in of_dense if c not in lead and c != column)
    if row not in out or set(out) != set(lead) | {row} | set(free) or row in of_dense:
        return []
    missing = [c for c in lead if c not in of_dense]
    for _ in missing:
        dense = dense.unsqueeze(0)
    names = "".join(reversed(missing)) + of_dense
    dense = dense.permute([names.index(c) for c in lead + column + free])
    sizes = [dense.shape[len(lead) + 1 + i] for i in range(len(free))]
    dense = dense.flatten(len(lead) + 1) if len(free) > 1 else dense
    if not free:
        dense = dense.unsqueeze(-1)
    have = lead + row + free

    def finish(product: Tensor) -> Tensor:
        product = product.reshape(*product.shape[: len(lead) + 1], *sizes)
        return product.permute([have.index(c) for c in out])

    return _product(layout, dense, finish)


_WIDER: dict[Function, Callable[..., list[Reading]]] = {
    torch.matmul: _of_matmul,
    torch.mm: _of_mm,
    torch.bmm: _of_bmm,
    torch.addmm: _of_addmm,
    torch.baddbmm: _of_addmm,
    torch.einsum: _of_einsum,
    F.linear: _of_linear,
}
