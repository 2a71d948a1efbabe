"""A row of products: its times by eager calls and in CUDA graphs, its rates, what bounds it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks import report
from benchmarks.gpu import OURS, Effort, copied_bytes, cublas_flops
from benchmarks.matmul_cases import BSR, CSR, DENSE, OUR_DSD, REORDERED, TRITON, Bar
from benchmarks.matmul_variants import Variant, float32_as
from benchmarks.timing import Row, attempt, gpu_times, graphed
from sparse_layouts.measuring import Timing

SHORT = {
    DENSE: "dense",
    BSR: "BSR",
    CSR: "CSR",
    TRITON: "Triton",
    OUR_DSD: "dsd",
    REORDERED: "reordered",
}
HEAD = ("row", "density", "call", "graph", "rate", "ceiling", "against", "bar", "holds")
# so many times the L2's bytes of weights take turns in a graph
TIMES_L2, FEWEST_COPIES, MOST_COPIES = 3, 4, 16
LONG_S = 5e-3  # a rival's call that takes longer: what a graph saves does not matter


FULL = Effort(rep_ms=20)


@dataclasses.dataclass
class Product(Row):
    """A row whose `timing` and `rivals` are eager calls, `graph` and `graph_rivals` those of CUDA
    graphs, a call.

    `moved` counts the bytes that have to be read and written; the ceilings are of this device and
    run. `in_graph`: the bar is of the graphs' times. `points`: what a curve is drawn from;
    `memory`: bytes of training, by whose they are.
    """

    moved: float | None = None
    ceiling_bytes: float | None = None
    graph_rivals: dict[str, Timing] = dataclasses.field(default_factory=dict)
    in_graph: bool = False
    aim: float | None = None
    points: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    memory: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)

    @property
    def graph_ratios(self) -> dict[str, float]:
        """Rival -> how many times faster this row is in a graph."""
        if self.graph is None:
            return {}
        return {name: t.median_s / self.graph.median_s for name, t in self.graph_rivals.items()}

    @property
    def best(self) -> Timing | None:
        """The time in a graph, where there is one: the kernel's, without the Python on the way."""
        return self.graph or self.timing

    @property
    def floor_s(self) -> tuple[float, float] | None:
        """The seconds that the work takes at the ceilings of arithmetic and of memory."""
        if not (self.flop and self.moved and self.ceiling_flops and self.ceiling_bytes):
            return None
        return self.flop / self.ceiling_flops, self.moved / self.ceiling_bytes

    @property
    def by_bytes(self) -> bool:
        """Whether memory bounds the row, and not arithmetic."""
        return self.floor_s is not None and self.floor_s[1] > self.floor_s[0]

    @property
    def of_ceiling(self) -> float | None:
        """The share of the ceiling that bounds the row."""
        if self.floor_s is None or self.best is None:
            return None
        return max(self.floor_s) / self.best.median_s

    @property
    def bytes_rate(self) -> float | None:
        """Bytes a second."""
        return None if self.best is None or not self.moved else self.moved / self.best.median_s

    def as_json(self) -> dict[str, Any]:
        """The row with what follows from it."""
        out = super().as_json()
        each = self.graph_rivals.items()
        out["graph_rivals"] = {n: {**t._asdict(), "spread": t.spread} for n, t in each}
        out |= {
            "graph_ratios": self.graph_ratios,
            "of_ceiling": self.of_ceiling,
            "bytes_rate": self.bytes_rate,
            "bound_by": None if self.floor_s is None else "bytes" if self.by_bytes else "flops",
        }
        return out


# --- measuring ------------------------------------------------------------------------------------


class Ceilings:
    """What the device does at best, measured when first asked for."""

    def __init__(self, device: str, effort: Effort) -> None:
        self.device, self.effort = device, effort
        self.found: dict[Any, float] = {}

    def flops(self, dtype: torch.dtype, tf32: bool = False) -> float:
        """FLOP/s of a dense product."""
        if (dtype, tf32) not in self.found:
            with float32_as(tf32):
                self.found[dtype, tf32] = cublas_flops(self.effort, dtype, self.device)
        return self.found[dtype, tf32]

    def bytes_rate(self) -> float:
        """Bytes a second of a copy, read and written."""
        if "copy" not in self.found:
            self.found["copy"] = copied_bytes(self.effort, self.device)
        return self.found["copy"]


