"""Routes of n:m layouts that need no kernel: softmax of a row's entries, indexing."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparse_layouts.dispatch import route
from sparse_layouts.layout_autograd import aligned, values_of, with_values
from sparse_layouts.layout_routes import if_taken, log_softmax_of_entries, softmax_of_entries
from sparse_layouts.nm_fragments import ROWS
from sparse_layouts.nm_packing import pack_positions
from sparse_layouts.nm_tensor import NMTensor


def along_groups(input: NMTensor, dim: int, dtype: torch.dtype | None = None) -> bool:
    """Whether a softmax is over the entries of rows of groups, which are equally many."""
    dims = input.dim()
    return input.stored_values is not None and dim in (input.axis, input.axis + dims)


@route(torch.softmax, input=NMTensor, uses=if_taken(along_groups))
def softmax_of_groups(input: NMTensor, dim: int, dtype: torch.dtype | None = None) -> Any:
    """`torch.softmax(w, dim)` over the stored entries, in the layout: along the groups torch's own
    on the values; along the other dimension dense inside.
    """
    if not along_groups(input, dim):
        return softmax_of_entries(input, dim, dtype)
    found = with_values(input.in_order(ROWS), torch.softmax(input.values(), -1, dtype=dtype))
    return aligned(found, input)


@route(torch.log_softmax, input=NMTensor, uses=if_taken(along_groups))
def log_softmax_of_groups(input: NMTensor, dim: int, dtype: torch.dtype | None = None) -> Any:
    """`torch.log_softmax(w, dim)`, likewise."""
    if not along_groups(input, dim):
        return log_softmax_of_entries(input, dim, dtype)
    found = with_values(input.in_order(ROWS), torch.log_softmax(input.values(), -1, dtype=dtype))
    return aligned(found, input)


Cuts = tuple[tuple[Any, ...], slice, slice]


def cuts(input: NMTensor, index: Any) -> Cuts | None:
    """How `w[index]` cuts the leading dimensions, the rows of groups and the groups; None for an
    index that leaves no n:m layout.
    """
    with torch._C.DisableTorchFunctionSubclass():
        dims = input.dim()
    index = index if isinstance(index, tuple) else (index,)
    plain = all(
        i is Ellipsis or isinstance(i, slice) or (isinstance(i, int) and not isinstance(i, bool))
        for i in index
    )
    if not plain:
        return None
    given = [i for i in index if i is not Ellipsis]
    if len(given) > dims or len(index) - len(given) > 1:
        return None
    at = index.index(Ellipsis) if Ellipsis in index else len(index)
    fill = [slice(None)] * (dims - len(given))
    index = (*index[:at], *fill, *index[at + 1 :])
    *lead, first, second = index
    rows, columns = (first, second) if input.axis == -1 else (second, first)
    if not isinstance(rows, slice) or not isinstance(columns, slice):
        return None
    start, stop, step = columns.indices(input.columns)
    stop = max(start, stop)
    if step != 1 or start % input.m or stop % input.m:
        return None
    return tuple(lead), rows, slice(start // input.m * input.n, stop // input.m * input.n)


@route(
    torch.Tensor.__getitem__,
    input=NMTensor,
    uses=if_taken(lambda input, index: cuts(input, index) is not None),
)
def select_entries(input: NMTensor, index: Any) -> Any:
    """`w[h]`, `w[:, 0:64]`: heads, samples, rows, and columns cut where groups end; any other index
    is dense. The result is a copy: writing to it does not change w, write to `w.values()` instead.
    """
    found = cuts(input, index)
    if found is None:
        return NotImplemented
    lead, rows, entries = found
    input = input.in_order(ROWS)
    batch = len(lead) - input.lead_dims
    own = (*lead[batch:], rows)
    indices = input.inner_indices.view(*input.lead, *input.inner_indices.shape[1:])[own]
    if entries != slice(0, input.entries):
        indices = pack_positions(input.positions()[own][..., entries], input.m)
    *left, height, words = indices.shape
    cut: dict[str, Any] = {
        "n": input.n,
        "m": input.m,
        "columns": (entries.stop - entries.start) // input.n * input.m,
        "lead": tuple(left),
        "axis": input.axis,
    }
    indices = indices.clone().view(math.prod(left), height, words)
    if input.inner_values is None:
        return NMTensor.on_indices(None, indices, **cut)
    values: Tensor = values_of(input)[(*lead, rows, entries)].clone()
    return with_values(NMTensor.on_indices(values.detach(), indices, **cut), values)
