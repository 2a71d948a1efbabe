"""`python -m benchmarks --out build/bench`: measures, prints a table, writes it as JSON."""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks import bigbird, cpu, gpu, gpu_layouts, layouts
from benchmarks.timing import Row, selected
from sparse_layouts import info

PROGRAM = "python -m benchmarks"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    own = argparse.ArgumentParser(
        prog=PROGRAM, description="Block layouts against dense torch and the best rivals."
    )
    own.add_argument(
        "--out",
        type=Path,
        help="a folder for benchmarks.json and benchmarks.txt; nothing is written without",
    )
    own.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="rows whose name contains NAME; repeatable",
    )
    own.add_argument(
        "--device",
        choices=("all", "cpu", "cuda"),
        default="all",
        help="all: the CPU, and a GPU if there is one",
    )
    own.add_argument(
        "--threads", type=int, default=2, help="torch's threads on the CPU (the bars are for 2)"
    )
    own.add_argument(
        "--minutes",
        type=float,
        default=9.0,
        help="start no GPU row after this long (default: %(default)s)",
    )
    own.add_argument(
        "--quick",
        action="store_true",
        help="small sizes, few repeats, no bars: whether it runs at all",
    )
    own.add_argument("--list", action="store_true", help="print the rows' names and leave")
    return own


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


# --- the table ------------------------------------------------------------------------------------

NARROWEST = 120
HEAD = ("row", "density", "time", "GFLOP/s", "against", "bar", "holds")


def in_unit(seconds: float) -> str:
    """ "12.3 ms"."""
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def cells(row: Row) -> list[str]:
    """A row as text."""
    if row.wrong:
        return [row.name, "", "", "", f"WRONG: {row.wrong}", "", "no"]
    if row.timing is None:
        return [row.name, "", "", "", "; ".join(row.notes), "", ""]
    if row.unit == "x":
        ratios = row.ratios.items()
        against = [f"{r:.2f}x {name} {in_unit(row.rivals[name].median_s)}" for name, r in ratios]
    else:
        against = [f"{row.measured:.3g} {row.unit}", *(f"over the {name}" for name in row.rivals)]
    if row.ceiling_flops and row.flops:
        against.append(f"{row.flops / row.ceiling_flops:.0%} of cuBLAS's FLOP/s")
    bar = ""
    if row.bar is not None:
        bar = f">= {row.bar:g}x" if row.unit == "x" else f"<= {row.bar:g} {row.unit}"
    return [
        row.name,
        "" if row.density is None else f"{row.density:.1%}",
        f"{in_unit(row.timing.median_s)} ±{row.timing.spread / 2:.0%}",
        "" if row.flops is None else f"{row.flops / 1e9:,.0f}",
        "\n".join(against) if len(against) > 2 else " ".join(against),
        bar,
        {None: "", True: "yes", False: "no"}[row.holds],
    ]


def print_table(rows: Sequence[Row], file: TextIO | None = None, width: int | None = None) -> None:
    """The rows, then their notes."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(file=file, width=width, highlight=False)
    if console.width < NARROWEST:
        console.width = NARROWEST  # a terminal that wraps lines is better than cells cut short
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name in HEAD:
        right = name in ("density", "time", "GFLOP/s", "bar")
        table.add_column(name, justify="right" if right else "left", no_wrap=name != "against")
    for row in rows:
        bad = bool(row.wrong) or row.holds is False
        colour = "[red]" if bad else "[green]"
        *rest, last = map(escape, cells(row))
        table.add_row(*rest, colour + last)
    console.print(table)
    shown = [row for row in rows if row.timing is not None]
    for row in shown:
        for note in row.notes:
            console.print(f"  {escape(row.name)}: {escape(note)}", soft_wrap=True)
    times = [row.error / row.dense_error for row in shown if row.error and row.dense_error]
    if times:
        console.print(
            f"Errors against float64 are at most {max(times):.2g} times those of dense torch in "
            "the same dtype (2, and a few eps, are allowed). ± is half the quartiles' distance."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures; returns 0, 1 if a result was wrong, 2 for a wrong command line.

    A bar that does not hold is a finding, not a failure.
    """
    own = parser()
    options = own.parse_args(arguments)
    if options.threads < 1:
        own.error(f"--threads: at least 1, got {options.threads}")
    try:
        import rich  # noqa: F401
    except ModuleNotFoundError:
        print(
            f"{PROGRAM}: needs the package rich: pip install 'sparse_layouts[cli]'", file=sys.stderr
        )
        return 1
    with_gpu = torch.cuda.is_available() and options.device != "cpu"
    if options.device == "cuda" and not with_gpu:
        print(f"{PROGRAM}: --device cuda: torch sees no CUDA device", file=sys.stderr)
        return 1
    with_cpu = options.device != "cuda"
    known = [*cpu.NAMES, *layouts.NAMES, *bigbird.NAMES] if with_cpu else []
    if with_gpu:
        known += [*gpu.names(options.quick), *gpu_layouts.NAMES]
    if options.list:
        print("\n".join(known))
        return 0
    if not selected(known, options.only):
        own.error(f"no row contains {' or '.join(map(repr, options.only))}; --list names them")
    if options.out is not None:
        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            print(f"{PROGRAM}: --out {options.out}: {error.strerror}", file=sys.stderr)
            return 1
    torch.set_num_threads(options.threads)
    where, begin = environment(), time.monotonic()
    warning = info.disturbance(where["load_average"])
    if warning:
        print(warning, file=sys.stderr)

    def tell(stage: str) -> None:
        print(f"{time.monotonic() - begin:6.1f} s  {stage}", file=sys.stderr, flush=True)

    rows: list[Row] = []
    if with_gpu:
        deadline = begin + 60 * options.minutes
        rows += gpu.run(options.only, options.quick, tell, deadline)
        rows += gpu_layouts.run(options.only, options.quick, tell, deadline)
    if with_cpu:
        rows += cpu.run(options.only, options.quick, tell)
        rows += layouts.run(options.only, options.quick, tell)
        rows += bigbird.run(options.only, options.quick, tell)
    print_table(rows)
    if options.out is not None:
        content = {
            **where,
            "threads": options.threads,
            "quick": options.quick,
            "rows": [r.as_json() for r in rows],
        }
        (options.out / "benchmarks.json").write_text(
            json.dumps(content, indent=2) + "\n", encoding="utf-8"
        )
        with (options.out / "benchmarks.txt").open("w", encoding="utf-8") as file:
            print_table(rows, file, 160)
        print(f"written: {options.out / 'benchmarks.json'} and benchmarks.txt")
    return 1 if any(row.wrong for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
