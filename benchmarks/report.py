"""What the benchmarks print and write: where they ran, tables of rows, and JSON."""

from __future__ import annotations

import datetime
import importlib.util
import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from benchmarks.timing import Row
from sparse_layouts import info
from sparse_layouts.dispatch.text import text_table

NARROWEST = 120
HEAD = ("row", "density", "time", "GFLOP/s", "against", "bar", "holds")
ON_THE_RIGHT = (
    *("density", "time", "call", "graph", "GFLOP/s", "TFLOP/s", "of cuDNN", "ceiling", "bar"),
)


def commit() -> str | None:
    """The commit of the checkout, with "+" if something is changed; None without git."""
    try:
        root = Path(__file__).resolve().parent.parent
        ask = ["git", "-C", str(root)]
        head = subprocess.run(
            [*ask, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        changes = subprocess.run(
            [*ask, "status", "--porcelain"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")


def environment() -> dict[str, Any]:
    """Where and on what the numbers were measured."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": info.versions(),
        "devices": info.devices(),
        "load_average": info.load_average(),
    }


def in_unit(seconds: float) -> str:
    """ "12.3 ms"."""
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def bar_of(row: Row) -> str:
    """ ">= 1.7x dkernel", "<= 40 us", or nothing."""
    if row.bar is None:
        return ""
    if row.unit != "x":
        return f"<= {row.bar:g} {row.unit}"
    return f">= {row.bar:g}x {row.over}".rstrip()


def holds_of(row: Row) -> str:
    """ "yes", "no", or nothing where it cannot be said."""
    return {None: "", True: "yes", False: "no"}[row.holds]


def ratios_of(row: Row) -> list[str]:
    """ "1.70x dkernel 3.5 ms", a text for each rival; what it is over, for other units."""
    if row.unit != "x":
        measured = [] if row.measured is None else [f"{row.measured:.3g} {row.unit}"]
        return [*measured, *(f"over the {name}" for name in row.rivals)]
    return [
        f"{ratio:.2f}x {name} {in_unit(row.rivals[name].median_s)}"
        for name, ratio in row.ratios.items()
    ]


def cells(row: Row) -> list[str]:
    """A row as text, by `HEAD`."""
    if row.wrong:
        return [row.name, "", "", "", f"WRONG: {row.wrong}", "", "no"]
    if row.timing is None and row.measured is None:
        return [row.name, "", "", "", "; ".join(row.notes), "", ""]
    against = ratios_of(row)
    if row.ceiling_flops and row.flops:
        against.append(f"{row.flops / row.ceiling_flops:.0%} of cuBLAS's FLOP/s")
    if row.share is not None:
        against.append(f"{row.share:.0%} of the FLOP/s of {row.share_of}")
    return [
        row.name,
        "" if row.density is None else f"{row.density:.1%}",
        time_of(row),
        "" if row.flops is None else f"{row.flops / 1e9:,.0f}",
        "\n".join(against) if len(against) > 2 else " ".join(against),
        bar_of(row),
        holds_of(row),
    ]


def time_of(row: Row) -> str:
    """ "702 us ±1%"; half the quartiles' distance."""
    if row.timing is None:
        return ""
    return f"{in_unit(row.timing.median_s)} ±{row.timing.spread / 2:.0%}"


def print_table(rows: Sequence[Row], file: TextIO | None = None, width: int | None = None) -> None:
    """The rows, then their notes."""
    bad = [bool(row.wrong) or row.holds is False for row in rows]
    draw(HEAD, [cells(row) for row in rows], bad, file, width)
    shown = [row for row in rows if row.timing is not None]
    for row in shown:
        for note in row.notes:
            print(f"  {row.name}: {note}", file=file)
    line = accuracy(rows)
    if line:
        print(line, file=file)


def accuracy(rows: Sequence[Row]) -> str:
    """How the rows' errors compare with those of dense torch, in one sentence."""
    times = [r.error / r.dense_error for r in rows if r.timing and r.error and r.dense_error]
    if not times:
        return ""
    return (
        f"Errors against float64 are at most {max(times):.2g} times those of dense torch in the "
        "same dtype (2, and a few eps, are allowed). ± is half the quartiles' distance."
    )


def draw(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    bad: Sequence[bool],
    file: TextIO | None = None,
    width: int | None = None,
) -> None:
    """A table, by rich where it is installed (the last cell red where `bad`), else plain."""
    if importlib.util.find_spec("rich") is None:
        lines = [[cell.replace("\n", "; ") for cell in row] for row in rows]
        print(text_table(head, lines), file=file)
        return
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(file=file, width=width, highlight=False)
    if console.width < NARROWEST:
        console.width = NARROWEST  # a terminal that wraps lines is better than cells cut short
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name in head:
        side = "right" if name in ON_THE_RIGHT else "left"
        table.add_column(name, justify=side, no_wrap=name != "against")  # type: ignore[arg-type]
    for row, is_bad in zip(rows, bad, strict=True):
        *rest, last = map(escape, row)
        table.add_row(*rest, ("[red]" if is_bad else "[green]") + last)
    console.print(table)


def write(
    folder: Path,
    name: str,
    rows: Sequence[Row],
    where: dict[str, Any],
    table: Callable[[Sequence[Row], TextIO], None] | None = None,
    **more: Any,
) -> None:
    """`name`.json, with where and on what the rows were measured, and `name`.txt, the table, which
    `table` prints if given.
    """
    content = {**where, **more, "rows": [row.as_json() for row in rows]}
    text = json.dumps(content, indent=2) + "\n"
    (folder / f"{name}.json").write_text(text, encoding="utf-8")
    with (folder / f"{name}.txt").open("w", encoding="utf-8") as file:
        if table is None:
            print_table(rows, file, 160)
        else:
            table(rows, file)
    print(f"written: {folder / name}.json and {name}.txt")
