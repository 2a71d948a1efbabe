"""Operands of products that are copied first, because small blocks would read them in short pieces,
or because Hopper's copy engine cannot read them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_layouts.kernels import operand_copies
from sparse_layouts.kernels.operand_copies import relaid
from tests.kernels.accuracy import check_call
from tests.kernels.cases import (
    BlockCase,
    Call,
    Stored,
    build_block_matmul,
    build_sddmm,
)

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
