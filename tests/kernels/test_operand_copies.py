"""Operands of products that are copied first, because small blocks would read them in short pieces,
or because Hopper's copy engine cannot read them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sparse_layouts as sl
from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.dispatch import Facts, choose
from sparse_layouts.kernels import block_matmul, operand_copies, sddmm
from sparse_layouts.kernels.operand_copies import engine_readable, reads_well, relaid
from sparse_layouts.kernels.products import tma_readable
from tests.kernels.accuracy import check_call
from tests.kernels.cases import (
    BlockCase,
    Call,
    Stored,
    build_block_matmul,
    build_sddmm,
    laid_out,
    make_pattern,
    random_source,
)
from tests.kernels.test_product_recall import linear
from tests.kernels.test_recall import on_hopper

BUILD = {"block_matmul": build_block_matmul, "sddmm": build_sddmm}


on_both = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.interpreter),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)


# --- short pieces ---------------------------------------------------------------------------------


@on_both
@pytest.mark.parametrize("op", BUILD)
@pytest.mark.parametrize("expanded", [False, True])
def test_operands_in_short_pieces_are_copied_once(
    op: str, expanded: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparse_layouts.kernels.block_matmul import triton_block_matmul
    from sparse_layouts.kernels.sddmm import triton_sddmm

    monkeypatch.setattr(operand_copies, "READS_WORTH_A_COPY", 2)
    module: Any = triton_block_matmul if op == "block_matmul" else triton_sddmm
    monkeypatch.setattr(module, "MANY", 24)
    seen: list[tuple[Tensor, Tensor]] = []

    def noted(operand: Tensor, *args: int) -> Tensor:
        seen.append((operand, relaid(operand, *args)))
        return seen[-1][1]

    monkeypatch.setattr(module, "relaid", noted)
    how = "mT" if op == "block_matmul" else "plain"
    case = BlockCase("small", Stored((96, 80), (16, 16), 2), batch=3, width=32, dense=how)
    args = list(BUILD[op](case, torch.float16, device).args)
    which = 2 if op == "block_matmul" else 1
    if expanded:
        args[which] = args[which][:1, :1].expand(args[which].shape)
    call = Call(tuple(args), {"transposed_output": False} if op == "block_matmul" else {})
    check_call(op, call, getattr(module, op)(*call.args, **call.kwargs))
    ((before, after),) = seen
    assert torch.equal(before, after)
    contiguous = -1 if op == "block_matmul" else -2
    assert before.stride(contiguous) != 1
    assert after.stride(contiguous) == 1
    storage = after.untyped_storage().nbytes() // after.element_size()
    assert storage == after[0, 0].numel() * (1 if expanded else 6)


def test_what_is_not_copied() -> None:
    by_rows = torch.zeros(2, 3, 64, 48, dtype=torch.bfloat16)
    by_columns = by_rows.mT
    assert relaid(by_columns, -1, 16, 18) is not by_columns
    assert relaid(by_columns, -1, 16, 17) is by_columns  # read too seldom
    assert relaid(by_columns, -1, 32, 99) is by_columns  # in pieces that are long enough
    assert relaid(by_columns, -2, 16, 99) is by_columns
    assert relaid(by_rows, -1, 16, 99) is by_rows
    assert relaid(by_rows[..., ::2], -2, 16, 99).stride(-1) == 2  # neither way
    single = torch.zeros(1, 1, 48, 64).mT
    assert relaid(single, -1, 16, 99) is single  # 64 bytes


# --- what the copy engine cannot read -------------------------------------------------------------

# matrices (2, 3, 64, 48) of 16-bit numbers, and whether the copy engine reads them
LYING: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "by rows": (lambda x: x, True),
    "by columns": (lambda x: laid_out(x, "mT"), True),
    "expanded": (lambda x: x[:1, :1].expand(2, 3, -1, -1), True),
    "gaps in rows": (lambda x: laid_out(x, "step"), False),
    "gaps in columns": (lambda x: laid_out(x.mT, "step").mT, False),
    "gaps, expanded": (lambda x: laid_out(x, "step")[:, :1].expand_as(x), False),
    "odd address": (lambda x: laid_out(x, "offset"), False),
    "odd rows": (lambda x: x[..., :45].contiguous(), False),
    "one number": (lambda x: x[:1, :1, :1, :1].expand_as(x), False),
    "one row": (lambda x: laid_out(x, "expand_2"), False),
    "one column": (lambda x: laid_out(x, "expand_3"), False),
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("how", LYING)
def test_copies_are_readable(how: str, device: str) -> None:
    lay, is_readable = LYING[how]
    x = lay(torch.randn(2, 3, 64, 48, device=device).half())
    copy = engine_readable(x)
    assert tma_readable(x) == is_readable
    assert (copy is x) == is_readable
    assert tma_readable(copy)
    assert torch.equal(copy, x)
    if not is_readable:
        assert (copy.stride(-2) == 1) == (how == "gaps in columns")
        repeated = [step == 0 for step in x.stride()[:2]]
        assert [step == 0 for step in copy.stride()[:2]] == repeated


def test_blocks_of_values_are_copied_one_by_one() -> None:
    values = torch.ones(1, 1, 1, 1).expand(2, 5, 64, 64)
    copy = engine_readable(values, 1)
    assert tma_readable(copy)
    assert copy.stride() == (0, 64 * 64, 64, 1)


def test_copies_that_pay() -> None:
    x = torch.zeros(1, 1, 64, 48, dtype=torch.float16)
    gaps = laid_out(x, "step")
    assert reads_well(x, 0)
    assert reads_well(gaps, 256)
    assert not reads_well(gaps, 255)
    assert not reads_well(gaps[:, :, :0], 256)  # holds nothing


def facts_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes facts those of a GPU of compute capability 9.0, but for the device's name."""
    for module in (block_matmul, sddmm):
        monkeypatch.setattr(module, "capability_of", lambda device: (9, 0))


