"""Block layouts on the CPU against dense torch: attention, matmul, call overhead, building.

Sizes and bars are those of the project's goals. Every result is compared with float64 first. Dense
attention is `scaled_dot_product_attention(is_causal=True)` without a mask, dense matmul is
`torch.matmul`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_layouts as sl
from benchmarks.timing import Row, WrongResult, check_error, guarded, microseconds, selected
from sparse_layouts.dispatch import choose
from sparse_layouts.kernels import block_matmul
from sparse_layouts.measuring import dense_attention, interleaved, relative_error

LOCAL, STRIDE = 4, 8


class Effort(NamedTuple):
    """How large and how often."""

    seq_len: int = 4096
    heads: int = 8
    matrix: int = 4096
    columns: int = 512
    repeats: int = 15
    calls: int = 100
    rounds: int = 41
    build_len: int = 131072


QUICK = Effort(512, 4, 512, 64, 3, 5, 3, 4096)


class AttentionCase(NamedTuple):
    """A row of attention."""

    name: str
    block: int
    dtype: torch.dtype
    backward: bool
    bar: float


ATTENTION = [
    AttentionCase("attention fp32 block 64", 64, torch.float32, False, 2.7),
    AttentionCase("attention fp32 block 16", 16, torch.float32, False, 1.2),
    AttentionCase("attention fp32 block 32", 32, torch.float32, False, 2.4),
    AttentionCase("attention fp32 block 128", 128, torch.float32, False, 3.3),
    AttentionCase("attention bf16 block 64", 64, torch.bfloat16, False, 3.8),
    AttentionCase("attention fp32 block 64 +gradients", 64, torch.float32, True, 2.2),
]
MATMUL = [
    ("matmul fp32 block 64", torch.float32, 4.5),
    ("matmul bf16 block 64", torch.bfloat16, 3.5),
]
OVERHEAD = {
    "call without grad": 60.0,
    "call with grad": 100.0,
    "explain": 1000.0,
}
BUILD = "build local_stride 131072"
BUILD_BAR_MS = 200.0
NAMES = [*(c.name for c in ATTENTION), *(n for n, _, _ in MATMUL), *OVERHEAD, BUILD]


def local_stride_rows(
    start: int,
    stop: int,
    seq_len: int,
    block: int,
    local: int,
    stride: int,
    heads: Sequence[int],
    step: int,
) -> Tensor:
    """Rows start..stop of the dense mask (heads, rows, N), by the pattern's formula alone."""
    i, j = torch.arange(start, stop)[:, None], torch.arange(seq_len)[None]
    own = [
        (j <= i) & ((i // block - j // block < local) | ((j // block + h * step) % stride == 0))
        for h in heads
    ]
    return torch.stack(own)


def local_stride_entries(seq_len: int, block: int, local: int, stride: int, heads: int) -> int:
    """Stored entries of the causal pattern over all heads, a multiple of `stride` of them."""
    grid = seq_len // block
    j = torch.arange(grid)
    total = 0
    for residue in range(stride):  # heads h and h + stride are equal
        strided = ((j + residue) % stride == 0).long().cumsum(0)
        before = torch.where(j >= local, strided[(j - local).clamp(min=0)], 0)
        full = before.sum() + torch.minimum(j + 1, torch.tensor(local)).sum() - grid
        total += int(full) * block * block + grid * (block * (block + 1) // 2)
    return total * (heads // stride)


def run(only: Sequence[str], quick: bool, tell: Callable[[str], None]) -> list[Row]:
    """The rows whose names contain one of `only` (all without any)."""
    effort = QUICK if quick else Effort()
    names = selected(NAMES, only)
    rows: list[Row] = []
    cases = [c for c in ATTENTION if c.name in names]
    for dtype, backward in dict.fromkeys((c.dtype, c.backward) for c in cases):
        group = [c for c in cases if (c.dtype, c.backward) == (dtype, backward)]
        rows += guarded(group[0].name, "cpu", attention, group, dtype, backward, effort, tell)
    for name, dtype, bar in MATMUL:
        if name in names:
            rows += guarded(name, "cpu", matmul, name, dtype, bar, effort, tell)
    wanted = [name for name in OVERHEAD if name in names]
    if wanted:
        made = guarded("call overhead", "cpu", overhead, effort, tell)
        rows += [row for row in made if row.name in wanted or row.wrong]
    if BUILD in names:
        rows += guarded(BUILD, "cpu", build, effort, tell)
    if quick:
        for row in rows:
            row.bar = None  # bars are for full sizes
    return rows


def attention(
    cases: Sequence[AttentionCase],
    dtype: torch.dtype,
    backward: bool,
    effort: Effort,
    tell: Callable[[str], None],
) -> list[Row]:
    """Rows of one dtype and direction, all timed in turns with one dense baseline."""
    n, heads, d = effort.seq_len, effort.heads, 64
    draw = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(1, heads, n, d, generator=draw).to(dtype) for _ in range(4))

    def attend(**how: Any) -> tuple[Tensor, ...]:
        if not backward:
            return (F.scaled_dot_product_attention(q, k, v, **how),)
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = F.scaled_dot_product_attention(*leaves, **how)
        return (out.detach(), *torch.autograd.grad(out, leaves, dout))

    rows, variants = [], {"dense causal": lambda: attend(is_causal=True)}
    for case in cases:
        mask = sl.local_stride(
            n, block_size=case.block, local_blocks=LOCAL, vert_stride=STRIDE, num_heads=heads
        )
        row = Row(case.name, "cpu", density=mask.density_of_causal, bar=case.bar)
        row.flop = 4.0 * d * mask.nnz * (3.5 if backward else 1)
        tell(f"{case.name}: comparing with float64")
        two = [0, heads - 1]

        def stored(
            start: int, stop: int, case: AttentionCase = case, two: list[int] = two
        ) -> Tensor:
            step = max(1, STRIDE // heads)
            return local_stride_rows(start, stop, n, case.block, LOCAL, STRIDE, two, step)

        few = [t[:, two] for t in (q, k, v, dout)]
        given = (few[0], few[1], few[2], stored, few[3] if backward else None)
        exact = dense_attention(*given, causal=True)
        dense = dense_attention(*given, causal=True, dtype=dtype)
        found = [t[:, two] for t in attend(attn_mask=mask)]
        for what, f, e, t in zip(("out", "dq", "dk", "dv"), found, exact, dense, strict=False):
            error, dense_error = relative_error(f, e), relative_error(t, e)
            check_error(f"{case.name}, {what}", error, dense_error, dtype)
            if row.error is None or error > row.error:
                row.error, row.dense_error = error, dense_error
        variants[case.name] = lambda mask=mask: attend(attn_mask=mask)
        rows.append(row)
    tell(f"timing {', '.join(variants)}")
    times = interleaved(variants, repeats=effort.repeats)
    for row in rows:
        row.timing, row.rivals = times[row.name], {"dense causal": times["dense causal"]}
        row.measured = row.ratios["dense causal"]
    return rows


def matmul(
    name: str, dtype: torch.dtype, bar: float, effort: Effort, tell: Callable[[str], None]
) -> list[Row]:
    """A matrix of which a tenth of the 64 x 64 blocks is stored, times a dense one."""
    n, block, share = effort.matrix, 64, 0.1
    draw = torch.Generator().manual_seed(0)
    dense = torch.randn(n, n, generator=draw).to(dtype)
    grid = n // block
    where = torch.randperm(grid * grid, generator=draw)[: round(share * grid * grid)]
    kept = torch.zeros(grid * grid, dtype=torch.bool)
    kept[where] = True
    kept = kept.view(grid, grid).repeat_interleave(block, 0).repeat_interleave(block, 1)
    dense = torch.where(kept, dense, 0)
    w = sl.bsr(dense, block)
    x = torch.randn(n, effort.columns, generator=draw).to(dtype)
    tell(f"{name}: comparing with float64")
    exact = dense.double() @ x.double()
    row = Row(name, "cpu", density=w.density, bar=bar, flop=2.0 * w.nnz * effort.columns)
    row.error, row.dense_error = relative_error(w @ x, exact), relative_error(dense @ x, exact)
    check_error(name, row.error, row.dense_error, dtype)
    tell(f"timing {name}")
    times = interleaved(
        {"sparse": lambda: torch.matmul(w, x), "dense": lambda: torch.matmul(dense, x)},
        repeats=2 * effort.repeats,
    )
    row.timing, row.rivals = times["sparse"], {"dense": times["dense"]}
    row.measured = row.ratios["dense"]
    return [row]


def overhead(effort: Effort, tell: Callable[[str], None]) -> list[Row]:
    """What `torch.matmul` on a tiny layout costs over its kernel's launcher, and `explain`."""
    draw = torch.Generator().manual_seed(0)
    blocks = torch.zeros(16)
    blocks[torch.randperm(16, generator=draw)[:8]] = 1
    kept = blocks.view(4, 4).repeat_interleave(16, 0).repeat_interleave(16, 1)
    dense = torch.randn(64, 64, generator=draw) * kept
    w, x = sl.bsr(dense, 16), torch.randn(64, 8, generator=draw)
    w_grad, x_grad = w.detach().requires_grad_(), x.clone().requires_grad_()
    values, pattern, operand = w.values()[None], w.block_pattern, x[None, None]
    kernel = choose(block_matmul.OP, block_matmul.facts(values, pattern, operand))
    assert kernel is not None
    launcher = kernel.function

    def launch() -> Tensor:
        return launcher(values, pattern, operand, transposed_output=False)

    exact, dense_error = (
        dense.double() @ x.double(),
        relative_error(dense @ x, dense.double() @ x.double()),
    )
    for what, found in (
        ("torch.matmul", w @ x),
        ("with grad", w_grad @ x_grad),
        ("launcher", launch()[0, 0]),
    ):
        check_error(
            f"call overhead, {what}", relative_error(found.detach(), exact), dense_error, x.dtype
        )
    tell("timing calls on a tiny layout")
    times = microseconds(
        {
            "launcher": launch,
            "call without grad": lambda: torch.matmul(w, x),
            "call with grad": lambda: torch.matmul(w_grad, x_grad),
            "explain": lambda: sl.explain(torch.matmul, w, x),
        },
        calls=effort.calls,
        repeats=effort.rounds,
    )
    rows = []
    for name, bar in OVERHEAD.items():
        row = Row(name, "cpu", unit="us", bar=bar, timing=times[name], density=w.density)
        row.measured = times[name].median_s * 1e6
        if name != "explain":
            row.rivals = {"launcher": times["launcher"]}
            row.measured -= times["launcher"].median_s * 1e6
            row.notes.append("the call less what calling the kernel's launcher takes")
        rows.append(row)
    return rows


def build(effort: Effort, tell: Callable[[str], None]) -> list[Row]:
    """The local-stride pattern of 131072 tokens for 32 heads, in O(stored blocks)."""
    n, block, heads, local, stride = effort.build_len, 64, 32, 16, 16

    def make() -> sl.LocalStrideTensor:
        return sl.local_stride(
            n, block_size=block, local_blocks=local, vert_stride=stride, num_heads=heads
        )

    tell(f"{BUILD}: counting")
    mask, expected = make(), local_stride_entries(n, block, local, stride, heads)
    if mask.nnz != expected:
        raise WrongResult(f"{BUILD}: {mask.nnz} stored entries, the formula has {expected}")
    tell(f"timing {BUILD}")
    timing = interleaved({"build": make}, repeats=effort.repeats)["build"]
    row = Row(
        BUILD, "cpu", unit="ms", bar=BUILD_BAR_MS, density=mask.density_of_causal, timing=timing
    )
    row.measured = timing.median_s * 1e3
    return [row]
