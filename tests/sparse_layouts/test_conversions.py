"""From every layout to every other, and back: entries, masks, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sparse_layouts as sl
from sparse_layouts.entry_lists import entries_of, lead_of
from sparse_layouts.layout_autograd import with_values
from tests.sparse_layouts.conftest import DiagonalTensor
from tests.sparse_layouts.conversion_cases import (
    CLASSES,
    EXACT,
    F64,
    TARGETS,
    check_other_forms,
    fitting_m,
    random_matrix,
)
from tests.sparse_layouts.user_csc import CscTensor

pytestmark = pytest.mark.filterwarnings("ignore:Sparse")

# --- any layout to any other ----------------------------------------------------------------------


@pytest.mark.parametrize("target", EXACT)
def test_every_layout_to_every_other_and_back(layout: sl.LayoutTensor, target: str) -> None:
    dense = layout.to_dense()
    if target != "bsr" and lead_of(layout):
        with pytest.raises(ValueError, match="convert each one for itself"):
            TARGETS[target](layout, layout.shape)
        return
    made = TARGETS[target](layout, layout.shape)
    made.validate()
    assert isinstance(made, CLASSES[target])
    assert (made.dtype, made.shape) == (layout.dtype, layout.shape)
    assert torch.equal(made.to_dense(), dense)
    for back in ("csr", "csc", "bsr"):
        if back == "bsr" or not lead_of(made):
            assert torch.equal(TARGETS[back](made, made.shape).to_dense(), dense)


@pytest.mark.parametrize("target", ["nm", "grouped_nm"])
def test_n_of_m_of_a_layout_is_that_of_its_matrix(layout: sl.LayoutTensor, target: str) -> None:
    def outcome(source: Tensor) -> Any:
        try:
            return TARGETS[target](source, layout.shape)
        except ValueError as error:
            return str(error)

    made, expected = outcome(layout), outcome(layout.to_dense())
    if isinstance(expected, str):  # three dimensions, or a length that m does not divide
        assert made == expected
        return
    made.validate()
    assert torch.equal(made.to_dense(), expected.to_dense())


def test_every_stored_entry_is_listed_once_and_in_order(layout: sl.LayoutTensor) -> None:
    entries = entries_of(layout)
    m, n = entries.shape
    stored = torch.ones_like(layout.to_dense()).sparse_mask(layout).to_dense() != 0
    batch = layout.dim() - layout.pattern_dims
    if 0 not in layout.shape[:batch]:
        one = stored[(0,) * batch].flatten(0, -2)
        assert torch.equal(torch.stack([entries.rows, entries.columns], 1), one.nonzero())
    assert (m, n) == layout.shape[-2:]


def test_masks_become_masks(mask: sl.LayoutTensor) -> None:
    dense = mask.to_dense()
    counted = getattr(getattr(mask, "block_pattern", None), "block_counts", None) is not None
    if counted:
        for convert in (lambda: sl.mask_from(mask, 7), lambda: sl.csr(mask)):
            if not (convert.__code__.co_names[1] == "csr" and lead_of(mask)):
                with pytest.raises(ValueError, match=r"counts blocks(.|\n)*without_counts"):
                    convert()
        mask = sl.without_counts(mask)
    for block in (1, 7, (4, 8), (5, 33)):
        made, expected = sl.mask_from(mask, block), sl.mask_from(dense, block)
        made.validate()
        assert made.dtype == torch.bool
        assert made.is_mask
        assert torch.equal(made.to_dense(), dense)
        assert made.nnz == mask.nnz
        # the lists and tiles, too; only equal heads of what is not on blocks are not looked for
        assert made is mask or made.same_pattern(expected)
    for make in (sl.csr, sl.csc):
        if lead_of(mask):
            with pytest.raises(ValueError, match="convert each one for itself"):
                make(mask)
            continue
        listed = make(mask)
        listed.validate()
        assert listed.is_mask
        assert torch.equal(listed.to_dense(), dense)


class DiagonalsTensor(sl.LayoutTensor):
    """A user's own layout of several matrices, that knows its dense form alone."""

    fields = ("entries",)

    def to_dense_entries(self) -> Tensor:
        return torch.diag_embed(self.inner_entries)


