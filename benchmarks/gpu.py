"""Block layouts on a CUDA device against cuDNN, cuBLAS, FlexAttention, torch.sparse, dkernel.

Attention is causal local-stride in bf16; TFLOP/s are effective: 4 * D a stored pair forward, 2.5
times that backward. Backward is `torch.autograd.grad` on a retained graph. Ratios within one run
are what can be compared.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import sparse_layouts as sl
from benchmarks.timing import Row, check_error, gpu_times, guarded, selected
from sparse_layouts.measuring import dense_attention, relative_error

DTYPE = torch.bfloat16
OURS, DKERNEL = "sparse_layouts", "dkernel"


class AttentionCase(NamedTuple):
    """A causal local-stride pattern and the operands' sizes."""

    name: str
    batch: int
    heads: int
    seq_len: int
    head_dim: int
    block: int
    local: int
    stride: int


ATTENTION = [
    AttentionCase("A1", 2, 32, 8192, 128, 64, 16, 8),
    AttentionCase("A2", 2, 32, 8192, 128, 128, 8, 8),
    AttentionCase("A3", 1, 32, 32768, 128, 64, 16, 16),
    AttentionCase("A4", 4, 16, 4096, 64, 64, 8, 8),
]
QUICK_ATTENTION = [AttentionCase("A0", 1, 4, 1024, 64, 64, 4, 8)]
MATMUL_BLOCKS = (16, 32, 64, 128)
MATMUL_DENSITY = 0.25


class Effort(NamedTuple):
    """How often, how large."""

    rounds: int = 3
    rep_ms: int = 60
    matrix: int = 4096


QUICK = Effort(1, 5, 512)


def matmul_name(block: int) -> str:
    """The row's name."""
    return f"matmul 25% block {block}"


def names(quick: bool) -> list[str]:
    """The rows there are; attention has each forward and backward."""
    cases = QUICK_ATTENTION if quick else ATTENTION
    both = [f"{case.name} {direction}" for case in cases for direction in ("forward", "backward")]
    return [*both, *map(matmul_name, MATMUL_BLOCKS)]


def run(
    only: Sequence[str], quick: bool, tell: Callable[[str], None], deadline: float = float("inf")
) -> list[Row]:
    """The rows whose names contain one of `only`.

    Past `deadline` (of `time.monotonic`) the rest is left out, and its rows say so.
    """
    effort = QUICK if quick else Effort()
    wanted = selected(names(quick), only)
    rows: list[Row] = []
    ceiling = None
    for case in QUICK_ATTENTION if quick else ATTENTION:
        own = [d for d in ("forward", "backward") if f"{case.name} {d}" in wanted]
        if not own:
            continue
        if time.monotonic() > deadline:
            rows += [Row(f"{case.name} {d}", "cuda", notes=["left out: no time left"]) for d in own]
            continue
        ceiling = ceiling or cublas_flops(effort)
        rows += guarded(case.name, "cuda", attention, case, own, effort, ceiling, tell, deadline)
        torch.cuda.empty_cache()
    for block in MATMUL_BLOCKS:
        if matmul_name(block) not in wanted:
            continue
        if time.monotonic() > deadline:
            rows.append(Row(matmul_name(block), "cuda", notes=["left out: no time left"]))
            continue
        ceiling = ceiling or cublas_flops(effort)
        rows += guarded(matmul_name(block), "cuda", matmul, block, effort, ceiling, tell)
    return rows


def cublas_flops(effort: Effort) -> float:
    """FLOP/s of a dense bf16 product on this device, now: the ceiling that rows are held to."""
    n = effort.matrix
    a, b = (torch.randn(n, n, device="cuda", dtype=DTYPE) for _ in range(2))
    times = gpu_times({"cublas": lambda: a @ b}, rounds=1, rep_ms=effort.rep_ms)
    return 2.0 * n**3 / times["cublas"].median_s


# --- attention ------------------------------------------------------------------------------------