def copies_of(weight_bytes: float, device: str) -> int:
    """So many weights that the L2 cannot hold those that take turns, within bounds."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    copies = math.ceil(TIMES_L2 * l2 / max(1.0, weight_bytes))
    return min(MOST_COPIES, max(FEWEST_COPIES, copies))


def captured(make: Callable[[], Callable[[], Any]]) -> Callable[[], None]:
    """`graphed(make)`, on the current stream again also after a capture that fails: torch then
    leaves its own one current.
    """
    with torch.cuda.stream(torch.cuda.current_stream()):
        return graphed(make)


def graph_times(
    makers: Mapping[str, Callable[[], Callable[[], Any]]],
    calls: int,
    effort: Effort,
    notes: list[str],
) -> dict[str, Timing]:
    """The time of one of the `calls` calls in each CUDA graph; `notes` says which had none."""
    replays = {}
    for name, make in makers.items():
        failed, replay = attempt(lambda make=make: captured(make))
        if failed:
            notes.append(f"{name}: no CUDA graph: {failed}")
        else:
            replays[name] = replay
    times = gpu_times(replays, rounds=effort.rounds, rep_ms=effort.rep_ms)
    return {
        name: Timing(t.median_s / calls, t.low_s / calls, t.high_s / calls, t.repeats)
        for name, t in times.items()
    }


def time_row(
    row: Product,
    variants: Mapping[str, Variant],
    effort: Effort,
    graph: bool,
    weight_bytes: float,
) -> None:
    """Times this library and its rivals in turns: eager calls with a cold L2, then graphs in which
    weights take turns.
    """
    every = {name: variant.run for name, variant in variants.items()}
    times = gpu_times(every, rounds=effort.rounds, rep_ms=effort.rep_ms)
    row.timing = times.pop(OURS)
    row.rivals = times
    if not graph:
        return
    copies = copies_of(weight_bytes, row.device)
    short = [name for name in variants if name == OURS or times[name].median_s < LONG_S]
    makers = {name: variants[name].turns(copies) for name in short}
    take_graphs(row, graph_times(makers, copies, effort, row.notes))
    row.notes.append(f"in graphs {copies} weights take turns")


def take_graphs(row: Product, times: dict[str, Timing]) -> None:
    """The times in graphs, with those of the rivals."""
    row.graph = times.pop(OURS, None)
    row.graph_rivals = times


def hold_to_bar(row: Product, bar: Bar | None) -> None:
    """Sets the bar, and what is measured for it where its rival ran."""
    if bar is None:
        return
    row.bar, row.over, row.aim, row.in_graph = bar.ratio, bar.over, bar.aim, bar.graph
    row.measured = (row.graph_ratios if bar.graph else row.ratios).get(bar.over)


def ceilings_of(rows: Sequence[Row]) -> str:
    """ "Ceilings: copy 4.2 TB/s; cuBLAS 740 TFLOP/s in bfloat16, ..." of the rows."""
    own = [row for row in rows if isinstance(row, Product) and row.ceiling_bytes]
    if not own:
        return ""
    rates = sorted({row.ceiling_flops or 0.0 for row in own}, reverse=True)
    text = ", ".join(f"{rate / 1e12:.3g}" for rate in rates)
    copy = (own[0].ceiling_bytes or 0.0) / 1e12
    return f"Ceilings: a copy {copy:.3g} TB/s; cuBLAS {text} TFLOP/s, by dtype."


# --- printing -------------------------------------------------------------------------------------


def bar_of(row: Product) -> str:
    """ ">= 2.5x BSR (aim 3.5)"."""
    if row.bar is None:
        return ""
    text = f">= {row.bar:g}x {SHORT.get(row.over, row.over)}"
    text += " in graphs" if row.in_graph else ""
    return text + (f" (aim {row.aim:g})" if row.aim else "")


def rate_of(row: Product) -> str:
    """ "401 TFLOP/s", with "3900 GB/s" where bytes bound the row."""
    if row.best is None or not row.flop:
        return ""
    text = f"{row.flop / row.best.median_s / 1e12:.3g} TFLOP/s"
    if row.by_bytes and row.bytes_rate:
        text += f", {row.bytes_rate / 1e9:.0f} GB/s"
    return text


def against(row: Product) -> str:
    """ "2.61x (2.90x) BSR": by eager calls, and in graphs."""
    parts = []
    for name in dict.fromkeys((*row.ratios, *row.graph_ratios)):
        eager, graph = row.ratios.get(name), row.graph_ratios.get(name)
        text = "-" if eager is None else f"{eager:.2f}x"
        text += "" if graph is None else f" ({graph:.2f}x)"
        parts.append(f"{text} {SHORT.get(name, name)}")
    return ", ".join(parts)


def cells(row: Row) -> list[str]:
    """A row by `HEAD`, in one line."""
    assert isinstance(row, Product)
    if row.wrong or (row.timing is None and row.measured is None):
        text = f"WRONG: {row.wrong}" if row.wrong else "; ".join(row.notes[-1:])
        return [row.name, *[""] * 5, text[:90], "", "no" if row.wrong else ""]
    if row.timing is None:  # a curve
        return [row.name, *[""] * 5, f"{row.measured:.0%} of the blocks", "", ""]
    share = row.of_ceiling
    return [
        row.name,
        "" if row.density is None else f"{row.density:.1%}",
        report.time_of(row),
        "" if row.graph is None else report.in_unit(row.graph.median_s),
        rate_of(row),
        "" if share is None else f"{share:.0%}",
        against(row),
        bar_of(row),
        report.holds_of(row),
    ]