def test_a_users_own_layout_of_several_matrices() -> None:
    entries = torch.randn(3, 8, dtype=F64)
    entries[1, 2] = 0
    w = DiagonalsTensor(entries, shape=(3, 8, 8))
    check_other_forms(w)
    w = w.requires_grad_()
    made = sl.bsr(w, 2)
    made.validate()
    assert torch.equal(made.to_dense(), w.to_dense())
    assert made.block_pattern.num_blocks == 3 * 4
    made.to_dense().sum().backward()
    assert type(w.grad) is DiagonalsTensor
    assert torch.equal(w.grad.inner_entries, torch.ones_like(entries))
    with pytest.raises(ValueError, match="convert each one for itself"):
        sl.csr(w)
    kept = DiagonalsTensor(entries != 0, shape=(3, 8, 8))  # its values are bool
    assert torch.equal(sl.mask_from(kept, 4).to_dense(), kept.to_dense())
    with pytest.raises(TypeError, match="got a bool tensor"):
        sl.bsr(kept, 2)
    with pytest.raises(TypeError, match="expected values, got bool"):
        sl.csr(DiagonalsTensor(entries[0] != 0, shape=(8, 8)))


def test_equal_heads_stay_one_pattern() -> None:
    mask = sl.bsr_mask((torch.rand(2, 6, 5) < 0.5)[[0, 1, 0]], (4, 8))
    made = sl.mask_from(mask, (8, 4))
    assert made.block_pattern.num_patterns == 2
    assert torch.equal(made.to_dense(), mask.to_dense())


def test_what_has_the_form_already_is_returned() -> None:
    w = sl.bsr(random_matrix(), 8)
    for same in (sl.bsr(w), sl.bsr(w, 8), sl.bsr(w, (8, 8))):
        assert same is w
    scores = torch.randn(30, 30).sparse_mask(sl.causal(30, block_size=8))
    assert sl.bsr(scores, 8) is scores
    for make in (sl.csr, sl.csc):
        assert make(make(w)) is not w
        listed = make(w)
        assert make(listed) is listed
    bird = sl.bigbird(40, block_size=4, num_random_blocks=2, source="hf-eval")
    assert sl.mask_from(bird, 4) is bird
    assert sl.mask_from(w.pattern, 8).block_size == (8, 8)


def test_stored_zeros_stay_stored() -> None:
    w = sl.csr([0, 2, 2], [1, 3], torch.tensor([0.0, 2.0]), shape=(2, 4))
    assert sl.csc(w).nnz == sl.csr(w.to_scipy()).nnz == sl.csr(w.to_torch_sparse()).nnz == 2
    assert sl.bsr(w, (2, 2)).col_indices().tolist() == [0, 1]
    assert sl.csr(sl.bsr(w, (2, 2))).nnz == 8
    # a dense matrix has no stored zeros
    assert sl.csr(w.to_dense()).nnz == 1
    assert sl.bsr(w.to_dense(), (2, 2)).col_indices().tolist() == [1]


def test_nan_and_inf_pass() -> None:
    dense = random_matrix()
    dense[0, 0], dense[1, 39], dense[23, 0] = torch.nan, torch.inf, -torch.inf
    for source in (sl.bsr(dense, 8), sl.csr(dense), sl.csc(dense)):
        for target in EXACT:
            made = TARGETS[target](source, dense.shape).to_dense()
            torch.testing.assert_close(made, dense, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int32, torch.complex64])
def test_dtypes_stay(dtype: torch.dtype) -> None:
    dense = random_matrix(dtype=dtype)
    for source in (sl.bsr(dense, 8), sl.csr(dense), dense.to_sparse_bsr((4, 8)), dense.to_sparse()):
        for target in EXACT:
            made = TARGETS[target](source, dense.shape)
            assert made.dtype == dtype
            assert torch.equal(made.to_dense(), dense)


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_gradients_come_back_in_the_layout_of_the_source(
    one_layout: sl.LayoutTensor, target: str
) -> None:
    if target == "nm" and one_layout.shape[-1] % fitting_m(one_layout.shape):
        pytest.skip("no m divides the rows")
    w = one_layout.detach().requires_grad_()
    made = TARGETS[target](w, w.shape)
    weight = torch.randn(*w.shape, dtype=w.dtype)
    (made.to_dense() * weight).sum().backward()
    assert type(w.grad) is type(w)
    assert w.grad.same_pattern(w)
    kept = made.detach().pattern.to_dense() if hasattr(made, "pattern") else made.to_dense() != 0
    expected = (weight * kept).sparse_mask(w)
    assert torch.equal(w.grad.to_dense(), expected.to_dense())


