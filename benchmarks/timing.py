"""A row of a benchmark, its bar, and its times: interleaved medians, with the spread."""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_layouts.measuring import Timing, interleaved, synchronize

# A kernel may err at most this many times what dense torch errs in the same dtype, plus a few eps.
TIMES_DENSE, MORE_EPS = 2.0, 4.0
# Operands that are read as tf32 are cut off by Triton, and rounded by cuBLAS. The error of a cut is
# uniform in [0, u] of the entry, that of a rounding in [-u/2, u/2]; of a product of two entries the
# root of the mean square is u sqrt(7/6) and u sqrt(1/6).
TIMES_TF32 = 7**0.5


class WrongResult(Exception):
    """A result differs from float64 by more than its dtype explains: its time is not measured."""


@dataclasses.dataclass
class Row:
    """One measured line.

    `measured` and `bar` are in `unit`: "x" a ratio (at least the bar) to the rival that `over`
    names or else the first one, a unit of time (at most the bar). `rivals` holds their times and
    `ratios` how many times faster this is. `flop` counts the stored part of the work, `share` is
    its rate over that of `share_of`, and `graph` the time in a CUDA graph.
    """

    name: str
    device: str
    unit: str = "x"
    density: float | None = None
    timing: Timing | None = None
    rivals: dict[str, Timing] = dataclasses.field(default_factory=dict)
    flop: float | None = None
    measured: float | None = None
    bar: float | None = None
    error: float | None = None
    dense_error: float | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    ceiling_flops: float | None = None
    wrong: str = ""
    over: str = ""
    share: float | None = None
    share_of: str = ""
    graph: Timing | None = None
    kernel: str = ""

    @property
    def ratios(self) -> dict[str, float]:
        """Rival -> how many times faster this row is."""
        if self.timing is None:
            return {}
        return {name: t.median_s / self.timing.median_s for name, t in self.rivals.items()}

    @property
    def flops(self) -> float | None:
        """Floating point operations a second, of the stored part."""
        if self.timing is None or self.flop is None:
            return None
        return self.flop / self.timing.median_s

    @property
    def holds(self) -> bool | None:
        """Whether the bar holds; None without a bar or a measurement."""
        if self.bar is None or self.measured is None:
            return None
        return self.measured >= self.bar if self.unit == "x" else self.measured <= self.bar

    def as_json(self) -> dict[str, Any]:
        """The row with what follows from it."""
        out = dataclasses.asdict(self)
        out["timing"] = (
            None if self.timing is None else {**self.timing._asdict(), "spread": self.timing.spread}
        )
        out["rivals"] = {n: {**t._asdict(), "spread": t.spread} for n, t in self.rivals.items()}
        out["graph"] = None if self.graph is None else self.graph._asdict()
        out |= {"ratios": self.ratios, "flops": self.flops, "holds": self.holds}
        return out


def check_error(
    what: str, error: float, dense_error: float, dtype: torch.dtype, *, tf32: bool = False
) -> None:
    """Raises :class:`WrongResult` for NaN, or more than twice dense torch's error and some eps."""
    times = TIMES_DENSE * (TIMES_TF32 if tf32 else 1.0)
    limit = times * dense_error + MORE_EPS * torch.finfo(dtype).eps
    if not error <= limit:
        raise WrongResult(
            f"{what}: relative error {error:.2e} against float64; "
            f"dense torch in {dtype} has {dense_error:.2e}, so at most {limit:.2e} is right"
        )


def guarded_rows(name: str, device: str, rows: Iterator[Row]) -> Iterator[Row]:
    """The rows as they come, then one that says what went wrong: others are still worth measuring.

    That is so for every exception; of one that is no :class:`WrongResult`, stderr has the trace.
    """
    try:
        yield from rows
    except WrongResult as error:
        yield Row(name, device, wrong=str(error))
    except Exception as error:
        traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0]
        yield Row(name, device, wrong=f"{type(error).__name__}: {first}")


