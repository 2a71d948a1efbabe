"""What attention costs beside its kernels: a call's Python, building a mask, compilations."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import sparse_layouts as sl
from benchmarks import attention_rivals as rivals
from benchmarks.attention_cases import CASES, Case, LocalStride
from benchmarks.attention_reference import check
from benchmarks.cpu import local_stride_entries
from benchmarks.timing import Row, WrongResult, attempt, guarded, host_time, selected
from sparse_layouts.dispatch.text import readable_bytes
from sparse_layouts.measuring import Timing, interleaved

TINY = Case("tiny", LocalStride(2, 4), 1, 2, 256, 64, 64)
A4 = next(case for case in CASES if case.name == "A4")
HOST = {"call tiny": TINY, "call A4": A4}
WITH_GRAD = " +grad"
HOST_BARS_US = {"": 40.0, WITH_GRAD: 80.0}
BUILD = "build local_stride 131072 cuda"
BUILD_BAR_MS = 3.0
COMPILATIONS = "compilations over 20 lengths"
LENGTHS = [1000 + 197 * i for i in range(20)]
QUICK_LENGTHS = [100, 297]
NAMES = [*(name + grad for name in HOST for grad in HOST_BARS_US), BUILD, COMPILATIONS]


def run(
    only: Sequence[str],
    quick: bool,
    tell: Callable[[str], None],
    deadline: float = float("inf"),
    device: str = "cuda",
) -> Iterator[Row]:
    """The rows whose names contain one of `only`; past `deadline` the rest says so."""
    for name in selected(NAMES, only):
        if time.monotonic() > deadline:
            yield Row(name, device, notes=["left out: no time left"])
            continue
        tell(name)
        if name == BUILD:
            made = guarded(name, device, build, quick, device)
        elif name == COMPILATIONS:
            made = guarded(name, device, compilations, quick, device)
        else:
            made = guarded(name, device, host, name, quick, device)
        for row in made:
            row.bar = None if quick else row.bar
            yield row


def host(name: str, quick: bool, device: str) -> list[Row]:
    """Microseconds of the CPU for a warm eager call of torch's function with a mask.

    With grad is the forward call that records a graph; what the backward call costs is a note.
    """
    with_grad = WITH_GRAD if name.endswith(WITH_GRAD) else ""
    case = TINY if quick else HOST[name.removesuffix(WITH_GRAD)]
    given = rivals.operands(case, device)
    variant = rivals.ours(case, given, case.pattern.mask(case, device))
    checked = check(case, given, variant)
    checked.sound()
    calls, rounds = (5, 2) if quick else (100, 15)
    row = Row(name, device, unit="us", bar=HOST_BARS_US[with_grad], notes=[case.describe()])
    if with_grad:
        row.timing = host_time(
            lambda: variant.attend(*variant.leaves), calls=calls, rounds=rounds, device=device
        )
        backward = host_time(
            variant.run("backward"), calls=calls // 2, rounds=rounds, device=device
        )
        row.notes.append(f"the backward call: {backward.median_s * 1e6:.3g} us")
    else:
        plain = [t.detach() for t in variant.leaves]
        row.timing = host_time(
            lambda: variant.attend(*plain), calls=calls, rounds=rounds, device=device
        )
    row.measured = row.timing.median_s * 1e6
    row.kernel = checked.kernels["forward"]
    row.error, row.dense_error = checked.errors["forward"]
    row.notes.append("the smallest of the rounds' medians, the queue empty before each round")
    return [row]


def build(quick: bool, device: str) -> list[Row]:
    """A mask of 131072 tokens and 32 heads on the device, ready to be used."""
    n, repeats = (4096, 3) if quick else (131072, 25)
    block, local, stride, heads = 64, 16, 16, 32

    def make(seq_len: int = n) -> sl.LocalStrideTensor:
        return sl.local_stride(
            seq_len,
            block_size=block,
            local_blocks=local,
            vert_stride=stride,
            num_heads=heads,
            device=device,
        )

    mask, expected = make(), local_stride_entries(n, block, local, stride, heads)
    if mask.nnz != expected:
        raise WrongResult(f"{BUILD}: {mask.nnz} stored entries, the formula has {expected}")
    row = Row(BUILD, device, unit="ms", bar=BUILD_BAR_MS, density=mask.density_of_causal)
    row.timing = interleaved({"": make}, repeats=repeats, device=device)[""]
    row.measured = row.timing.median_s * 1e3
    row.notes.append(
        f"N {n}, {heads} heads, block {block}, local {local}, stride {stride}: "
        f"{readable_bytes(mask.nbytes)}"
    )
    if not quick:
        failed, times = attempt(lambda: against_flex(make, LocalStride(local, stride), device))
        row.notes.append(
            f"FlexAttention's create_block_mask: {failed}"
            if failed
            else "N 32768: {:.3g} ms, FlexAttention's create_block_mask, compiled and warm, "
            "{:.3g} ms".format(*(t.median_s * 1e3 for t in times))
        )
    return [row]


def against_flex(
    make: Callable[[int], Any], pattern: LocalStride, device: str
) -> tuple[Timing, Timing]:
    """The mask of 32768 tokens, and FlexAttention's of the same pattern."""
    from torch.nn.attention.flex_attention import create_block_mask

    case = Case("", pattern, 1, 32, 32768, 128, 64)
    entry = pattern.entry(case, device)

    def stored(b: Any, h: Any, i: Any, j: Any) -> Any:
        return entry(h, i, j)

    def theirs() -> Any:
        n = case.seq_len
        return create_block_mask(stored, None, case.heads, n, n, device=device, _compile=True)

    times = interleaved(
        {"ours": lambda: make(case.seq_len), "theirs": theirs}, repeats=5, device=device
    )
    return times["ours"], times["theirs"]


def compilations(quick: bool, device: str) -> list[Row]:
    """How often Triton compiles for 20 lengths, each compared with float64."""
    counts: list[int] = []
    lengths = QUICK_LENGTHS if quick else LENGTHS
    with compiled() as count:
        for n in lengths:
            case = Case(f"N {n}", LocalStride(4, 8), 1, 4, n, 128, 64)
            given = rivals.operands(case, device)
            check(case, given, rivals.ours(case, given, case.pattern.mask(case, device))).sound()
            counts.append(count())
    row = Row(COMPILATIONS, device, unit="compilations", measured=float(counts[-1]))
    row.notes.append(
        f"N {lengths[0]} to {lengths[-1]}: {counts[0]} at the first length, "
        f"{counts[-1] - counts[0]} at the {len(counts) - 1} others"
    )
    return [row]


@contextmanager
def compiled() -> Iterator[Callable[[], int]]:
    """Counts what Triton compiles or takes from its cache on disk; 0 without Triton."""
    seen = 0
    if not rivals.installed("triton"):
        yield lambda: seen
        return
    import triton

    before = triton.knobs.compilation.listener

    def listener(**what: Any) -> None:
        nonlocal seen
        seen += 1
        if before is not None:
            before(**what)

    triton.knobs.compilation.listener = listener
    try:
        yield lambda: seen
    finally:
        triton.knobs.compilation.listener = before
