"""Attention in 8 bits: what it gains over 16 bits, and what it loses against them and float64."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

import sparse_layouts as sl
from benchmarks import attention_rivals as rivals
from benchmarks.attention_cases import CUDNN, Case, Causal, LocalStride, Window, rows_of
from benchmarks.attention_reference import kernel_of, places
from benchmarks.timing import Row, WrongResult, attempt, gpu_times, graphed, guarded_rows, selected
from sparse_layouts.kernels.block_attention_fp8 import OP
from sparse_layouts.measuring import dense_attention, relative_error

IN_16_BITS = "16 bits"
AND_QUANTISING = " and quantising"
CASES = (
    Case("FP8 stride block 64", LocalStride(16, 8), 2, 32, 8192, 128, 64),
    Case("FP8 stride block 128", LocalStride(8, 8), 2, 32, 8192, 128, 128),
    Case("FP8 stride 32768", LocalStride(16, 16), 1, 32, 32768, 128, 64),
    Case("FP8 dense causal", Causal(), 2, 32, 8192, 128, 128),
    Case("FP8 grouped heads", LocalStride(8, 8), 2, 32, 8192, 128, 128, kv_heads=8),
    Case("FP8 D 64", LocalStride(8, 8), 4, 16, 4096, 64, 128),
)
QUICK_CASES = (
    Case("FP8 stride", LocalStride(2, 4), 1, 4, 512, 64, 64),
    Case("FP8 tokens", Window(100), 1, 4, 512, 128, 128, kv_heads=2),
)
# The operands stand for numbers that are compared exactly; a kernel may round the probabilities to
# e4m3, to a sixteenth of each.
ALLOWED = 1 / 16


def names(quick: bool) -> list[str]:
    """The rows there are: attention alone, and with quantising q, k and v before it."""
    cases = QUICK_CASES if quick else CASES
    return [case.name + more for case in cases for more in ("", AND_QUANTISING)]


def run(
    only: Sequence[str],
    quick: bool,
    tell: Callable[[str], None],
    deadline: float = float("inf"),
    device: str = "cuda",
    rounds: int = 3,
    rep_ms: int = 60,
) -> Iterator[Row]:
    """The rows whose names contain one of `only`; past `deadline` the rest says so."""
    wanted = selected(names(quick), only)
    for case in QUICK_CASES if quick else CASES:
        own = [name for name in wanted if name in (case.name, case.name + AND_QUANTISING)]
        if own and time.monotonic() > deadline:
            yield from (Row(name, device, notes=["left out: no time left"]) for name in own)
        elif own:
            tell(case.name)
            measured = measure(case, own, device, rounds, rep_ms)
            yield from guarded_rows(case.name, device, measured)


def measure(
    case: Case, wanted: Sequence[str], device: str, rounds: int, rep_ms: int
) -> Iterator[Row]:
    """One case: checked, then timed in turns with 16 bits and dense attention."""
    given = rivals.operands(case, device)
    q, k, v = (t.detach() for t in given.leaves)
    mask = case.pattern.mask(case, device)

    def in_16_bits() -> Tensor:
        return sl.attention(q, k, v, mask)

    quantised = sl.quantize_fp8(q, k, v)

    def in_8_bits() -> Tensor:
        return sl.attention(*quantised, mask)

    def whole_way() -> Tensor:
        return sl.attention(*sl.quantize_fp8(q, k, v), mask)

    with sl.fallback("error"), sl.trace() as steps:
        out = in_8_bits()
    check(case, quantised, out)
    if not torch.equal(out, in_8_bits()):
        raise WrongResult(f"{case.name}: out differs in its bits between two runs")
    error, notes = losses(case, q, k, v, mask)

    variants: dict[str, Callable[[], Tensor]] = {
        case.name: in_8_bits,
        case.name + AND_QUANTISING: whole_way,
        IN_16_BITS: in_16_bits,
    }
    failed, dense = attempt(lambda: rivals.RIVALS[CUDNN](case, given, "forward", 0.0))
    if not failed:
        failed, _ = attempt(dense.run("forward"))
    if failed:
        notes.append(f"{CUDNN}: {failed}")
    else:
        variants[CUDNN] = dense.run("forward")
    times = gpu_times(variants, rounds=rounds, rep_ms=rep_ms)
    for name in wanted:
        row = Row(name, device, density=case.density(mask), error=error)
        row.timing, row.flop = times[name], case.flop(case.pairs(mask), "forward")
        row.rivals = {rival: times[rival] for rival in (IN_16_BITS, CUDNN) if rival in times}
        row.kernel = kernel_of(steps, OP)
        row.notes = [case.describe(), f"kernel {row.kernel}", *notes]
        if torch.device(device).type == "cuda":
            row.notes.append(in_graphs(variants, name, rounds, rep_ms))
        yield row


def in_graphs(
    variants: dict[str, Callable[[], Tensor]], name: str, rounds: int, rep_ms: int
) -> str:
    """8 and 16 bits without the Python on the way."""

    def capture(variant: str) -> Callable[[], None]:
        return graphed(lambda: variants[variant])

    failed, replays = attempt(lambda: {each: capture(each) for each in (name, IN_16_BITS)})
    if failed:
        return f"no CUDA graph: {failed}"
    mine, theirs = gpu_times(replays, rounds=rounds, rep_ms=rep_ms).values()
    return (
        f"in CUDA graphs {mine.median_s * 1e6:.0f} us, {theirs.median_s / mine.median_s:.2f}x "
        f"{IN_16_BITS}"
    )


def check(case: Case, quantised: tuple[sl.FP8Operand, ...], out: Tensor) -> None:
    """Raises :class:`WrongResult` unless `out` is attention of what the operands stand for."""
    exact = (t._replace(dtype=torch.float32).dequantize() for t in quantised)
    error = error_of(case, *exact, out)
    limit = ALLOWED + torch.finfo(out.dtype).eps
    if not error <= limit:
        raise WrongResult(
            f"{case.name}: relative error {error:.2e} against float64 on the same e4m3 operands, "
            f"at most {limit:.2e} is right"
        )


def error_of(case: Case, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> float:
    """The largest relative error against float64 over a few (sample, KV head) pairs."""
    errors = []
    for sample, kv_head in places(case):
        heads = range(kv_head * case.group, (kv_head + 1) * case.group)
        of_q = (slice(sample, sample + 1), slice(heads.start, heads.stop))
        of_k = (slice(sample, sample + 1), slice(kv_head, kv_head + 1))
        stored = rows_of(case, heads, str(q.device))
        exact = dense_attention(q[of_q], k[of_k], v[of_k], stored, causal=case.pattern.causal)[0]
        errors.append(relative_error(out[of_q], exact))
    return max(errors)


def losses(
    case: Case, q: Tensor, k: Tensor, v: Tensor, mask: sl.BSRTensor
) -> tuple[float, list[str]]:
    """The relative error in 8 bits against float64, and notes of it beside that of 16 bits, for
    these operands and for keys whose channels have a mean.
    """
    draw = torch.Generator(device=k.device).manual_seed(1)
    mean = torch.randn(k.shape[-1], device=k.device, generator=draw)
    found, notes = [], []
    for what, keys in (("normal keys", k), ("means of N(0, 9)", k + (3 * mean).to(k.dtype))):
        sixteen = sl.attention(q, keys, v, mask)
        smooth, plain = (
            sl.attention(*sl.quantize_fp8(q, keys, v, smooth_k=how), mask) for how in (True, False)
        )
        in_16, in_8, unsmoothed = (
            error_of(case, q, keys, v, out) for out in (sixteen, smooth, plain)
        )
        found.append(in_8)
        notes.append(
            f"{what}: error against float64 {in_8:.2%}, without smooth_k {unsmoothed:.2%}, in "
            f"{IN_16_BITS} {in_16:.2%}; against {IN_16_BITS} {relative_error(smooth, sixteen):.2%}"
        )
    return found[0], notes