def chosen(op: str, facts: Facts) -> str:
    row = choose(op, facts._replace(device="cuda", capability=(9, 0), triton=(3, 6, 0)))
    assert row is not None
    return row.name


@pytest.mark.parametrize("how", ["step", "offset"])
def test_products_of_copies_run_on_hopper(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    facts_on_hopper(monkeypatch)
    stored = Stored((512, 512), (64, 64), blocks="all")
    p = make_pattern(stored, random_source("copies"))
    flat = make_pattern(stored._replace(shape=(192, 512)), random_source("copies"))
    values = torch.zeros(1, 64, 64, 64, dtype=torch.bfloat16)
    x = torch.zeros(1, 1, 512, 512, dtype=torch.bfloat16)
    strange = laid_out(x, how)

    def of(values: Tensor, x: Tensor, pattern: BlockPattern = p) -> str:
        return chosen("block_matmul", block_matmul.facts(values, pattern, x))

    assert of(values, x) == of(values, strange) == of(values, strange[..., :128]) == "hopper"
    assert of(values, strange[..., :64]) == "hopper_few_columns"
    assert of(laid_out(values, how), strange) == "hopper"
    assert of(laid_out(values, how), x[..., :128]) == "triton"  # too few columns for copied values
    assert of(values, strange[..., :32]) == "triton_few_columns"
    assert of(values, strange[..., :500]) == "triton"  # its result cannot be written
    assert of(values[:, :24], strange, flat) == "triton"  # 192 rows: too few for a copied x
    assert of(values[:, :24], x, flat) == "hopper"

    def sampled(a: Tensor, b: Tensor, pattern: BlockPattern = p) -> str:
        return chosen("sddmm", sddmm.facts(a, b, pattern))

    assert sampled(x, x) == sampled(strange, x) == sampled(x, strange) == "hopper"
    assert sampled(x[..., :192, :], strange, flat) == "triton"
    assert sampled(strange[..., :192, :], x, flat) == "hopper"


def test_explain_looks_at_the_operands_of_each_product(monkeypatch: pytest.MonkeyPatch) -> None:
    facts_on_hopper(monkeypatch)
    w = sl.bsr(torch.randn(1024, 1024, dtype=torch.bfloat16), 64, keep=sl.Random(0.5))
    w.requires_grad_()

    def named(function: Any, *args: Any) -> dict[str, str]:
        plans = sl.explain(function, *args).ops
        return {plan.purpose: chosen(plan.op, plan.facts) for plan in plans}

    x = torch.randn(1024, 300, dtype=torch.bfloat16, requires_grad=True)  # rows of 600 bytes
    assert named(torch.matmul, w, x) == {
        "forward": "triton",  # such rows cannot be written
        "gradient of the dense operand": "triton",
        "gradient of the layout's values": "hopper",  # they are copied to be read
    }
    assert named(torch.matmul, w, x.detach()[:, :296].requires_grad_()) == {
        "forward": "hopper",
        "gradient of the dense operand": "hopper",
        "gradient of the layout's values": "hopper",
    }
    b = x.detach().mT.contiguous().requires_grad_()
    assert named(sl.sddmm, x, b, w.pattern) == {
        "forward": "hopper",
        "gradient of a": "triton",
        "gradient of b": "hopper",
    }


def test_launches_with_a_copy_are_not_settled() -> None:
    pytest.importorskip("triton")
    from sparse_layouts.kernels.block_matmul import hopper_block_matmul, hopper_few_columns
    from sparse_layouts.kernels.sddmm import hopper_sddmm

    p = make_pattern(Stored((128, 128), (64, 64), blocks="all"), random_source("settled"))
    x = torch.zeros(1, 1, 128, 128, dtype=torch.bfloat16)
    values = torch.zeros(1, 4, 64, 64, dtype=torch.bfloat16)
    for module in (hopper_block_matmul, hopper_few_columns):
        assert module.prepared(values, p, laid_out(x, "step"), x, None) is None
    assert hopper_block_matmul.prepared(laid_out(values, "offset"), p, x, x, None) is None
    assert hopper_sddmm.prepared(x, laid_out(x, "step"), p, values) is None
    assert hopper_sddmm.prepared(laid_out(x, "offset"), x, p, values) is None


@on_hopper
@pytest.mark.parametrize("how", ["step", "offset", "steps along columns"])
def test_a_strange_operand_gives_what_a_contiguous_one_gives(how: str, device: str) -> None:
    dense = torch.randn(1024, 512, device=device, dtype=torch.bfloat16)
    w = sl.bsr(dense, 64, keep=sl.Random(0.5))
    x = torch.randn(512, 512, device=device, dtype=torch.bfloat16)
    a = torch.randn(1024, 512, device=device, dtype=torch.bfloat16)

    def strange(x: Tensor) -> Tensor:
        return laid_out(x.mT, "step").mT if how == "steps along columns" else laid_out(x, how)

    with sl.kernel_choice(block_matmul="hopper", sddmm="hopper"):
        expected = w @ x, linear(w, x), sl.sddmm(a, x, w.pattern).values()
    x, a = strange(x), strange(a)
    for _ in range(3):  # later ones might be recalled
        with sl.trace() as trace:
            got = w @ x, linear(w, x), sl.sddmm(a, x, w.pattern).values()
        assert all(map(torch.equal, got, expected))
        assert [step.kernel for step in trace.steps] == ["hopper"] * 3
        assert torch.equal(w @ x, expected[0])
        assert torch.equal(sl.sddmm(a, x, w.pattern).values(), expected[2])
    assert sl.explain(torch.matmul, w, x).kernel == "hopper"
    assert sl.explain(sl.sddmm, a, x, w.pattern).kernel == "hopper"
    compiled = torch.compile(lambda w, x: w @ x, fullgraph=True, backend="aot_eager")(w, x)
    assert torch.equal(compiled, expected[0])
    assert compiled.stride() == expected[0].stride()


@on_hopper
def test_gradients_of_a_sum_are_those_of_ones(device: str) -> None:
    w = sl.bsr(
        torch.randn(1024, 1024, device=device, dtype=torch.bfloat16), 64, keep=sl.Random(0.5)
    )
    w = w.detach().requires_grad_()
    x = torch.randn(1024, 512, device=device, dtype=torch.bfloat16, requires_grad=True)
    out = w @ x
    expected = torch.autograd.grad(out, (w, x), torch.ones_like(out))
    with sl.trace() as trace:
        got = torch.autograd.grad((w @ x).sum(), (w, x))  # the gradient is one number, expanded
    assert torch.equal(got[0].values(), expected[0].values())
    assert torch.equal(got[1], expected[1])
    assert {step.kernel for step in trace.steps} == {"hopper"}


@on_hopper
def test_a_contiguous_operand_with_odd_rows(device: str) -> None:
    mask = sl.bsr_mask(torch.ones(16, 9, dtype=torch.bool, device=device), 64, shape=(1024, 516))
    w = mask.sample(torch.randn(1024, 516, device=device, dtype=torch.bfloat16))
    x = torch.randn(300, 516, device=device, dtype=torch.bfloat16)
    by_columns = x.mT.contiguous().mT  # steps of 300: neither
    padded = torch.nn.functional.pad(x, (0, 4))[:, :516]
    expected = linear(w, padded)
    for _ in range(3):  # contiguous: such calls are recalled where they can be
        assert torch.equal(linear(w, x), expected)
        assert torch.equal(linear(w, by_columns), expected)
    assert sl.explain(torch.nn.functional.linear, x, w).kernel == "hopper"


@pytest.mark.parametrize("columns", [1, 64, 128])
def test_tiles_are_no_wider_than_x(columns: int) -> None:
    pytest.importorskip("triton")
    from sparse_layouts.kernels.block_matmul.hopper_block_matmul import tile_columns

    for row_tiles in (1, 99, 128, 5000):
        assert tile_columns(columns, row_tiles, 132) == 128


def test_whole_tiles_where_they_keep_the_processors_busy() -> None:
    pytest.importorskip("triton")
    from sparse_layouts.kernels.block_matmul.hopper_block_matmul import tile_columns

    assert [tile_columns(256, rows, 132) for rows in (98, 99, 128)] == [128, 256, 256]
    assert [tile_columns(512, rows, 132) for rows in (49, 50)] == [128, 256]
