"""n:m layouts by fragments: equal to those row by row wherever both can be told apart."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_layouts as sl
from sparse_layouts.nm_fragments import AXES, unit_columns
from tests.rounding import assert_close

F64 = torch.float64
RATIOS = sorted(AXES)


@pytest.fixture(params=RATIOS, ids=lambda nm: f"{nm[0]}:{nm[1]}")
def rows(request: pytest.FixtureRequest) -> sl.NMTensor:
    """One row by row, with two heads."""
    n, m = request.param
    return sl.nm(torch.randn(2, 32, 2 * unit_columns(n, m), dtype=F64), n, m)


def test_the_order_goes_and_comes_back(rows: sl.NMTensor) -> None:
    w = rows.in_order("fragments")
    assert w.order == "fragments"
    assert not torch.equal(w.inner_values, rows.inner_values)
    back = w.in_order("rows")
    for a, b in zip(back.inner_tensors(), rows.inner_tensors(), strict=True):
        assert torch.equal(a, b)
    assert w.in_order("fragments") is w
    assert w.prepack().order == "rows"  # what the CPU wants
    assert rows.prepack() is rows


def test_accessors_undo_it(rows: sl.NMTensor) -> None:
    w = rows.in_order("fragments")
    assert torch.equal(w.values(), rows.values())
    assert torch.equal(w.indices(), rows.indices())
    assert torch.equal(w.positions(), rows.positions())
    assert torch.equal(w.to_dense(), rows.to_dense())
    assert torch.equal(w.mT.to_dense(), rows.mT.to_dense())
    assert torch.equal(w.pattern.to_dense(), rows.pattern.to_dense())
    assert (w[0].to_scipy() != rows[0].to_scipy()).nnz == 0
    assert w.nnz == rows.nnz
    cut = slice(0, rows.m)
    assert torch.equal(w[:, 3:9, cut].to_dense(), rows[:, 3:9, cut].to_dense())
    dense = torch.randn(rows.shape, dtype=F64)
    assert torch.equal(dense.sparse_mask(w).to_dense(), dense.sparse_mask(rows).to_dense())
    assert dense.sparse_mask(w).order == "fragments"
    assert torch.equal(sl.csr(w[0]).to_dense(), rows[0].to_dense())
    assert torch.equal(sl.bsr(w, 16).to_dense(), rows.to_dense())


MIXED: dict[str, Callable[[sl.NMTensor, sl.NMTensor], Tensor]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - 3 * b,
    "multiply": lambda a, b: a * b,
    "in place": lambda a, b: a.clone().mul_(2).add_(b),
    "foreach": lambda a, b: torch._foreach_add([a], [b], alpha=0.5)[0],
    "copy": lambda a, b: torch.zeros_like(a).copy_(b * 5),
    "sparse_mask": lambda a, b: (b * 5).sparse_mask(a),
    "softmax": lambda a, b: torch.softmax(a, -1) + torch.log_softmax(b, -1),
    "masked_fill_": lambda a, b: a.clone().masked_fill_(b.like_self(b.inner_values > 0), 7.0),
}


@pytest.mark.parametrize("name", MIXED)
def test_two_orders_work_together(name: str, rows: sl.NMTensor) -> None:
    other = rows.like_self(torch.randn_like(rows.inner_values))
    expected = MIXED[name](rows, other)
    w, v = rows.in_order("fragments"), other.in_order("fragments")
    assert w.same_pattern(other)
    assert other.same_pattern(w)
    for a, b in ((w, other), (rows, v), (w, v)):
        found = MIXED[name](a, b)
        assert found.order == a.order
        assert torch.equal(found.to_dense(), expected.to_dense())


def test_other_patterns_are_seen(rows: sl.NMTensor) -> None:
    other = sl.nm(torch.randn(rows.shape, dtype=F64), rows.n, rows.m)
    assert not rows.in_order("fragments").same_pattern(other)
    with pytest.raises(ValueError, match="stores other entries"):
        rows.in_order("fragments").copy_(other)


def test_gradients_have_the_order_of_their_parameter(rows: sl.NMTensor) -> None:
    w = rows.in_order("fragments").requires_grad_()
    (w.in_order("rows").values() ** 2).sum().backward()
    assert isinstance(w.grad, sl.NMTensor)
    assert w.grad.order == "fragments"
    assert torch.equal(w.grad.to_dense(), 2 * rows.to_dense())
    weight = torch.randn(rows.shape, dtype=F64)
    assert torch.autograd.gradcheck(
        lambda x: sl.nm(x, 2, 4).in_order("fragments").to_dense() * weight[0, :16, :64],
        torch.randn(16, 64, dtype=F64, requires_grad=True),
    )


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_training_is_the_same(make: type[torch.optim.Optimizer], rows: sl.NMTensor) -> None:
    x, results = torch.randn(5, rows.shape[-1], dtype=F64), []
    for order in ("rows", "fragments"):
        w = torch.nn.Parameter(rows[0].in_order(order))
        optimizer = make([w], lr=0.01)

        def loss(w: Tensor = w, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            found = F.linear(x, w).square().mean()
            found.backward()
            return found

        for _ in range(3):
            optimizer.step(loss)
        assert w.order == w.grad.order == order
        results.append(w.to_dense())
    torch.testing.assert_close(*results)


def test_files_keep_it(rows: sl.NMTensor, tmp_path: Path) -> None:
    w, file = rows.in_order("fragments"), io.BytesIO()
    torch.save(w, file)
    file.seek(0)
    sl.save_safetensors({"w": w}, tmp_path / "w.safetensors")
    for found in (
        torch.load(file, weights_only=True),
        sl.load_safetensors(tmp_path / "w.safetensors")["w"],
    ):
        found.validate()
        assert found.order == "fragments"
        assert torch.equal(found.to_dense(), rows.to_dense())


def test_a_state_dict_of_the_other_order_loads(rows: sl.NMTensor) -> None:
    module = torch.nn.Linear(rows.shape[-1], 32, bias=False, dtype=F64)
    module.weight = torch.nn.Parameter(torch.zeros_like(rows[0]).in_order("fragments"))
    module.load_state_dict({"weight": rows[0]})
    assert module.weight.order == "fragments"
    assert torch.equal(module.weight.to_dense(), rows[0].to_dense())


def test_compiled_products_are_the_same(rows: sl.NMTensor) -> None:
    w = rows[0].in_order("fragments").requires_grad_()
    x = torch.randn(3, rows.shape[-1], dtype=F64)
    product = torch.compile(lambda x, w: F.linear(x, w), backend="aot_eager", fullgraph=True)
    product(x, w).sum().backward()
    torch.testing.assert_close(product(x, w), F.linear(x, rows[0]))
    assert w.grad.order == "fragments"
    expected = x.sum(0).expand(32, -1).sparse_mask(rows[0])
    torch.testing.assert_close(w.grad.to_dense(), expected.to_dense())


def test_the_call_says_that_rows_are_made() -> None:
    w = sl.nm(torch.randn(16, 64), 2, 4).in_order("fragments")
    assert "forward, entries brought into rows first" in repr(
        sl.explain(torch.mm, w, w.to_dense().mT)
    )
    with sl.kernel_choice(nm_matmul="cpu"):
        x = torch.randn(64, 2)
        torch.testing.assert_close(w @ x, w.to_dense() @ x)


@pytest.mark.parametrize(
    ("nm", "per_entry"), [((2, 4), 1.125), ((1, 4), 0.5625), ((2, 8), 0.59375), ((1, 8), 0.296875)]
)
def test_bytes(nm: tuple[int, int], per_entry: float) -> None:
    w = sl.nm(torch.randn(32, 512).bfloat16(), *nm).in_order("fragments")
    assert w.nbytes == w.numel() * per_entry


def broken(**changes: object) -> sl.NMTensor:
    w = sl.nm(torch.randn(16, 64), 2, 4).in_order("fragments")
    parts = {"values": w.inner_values, "indices": w.inner_indices, **w.static(), **changes}
    values, indices = parts.pop("values"), parts.pop("indices")
    return sl.NMTensor(values, indices, shape=(16, 64), **parts)


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "name": (lambda: sl.nm(torch.ones(16, 64), 2, 4).in_order("columns"), "'rows', 'fragments'"),
    "n:m": (lambda: sl.nm(torch.ones(16, 64), 1, 2).in_order("fragments"), "2:4, 1:4, .* got 1:2"),
    "rows": (lambda: sl.nm(torch.ones(8, 64), 2, 4).in_order("fragments"), "multiple of 16"),
    "columns": (lambda: sl.nm(torch.ones(16, 64), 1, 4).in_order("fragments"), "128 divides"),
    "order": (lambda: broken(order="columns").validate(), "order: expected one of"),
    "words": (
        lambda: broken(indices=torch.zeros(1, 1, 31, dtype=torch.int32)).validate(),
        r"indices: expected int32 of shape \(1, 1, 32\)",
    ),
    "positions": (
        lambda: broken(indices=torch.zeros(1, 1, 32, dtype=torch.int32)).validate(),
        "ascending positions",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call()


FUSED = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
}


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("state", ["rows", "dense"])
def test_fused_optimizers_write_to_state_of_another_order(name: str, state: str) -> None:
    x = torch.randn(8, 128, dtype=F64)
    ended = []
    for order in ("rows", "fragments"):
        torch.manual_seed(0)
        p = torch.nn.Parameter(sl.nm(torch.randn(32, 128, dtype=F64), 2, 4))
        optimizer = FUSED[name]([p])
        for step in range(4):
            if step == 1 and order == "fragments":
                saved = optimizer.state_dict()
                if state == "dense":
                    for key, value in saved["state"][0].items():
                        if isinstance(value, sl.LayoutTensor):
                            saved["state"][0][key] = value.to_dense()
                p = torch.nn.Parameter(p.detach().in_order("fragments"))
                optimizer = FUSED[name]([p])
                optimizer.load_state_dict(saved)
            optimizer.zero_grad()
            torch.nn.functional.linear(x, p).square().mean().backward()
            optimizer.step()
        ended.append(p.detach().to_dense())
    assert_close(*ended)


def test_a_gradient_through_prepack_lies_on_the_tensors_of_its_leaf() -> None:
    w = sl.nm(torch.randn(32, 128), 2, 4).requires_grad_()
    torch.nn.functional.linear(torch.randn(3, 128), w.in_order("fragments")).sum().backward()
    assert w.grad is not None
    assert w.grad.inner_indices is w.inner_indices
