"""What the tests of conversions share: targets, random matrices, other libraries' forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import scipy.sparse
import torch
from torch import Tensor

import sparse_layouts as sl

F64 = torch.float64
TORCH_FORMS = ("coo", "csr", "csc", "bsr", "bsc")
SCIPY_FORMS = ("csr", "csc", "coo", "bsr", "dia", "dok", "lil")


def fitting_block(shape: Any) -> tuple[int, int]:
    """Edges that divide a matrix."""
    m, n = (next(d for d in (4, 3, 2, 1) if size % d == 0) for size in shape[-2:])
    return m, n


def fitting_m(shape: Any) -> int:
    """An m that divides the rows, or one that does not, where none from 2 to 16 does."""
    return next((m for m in (4, 5, 3, 2) if shape[-1] % m == 0), 4)


TARGETS: dict[str, Callable[[Any, Any], Any]] = {
    "bsr": lambda x, shape: sl.bsr(x, fitting_block(shape)),
    "csr": lambda x, _: sl.csr(x),
    "csc": lambda x, _: sl.csc(x),
    "nm": lambda x, shape: sl.nm(x, 1, fitting_m(shape)),
    "grouped_nm": lambda x, _: sl.grouped_nm(x, 1, 2, 3),
}
CLASSES = {
    "bsr": sl.BSRTensor,
    "csr": sl.CSRTensor,
    "csc": sl.CSCTensor,
    "nm": sl.NMTensor,
    "grouped_nm": sl.GroupedNMTensor,
}
EXACT = ("bsr", "csr", "csc")  # keep all that is stored


def random_matrix(m: int = 24, n: int = 40, dtype: torch.dtype = torch.float32) -> Tensor:
    """About a third of the entries, one row and one column empty."""
    dense = torch.randn(m, n, dtype=F64).to(dtype) * (torch.rand(m, n) < 0.3)
    dense[5], dense[:, 7] = 0, 0
    return dense


def torch_form(dense: Tensor, form: str, block: tuple[int, int] = (4, 8)) -> Tensor:
    if form == "coo":
        return dense.to_sparse()
    return getattr(dense, f"to_sparse_{form}")(*((block,) if form in ("bsr", "bsc") else ()))


def scipy_blocks(dense: Tensor, block: tuple[int, int] = (4, 8)) -> Any:
    made = scipy.sparse.bsr_array(dense.numpy(), blocksize=block)
    made.sort_indices()  # scipy lists a row's blocks as it meets them
    return made


def address(array: Any) -> int:
    return array.data_ptr() if isinstance(array, Tensor) else array.ctypes.data


def stacked(convert: Callable[[Any], Tensor], made: Any, lead: Any) -> Tensor:
    if not lead:
        return convert(made)
    return torch.stack([stacked(convert, one, lead[1:]) for one in made])


def check_other_forms(w: sl.LayoutTensor) -> None:
    dense, lead = w.to_dense(), w.shape[:-2]
    if 0 in lead:
        assert w.to_scipy() == w.to_torch_sparse() == []
        return
    wide = dense.float() if dense.dtype in (torch.bfloat16, torch.float16) else dense
    in_scipy = stacked(lambda one: torch.from_numpy(one.toarray()), w.to_scipy(), lead)
    assert in_scipy.dtype == wide.dtype
    assert torch.equal(in_scipy, wide)
    in_torch = stacked(lambda one: one.to_dense(), w.to_torch_sparse(), lead)
    assert in_torch.dtype == dense.dtype
    assert torch.equal(in_torch, dense)
