"""`sl.roofline`: how near a measured call comes to what the machine, or the density, allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sparse_layouts.dispatch.faces import name_of
from sparse_layouts.dispatch.fallback import layouts_in
from sparse_layouts.dispatch.settings import fallback
from sparse_layouts.measuring import interleaved
from sparse_layouts.viewing import figures
from sparse_layouts.viewing.benchmark_results import Result, named, read_results
from sparse_layouts.viewing.extras import needed
from sparse_layouts.viewing.measured import machine_limits
from sparse_layouts.viewing.work import work_of


def roofline(
    op: str | Callable[..., Any] = "",
    *args: Any,
    results: str | Path | Iterable[str | Path] | None = None,
    title: str | None = None,
    **kwargs: Any,
) -> Any:
    """Draws measured calls below the roof that bounds them, and returns the matplotlib figure.

    With a name, such as `roofline("matmul")` or `"forward"`, of the benchmark results whose names
    contain its words (all without one): left, the rate of the stored part of the work over the
    density, below the ceiling of dense products measured in the same run; right, how many times
    faster than dense, below 1/density, which is all that skipping work can give. `results` is a
    file or folder of JSON that `make bench` wrote; by default that of a source checkout.

    With a function and operands, `roofline(torch.matmul, w, x)`, of that call, measured now on this
    machine with dense operands beside it: its rate over its FLOP per byte, below the measured rate
    of a dense product and the measured bandwidth.

    Raises `ModuleNotFoundError` with the pip command without matplotlib (extra `viz`),
    `FileNotFoundError` where there are no results, `ValueError` for files that hold none or a name
    that no row has, `NotImplementedError` for a function whose work is not known.

    >>> import torch, sparse_layouts as sl
    >>> w = sl.bsr(torch.randn(256, 256), 32, keep=sl.Magnitude(0.25))
    >>> sl.roofline(torch.matmul, w, torch.randn(256, 64)).axes[0].get_xlabel()
    'FLOP for every byte moved'
    """
    needed("matplotlib", "roofline")
    if callable(op):
        return _of_call(op, args, kwargs, title)
    if not isinstance(op, str):
        raise TypeError(f"roofline: expected a name or a function, got {type(op).__name__}")
    if args or kwargs:
        raise TypeError("roofline: operands go with a function, not with the name of results")
    every = read_results(results)
    rows = [r for r in named(every, op) if r.drawn]
    if not rows:
        known = ", ".join(sorted({r.name for r in every if r.density}))
        raise ValueError(f"roofline: no result with a density is called {op!r}; there are {known}")
    return _of_results(rows, title or f"Benchmark results{f': {op}' if op else ''}")


# --- of benchmark results -------------------------------------------------------------------------


def _of_results(rows: list[Result], title: str) -> Any:
    figure = figures.new_figure("roofline", 11.0, 5.6)
    rates, gains = figure.subplots(1, 2)
    densities = [row.density for row in rows if row.density]
    low, high = min(densities) / 1.5, min(1.0, max(densities) * 1.5)
    by_place: dict[str, list[Result]] = {}
    for row in rows:
        by_place.setdefault(row.where, []).append(row)
    rate_points, gain_points = [], []
    for number, (where, own) in enumerate(by_place.items()):
        colour = figures.COLOURS[number % len(figures.COLOURS)]
        how = {
            "color": colour,
            "marker": figures.MARKERS[number % len(figures.MARKERS)],
            "linestyle": "none",
            "label": where,
        }
        here = [Point(r.density, r.flops / 1e9, r.name) for r in own if r.density and r.flops]
        rates.plot([p.x for p in here], [p.y for p in here], **how)
        rate_points += here
        ceiling = max((r.ceiling_flops for r in own if r.ceiling_flops), default=None)
        if ceiling:
            label = f"dense product, measured in the same run: {ceiling / 1e12:,.0f} TFLOP/s"
            rates.axhline(ceiling / 1e9, color=colour, linestyle="--", linewidth=1, label=label)
            rate_points.append(Point(high, ceiling / 1e9, ""))
        here = [Point(r.density, r.over_dense, r.name) for r in own if r.density and r.over_dense]
        gains.plot([p.x for p in here], [p.y for p in here], **how)
        gain_points += here
    steps = [low * (high / low) ** (i / 63) for i in range(64)]
    roof = {"color": "0.3", "linewidth": 1, "label": "1 / density: all work skipped"}
    gains.plot(steps, [1 / d for d in steps], **roof)
    gains.axhline(1, color="0.6", linewidth=1, linestyle=":", label="as fast as dense")
    if not gain_points:
        gains.text(0.5, 0.5, "no row has a dense rival", transform=gains.transAxes, ha="center")
    for axes, points, name in (
        (rates, rate_points, "GFLOP/s of the stored part"),
        (gains, [*gain_points, Point(1, 1, ""), Point(1, 1 / low, "")], "times faster than dense"),
    ):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(low, max(high, low * 2))
        axes.set_xlabel("density: stored share of the entries")
        axes.set_ylabel(name)
        if points:
            _whole_decades(axes, [p.y for p in points])
            _name(axes, [p for p in points if p.name])
    rates.set_title("Rate", fontsize="medium")
    gains.set_title("Speed-up", fontsize="medium")
    named_lines: dict[str, Any] = {}
    for axes in (rates, gains):
        lines, labels = axes.get_legend_handles_labels()
        named_lines |= dict(zip(labels, lines, strict=True))
    figure.legend(
        named_lines.values(), named_lines, loc="outside lower center", fontsize="small", ncols=2
    )
    figure.suptitle(title)
    return figure


class Point(NamedTuple):
    """A place in a panel and what stands beside it."""

    x: float
    y: float
    name: str


def _whole_decades(axes: Any, ys: list[float]) -> None:
    low = math.floor(math.log10(min(ys) * 0.999))
    high = math.ceil(math.log10(max(ys) * 1.001))
    axes.set_ylim(10.0**low, 10.0**high)


def _name(axes: Any, points: list[Point]) -> None:
    """Names beside the points, right or left, where they cover no other name or point."""
    taken: list[tuple[float, float, float]] = []  # left, right, bottom, in shares of the axes
    to_axes = axes.transData + axes.transAxes.inverted()
    places = [to_axes.transform((point.x, point.y)) for point in points]

    def free(left: float, right: float, bottom: float) -> bool:
        clear = all(
            right < px - 0.012 or px + 0.012 < left or abs(py - bottom) > 0.03 for px, py in places
        )
        apart = all(right < at or end < left or abs(bottom - b) > 0.032 for at, end, b in taken)
        return left >= 0 and right <= 1 and clear and apart

    for point, (x, y) in zip(points, places, strict=True):
        length = 0.0125 * len(point.name)
        for start, offset, side in ((x + 0.014, 5, "left"), (x - 0.014 - length, -5, "right")):
            if not free(start, start + length, y):
                continue
            taken.append((start, start + length, y))
            axes.annotate(
                point.name,
                (point.x, point.y),
                xytext=(offset, 2),
                ha=side,
                textcoords="offset points",
                fontsize="x-small",
                color="0.3",
            )
            break


# --- of a call, measured now ----------------------------------------------------------------------


def _of_call(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], title: str | None
) -> Any:
    work = work_of(function, *args, **kwargs)
    (layout,) = layouts_in(args) + layouts_in(kwargs)
    operands = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
    dtype = next(t.dtype for t in operands if t.dtype.is_floating_point)
    figure = figures.new_figure("roofline", 6.5, 5.0)

    def densely(value: Any) -> Any:
        return dense if value is layout else value

    with fallback("allow"), torch.no_grad():
        dense = layout.to_dense()
        times = interleaved(
            {
                "layout": lambda: function(*args, **kwargs),
                "dense": lambda: function(
                    *map(densely, args), **{k: densely(v) for k, v in kwargs.items()}
                ),
            },
            repeats=7,
            budget_s=2.0,
            at_least=1,
            device=layout.device,
        )
        top, bandwidth = machine_limits(dtype, layout.device)
    points = {
        type(layout).__name__: (work.intensity, work.flop / times["layout"].median_s),
        "dense": (
            work.dense_flop / max(1, work.dense_bytes),
            work.dense_flop / times["dense"].median_s,
        ),
    }
    axes = figure.subplots()
    xs = [x for x, _ in points.values()]
    low, high = min(*xs, top / bandwidth) / 4, max(*xs, top / bandwidth) * 4
    steps = [low * (high / low) ** (i / 99) for i in range(100)]
    axes.plot(
        steps,
        [min(top, bandwidth * x) / 1e9 for x in steps],
        color="0.3",
        label=f"roof: {top / 1e9:,.0f} GFLOP/s, {bandwidth / 1e9:,.1f} GB/s, measured",
    )
    for number, (name, (x, rate)) in enumerate(points.items()):
        roof = min(top, bandwidth * x)
        axes.plot(
            [x],
            [rate / 1e9],
            color=figures.COLOURS[number],
            marker=figures.MARKERS[number],
            linestyle="none",
            markersize=8,
            label=f"{name}: {rate / 1e9:,.3g} GFLOP/s, {rate / roof:.0%} of the roof",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    _whole_decades(axes, [top / 1e9, *(rate / 1e9 for _, rate in points.values())])
    axes.set_xlabel("FLOP for every byte moved")
    axes.set_ylabel("GFLOP/s")
    axes.legend(fontsize="small")
    gain = times["dense"].median_s / times["layout"].median_s
    axes.set_title(
        f"{work.share:.0%} of the dense work, {gain:.2f} times as fast", fontsize="medium"
    )
    figure.suptitle(title or f"{name_of(function)} with a {type(layout).__name__}")
    return figure