def stored_rows(
    case: AttentionCase, head: int, start: int, stop: int, device: str = "cuda"
) -> Tensor:
    """Rows start..stop of one head's dense mask, (rows, N), by the formula."""
    i = torch.arange(start, stop, device=device)[:, None]
    j = torch.arange(case.seq_len, device=device)[None]
    step = max(1, case.stride // case.heads)
    near = i // case.block - j // case.block < case.local
    return (j <= i) & (near | ((j // case.block + head * step) % case.stride == 0))


def check_attention(
    case: AttentionCase, found: Sequence[Tensor], q: Tensor, k: Tensor, v: Tensor, dout: Tensor
) -> tuple[float, float]:
    """The largest error of `found` (out, dq, dk, dv) in two heads, and dense torch's there.

    Raises :class:`WrongResult` if it is too large.
    """
    worst, worst_dense = 0.0, 0.0
    for b, h in ((0, 0), (case.batch - 1, case.heads - 1)):
        one = (slice(b, b + 1), slice(h, h + 1))

        def stored(start: int, stop: int, h: int = h) -> Tensor:
            return stored_rows(case, h, start, stop)

        given = (q[one], k[one], v[one], stored, dout[one])
        exact = dense_attention(*given, causal=True)
        dense = dense_attention(*given, causal=True, dtype=DTYPE)
        for what, f, e, d in zip(("out", "dq", "dk", "dv"), found, exact, dense, strict=True):
            error, dense_error = relative_error(f[one], e), relative_error(d, e)
            check_error(f"{case.name}, {what} of head {h}", error, dense_error, DTYPE)
            if error > worst:
                worst, worst_dense = error, dense_error
    return worst, worst_dense


def cudnn(case: AttentionCase) -> Callable[..., Tensor]:
    """Dense causal attention by cuDNN."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return attend


def flex_attention(case: AttentionCase) -> Callable[..., Tensor]:
    """FlexAttention, compiled, with blocks of 128 (its default) on the same pattern."""
    import torch._functorch.config
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as flex

    torch._functorch.config.donated_buffer = False  # the graph is retained
    torch._dynamo.reset()
    step = max(1, case.stride // case.heads)

    def stored(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        row, column = i // case.block, j // case.block
        return ((row - column < case.local) | ((column + h * step) % case.stride == 0)) & (i >= j)

    n = case.seq_len
    mask = create_block_mask(
        stored, None, case.heads, n, n, device="cuda", BLOCK_SIZE=128, _compile=True
    )
    compiled = torch.compile(flex, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def dkernel(case: AttentionCase) -> Callable[..., Tensor]:
    """https://github.com/linxihui/dkernel, if it is importable."""
    from dkernel import LocalStrideSparseAttention

    attend = LocalStrideSparseAttention(
        case.heads, case.seq_len, case.block, case.local, case.stride, seq_dim=2
    ).to("cuda")
    return lambda q, k, v: attend(q, k, v)


def attention(
    case: AttentionCase,
    directions: Sequence[str],
    effort: Effort,
    ceiling: float,
    tell: Callable[[str], None],
    deadline: float,
) -> list[Row]:
    """One pattern, forward and backward, against every rival that runs it."""
    draw = torch.Generator(device="cuda").manual_seed(0)
    shape = (case.batch, case.heads, case.seq_len, case.head_dim)
    q, k, v, dout = (
        torch.randn(shape, device="cuda", dtype=DTYPE, generator=draw) for _ in range(4)
    )
    leaves = [t.requires_grad_() for t in (q, k, v)]
    mask = sl.local_stride(
        case.seq_len,
        block_size=case.block,
        local_blocks=case.local,
        vert_stride=case.stride,
        num_heads=case.heads,
        device="cuda",
    )
    notes = [
        f"B {case.batch}, H {case.heads}, N {case.seq_len}, D {case.head_dim}, "
        f"block {case.block}, local {case.local}, stride {case.stride}"
    ]
    tell(f"{case.name}: comparing with float64")
    attend: dict[str, Callable[..., Tensor]] = {
        OURS: lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    }
    out = attend[OURS](q, k, v)
    found = (out.detach(), *torch.autograd.grad(out, leaves, dout))
    error, dense_error = check_attention(case, found, q, k, v, dout)
    # What computes the same pattern must agree with the checked result; cuDNN is dense.
    rivals: dict[str, Callable[[AttentionCase], Callable[..., Tensor]]] = {"cuDNN dense": cudnn}
    rivals["FlexAttention"] = flex_attention
    if importlib.util.find_spec("dkernel") is not None:
        rivals[DKERNEL] = dkernel
    else:
        notes.append("dkernel is not installed")
    for name, make in rivals.items():
        if time.monotonic() > deadline:
            notes.append(f"{name}: left out, no time left")
            continue
        tell(f"{case.name}: preparing {name}")
        failed, made = attempt(lambda make=make: prepared(make(case), leaves))
        if failed:
            notes.append(f"{name}: {failed}")
            continue
        function, theirs = made
        difference = relative_error(theirs, found[0])
        if name != "cuDNN dense" and not difference < 0.02:
            notes.append(f"{name}: left out, its output differs by {difference:.1e}")
            continue
        attend[name] = function
    del found, out
    rows = []
    pairs = 4.0 * case.head_dim * mask.nnz * case.batch
    for direction in directions:
        tell(f"{case.name}: timing {direction}")
        variants, own_notes = {}, list(notes)
        for name, function in attend.items():
            if direction == "forward":
                variants[name] = forward_of(function, leaves)
                continue
            failed, run_backward = attempt(lambda f=function: backward_of(f, leaves, dout))
            if failed:
                if name == OURS:
                    raise RuntimeError(f"{case.name}: backward failed: {failed}")
                own_notes.append(f"{name}: backward: {failed}")
            else:
                variants[name] = run_backward
        times = gpu_times(variants, rounds=effort.rounds, rep_ms=effort.rep_ms)
        row = Row(
            f"{case.name} {direction}", "cuda", density=mask.density_of_causal, notes=own_notes
        )
        row.flop = pairs * (1.0 if direction == "forward" else 2.5)
        row.timing = times.pop(OURS)
        row.rivals, row.ceiling_flops = times, ceiling
        row.error, row.dense_error = error, dense_error
        if DKERNEL in times:
            row.measured, row.bar = row.ratios[DKERNEL], 1.0
        rows.append(row)
    return rows


def attempt(function: Callable[[], Any]) -> tuple[str, Any]:
    """`("", result)`, or why it did not work and None.

    For rivals alone: they fail in ways of their own (compilers, out of memory, assertions), and a
    rival that does not run is a result, not an error.
    """
    try:
        return "", function()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0][:120]}", None


def prepared(
    function: Callable[..., Tensor], leaves: Sequence[Tensor]
) -> tuple[Callable[..., Tensor], Tensor]:
    """The function and what it gives, once compiled."""
    with torch.no_grad():
        out = function(*leaves)
    torch.cuda.synchronize()
    return function, out


def forward_of(function: Callable[..., Tensor], leaves: Sequence[Tensor]) -> Callable[[], Tensor]:
    """Forward without a graph."""

    def run() -> Tensor:
        with torch.no_grad():
            return function(*leaves)

    return run


def backward_of(
    function: Callable[..., Tensor], leaves: Sequence[Tensor], dout: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    """Backward alone, on a graph that is kept; run once here, so that what fails does so now."""
    out = function(*leaves)

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, dout, retain_graph=True)

    run()
    torch.cuda.synchronize()
    return run


# --- matmul ---------------------------------------------------------------------------------------


def matmul(block: int, effort: Effort, ceiling: float, tell: Callable[[str], None]) -> list[Row]:
    """A quarter of the blocks of an N x N matrix times an N x N one."""
    n, name = effort.matrix, matmul_name(block)
    draw = torch.Generator(device="cuda").manual_seed(0)
    grid = n // block
    kept = torch.zeros(grid * grid, dtype=torch.bool, device="cuda")
    order = torch.randperm(grid * grid, device="cuda", generator=draw)
    kept[order[: round(MATMUL_DENSITY * grid * grid)]] = True
    kept = kept.view(grid, grid).repeat_interleave(block, 0).repeat_interleave(block, 1)
    dense = torch.randn(n, n, device="cuda", generator=draw).to(DTYPE) * kept
    x = torch.randn(n, n, device="cuda", generator=draw).to(DTYPE)
    w = sl.bsr(dense, block)
    tell(f"{name}: comparing with float64")
    exact = dense.double() @ x.double()
    row = Row(name, "cuda", density=w.density, flop=2.0 * w.nnz * n, ceiling_flops=ceiling)
    row.error, row.dense_error = relative_error(w @ x, exact), relative_error(dense @ x, exact)
    check_error(name, row.error, row.dense_error, DTYPE)
    tell(f"{name}: timing")
    variants: dict[str, Callable[[], Any]] = {
        OURS: lambda: torch.matmul(w, x),
        "cuBLAS dense": lambda: torch.matmul(dense, x),
    }
    failed, theirs = attempt(lambda: torch_bsr(dense, block, x))
    if failed:
        row.notes.append(f"torch.sparse BSR: {failed}")
    else:
        variants["torch.sparse BSR"] = theirs
    times = gpu_times(variants, rounds=effort.rounds, rep_ms=effort.rep_ms)
    row.timing = times.pop(OURS)
    row.rivals = times
    return [row]


def torch_bsr(dense: Tensor, block: int, x: Tensor) -> Callable[[], Tensor]:
    """torch's own BSR product; run once here."""
    bsr = dense.to_sparse_bsr((block, block))

    def run() -> Tensor:
        return bsr @ x

    run()
    torch.cuda.synchronize()
    return run
