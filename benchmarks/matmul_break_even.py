"""The density below which a product of blocks is faster than cuBLAS's dense one, by block size."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.matmul_cases import Case, RandomBlocks, square
from benchmarks.matmul_rows import Product
from benchmarks.timing import Row
from sparse_layouts.dispatch.text import text_table

BLOCKS = (16, 32, 64, 128)
DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
QUICK_DENSITIES = (0.1, 0.9)
NAMES = {f"break-even block {block}": block for block in BLOCKS}


def case(block: int, density: float, edge: int) -> Case:
    """One point of a curve: an `edge` x `edge` matrix times another."""
    pattern = RandomBlocks(density)
    name = f"break-even block {block}, {density:.0%}"
    return Case(name, pattern, square(block), m=edge, k=edge, n=edge)


def point(row: Product) -> dict[str, Any]:
    """What a curve keeps of a row: density, and how many times faster than dense."""
    assert row.timing is not None
    (dense,) = row.ratios
    return {
        "density": row.density,
        "seconds": row.timing.median_s,
        "ratio": row.ratios[dense],
        "graph_ratio": row.graph_ratios.get(dense),
    }


def ratio_of(point: dict[str, Any]) -> float:
    """In a graph, where there is one."""
    return point["ratio"] if point["graph_ratio"] is None else point["graph_ratio"]


def break_even(points: Sequence[dict[str, Any]]) -> float | None:
    """The largest density at which the ratio crosses 1, between two points along log(ratio); None
    where it does not.
    """
    for low, high in reversed(list(itertools.pairwise(points))):
        a, b = math.log(ratio_of(low)), math.log(ratio_of(high))
        if a >= 0 > b:
            return low["density"] + (high["density"] - low["density"]) * a / (a - b)
    return None


def summary(name: str, device: str, rows: Sequence[Product]) -> Product:
    """The row of a block size: its break-even density is what is measured."""
    out = Product(name, device, unit="density")
    out.wrong = next((row.wrong for row in rows if row.wrong), "")
    timed = [row for row in rows if row.timing is not None and row.rivals]
    if out.wrong or not timed:
        out.notes += [note for row in rows for note in row.notes][-1:] or ["nothing was measured"]
        return out
    out.points = sorted(map(point, timed), key=lambda each: each["density"])
    out.kernel = ", ".join(dict.fromkeys(row.kernel for row in timed))
    out.measured = break_even(out.points)
    faster = [ratio_of(each) > 1 for each in out.points]
    curve = ", ".join(f"{each['density']:.0%} {ratio_of(each):.2f}x" for each in out.points)
    out.notes = [f"kernel {out.kernel}", f"over dense at a density of: {curve}"]
    if out.measured is None:
        what = (
            "faster" if all(faster) else "faster and slower by turns" if any(faster) else "slower"
        )
        out.notes.append(f"{what} at the densities that were measured")
    return out


def curves(rows: Sequence[Row]) -> list[Product]:
    """The rows that are curves."""
    return [row for row in rows if isinstance(row, Product) and row.points]


def table(rows: Sequence[Row]) -> str:
    """Ratios by density and block size, and where they cross 1; "" without a curve."""
    found = curves(rows)
    if not found:
        return ""
    labels = [f"{each['density']:.0%}" for each in max(found, key=lambda r: len(r.points)).points]
    head = ["times faster than dense at", *labels, "break-even"]
    lines = []
    for row in found:
        ratios = [f"{ratio_of(each):.2f}" for each in row.points]
        ratios += [""] * (len(labels) - len(ratios))
        even = "-" if row.measured is None else f"{row.measured:.0%}"
        lines.append([row.name.removeprefix("break-even "), *ratios, even])
    return text_table(head, lines)


def plot(rows: Sequence[Row], path: Path, title: str) -> str:
    """Draws the curves into `path` with .png and .svg; returns what was done, or why not."""
    found = curves(rows)
    if not found:
        return ""
    if importlib.util.find_spec("matplotlib") is None:
        return "no plot: matplotlib is not installed"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.axhline(1.0, color="0.5", linewidth=1)
    for row in found:
        densities = [100 * each["density"] for each in row.points]
        label = row.name.removeprefix("break-even ")
        if row.measured is not None:
            label += f": {row.measured:.0%}"
        axes.plot(densities, list(map(ratio_of, row.points)), marker="o", markersize=4, label=label)
    axes.set_yscale("log", base=2)
    low, high = axes.get_ylim()
    ticks = [2.0**power for power in range(-8, 9) if low <= 2.0**power <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlabel("stored blocks, %")
    axes.set_ylabel("times faster than cuBLAS dense")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(title="break-even", fontsize=9)
    written = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for file in written:
        figure.savefig(file, dpi=150)
    return "drawn: " + ", ".join(file.name for file in written)
