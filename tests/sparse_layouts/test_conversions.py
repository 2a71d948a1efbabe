"""From every layout to every other, to scipy and torch.sparse, and back; what shares memory."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import sparse_layouts as sl
from sparse_layouts.entry_lists import entries_of, lead_of
from sparse_layouts.layout_autograd import with_values
from tests.sparse_layouts.conftest import DiagonalTensor
from tests.sparse_layouts.user_csc import CscTensor

pytestmark = pytest.mark.filterwarnings("ignore:Sparse")

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


# --- to scipy and to torch.sparse -----------------------------------------------------------------


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


def test_every_layout_goes_to_scipy_and_torch(layout: sl.LayoutTensor) -> None:
    check_other_forms(layout)


def test_every_mask_goes_to_scipy_and_torch(mask: sl.LayoutTensor) -> None:
    check_other_forms(mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_scipy_gets_float32_for_what_it_lacks(one_layout: sl.LayoutTensor, dtype: Any) -> None:
    w = one_layout.to(dtype)
    check_other_forms(w.requires_grad_())


@pytest.mark.parametrize("make", [lambda x: sl.bsr(x, 2), sl.csr, sl.csc])
def test_a_dtype_that_scipy_lacks_is_refused(make: Any) -> None:
    w = make(torch.eye(4)).to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"to_scipy: expected a dtype that scipy has.*w\.float\(\)"):
        w.to_scipy()


def test_grouped_n_of_m_is_not_made_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    w = sl.grouped_nm(torch.randn(10, 29), 1, 3, 3)
    dense = w.to_dense()
    monkeypatch.setattr(sl.GroupedNMTensor, "to_dense_entries", None)
    for one in (w, w.mT):
        made = one.to_scipy()
        assert made.format == "csr"
        assert made.nnz == w.nnz
        assert one.to_torch_sparse()._nnz() == w.nnz
    assert np.array_equal(w.to_scipy().toarray(), dense.numpy())
    assert torch.equal(sl.csc(w.mT).T.to_torch_sparse().to_dense(), dense)


def test_no_blocks_keep_their_size_in_scipy() -> None:
    w = sl.bsr(torch.zeros(24, 40), (4, 8))
    assert w.to_scipy().blocksize == (4, 8)
    assert sl.bsr(w.to_scipy()).block_size == (4, 8)
    assert sl.bsr(w.to_torch_sparse()).block_size == (4, 8)


# --- from scipy, torch.sparse and numpy -----------------------------------------------------------


@pytest.mark.parametrize("kind", ["array", "matrix"])
@pytest.mark.parametrize("form", SCIPY_FORMS)
@pytest.mark.parametrize("target", TARGETS)
def test_from_every_scipy_form(target: str, form: str, kind: str) -> None:
    dense = random_matrix()
    source = getattr(scipy.sparse, f"{form}_{kind}")(dense.numpy())
    made = TARGETS[target](source, dense.shape)
    made.validate()
    assert torch.equal(made.to_dense(), TARGETS[target](dense, dense.shape).to_dense())
    assert np.array_equal(source.toarray(), dense.numpy())  # the source is as it was


@pytest.mark.parametrize("form", TORCH_FORMS)
@pytest.mark.parametrize("target", TARGETS)
def test_from_every_form_of_torch(target: str, form: str) -> None:
    dense = random_matrix()
    made = TARGETS[target](torch_form(dense, form), dense.shape)
    made.validate()
    assert torch.equal(made.to_dense(), TARGETS[target](dense, dense.shape).to_dense())


@pytest.mark.parametrize("target", TARGETS)
def test_from_numpy(target: str) -> None:
    dense = random_matrix()
    made = TARGETS[target](dense.numpy(), dense.shape)
    assert torch.equal(made.to_dense(), TARGETS[target](dense, dense.shape).to_dense())


@pytest.mark.parametrize("form", TORCH_FORMS)
def test_masks_from_torch_scipy_and_numpy(form: str) -> None:
    dense = random_matrix(21, 30) != 0
    dense[0, 0] = True
    block = (3, 5)
    expected = sl.mask_from(dense, 8)
    listed = torch_form(dense, form, block)
    kept = torch.rand(listed.values().shape) < 0.5
    listed.values().logical_and_(kept)  # a stored False is False
    for source in (torch_form(dense, form, block), listed):
        made = sl.mask_from(source, 8)
        made.validate()
        assert torch.equal(made.to_dense(), source.to_dense())
    assert sl.mask_from(torch_form(dense, form, block), 8).same_pattern(expected)
    assert sl.mask_from(dense.numpy(), 8).same_pattern(expected)


@pytest.mark.parametrize("form", SCIPY_FORMS)
def test_masks_from_scipy(form: str) -> None:
    dense = random_matrix(21, 30) != 0
    dense[:, 20:] = True
    source = getattr(scipy.sparse, f"{form}_array")(dense.numpy())
    made = sl.mask_from(source, 8)
    made.validate()
    assert made.same_pattern(sl.mask_from(dense, 8))
    twice = scipy.sparse.coo_array((np.array([True, True, False]), ([0, 0, 1], [1, 1, 0])), (2, 2))
    assert sl.mask_from(twice, 2).to_dense().tolist() == [[False, True], [False, False]]


def test_the_matrices_of_a_file(tmp_path: Any) -> None:
    path = tmp_path / "small.smtx"
    path.write_text("4, 6, 4\n0 2 2 3 4\n1 4 0 5\n")
    w = sl.load_smtx(path)
    assert torch.equal(sl.bsr(w, 2).to_dense(), w.to_dense())
    assert torch.equal(sl.mask_from(w.pattern, 4).to_dense(), w.to_dense() != 0)
    with pytest.raises(TypeError, match=r"got CSRTensor.*w\.pattern is the mask"):
        sl.mask_from(w, 4)


@pytest.mark.parametrize("own", [(4, 8), (8, 8), (1, 1)])
@pytest.mark.parametrize("form", ["scipy", "bsr", "bsc"])
def test_blocks_of_another_size_are_cut_anew(form: str, own: tuple[int, int]) -> None:
    dense = random_matrix()
    if form == "scipy":
        source: Any = scipy.sparse.bsr_array(dense.numpy(), blocksize=own)
    else:
        source = torch_form(dense, form, own)
    assert sl.bsr(source).block_size == own
    for block in (own, (2, 4), (24, 40)):
        made = sl.bsr(source, block)
        made.validate()
        assert made.block_size == block
        assert torch.equal(made.to_dense(), dense)


def test_scipy_blocks_that_are_not_sorted_or_come_twice() -> None:
    data = np.arange(12.0).reshape(3, 2, 2)
    source = scipy.sparse.bsr_array((data, np.array([1, 0, 1]), np.array([0, 3, 3])), shape=(4, 4))
    made = sl.bsr(source)
    made.validate()
    assert made.col_indices().tolist() == [0, 1]
    assert np.array_equal(made.to_dense().numpy(), source.toarray())
    assert source.indices.tolist() == [1, 0, 1]


@given(st.data())
def test_random_matrices(data: Any) -> None:
    bm, bn = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    mb, nb = data.draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
    m, n = bm * mb, bn * nb
    places = data.draw(st.lists(st.integers(0, max(m * n - 1, 0)), unique=True, max_size=20))
    dense = torch.zeros(m * n, dtype=F64)
    if m * n:
        dense[places] = torch.arange(1.0, len(places) + 1, dtype=F64)
    dense = dense.view(m, n)
    sources = [sl.csr(dense), sl.csc(dense), sl.bsr(dense, (bm, bn)), sl.bsr(dense.mT, (bn, bm)).mT]
    sources += [scipy.sparse.coo_array(dense.numpy()), dense.to_sparse()]
    for source in sources:
        for made in (sl.csr(source), sl.csc(source), sl.bsr(source, (bm, bn)), sl.bsr(source, 1)):
            made.validate()
            assert torch.equal(made.to_dense(), dense)
            assert np.array_equal(made.to_scipy().toarray(), dense.numpy())
            assert torch.equal(made.to_torch_sparse().to_dense(), dense)
    edges = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 40)))
    for listed in (sl.csr(dense).pattern, sl.csc(dense).pattern, sl.mask_from(dense != 0, 3)):
        made = sl.mask_from(listed, edges)
        made.validate()
        assert made.same_pattern(sl.mask_from(dense != 0, edges))


# --- what shares memory: every line of the table --------------------------------------------------

NO_COPY: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Any]]] = {
    "scipy csr -> sl.csr": (lambda x: scipy.sparse.csr_array(x.numpy()), sl.csr),
    "scipy csc -> sl.csc": (lambda x: scipy.sparse.csc_array(x.numpy()), sl.csc),
    "scipy bsr -> sl.bsr": (lambda x: scipy_blocks(x), sl.bsr),
    "torch csr -> sl.csr": (Tensor.to_sparse_csr, sl.csr),
    "torch csc -> sl.csc": (Tensor.to_sparse_csc, sl.csc),
    "torch bsr -> sl.bsr": (lambda x: x.to_sparse_bsr((4, 8)), sl.bsr),
    "torch bsc -> sl.bsr": (lambda x: x.to_sparse_bsc((4, 8)), sl.bsr),
    "sl.csr -> scipy": (sl.csr, lambda w: w.to_scipy()),
    "sl.csc -> scipy": (sl.csc, lambda w: w.to_scipy()),
    "sl.bsr -> scipy": (lambda x: sl.bsr(x, (4, 8)), lambda w: w.to_scipy()),
    "sl.csr -> torch": (sl.csr, lambda w: w.to_torch_sparse()),
    "sl.csc -> torch": (sl.csc, lambda w: w.to_torch_sparse()),
    "sl.bsr -> torch": (lambda x: sl.bsr(x, (4, 8)), lambda w: w.to_torch_sparse()),
    "sl.csr -> mT": (sl.csr, lambda w: w.mT),
    "sl.csc -> mT": (sl.csc, lambda w: w.mT),
    "sl.bsr -> mT": (lambda x: sl.bsr(x, (4, 8)), lambda w: w.mT),
    "sl.nm -> mT": (lambda x: sl.nm(x, 2, 4), lambda w: w.mT),
    "sl.grouped_nm -> mT": (lambda x: sl.grouped_nm(x, 2, 4, 2), lambda w: w.mT),
}
COPY: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Any]]] = {
    "dense -> sl.csr": (lambda x: x, sl.csr),
    "dense -> sl.bsr": (lambda x: x, lambda x: sl.bsr(x, (24, 40))),
    "scipy csr -> sl.csc": (lambda x: scipy.sparse.csr_array(x.numpy()), sl.csc),
    "scipy csr -> sl.bsr": (
        lambda x: scipy.sparse.csr_array(x.numpy()),
        lambda x: sl.bsr(x, (4, 8)),
    ),
    "torch bsr -> sl.csr": (lambda x: x.to_sparse_bsr((4, 8)), sl.csr),
    "sl.csr -> sl.csc": (sl.csr, sl.csc),
    "sl.csr -> sl.bsr": (sl.csr, lambda w: sl.bsr(w, (4, 8))),
    "sl.bsr -> sl.csr": (lambda x: sl.bsr(x, (4, 8)), sl.csr),
    "sl.nm -> scipy": (lambda x: sl.nm(x, 2, 4), lambda w: w.to_scipy()),
    "sl.grouped_nm -> scipy": (lambda x: sl.grouped_nm(x, 2, 4, 2), lambda w: w.to_scipy()),
}


def values_at(x: Any) -> int:
    if isinstance(x, sl.LayoutTensor):
        return address(x.stored_values)
    if isinstance(x, Tensor):
        return address(x if x.layout == torch.strided else x.values())
    return address(x.data)


def as_dense(x: Any) -> Tensor:
    return x.to_dense() if isinstance(x, Tensor) else torch.from_numpy(x.toarray())


@pytest.mark.parametrize("name", NO_COPY)
def test_values_are_shared(name: str) -> None:
    start, convert = NO_COPY[name]
    source = start(random_matrix())
    made = convert(source)
    expected = as_dense(source).mT if name.endswith("mT") else as_dense(source)
    assert torch.equal(as_dense(made), expected)
    assert values_at(made) == values_at(source)
    if isinstance(made, sl.LayoutTensor):  # writing shows on the other side
        made.mul_(2)
        twice = as_dense(source).mT if name.endswith("mT") else as_dense(source)
        assert torch.equal(twice, 2 * expected)


@pytest.mark.parametrize("name", COPY)
def test_values_are_not_shared(name: str) -> None:
    start, convert = COPY[name]
    source = start(random_matrix())
    made = convert(source)
    before = as_dense(source).clone()
    assert torch.equal(as_dense(made), as_dense(source))
    assert values_at(made) != values_at(source)
    if isinstance(made, sl.LayoutTensor):
        made.mul_(2)
    else:
        made.data *= 2
    assert torch.equal(as_dense(source), before)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_lists_are_shared(index: torch.dtype) -> None:
    dense = random_matrix()
    source = sl.csr(dense)
    source = source.map_inner(lambda t: t.to(index), source.stored_values)
    for there in (source.to_scipy(), source.to_torch_sparse()):
        again = sl.csr(there)
        assert [t.data_ptr() for t in again.inner_tensors()] == [
            t.data_ptr() for t in source.inner_tensors()
        ]
    blocks = scipy_blocks(dense)
    made = sl.bsr(blocks)
    assert address(made.col_indices()) == address(blocks.indices)
    assert address(made.to_scipy().indices) == address(blocks.indices)


def test_blocks_in_another_order_are_copied_to_scipy() -> None:
    w = sl.bsr(random_matrix(), (4, 8)).mT
    assert values_at(w.to_scipy()) != values_at(w)
    assert np.array_equal(w.to_scipy().toarray(), w.to_dense().numpy())


@pytest.mark.parametrize("make", [sl.csr, sl.csc, sl.bsr], ids=["csr", "csc", "bsr"])
def test_read_only_values_are_copied(make: Any) -> None:
    form = make.__name__
    source = getattr(scipy.sparse, f"{form}_array")(random_matrix().numpy())
    before = source.toarray()
    source.data.flags.writeable = False
    made = make(source)
    made.mul_(2)
    assert np.array_equal(source.toarray(), before)


# --- nothing is made dense ------------------------------------------------------------------------

HUGE = """
    import resource, numpy as np, scipy.sparse, torch, sparse_layouts as sl

    size, block = 200_000, 32
    rng = np.random.default_rng(0)
    at = rng.integers(size, size=(2, 40))
    listed = scipy.sparse.coo_array((rng.random(40), tuple(at)), shape=(size, size))
    torch.ones(2, requires_grad=True).sum().backward()  # autograd's threads
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    # of a dense matrix not even its bits fit in
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))

    def check(found):
        found = scipy.sparse.csr_array(found)
        found.eliminate_zeros()
        assert found.shape == listed.shape
        assert abs(found - listed.tocsr()).max() == 0

    csr = sl.csr(listed)
    in_torch = csr.to_torch_sparse()
    sources = [csr, sl.csc(listed), sl.bsr(csr, block), csr.mT.mT, listed, csr.to_scipy(), in_torch]
    sources += [sl.csc(csr).to_scipy(), sl.bsr(csr, block).to_scipy(), in_torch.to_sparse()]
    sources += [sl.bsr(csr, block).to_torch_sparse()]
    for source in sources:
        for made in (sl.csr(source), sl.csc(source), sl.bsr(source, block), sl.bsr(source, 64)):
            check(made.to_scipy())
            torch_form = made.to_torch_sparse()
            assert torch_form.shape == made.shape
    w = csr.clone().requires_grad_()
    sl.bsr(sl.csc(w), block).values().sum().backward()
    assert w.grad.values().eq(1).all()
    for pattern in (csr.pattern, sl.csc(csr).pattern, sl.bsr(csr, 64).pattern):
        mask = sl.mask_from(pattern, block)
        assert mask.nnz == pattern.nnz
        assert sl.csr(mask).nnz == pattern.nnz
    assert sl.mask_from(listed.astype(bool), block).nnz == csr.nnz
    assert sl.mask_from(in_torch.to_sparse().bool(), block).nnz == csr.nnz
    try:
        csr.to_dense()
    except RuntimeError:
        print("ok")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc for its memory")
