"""`sl.reorder`: the grouping, the layout's fields, products and gradients, the gain, bad input."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sparse_layouts as sl
from sparse_layouts.row_clustering import in_groups, similar_rows
from tests.rounding import assert_close

F64 = torch.float64
Check = Callable[..., None]


def on_blocks(kept: Tensor, block: tuple[int, int], dtype: torch.dtype = F64) -> sl.BSRTensor:
    """Random values in these blocks."""
    mask = sl.bsr_mask(kept, block)
    return torch.randn(mask.shape, dtype=dtype).sparse_mask(mask)


def band(rows: int, columns: int, half: int = 2) -> Tensor:
    i, j = torch.arange(rows)[:, None], torch.arange(columns)
    return (j - i * columns // rows).abs() <= half


def shuffled(rows: Tensor) -> Tensor:
    return rows[torch.randperm(len(rows))]


def power_law(rows: int, columns: int) -> Tensor:
    lengths = (columns / torch.arange(1, rows + 1)).ceil()
    return shuffled(torch.rand(rows, columns).argsort(1) < lengths[:, None])


def with_empty_rows() -> Tensor:
    kept = torch.rand(16, 8) < 0.3
    kept[::3] = False
    return kept


# name -> (which blocks, block, height)
PATTERNS: dict[str, tuple[Callable[[], Tensor], tuple[int, int], int]] = {
    "random": (lambda: torch.rand(16, 12) < 0.3, (4, 4), 16),
    "shuffled band": (lambda: shuffled(band(32, 32)), (4, 4), 16),
    "power law": (lambda: power_law(24, 20), (2, 8), 8),
    "empty rows": (with_empty_rows, (4, 4), 12),
    "wide blocks": (lambda: torch.rand(16, 4) < 0.4, (2, 48), 4),
    "tall blocks": (lambda: torch.rand(6, 16) < 0.4, (8, 2), 24),
    "single rows": (lambda: shuffled(band(48, 8)), (1, 8), 16),
    "a height that the rows do not fill": (lambda: torch.rand(7, 5) < 0.5, (4, 4), 16),
    "more than there are rows": (lambda: torch.rand(3, 5) < 0.5, (4, 4), 64),
    "as it is": (lambda: torch.rand(6, 5) < 0.5, (4, 4), 4),
    "nothing stored": (lambda: torch.zeros(6, 5, dtype=torch.bool), (4, 4), 8),
    "all stored": (lambda: torch.ones(6, 5, dtype=torch.bool), (4, 4), 8),
}


@pytest.fixture(params=PATTERNS)
def pair(request: pytest.FixtureRequest, fixed_seeds: None) -> tuple[sl.BSRTensor, int]:
    """A layout and the height of the blocks to come."""
    make, block, height = PATTERNS[request.param]
    return on_blocks(make(), block), height


# --- the same matrix ------------------------------------------------------------------------------


def test_it_is_the_same_matrix(pair: tuple[sl.BSRTensor, int]) -> None:
    w, height = pair
    r = sl.reorder(w, height)
    r.validate()
    assert type(r) is sl.ReorderedTensor
    assert (r.shape, r.dtype) == (w.shape, w.dtype)
    assert torch.equal(r.to_dense(), w.to_dense())
    assert torch.equal(r.mT.to_dense(), w.mT.to_dense())
    assert torch.equal(r.pattern.to_dense(), w.pattern.to_dense())
    assert (r.nnz, r.density) == (w.nnz, w.density)
    assert torch.equal((r * 2 + r).to_dense(), (w * 2 + w).to_dense())
    back = sl.bsr(r, w.block_size)
    assert back.same_pattern(w)
    assert torch.equal(back.values(), w.values())
    assert torch.equal(sl.csr(r).to_dense(), w.to_dense())
    assert (r.to_scipy() != w.to_scipy().tocsr()).nnz == 0


def test_stored_blocks_are_its_rows_in_their_order(pair: tuple[sl.BSRTensor, int]) -> None:
    w, height = pair
    r = sl.reorder(w, height)
    stored = r.stored_blocks()
    assert stored.block_size == (height, w.block_size[1])
    assert torch.equal(stored.to_dense(), w.to_dense()[r.row_order().long()])
    assert stored.values().data_ptr() == r.values().data_ptr()


@pytest.mark.parametrize("kind", ["transposed", "bit tiles", "bit tiles, transposed", "ragged"])
def test_other_sources(kind: str, fixed_seeds: None) -> None:
    if kind == "transposed":
        w = on_blocks(torch.rand(12, 16) < 0.3, (4, 4)).mT
    else:
        entries = torch.rand(45, 30) < 0.1
        mask = sl.mask_from(entries if kind != "ragged" else entries[:43], (5, 6))
        w = torch.randn(mask.shape, dtype=F64).sparse_mask(mask)
        w = w.mT if kind.endswith("transposed") else w
    r = sl.reorder(w, 3 * w.block_size[0])
    r.validate()
    assert torch.equal(r.to_dense(), w.to_dense())
    assert torch.equal(r.pattern.to_dense(), w.pattern.to_dense())
    x = torch.randn(w.shape[1], 5, dtype=F64)
    torch.testing.assert_close(r @ x, w @ x)
    if w.shape[0] % w.block_size[0]:  # rows of the block that reaches over the edge stay the last
        assert r.row_order()[-3:].tolist() == [40, 41, 42]


def test_a_batch(fixed_seeds: None) -> None:
    w = on_blocks(torch.rand(16, 12) < 0.3, (4, 4))
    w = torch.randn(2, *w.shape, dtype=F64).sparse_mask(w.pattern).requires_grad_()
    r = sl.reorder(w, 16)
    assert torch.equal(r.to_dense(), w.to_dense())
    r.square().sum().backward()
    assert torch.equal(w.grad.to_dense(), 2 * w.to_dense())


def test_round_trips(tmp_path: Path, fixed_seeds: None) -> None:
    r = sl.reorder(on_blocks(shuffled(band(32, 32)), (4, 4)), 16)
    torch.save({"w": r}, tmp_path / "w.pt")
    for again in (
        torch.load(tmp_path / "w.pt", weights_only=True)["w"],
        copy.deepcopy(r),
        r.clone(),
        r.mT.mT,
    ):
        again.validate()
        assert again.same_pattern(r)
        assert torch.equal(again.to_dense(), r.to_dense())


# --- products -------------------------------------------------------------------------------------


def operands(
    w: sl.BSRTensor, dtype: torch.dtype
) -> dict[str, tuple[Callable[..., Tensor], Tensor]]:
    m, k = w.shape
    bias = torch.randn(m, dtype=dtype)
    return {
        "W @ x": (torch.matmul, torch.randn(k, 7, dtype=dtype)),
        "W @ vector": (torch.matmul, torch.randn(k, dtype=dtype)),
        "W @ x by columns": (torch.matmul, torch.randn(7, k, dtype=dtype).mT),
        "W @ x strided": (torch.matmul, torch.randn(k, 14, dtype=dtype)[:, ::2]),
        "W @ batch": (torch.matmul, torch.randn(3, k, 2, dtype=dtype)),
        "W.mT @ x": (lambda w, x: w.mT @ x, torch.randn(m, 7, dtype=dtype)),
        "x @ W": (lambda w, x: x @ w, torch.randn(7, m, dtype=dtype)),
        "batch @ W": (lambda w, x: x @ w, torch.randn(3, 7, m, dtype=dtype)),
        "x @ W.mT": (lambda w, x: x @ w.mT, torch.randn(7, k, dtype=dtype)),
        "linear": (lambda w, x: F.linear(x, w, bias), torch.randn(2, 7, k, dtype=dtype)),
        "sl.linear": (
            lambda w, x: sl.linear(x, w, bias, activation="relu"),
            torch.randn(7, k, dtype=dtype),
        ),
        "einsum": (
            lambda w, x: torch.einsum("ij,jk->ik", w, x),
            torch.randn(k, 7, dtype=dtype),
        ),
    }


def said(what: str) -> Callable[[str], str]:
    return lambda message: f"{what}: {message}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64], ids=str)
def test_products_and_gradients_are_those_of_the_blocks(
    pair: tuple[sl.BSRTensor, int], dtype: torch.dtype
) -> None:
    exact, height = pair
    with warnings.catch_warnings():  # no dense fallback, which would warn
        warnings.simplefilter("error")
        for what, (function, x) in operands(exact, dtype).items():
            w = exact.to(dtype, copy=True).requires_grad_()
            r = sl.reorder(w.detach(), height).requires_grad_()
            ours, its = x.clone().requires_grad_(), x.clone().requires_grad_()
            out, expected = function(r, ours), function(w, its)
            dout = torch.randn_like(expected)
            out.backward(dout)
            expected.backward(dout)
            # sums of at most 192 numbers, in another order
            eps = torch.finfo(dtype).eps
            close = {"atol": 256 * eps, "rtol": 8 * eps}
            torch.testing.assert_close(out, expected, msg=said(what), **close)
            torch.testing.assert_close(ours.grad, its.grad, **close)
            assert type(r.grad) is sl.ReorderedTensor
            torch.testing.assert_close(r.grad.to_dense(), w.grad.to_dense(), **close)


def test_gradcheck(fixed_seeds: None) -> None:
    r = sl.reorder(on_blocks(torch.rand(6, 4) < 0.5, (2, 2)), 4)
    values, x = r.values().detach(), torch.randn(8, 3, dtype=F64, requires_grad=True)
    stored = r.like_self(r.ones(F64)).values()
    kept = (values * stored).requires_grad_()

    def product(values: Tensor, x: Tensor) -> Tensor:
        from sparse_layouts.layout_autograd import with_values

        return with_values(r.detach(), values) @ x

    torch.autograd.gradcheck(product, (kept, x))
    torch.autograd.gradgradcheck(product, (kept, x))


def test_sampled_product(pair: tuple[sl.BSRTensor, int], assert_close: Check) -> None:
    w, height = pair
    r = sl.reorder(w, height)
    a = torch.randn(w.shape[0], 5, dtype=F64, requires_grad=True)
    b = torch.randn(5, w.shape[1], dtype=F64, requires_grad=True)
    out = sl.sddmm(a, b, r.pattern)
    torch.testing.assert_close(out.to_dense(), sl.sddmm(a, b, w.pattern).to_dense())
    torch.testing.assert_close(sl.sddmm(b.mT, a.mT, r.pattern.mT).to_dense(), out.to_dense().mT)
    found = torch.autograd.grad(out.to_dense().sin().sum(), (a, b))
    expected = torch.autograd.grad(sl.sddmm(a, b, w.pattern).to_dense().sin().sum(), (a, b))
    torch.testing.assert_close(found, expected)


def test_differentiable_in_the_blocks(fixed_seeds: None) -> None:
    w = on_blocks(shuffled(band(32, 32)), (4, 4)).requires_grad_()
    x = torch.randn(128, 3, dtype=F64)
    (sl.reorder(w, 16) @ x).square().sum().backward()
    again = w.detach().requires_grad_()
    (again @ x).square().sum().backward()
    torch.testing.assert_close(w.grad.values(), again.grad.values())


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_training_keeps_fill_in_zero(
    optimizer: type[torch.optim.Optimizer], fixed_seeds: None
) -> None:
    w = on_blocks(torch.rand(16, 12) < 0.3, (4, 4))
    r = torch.nn.Parameter(sl.reorder(w, 16))
    w = torch.nn.Parameter(w)
    assert r.gain.fill_in > 0.1
    x = torch.randn(5, 48, dtype=F64)
    for each in (r, w):
        steps = optimizer([each], lr=0.1)
        for _ in range(3):
            steps.zero_grad()
            F.linear(x, each).square().sum().backward()
            steps.step()
    r.validate()  # among others: what is not stored is 0
    assert not bool(r.values()[r.pattern.to(torch.float32).values() == 0].any())
    torch.testing.assert_close(r.to_dense(), w.to_dense())


def test_filling_leaves_fill_in_zero(fixed_seeds: None) -> None:
    w = on_blocks(torch.rand(16, 12) < 0.3, (4, 4))
    r = sl.reorder(w, 16)
    r.fill_(3.0)
    assert torch.equal(r.to_dense(), 3.0 * w.pattern.to_dense())
    r.add_(1)
    assert torch.equal(r.to_dense(), 4.0 * w.pattern.to_dense())


# --- the order ------------------------------------------------------------------------------------


def lists_of(kept: Tensor) -> tuple[np.ndarray, np.ndarray]:
    crow = np.concatenate([np.zeros(1, np.int64), kept.sum(1).cumsum(0).numpy()])
    return crow, kept.nonzero()[:, 1].numpy()


def by_definition(kept: Tensor, size: int) -> list[int]:
    """The greedy order, as the docstring says it."""
    rows = [set(row.nonzero()[:, 0].tolist()) for row in kept]
    free, order = list(range(len(rows))), []
    group: set[int] = set()
    while free:
        similar = [len(rows[r] & group) / max(1, len(rows[r] | group)) for r in free]
        best = max(similar)
        if best > 0:
            row = free[similar.index(best)]
        else:
            row = min(free, key=lambda r: len(rows[r]))
        group = rows[row] | (set() if len(order) % size == 0 else group)
        order.append(row)
        free.remove(row)
    return order


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 12), st.integers(0, 9), st.integers(1, 5), st.floats(0, 1))
def test_rows_are_grouped_greedily(rows: int, columns: int, size: int, share: float) -> None:
    kept = torch.rand(rows, columns) < share
    found = similar_rows(*lists_of(kept), columns, size)
    assert found.tolist() == by_definition(kept, size)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 5))
def test_groups_store_what_their_rows_do(rows: int, columns: int, size: int) -> None:
    kept = torch.rand(rows, columns) < 0.3
    order = torch.randperm(rows)
    cells, which, part = in_groups(*lists_of(kept), columns, order.numpy(), size)
    groups = torch.zeros(-(-rows // size), columns, dtype=torch.bool)
    for place, row in enumerate(order):
        groups[place // size] |= kept[row]
    assert cells.tolist() == groups.flatten().nonzero()[:, 0].tolist()
    r, c = kept.nonzero().T
    place = order.argsort()[r]
    assert cells[which].tolist() == (place // size * columns + c).tolist()
    assert part.tolist() == (place % size).tolist()


def test_full_columns_do_not_make_every_row_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_layouts.row_clustering.MOST_ROWS_OF_A_COLUMN", 2)
    kept = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 1, 0], [1, 0, 1]]).bool()
    assert similar_rows(*lists_of(kept), 3, 2).tolist() == [0, 2, 1, 3]


def test_a_shuffled_band_is_found_again(fixed_seeds: None) -> None:
    kept = shuffled(band(256, 256, 8))
    r = sl.reorder(on_blocks(kept, (16, 16), torch.bfloat16))
    assert r.block_size[0] in (64, 128)
    assert r.gain.fill_in < 0.35
    assert r.gain.speedup > 1.2
    # in the band's own order: the fewest blocks that there can be, or nearly
    own = sl.bsr(on_blocks(band(256, 256, 8), (16, 16), torch.bfloat16), r.block_size)
    assert r.values().shape[0] < 1.25 * own.values().shape[0]


def test_rows_in_order_stay_where_they_are() -> None:
    kept = torch.eye(8).repeat_interleave(4, 0) > 0
    r = sl.reorder(on_blocks(kept, (16, 16)), 64)
    assert torch.equal(r.row_order(), torch.arange(512, dtype=torch.int32))
    assert r.gain.fill_in == 0


def test_equal_patterns_give_equal_orders(fixed_seeds: None) -> None:
    kept = torch.rand(32, 16) < 0.2
    first, second = (sl.reorder(on_blocks(kept, (4, 4)), 16) for _ in range(2))
    assert first.same_pattern(second)


# --- the gain -------------------------------------------------------------------------------------


def test_gain_counts_what_there_is(pair: tuple[sl.BSRTensor, int]) -> None:
    w, height = pair
    gain = sl.reorder(w, height).gain
    r = sl.reorder(w, height)
    assert (gain.blocks_before, gain.blocks_after) == (w.col_indices().numel(), len(r.values()))
    assert (gain.block_before, gain.block_after) == (w.block_size, r.block_size)
    assert (gain.entries, gain.bytes_before, gain.bytes_after) == (w.nnz, w.nbytes, r.nbytes)
    room = r.values().numel()
    assert gain.fill_in == (1 - w.nnz / room if room else 0)
    assert (gain.speedup > 0) if w.nnz else (gain.speedup == 1)
    said = f"{gain.speedup:.2f}x"
    assert f"modelled: {said} as fast" in str(gain)
    assert f"modelled gain {said}" in " ".join(repr(r).split())
    assert r.mT.gain == r.pattern.gain._replace(
        bytes_before=gain.bytes_before, bytes_after=gain.bytes_after
    )


def test_gain_of_blocks_stored_in_part(fixed_seeds: None) -> None:
    mask = sl.mask_from(torch.rand(43, 30) < 0.05, (5, 6))
    w = torch.randn(mask.shape, dtype=F64).sparse_mask(mask)
    gain = sl.reorder(w, 10).gain
    assert (gain.blocks_before, gain.entries) == (w.col_indices().numel(), w.nnz)


def test_where_nothing_is_gained_it_says_so(fixed_seeds: None) -> None:
    w = on_blocks(torch.rand(64, 64) < 0.05, (16, 16))
    with pytest.warns(UserWarning, match=r"reorder: BSRTensor.* modelled as the faster one.* Keep"):
        r = sl.reorder(w)
    assert r.gain.speedup < 1
    assert "slower than before" in str(r.gain)
    assert torch.equal(r.to_dense(), w.to_dense())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sl.reorder(w, 128)  # asked for


def test_heights_are_multiples_of_the_block(fixed_seeds: None) -> None:
    kinds = torch.eye(4).repeat(64, 1) > 0
    for rows, heights in ((4, (16, 32, 64, 128)), (12, (12, 24, 48, 96)), (200, (200,))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            assert sl.reorder(on_blocks(kinds, (rows, 16))).block_size[0] in heights


# --- bad input ------------------------------------------------------------------------------------

W = sl.bsr(torch.eye(64), 16)
BAD = {
    "dense": (lambda: sl.reorder(torch.eye(64)), TypeError, r"expected a BSRTensor, got Tensor of"),
    "no tensor": (lambda: sl.reorder([[1.0]]), TypeError, r"expected a BSRTensor, got list"),
    "another layout": (lambda: sl.reorder(sl.csr(torch.eye(8))), TypeError, r"got CSRTensor"),
    "a mask": (lambda: sl.reorder(W.pattern), TypeError, r"with values, got the mask BSRTensor"),
    "heads": (lambda: sl.reorder(sl.bsr(torch.ones(2, 64, 64), 16)), ValueError, r"one pattern"),
    "a float": (lambda: sl.reorder(W, 64.0), TypeError, r"an int or None, got 64\.0"),
    "a bool": (lambda: sl.reorder(W, True), TypeError, r"an int or None, got True"),
    "no multiple": (
        lambda: sl.reorder(W, 40),
        ValueError,
        r"multiple of the block's 16 rows, got 40",
    ),
    "none": (lambda: sl.reorder(W, 0), ValueError, r"multiple of the block's 16 rows, got 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call()


def broken(**changed: object) -> sl.ReorderedTensor:
    """A layout of which some fields are others."""
    r = sl.reorder(sl.bsr(torch.eye(8), (1, 2)), 4)
    static = {name: changed.pop(name, value) for name, value in r.static().items()}
    tensors = [changed.get(n, t) for n, t in zip(r.fields, r.inner_tensors(), strict=True)]
    return sl.ReorderedTensor(*tensors, shape=r.shape, **static)  # type: ignore[arg-type]


BROKEN = {
    "axis": ({"axis": 0}, r"axis: expected -1 or -2, got 0"),
    "block": ({"source_block": (0, 2)}, r"source_block: expected edges from 1"),
    "source": ({"source_block": (1, 4)}, r"source_block: expected one whose height divides"),
    "order twice": ({"row_order": torch.zeros(8).int()}, r"row_order: expected a permutation"),
    "order long": ({"row_order": torch.arange(8)}, r"row_order: expected int32 of shape \(8,\)"),
    "places": ({"row_places": torch.arange(7).int()}, r"row_places: expected int32 of shape"),
    "far": ({"row_places": torch.full((8,), 9).int()}, r"row_places: expected rows from 0 to 7"),
    "no inverse": ({"row_places": torch.zeros(8).int()}, r"row_places: expected the inverse"),
    "fill-in": ({"values": torch.ones(4, 4, 2)}, r"an entry that the pattern does not store"),
    "columns": ({"ccol_indices": torch.tensor([[0, 1, 1, 3, 4]]).int()}, r"column lists do not"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_validate(name: str) -> None:
    changed, message = BROKEN[name]
    broken().validate()
    with pytest.raises(ValueError, match=message):
        broken(**changed).validate()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("block_size", [2**40, 2], r"'block_size': expected positive sizes of at most"),
        ("source_block", [3, 2], r"source_block: expected one whose height divides"),
        ("axis", 5, r"axis: expected -1 or -2"),
    ],
)
def test_files_that_lie(tmp_path: Path, field: str, value: object, message: str) -> None:
    pytest.importorskip("safetensors", reason="needs the extra safetensors")
    import safetensors.torch

    path = tmp_path / "w.safetensors"
    r = broken()
    sl.save_safetensors({"w": r}, path)
    again = sl.load_safetensors(path)["w"]
    assert again.same_pattern(r)
    with safetensors.safe_open(path, framework="pt") as file:
        records = json.loads(file.metadata()["sparse_layouts"])
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    records["layouts"]["w"]["static"][field] = value
    safetensors.torch.save_file(tensors, path, {"sparse_layouts": json.dumps(records)})
    with pytest.raises(ValueError, match=message):
        sl.load_safetensors(path)


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("function", [torch.softmax, torch.log_softmax])
def test_a_softmax_is_over_what_the_source_stored(dim: int, function: Callable[..., Any]) -> None:
    w = on_blocks(shuffled(band(24, 12, 1)), (2, 4))
    r = sl.reorder(w, 8)
    assert len(r.values()) * 4 > len(w.values()), "nothing was filled in"
    before, after = w.requires_grad_(), r.detach().requires_grad_()
    with sl.fallback("allow"):
        expected, found = function(before, dim), function(after, dim)
    goal = torch.randn(w.shape, dtype=F64)
    assert_close(found.detach(), expected.detach())
    for out in (expected, found):
        (out.to_dense() * goal).sum().backward()
    assert_close(after.grad, before.grad)


def test_blocks_that_count_several_times_are_refused() -> None:
    counted = sl.bsr_mask(torch.tensor([[2, 0], [1, 3]]), (2, 4)).to(F64)
    with pytest.raises(ValueError, match="counts blocks several times"):
        sl.reorder(counted)