def guarded(name: str, device: str, measure: Callable[..., list[Row]], *args: Any) -> list[Row]:
    """`measure(*args)`, or a row that says what went wrong, as :func:`guarded_rows`."""

    def rows() -> Iterator[Row]:
        yield from measure(*args)

    return list(guarded_rows(name, device, rows()))


def attempt(function: Callable[[], Any]) -> tuple[str, Any]:
    """`("", result)`, or why it did not work and None.

    For rivals alone: they fail in ways of their own (compilers, out of memory, assertions), and a
    rival that does not run is a result, not an error.
    """
    try:
        return "", function()
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        return f"{type(error).__name__}: {lines[0][:120]}", None


def forward_of(function: Callable[..., Tensor], leaves: Sequence[Tensor]) -> Callable[[], Tensor]:
    """Forward without a graph."""

    def run() -> Tensor:
        with torch.no_grad():
            return function(*leaves)

    return run


def backward_of(
    function: Callable[..., Tensor], leaves: Sequence[Tensor], dout: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    """Backward alone, on a graph that is kept, of leaves that no other graph has: theirs may live
    on another stream, which a capture cannot wait for.
    """
    own = [leaf.detach().requires_grad_(leaf.requires_grad) for leaf in leaves]
    out = function(*own)

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, own, dout, retain_graph=True)

    return run


def per_call(function: Callable[[], Any], calls: int) -> Callable[[], None]:
    """A variant of `calls` calls, for what takes microseconds."""

    def run() -> None:
        for _ in range(calls):
            function()

    return run


def microseconds(
    variants: Mapping[str, Callable[[], Any]], *, calls: int, repeats: int
) -> dict[str, Timing]:
    """The time of one call of each variant, measured `calls` at a time, in turns."""
    each = interleaved({n: per_call(f, calls) for n, f in variants.items()}, repeats=repeats)
    return {
        name: Timing(t.median_s / calls, t.low_s / calls, t.high_s / calls, t.repeats)
        for name, t in each.items()
    }


def host_time(function: Callable[[], Any], *, calls: int, rounds: int, device: str) -> Timing:
    """What a warm call costs the CPU: the smallest of the rounds' medians over single calls.

    A round begins with an empty queue, and `calls` are few enough that it never fills: a call then
    returns when its launches are queued, and the device's own time is not in it.
    """
    for _ in range(3):
        function()
    medians = []
    collects = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            synchronize(device)
            seconds = []
            for _ in range(calls):
                begin = time.perf_counter_ns()
                function()
                seconds.append((time.perf_counter_ns() - begin) / 1e9)
            medians.append(statistics.median(seconds))
    finally:
        if collects:
            gc.enable()
        synchronize(device)
    return Timing(min(medians), min(medians), max(medians), rounds)


def graphed(make: Callable[[], Callable[[], Any]]) -> Callable[[], None]:
    """Replays `make()`'s call as a CUDA graph: its kernels without the Python on the way.

    `make` is called on the stream that is captured, because backward runs on its forward's.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run = make()
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = run()
    alive = (run, kept)  # what the graph reads and writes

    def replay() -> None:
        assert alive
        graph.replay()

    return replay


def gpu_times(
    variants: Mapping[str, Callable[[], Any]], *, rounds: int, rep_ms: int, warmup_ms: int = 10
) -> dict[str, Timing]:
    """Triton's `do_bench` medians (cold L2), a few rounds over all variants in turns."""
    from triton.testing import do_bench

    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            ms = do_bench(run, warmup=warmup_ms, rep=rep_ms, return_mode="median")
            seconds[name].append(ms / 1e3)
    return {name: Timing.of(each) for name, each in seconds.items()}


def selected(names: Sequence[str], only: Sequence[str]) -> list[str]:
    """Those of `names` that contain one of the `only`; all without any."""
    return [n for n in names if not only or any(part in n for part in only)]
