"""The kernels on blocks that compute densely in scratch memory: any blocks, whatever else could
take them; in pieces of bounded size; NaN stays in the rows that read it; when they are chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sparse_layouts as sl
from sparse_layouts.block_pattern import dense_counts
from sparse_layouts.dispatch import Facts, choose
from sparse_layouts.dispatch.kernel_table import verdicts
from sparse_layouts.kernels import block_matmul, scratch_products, sddmm
from sparse_layouts.kernels.products import sixteenths_fact
from sparse_layouts.kernels.scratch_products import ScratchMatrices
from tests.kernels.accuracy import check_call
from tests.kernels.cases import (
    MATMUL_CASES,
    SDDMM_CASES,
    BlockCase,
    Stored,
    build_block_matmul,
    build_sddmm,
    make_pattern,
    random_source,
)
from tests.rounding import assert_close

# numpy warns where a GPU computes on, by IEEE's rules
AS_ON_A_GPU = "ignore:(divide by zero|invalid value|overflow) encountered:RuntimeWarning"
on_both = pytest.mark.parametrize(
    "device",
    [
        pytest.param(
            "cpu", marks=(pytest.mark.interpreter, pytest.mark.filterwarnings(AS_ON_A_GPU))
        ),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
BUILD = {"block_matmul": build_block_matmul, "sddmm": build_sddmm}
CASES = {"block_matmul": MATMUL_CASES, "sddmm": SDDMM_CASES}


def kernel(op: str) -> Callable[..., Tensor]:
    """The row of an op."""
    if op == "block_matmul":
        from sparse_layouts.kernels.block_matmul import triton_dense_scratch as matmul

        return matmul.block_matmul
    from sparse_layouts.kernels.sddmm import triton_dense_scratch

    return triton_dense_scratch.sddmm


# blocks that other kernels take as well, which the kernel suite gives to those alone
BESIDE_OTHERS = [
    pytest.param(op, case, id=f"{op}-{case.name}")
    for op, cases in CASES.items()
    for case in cases
    if case.small and min(case.stored.block) >= 16 and max(case.stored.shape) < 300
]


@on_both
@pytest.mark.parametrize(("op", "case"), BESIDE_OTHERS)
def test_blocks_that_other_kernels_take(
    op: str, case: BlockCase, device: str, poisoned_empty: None
) -> None:
    call = BUILD[op](case, torch.float32, device)
    check_call(op, call, kernel(op)(*call.args, **call.kwargs))


IN_PIECES = [
    BlockCase("rows_of_7", Stored((101, 90), (1, 7), 2), batch=2, width=20),
    BlockCase("fives", Stored((103, 88), (5, 5), 2, tiles=True), batch=3, share=True, flip=True),
    BlockCase("sixteens", Stored((250, 40), (16, 16)), batch=2, width=33, dense="mT", bias=True),
    BlockCase("many_small", Stored((24, 20), (8, 4), 5, blocks="gaps"), batch=4, poison=True),
]


@on_both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", IN_PIECES, ids=lambda case: case.name)
@pytest.mark.parametrize("op", BUILD)
def test_in_many_pieces(
    op: str,
    case: BlockCase,
    dtype: torch.dtype,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    poisoned_empty: None,
) -> None:
    taken: list[int] = []
    take = ScratchMatrices.take

    def counted(self: ScratchMatrices, *shape: int) -> Tensor:
        made = take(self, *shape)
        taken.append(self.buffer.nbytes)
        return made

    budget = 4000 * dtype.itemsize
    monkeypatch.setattr(ScratchMatrices, "take", counted)
    monkeypatch.setattr(scratch_products, "SCRATCH_BYTES", budget)
    call = BUILD[op](case, dtype, device)
    check_call(op, call, kernel(op)(*call.args, **call.kwargs))
    assert len(taken) > 1, "one piece"
    assert max(taken) <= budget


# --- NaN and infinities of x ----------------------------------------------------------------------

POISONED = [
    BlockCase("rows_of_32", Stored((41, 130), (1, 32), 2), batch=2, width=70),
    BlockCase("fives", Stored((63, 88), (5, 5)), width=150, flip=True, dense="mT"),
    BlockCase("sixteens", Stored((80, 96), (16, 16), 2, transposed=True), share=True, batch=2),
    BlockCase("bias_relu", Stored((75, 96), (24, 8), blocks="gaps"), bias=True, activation="relu"),
]


@on_both
@pytest.mark.parametrize("what", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("case", POISONED, ids=lambda case: case.name)
def test_a_row_is_untouched_by_what_it_does_not_read(
    case: BlockCase, what: float, device: str, poisoned_empty: None
) -> None:
    call = build_block_matmul(case, torch.float32, device)
    values, pattern, x = call.args
    clean = kernel("block_matmul")(*call.args, **call.kwargs)
    poisoned = x.clone()
    places = [(7, 3), (30, 3), (31, case.width - 1)]
    touched = torch.zeros_like(clean, dtype=torch.bool)
    read = dense_counts(pattern._replace(lead=(pattern.num_patterns,))) != 0  # (P, M, K)
    for k, n in places:
        poisoned[..., k, n] = what
        touched[..., n] |= read[:, :, k]
    got = kernel("block_matmul")(values, pattern, poisoned, **call.kwargs)
    assert touched.any()
    assert (~touched[..., 3]).any()
    assert_close(got[~touched], clean[~touched])
    if case.activation is None:
        assert not got[touched].isfinite().any()


@on_both
def test_infinities_of_stored_values_are_kept(device: str, poisoned_empty: None) -> None:
    case = BlockCase("infinite", Stored((40, 35), (5, 5)), width=20)
    values, pattern, x = build_block_matmul(case, torch.float32, device).args
    values[0, 3, 2, 1], values[0, 5, 0, 4] = torch.inf, torch.nan
    got = kernel("block_matmul")(values, pattern, x)
    from sparse_layouts.kernels.block_matmul import reference

    expected = reference.block_matmul(values, pattern, x)
    assert_close(got, expected)
    assert expected.isinf().any()
    assert expected.isnan().any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.gpu
def test_a_cuda_graph_captures_it() -> None:
    w = sl.bsr(torch.randn(200, 300, device="cuda"), (1, 20), keep=sl.Magnitude(0.3))
    x = torch.randn(300, 50, device="cuda")
    with sl.kernel_choice(block_matmul="dense_scratch"):
        expected = w @ x
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = w @ x
    graph.replay()
    assert torch.equal(got, expected)


# --- the choice -----------------------------------------------------------------------------------


def on_hopper(**changes: Any) -> Facts:
    usual: dict[str, Any] = {
        "capability": (9, 0),
        "triton": (3, 6, 0),
        "block_size": (16, 16),
        "columns": 4096,
        "tma": True,
    }
    return Facts("cuda", changes.pop("dtype", torch.bfloat16), **{**usual, **changes})


def chosen(op: str, facts: Facts) -> str:
    row = choose(op, facts)
    assert row is not None
    return row.name


@pytest.mark.parametrize("op", BUILD)
@pytest.mark.parametrize("block", [(1, 32), (32, 1), (5, 5), (24, 24), (8, 8), (16, 8), (1, 1)])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("columns", [1, 4096])
def test_blocks_that_no_other_kernel_takes(
    op: str,
    block: tuple[int, int],
    capability: tuple[int, int],
    dtype: torch.dtype,
    columns: int,
) -> None:
    facts = on_hopper(block_size=block, capability=capability, dtype=dtype, columns=columns)
    assert chosen(op, facts) == "dense_scratch"


LEAST = {
    "block_matmul": {16: 3, 32: 7, 64: 17, 128: 17},
    "sddmm": {16: 3, 32: 5, 64: 17, 128: 17},
}


@pytest.mark.parametrize("op", BUILD)
@pytest.mark.parametrize("edge", [16, 32, 64, 128])
def test_from_the_density_on_at_which_cublas_wins(op: str, edge: int) -> None:
    for sixteenths in range(17):
        facts = on_hopper(block_size=(edge, edge), sixteenths=sixteenths)
        dense = sixteenths >= LEAST[op][edge]
        other = "hopper" if edge >= 64 else "triton"
        assert chosen(op, facts) == ("dense_scratch" if dense else other)


WHY_NOT: dict[str, tuple[dict[str, Any], str]] = {
    "sparse": ({"sixteenths": 1}, "/16 of a large matrix are stored in blocks of 16 rows, here it"),
    "large blocks": ({"block_size": (128, 64)}, "not known to be the faster one for blocks of 128"),
    "few columns": ({"columns": 1024}, "for 2048 or more columns of the dense operand, not for"),
    "older GPU": ({"capability": (8, 0)}, "only where it was measured, in float16 and bfloat16 at"),
    "float32": ({"dtype": torch.float32}, "only where it was measured, in float16 and bfloat16"),
    "integers": ({"dtype": torch.int32}, "takes float16, bfloat16, float32 and float64"),
}


@pytest.mark.parametrize("op", BUILD)
@pytest.mark.parametrize("name", WHY_NOT)
def test_why_not(op: str, name: str) -> None:
    changes, reason = WHY_NOT[name]
    facts = on_hopper(**{"sixteenths": 8, **changes})
    answer = next(v for v in verdicts(op, facts) if v.kernel.name == "dense_scratch")
    assert answer.reason is not None
    assert reason in answer.reason


def test_how_much_is_stored() -> None:
    what = Stored((2048, 2048), (64, 64), blocks="all")
    p = make_pattern(what, random_source("all"))
    assert sixteenths_fact(p) == 16
    half = p._replace(col_indices=p.col_indices[: p.num_blocks // 2])  # counts alone are read
    assert sixteenths_fact(half) == 8
    assert sixteenths_fact(p._replace(shape=(2047, 2048))) == 0
    over_the_edge = make_pattern(what._replace(shape=(2050, 2050)), random_source("over"))
    assert sixteenths_fact(over_the_edge) == 16
    x = torch.empty(1, 1, 2048, 3000)
    values = torch.empty(1, p.num_blocks, 64, 64)
    assert block_matmul.facts(values, p, x).sixteenths == 16
    assert sddmm.facts(x[..., :2048], x[..., :2048], p).columns == 2048


def test_explain_names_it_and_says_why_not() -> None:
    x = torch.randn(60, 8, requires_grad=True)
    w = sl.bsr(torch.randn(40, 60), (1, 20), keep=sl.Magnitude(0.3)).requires_grad_()
    said = sl.explain(torch.matmul, w, x).on_gpu((8, 0), (3, 6, 0))
    taken = [v.kernel.name for plan in said.ops for v in plan.verdicts if v.chosen]
    assert taken == ["dense_scratch"] * 3
    square = sl.bsr(torch.randn(64, 64), 16, keep=sl.Magnitude(0.3))
    said = sl.explain(torch.matmul, square, torch.randn(64, 100)).on_gpu((9, 0), (3, 6, 0))
    assert said.kernel == "triton"
    reasons = {v.kernel.name: v.reason for v in said.ops[0].verdicts}
    assert "only where it was measured" in str(reasons["dense_scratch"])
    assert "dense_scratch" in str(said)