SMALL: dict[str, Callable[[Tensor], sl.LayoutTensor]] = {
    "bsr": lambda x: sl.bsr(x, (2, 3)),
    "bsr.mT": lambda x: sl.bsr(x.mT, (3, 2)).mT,
    "partial": lambda x: x.sparse_mask(sl.mask_from(x != 0, (2, 3))),
    "csr": sl.csr,
    "csc": sl.csc,
    "nm": lambda x: sl.nm(x, 1, 3),
    "nm.mT": lambda x: sl.nm(x.mT, 1, 2).mT,
    "grouped_nm": lambda x: sl.grouped_nm(x, 1, 2, 2),
    "diagonal": lambda x: DiagonalTensor.from_dense(x[:, :4]),
    "user": CscTensor.from_dense,
}


@pytest.mark.parametrize("target", EXACT)
@pytest.mark.parametrize("source", SMALL)
def test_gradcheck(source: str, target: str) -> None:
    dense = torch.randn(4, 6, dtype=F64) * (torch.rand(4, 6) < 0.3)
    dense[:2, :3] = 0
    like = SMALL[source](dense)
    values = like.stored_values.clone().requires_grad_()

    def converted(v: Tensor) -> Tensor:
        made = TARGETS[target](with_values(like, v), like.shape)
        return made.to_dense() ** 2

    assert torch.autograd.gradcheck(converted, values)
    assert torch.autograd.gradgradcheck(converted, values, fast_mode=True)


@pytest.mark.parametrize("target", TARGETS)
def test_a_batch_and_heads_have_gradients_too(target: str) -> None:
    mask = sl.bsr((torch.rand(24, 40) < 0.2).double(), 4).pattern
    w = torch.randn(2, 24, 40, dtype=F64).sparse_mask(mask).requires_grad_()
    if target == "grouped_nm":
        with pytest.raises(ValueError, match="convert each matrix for itself"):
            TARGETS[target](w, w.shape)
        return
    made = sl.bsr(w, 8) if target == "bsr" else TARGETS[target](w, w.shape)
    made.to_dense().sum().backward()
    if target in EXACT:
        assert torch.equal(w.grad.to_dense(), mask.to_dense().double().expand(2, 24, 40))
    heads = sl.bsr(torch.randn(3, 24, 40, dtype=F64), 4).requires_grad_()
    sl.bsr(heads, 8).to_dense().sum().backward()
    assert torch.equal(heads.grad.to_dense(), torch.ones(3, 24, 40, dtype=F64))


# --- a GPU ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("target", EXACT)
@pytest.mark.parametrize("source", SMALL)
def test_a_gpu_converts_as_the_cpu_does(source: str, target: str) -> None:
    if source == "user":
        pytest.skip("README's layout is made by scipy, on the CPU")
    w = SMALL[source](random_matrix(24, 42, F64))
    expected = TARGETS[target](w, w.shape)
    made = TARGETS[target](w.cuda().requires_grad_(), w.shape)
    assert made.device.type == "cuda"
    assert made.detach().cpu().same_pattern(expected)
    assert torch.equal(made.detach().to_dense().cpu(), expected.to_dense())
    listed = sl.csr(w).pattern if source != "diagonal" else sl.csr(sl.bsr(w, 1)).pattern
    mask = sl.mask_from(listed.cuda(), (5, 7))
    assert mask.cpu().same_pattern(sl.mask_from(listed, (5, 7)))
    again = sl.csr if target in ("csr", "csc") else sl.bsr
    in_torch = again(made.detach().to_torch_sparse())
    assert in_torch.device.type == "cuda"
    assert torch.equal(in_torch.to_dense().cpu(), expected.to_dense())
