"""`sl.nm`: which entries are chosen, the packed fields, conversions, indexing, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sparse_layouts as sl
from sparse_layouts import nm_factory
from sparse_layouts.nm_packing import pack_positions, unpack_positions

F64 = torch.float64
Check = Callable[..., None]
BETA = pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state")


def largest(dense: Tensor, n: int, m: int) -> Tensor:
    """bool: the n largest magnitudes of every m, the first of equals, as the definition says it."""
    groups = dense.abs().double().unflatten(-1, (-1, m))
    order = groups.argsort(stable=True, dim=-1, descending=True)[..., :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter(-1, order, True).flatten(-2)


@st.composite
def n_of_m(draw: st.DrawFn) -> tuple[int, int]:
    m = draw(st.integers(2, 16))
    return draw(st.integers(1, m - 1)), m


# --- what is chosen -------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(n_of_m(), st.integers(0, 5), st.integers(0, 37), st.booleans(), st.integers(0, 3))
def test_round_trip(
    nm: tuple[int, int], rows: int, groups: int, with_ties: bool, heads: int
) -> None:
    n, m = nm
    dense = torch.randn(*(heads,) * (heads > 0), rows, groups * m, dtype=F64)
    if with_ties:
        dense = dense.round()
    w = sl.nm(dense, n, m)
    w.validate()
    chosen = largest(dense, n, m)
    assert torch.equal(w.to_dense(), dense * chosen)
    assert torch.equal(w.pattern.to_dense(), chosen)
    assert torch.equal(w.mT.to_dense(), w.to_dense().mT)
    assert w.nnz == int(chosen.sum())
    assert torch.equal(dense.sparse_mask(w.pattern).values(), w.values())
    lead = dense.shape[:-1]
    assert torch.equal(dense.gather(-1, w.indices().long()), w.values())
    first = torch.arange(groups).repeat_interleave(n) * m
    assert torch.equal(w.indices(), (w.positions() + first).int())
    assert w.indices().shape == w.positions().shape == (*lead, groups * n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, F64])
def test_every_dtype(dtype: torch.dtype) -> None:
    dense = torch.randn(6, 32).to(dtype)
    dense[0, :4] = torch.tensor([-math.inf, 1.0, math.inf, -0.0])
    dense[1, :4] = torch.tensor([0.0, -0.0, 0.0, 0.0])
    w = sl.nm(dense, 2, 4)
    assert w.dtype == dtype
    assert torch.equal(w.pattern.to_dense(), largest(dense, 2, 4))
    assert torch.equal(w.values(), dense[w.pattern.to_dense()].view(6, 16))


@pytest.mark.parametrize("chunk", [1, 1000, 4000])
@pytest.mark.parametrize("strides", ["plain", "mT", "step", "heads last"])
def test_chunks_and_strides_change_nothing(
    chunk: int, strides: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = torch.randn(3, 24, 40)
    given_as = {
        "plain": dense,
        "mT": dense.mT.contiguous().mT,
        "step": dense.repeat_interleave(2, -1)[..., ::2],
        "heads last": dense.transpose(0, 1).contiguous().transpose(0, 1),
    }[strides]
    expected = sl.nm(dense, 3, 8)
    monkeypatch.setattr(nm_factory, "CHUNK_BYTES", chunk)
    found = sl.nm(given_as, 3, 8)
    assert torch.equal(found.inner_indices, expected.inner_indices)
    assert torch.equal(found.inner_values, expected.inner_values)


@BETA
def test_what_is_taken_besides_dense_tensors() -> None:
    dense = torch.randn(8, 24)
    dense[:, ::3] = 0
    expected = sl.nm(dense, 2, 4).to_dense()
    sources = {
        "layout": sl.bsr(dense, 8),
        "torch.sparse": dense.to_sparse_csr(),
        "numpy": dense.numpy(),
        "scipy array": scipy.sparse.csr_array(dense.numpy()),
        "scipy matrix": scipy.sparse.coo_matrix(dense.numpy()),
    }
    for name, source in sources.items():
        assert torch.equal(sl.nm(source, 2, 4).to_dense(), expected), name
    on_meta = sl.nm(dense, 2, 4, device="meta")
    assert on_meta.shape == (8, 24)
    assert (on_meta @ torch.empty(24, 2, device="meta")).shape == (8, 2)


def test_the_factory_is_differentiable() -> None:
    dense = torch.randn(2, 4, 12, dtype=F64, requires_grad=True)
    weight = torch.randn(2, 4, 12, dtype=F64)
    assert torch.autograd.gradcheck(lambda x: sl.nm(x, 1, 3).to_dense() * weight, dense)
    sl.nm(dense, 1, 3).values().sum().backward()
    assert torch.equal(dense.grad, largest(dense.detach(), 1, 3).to(F64))


# --- the packed fields ----------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(n_of_m(), st.integers(0, 70), st.integers(0, 3))
def test_packing_round_trip(nm: tuple[int, int], groups: int, rows: int) -> None:
    n, m = nm
    positions = torch.rand(rows, groups, m).argsort(-1)[..., :n].sort(-1)[0].flatten(1)
    packed = pack_positions(positions, m)
    bits = max(1, math.ceil(math.log2(m)))
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, math.ceil(groups * n / (32 // bits)))
    assert torch.equal(unpack_positions(packed, n, m, groups * m).long(), positions)
    for row, words in zip(positions.tolist(), packed.tolist(), strict=True):
        expected = [0] * len(words)
        for e, position in enumerate(row):
            expected[e // (32 // bits)] |= position << (e % (32 // bits) * bits)
        assert [word & 0xFFFFFFFF for word in words] == expected


def test_the_docstring_example() -> None:
    dense = torch.tensor([[1.0, 2, 0, 0], [3, 0, 0, 4], [0, 5, 6, 0], [0, 0, 7, 8]])
    w = sl.nm(dense, 2, 4)
    assert w.values().tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert w.indices().tolist() == [[0, 1], [0, 3], [1, 2], [2, 3]]
    assert w.inner_indices.tolist() == [[[0b0100], [0b1100], [0b1001], [0b1110]]]


@pytest.mark.parametrize(
    ("n", "m", "dtype", "per_entry"),
    [
        (2, 4, torch.bfloat16, 1.125),
        (2, 4, torch.float32, 2.125),
        (1, 2, torch.float16, 1 + 1 / 16),
        (4, 8, torch.bfloat16, 1 + 0.5 * 4 / 10),
        (1, 16, torch.float32, 4 / 16 + 1 / 32),
    ],
)
def test_bytes(n: int, m: int, dtype: torch.dtype, per_entry: float) -> None:
    # 5120: a multiple of 16 whose entries fill whole words of 10, too
    w = sl.nm(torch.randn(4, 5120).to(dtype), n, m)
    assert w.nbytes == 4 * 5120 * per_entry
    assert w.cached_bytes == 0


def test_description_and_densities() -> None:
    w = sl.nm(torch.randn(3, 8, 16), 1, 4)
    assert repr(w) == "NMTensor([3, 8, 16], float32, cpu, 1:4, density 25.00%, 3 patterns)"
    assert repr(w.pattern.mT) == (
        "NMTensor([3, 16, 8], bool, cpu, 1:4 transposed, density 25.00%, 3 patterns)"
    )
    assert (w.nnz, w.density) == (96, 0.25)
    assert w.pattern.density_of_causal == 96 / (3 * 36)
    assert w.prepack() is w


def test_a_transpose_shares_everything() -> None:
    w = sl.nm(torch.randn(8, 16), 2, 4)
    assert w.mT.inner_indices is w.inner_indices
    assert w.mT.inner_values.data_ptr() == w.inner_values.data_ptr()
    assert w.mT.shape == (16, 8)
    assert w.mT.mT.same_pattern(w)
    assert not w.mT.same_pattern(w)


# --- conversions, masks, indexing -----------------------------------------------------------------


@BETA
@pytest.mark.parametrize("flip", [False, True], ids=["", "transposed"])
def test_scipy_and_torch_sparse(flip: bool) -> None:
    w = sl.nm(torch.randn(8, 20, dtype=F64), 2, 5)
    w = w.mT if flip else w
    with sl.fallback("error"):
        in_scipy, in_torch = w.to_scipy(), w.to_torch_sparse()
    assert in_scipy.format == ("csc" if flip else "csr")
    assert in_torch.layout == (torch.sparse_csc if flip else torch.sparse_csr)
    assert in_scipy.nnz == w.nnz
    assert np.array_equal(in_scipy.toarray(), w.to_dense().numpy())
    assert torch.equal(in_torch.to_dense(), w.to_dense())
    mask = w.pattern.to_scipy()
    assert mask.dtype == bool
    assert np.array_equal(mask.toarray(), w.pattern.to_dense().numpy())
    assert w.bfloat16().to_scipy().dtype == np.float32


@BETA
def test_conversions_of_heads_and_samples_are_lists() -> None:
    mask = sl.nm(torch.randn(3, 8, 16), 2, 4).pattern
    w = torch.randn(2, 3, 8, 16, dtype=F64).sparse_mask(mask)
    for made in (w.to_scipy(), w.to_torch_sparse()):
        assert [len(sample) for sample in made] == [3, 3]
    assert np.array_equal(w.to_scipy()[1][2].toarray(), w.to_dense()[1, 2].numpy())


def test_masks() -> None:
    mask = sl.nm(torch.randn(8, 16), 2, 4).pattern
    dense = torch.randn(5, 8, 16)
    kept = dense * mask.to_dense()
    with sl.fallback("error"):
        assert torch.equal((mask * dense).to_dense(), kept)
        assert torch.equal((dense * mask).to_dense(), kept)
        assert torch.equal(dense.sparse_mask(mask).to_dense(), kept)
        assert torch.equal(mask.to(F64).to_dense(), mask.to_dense().to(F64))
        assert torch.equal((mask.mT * dense.mT).to_dense(), kept.mT)
    assert mask.pattern is mask
    assert mask.is_mask


def test_attention_with_an_nm_mask_is_dense_and_right(assert_close: Check) -> None:
    q, k, v = torch.randn(3, 2, 2, 16, 8, dtype=F64)
    mask = sl.nm(torch.randn(2, 16, 16), 4, 8).pattern
    attend = torch.nn.functional.scaled_dot_product_attention
    with sl.fallback("allow"):
        found = attend(q, k, v, attn_mask=mask)
    assert_close(found, attend(q, k, v, attn_mask=mask.to_dense()))
    with sl.fallback("error"), pytest.raises(sl.DenseFallbackError, match="no sparse impl"):
        attend(q, k, v, attn_mask=mask)


INDICES: dict[str, object] = {
    "a head": 1,
    "the last head": -1,
    "heads": slice(1, None),
    "rows": (Ellipsis, slice(2, 7), slice(None)),
    "every other row": (Ellipsis, slice(None, None, 2), slice(None)),
    "columns at groups": (Ellipsis, slice(4, 12)),
    "no columns": (Ellipsis, slice(8, 4)),
    "a head's rows and columns": (2, slice(3), slice(-8, None)),
    "all": Ellipsis,
}


@pytest.mark.parametrize("name", INDICES)
@pytest.mark.parametrize("is_mask", [False, True], ids=["values", "mask"])
def test_indexing(name: str, is_mask: bool) -> None:
    w = sl.nm(torch.randn(3, 8, 20), 1, 4)
    w = w.pattern if is_mask else w
    with sl.fallback("error"):
        cut = w[INDICES[name]]
    cut.validate()
    assert isinstance(cut, sl.NMTensor)
    assert torch.equal(cut.to_dense(), w.to_dense()[INDICES[name]])


def test_indexing_a_transpose_and_samples() -> None:
    mask = sl.nm(torch.randn(8, 16), 2, 4).pattern
    w = torch.randn(3, 8, 16).sparse_mask(mask)
    with sl.fallback("error"):
        assert torch.equal(w[1].to_dense(), w.to_dense()[1])
        assert torch.equal(w[1:, 2:4].to_dense(), w.to_dense()[1:, 2:4])
        assert torch.equal(w.mT[0, 4:8, :5].to_dense(), w.to_dense().mT[0, 4:8, :5])
    assert torch.equal(w[1].inner_indices, w.inner_indices)


def test_a_slice_is_a_copy_with_a_gradient() -> None:
    w = sl.nm(torch.randn(8, 16, dtype=F64), 2, 4).requires_grad_()
    with torch.no_grad():
        w[:4].zero_()
    assert w.nnz == int((w.to_dense() != 0).sum())
    w[2:4, 4:].to_dense().sum().backward()
    assert isinstance(w.grad, sl.NMTensor)
    expected = torch.zeros(8, 16, dtype=F64)
    expected[2:4, 4:] = 1
    assert torch.equal(w.grad.to_dense(), expected * w.pattern.to_dense())


@pytest.mark.parametrize(
    "index", [(0, 0), (0, 0, 0), (Ellipsis, slice(1, 8)), (Ellipsis, slice(None, None, 2)), None]
)
def test_other_indices_are_dense(index: object) -> None:
    w = sl.nm(torch.randn(3, 8, 16), 2, 4)
    with sl.fallback("allow"):
        assert torch.equal(w[index], w.to_dense()[index])
    with sl.fallback("error"), pytest.raises(sl.DenseFallbackError):
        w[index]


# --- bad input ------------------------------------------------------------------------------------

BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "n is m": (lambda: sl.nm(torch.ones(4, 4), 4, 4), ValueError, "1 <= n < m <= 16, got n=4, m=4"),
    "n of 0": (lambda: sl.nm(torch.ones(4, 4), 0, 4), ValueError, "got n=0, m=4"),
    "m": (lambda: sl.nm(torch.ones(4, 34), 2, 17), ValueError, "got n=2, m=17"),
    "kind": (lambda: sl.nm(torch.ones(4, 4), 2.0, 4), TypeError, "n is an int, got 2.0"),
    "bool": (lambda: sl.nm(torch.ones(4, 4), 2, True), TypeError, "m is an int, got True"),
    "length": (
        lambda: sl.nm(torch.ones(4, 6), 2, 4),
        ValueError,
        r"m=4 does not divide the last dimension 6 of \(4, 6\); "
        r"pad it with torch.nn.functional.pad\(x, \(0, 2\)\)",
    ),
    "vector": (lambda: sl.nm(torch.ones(4), 2, 4), ValueError, r"\(4,\); a vector is x\[None\]"),
    "no dimension": (lambda: sl.nm(torch.tensor(1.0), 2, 4), ValueError, r"got shape \(\)"),
    "list": (lambda: sl.nm([[1.0]], 2, 4), TypeError, "a tensor, a numpy array .* got list"),
    "booleans": (lambda: sl.nm(torch.ones(4, 4).bool(), 2, 4), TypeError, "got torch.bool"),
    "integers": (lambda: sl.nm(torch.ones(4, 4).int(), 2, 4), TypeError, "got torch.int32; conv"),
    "complex": (lambda: sl.nm(torch.ones(4, 4) * 1j, 2, 4), TypeError, "got torch.complex64"),
    "NaN": (
        lambda: sl.nm(torch.eye(4).masked_fill(torch.eye(4) == 1, math.nan)[1:], 2, 4),
        ValueError,
        r"NaN, first at \(0, 1\) of \(3, 4\); replace them with torch.nan_to_num",
    ),
    "values of a mask": (
        lambda: sl.nm(torch.ones(4, 4), 2, 4).pattern.values(),
        TypeError,
        r"mask.to\(dtype\) has ones",
    ),
    "sparse_mask": (
        lambda: torch.ones(4, 8).sparse_mask(sl.nm(torch.ones(4, 4), 2, 4)),
        ValueError,
        r"\(\*batch, 4, 4\), got \(4, 8\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call()


def test_padding_as_the_error_says() -> None:
    dense = torch.randn(4, 6)
    padded = torch.nn.functional.pad(dense, (0, -6 % 4))
    assert sl.nm(padded, 2, 4).shape == (4, 8)


def broken(**changes: object) -> sl.NMTensor:
    w = sl.nm(torch.randn(6, 20, dtype=F64), 2, 5)
    parts = {"values": w.inner_values, "indices": w.inner_indices, **w.static(), **changes}
    inner = (parts.pop("values"), parts.pop("indices"))
    return sl.NMTensor(*inner, shape=parts.pop("shape", w.shape), **parts)


def packed(*positions: int) -> Tensor:
    return pack_positions(torch.tensor(positions).repeat(1, 6, 1), 5)


BROKEN: dict[str, tuple[dict[str, object], str]] = {
    "n:m": ({"n": 5}, "1 <= n < m"),
    "axis": ({"axis": -3}, "axis: expected -1 or -2, got -3"),
    "shape": ({"shape": (6, 21)}, "m=5 divides, got 21"),
    "indices' dtype": ({"indices": torch.zeros(1, 6, 1)}, "expected int32 of shape"),
    "indices' size": ({"shape": (6, 80)}, r"int32 of shape \(1, 6, 4\)"),
    "heads": ({"lead_dims": 1, "shape": (2, 6, 20)}, r"int32 of shape \(2, 6, 1\)"),
    "range": ({"indices": packed(0, 1, 0, 5, 0, 1, 0, 1)}, r"positions 0\.\.4, got 5"),
    "order": ({"indices": packed(0, 1, 3, 3, 0, 1, 0, 1)}, "ascending positions"),
    "unused bits": ({"indices": packed(0, 1, 0, 1, 0, 1, 0, 1, 1)}, "unused bits of a word"),
    "values' size": ({"values": torch.zeros(6, 9)}, r"\(\*batch, 6, 8\), got \(6, 9\)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_validate_names_what_is_broken(name: str) -> None:
    changes, message = BROKEN[name]
    with pytest.raises(ValueError, match=message):
        broken(**changes).validate()
