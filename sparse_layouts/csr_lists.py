"""The lists of a compressed matrix: rows of entries, the other compression, dense and back.

`crow_indices` (M + 1,) and `col_indices` (S,), both int32 or both int64, columns ascending within a
row, as in `torch.sparse_csr`. Nothing here waits for a GPU, but for :func:`first_fault`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_layouts.derived import derived

Shape = tuple[int, int]


def is_plain(lists: Tensor) -> bool:
    """Whether nobody traces or captures, so that something may be learnt of the lists and kept."""
    return (
        not torch.compiler.is_compiling()
        and type(lists) is Tensor
        and lists.device.type != "meta"
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
        and not (lists.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def entry_rows(crow_indices: Tensor, num_entries: int) -> Tensor:
    """int64 (S,): the row of every entry; no host sync."""
    counts = crow_indices.diff().long()
    rows = torch.arange(counts.shape[0], device=counts.device)
    return rows.repeat_interleave(counts, output_size=num_entries)


def transposed_lists(
    crow_indices: Tensor, col_indices: Tensor, shape: Shape
) -> tuple[Tensor, Tensor, Tensor]:
    """The other compression of an (M, K) matrix: `(ccol_indices (K + 1,), row_indices (S,),
    permutation (S,))`, in the lists' dtype.

    Entry t of the other compression is entry `permutation[t]` of this one; rows are ascending
    within a column. Made once for a pattern and kept with it; no host sync.
    """
    return derived(
        (crow_indices, col_indices),
        ("transposed_lists", shape),
        lambda: _transposed(crow_indices, col_indices, shape),
    )


def _transposed(crow: Tensor, col: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    size = col.shape[0]
    if col.device.type == "cpu" and size:
        import scipy.sparse  # 100 ms, so not when the library is imported

        # scipy's counting sort: several times faster than a stable torch.argsort here
        number = torch.arange(size, dtype=col.dtype)
        made = scipy.sparse.csr_array((number.numpy(), col.numpy(), crow.numpy()), shape).tocsc()
        lists = (made.indptr, made.indices, made.data)
        return tuple(torch.from_numpy(t).to(col.dtype) for t in lists)  # type: ignore[return-value]
    order = torch.argsort(col, stable=True)
    edges = torch.arange(shape[1] + 1, dtype=col.dtype, device=col.device)
    ccol = torch.searchsorted(col[order], edges, out_int32=col.dtype == torch.int32)
    return ccol, entry_rows(crow, size)[order].to(col.dtype), order.to(col.dtype)


def transposed_slots(crow_indices: Tensor, col_indices: Tensor, shape: Shape) -> Tensor:
    """(S,) in the lists' dtype: where each entry lies in the other compression, the inverse of
    :func:`transposed_lists`' permutation; kept as that is.
    """

    def build() -> Tensor:
        order = transposed_lists(crow_indices, col_indices, shape)[2]
        number = torch.arange(order.shape[0], dtype=order.dtype, device=order.device)
        return torch.empty_like(order).index_copy_(0, order.long(), number)

    return derived((crow_indices, col_indices), ("transposed_slots", shape), build)


def places(crow_indices: Tensor, col_indices: Tensor, shape: Shape) -> Tensor:
    """int64 (S,): `row * K + column` of every entry."""
    return entry_rows(crow_indices, col_indices.shape[0]) * shape[1] + col_indices


def densify(values: Tensor, crow_indices: Tensor, col_indices: Tensor, shape: Shape) -> Tensor:
    """The matrices (B, M, K) of values (B, S); differentiable."""
    out = values.new_zeros(values.shape[0], shape[0] * shape[1])
    where = places(crow_indices, col_indices, shape)
    return out.index_copy(1, where, values).view(values.shape[0], *shape)


def gather(dense: Tensor, crow_indices: Tensor, col_indices: Tensor) -> Tensor:
    """The entries (*batch, S) of `dense` (*batch, M, K) that the lists store; differentiable."""
    shape = (dense.shape[-2], dense.shape[-1])
    if dense.is_contiguous():
        where = places(crow_indices, col_indices, shape)
        return dense.flatten(-2).index_select(-1, where)
    rows = entry_rows(crow_indices, col_indices.shape[0])
    return dense[..., rows, col_indices.long()]


def first_fault(crow_indices: Tensor, col_indices: Tensor, columns: int) -> str | None:
    """What is wrong with the contents of lists of fitting sizes, None if nothing is; one host
    sync.
    """
    crow, col = crow_indices, col_indices
    size = col.shape[0]
    steps = crow.diff()
    # An entry starts a row where some row's offset points at it; all others must ascend.
    starts = torch.zeros(size + 1, dtype=torch.bool, device=crow.device)
    starts[crow.long().clamp(0, size)] = True
    rising = (col[1:] > col[:-1]) | starts[1:-1] if size else starts[:0]
    equal = (col[1:] == col[:-1]) & ~starts[1:-1] if size else starts[:0]
    faults = {
        "starts": crow[0] != 0,
        "ends": crow[-1] != size,
        "falls": (steps < 0).any(),
        "range": ((col < 0) | (col >= columns)).any(),
        "twice": equal.any(),
        "order": ~rising.all(),
    }
    found = torch.stack(list(faults.values())).tolist()
    if not any(found):
        return None
    return next(name for name, is_wrong in zip(faults, found, strict=True) if is_wrong)
