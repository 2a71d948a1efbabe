"""From scipy's matrices, torch's sparse tensors and numpy arrays, and to them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparse_layouts as sl
from tests.sparse_layouts.conversion_cases import (
    F64,
    SCIPY_FORMS,
    TARGETS,
    TORCH_FORMS,
    check_other_forms,
    random_matrix,
    torch_form,
)

pytestmark = pytest.mark.filterwarnings("ignore:Sparse")

# --- to scipy and to torch.sparse -----------------------------------------------------------------


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