def test_a_matrix_that_would_not_fit_as_a_dense_one() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(HUGE)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "ok"


# --- what cannot be converted ---------------------------------------------------------------------

W = sl.csr(torch.eye(8))
WRONG: dict[str, tuple[Callable[[], Any], type, str]] = {
    "keep of a layout": (
        lambda: sl.bsr(W, 4, keep=sl.Magnitude(0.5)),
        ValueError,
        r"has chosen already: CSRTensor.*\(densify it first\)",
    ),
    "keep of scipy": (
        lambda: sl.bsr(scipy.sparse.eye_array(8), 4, keep=sl.Magnitude(0.5)),
        ValueError,
        r"has chosen already",
    ),
    "a mask layout as values": (lambda: sl.bsr(W.pattern, 4), TypeError, r"sl\.mask_from makes"),
    "a mask for n:m": (lambda: sl.nm(W.pattern, 2, 4), TypeError, r"got torch\.bool"),
    "a mask for n:m:g": (lambda: sl.grouped_nm(W.pattern, 2, 4, 1), TypeError, r"got torch\.bool"),
    "scipy bool as values": (
        lambda: sl.bsr(scipy.sparse.eye_array(8, dtype=bool), 4),
        TypeError,
        r"sl\.mask_from makes",
    ),
    "values as a mask": (
        lambda: sl.mask_from(W, 4),
        TypeError,
        r"expected a mask, got CSRTensor.*w\.pattern",
    ),
    "scipy values as a mask": (
        lambda: sl.mask_from(scipy.sparse.eye_array(8), 4),
        TypeError,
        r"got scipy's float64.*astype\(bool\)",
    ),
    "torch values as a mask": (
        lambda: sl.mask_from(torch.eye(8).to_sparse(), 4),
        TypeError,
        r"got torch\.float32 of torch\.sparse_coo.*sl\.csr\(x\)\.pattern",
    ),
    "a sparse batch as a mask": (
        lambda: sl.mask_from(torch.ones(2, 4, 4, dtype=torch.bool).to_sparse(), 4),
        ValueError,
        r"convert each sample for itself",
    ),
    "a scipy vector as a mask": (
        lambda: sl.mask_from(scipy.sparse.coo_array(np.ones(3, dtype=bool)), 4),
        ValueError,
        r"expected a matrix, got shape \(3,\)",
    ),
    "a scipy vector": (
        lambda: sl.bsr(scipy.sparse.coo_array(np.ones(3)), 1),
        ValueError,
        r"bsr: expected a matrix, got shape \(3,\)",
    ),
    "sizes that do not divide": (
        lambda: sl.bsr(W, 3),
        ValueError,
        r"does not divide the matrix \(8, 8\) of CSRTensor.*pad it to \(9, 9\).*resize\(\(9, 9\)\)",
    ),
    "sizes of scipy that do not divide": (
        lambda: sl.bsr(scipy.sparse.eye_array(8)),
        ValueError,
        r"\(32, 32\) does not divide the matrix \(8, 8\) of dia_array",
    ),
    "heads": (
        lambda: sl.csr(sl.nm(torch.randn(2, 4, 8), 2, 4)),
        ValueError,
        r"expected a matrix, got NMTensor.*convert each one for itself",
    ),
    "blocks of a layout": (
        lambda: sl.bsr_mask(W.pattern, 4),
        TypeError,
        r"got CSRTensor; sl\.mask_from takes a mask of entries",
    ),
    "blocks of torch": (
        lambda: sl.bsr_mask(torch.eye(4).bool().to_sparse(), 4),
        TypeError,
        r"a tensor of torch\.sparse_coo.*x\.to_dense\(\)",
    ),
    "a list for n:m:g": (lambda: sl.grouped_nm([[1.0]], 1, 2, 1), TypeError, r"got list"),
    "scipy numbers that torch lacks": (
        lambda: sl.bsr(scipy.sparse.csr_array(np.eye(4, dtype=np.longdouble)), 2),
        TypeError,
        r"bsr: expected an array of numbers, got numpy's",
    ),
    "torch gradient": (
        lambda: sl.bsr(torch.eye(4).to_sparse_csr().requires_grad_(), 2),
        ValueError,
        r"cannot be followed",
    ),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_what_cannot_be_converted(case: tuple[Callable[[], Any], type, str]) -> None:
    call, error, text = case
    with pytest.raises(error, match=f"(?s){text}"):
        call()


@pytest.mark.parametrize(
    ("crow", "col", "text"),
    [
        ([0, 2], [1, 0], r"expected ascending (columns|rows)"),
        ([0, 2], [0, 7], r"from 0 to 1"),
        ([0, 3], [0, 1], r"the last offset to be 2"),
        ([0, 2], [1, 1], r"once"),
    ],
)
@pytest.mark.parametrize("form", ["bsr", "bsc"])
def test_broken_lists_of_blocks(form: str, crow: Any, col: Any, text: str) -> None:
    make = torch.sparse_bsr_tensor if form == "bsr" else torch.sparse_bsc_tensor
    shape = (4, 8) if form == "bsr" else (8, 4)
    lists = (torch.tensor(crow), torch.tensor(col))
    broken = make(*lists, torch.ones(2, 4, 4), shape, check_invariants=False)
    with pytest.raises(ValueError, match=f"bsr: (col|crow|row|ccol)_indices: .*{text}"):
        sl.bsr(broken)


def test_a_device_is_where_the_result_goes() -> None:
    for source in (W, W.to_scipy(), W.to_torch_sparse()):
        assert sl.bsr(source, 4, device="meta").device.type == "meta"
    for source in (W.pattern, W.to_scipy().astype(bool)):
        assert sl.mask_from(source, 4, device="meta").device.type == "meta"
