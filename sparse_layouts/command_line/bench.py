"""`python -m sparse_layouts bench`: the benchmarks of a source checkout, with a progress bar and a
table that shows the ceiling.

They run in a process of their own, whose threads they set; what they tell on the way moves the bar,
and the table is made of the JSON that they write.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import sparse_layouts
from sparse_layouts.command_line.errors import CommandError, UsageError, need_package
from sparse_layouts.viewing.benchmark_results import Result, read_results
from sparse_layouts.viewing.measured import machine_limits

HEAD = ("row", "density", "time", "GFLOP/s", "ceiling", "of it", "against", "bar")
STAGE = re.compile(r"^\s*[\d.]+ s  (.*)$")


def checkout() -> Path:
    """The root of the source checkout that has the benchmarks.

    Raises `CommandError` in an installed library, which has none.
    """
    root = Path(sparse_layouts.__file__).resolve().parent.parent
    if not (root / "benchmarks" / "__main__.py").is_file():
        raise CommandError(
            "the benchmarks are in the source checkout, not in the installed library; clone the "
            "repository and run it there"
        )
    return root


def _command(root: Path, arguments: Sequence[str]) -> dict[str, Any]:
    path = os.pathsep.join(p for p in (str(root), os.environ.get("PYTHONPATH", "")) if p)
    return {
        "args": [sys.executable, "-m", "benchmarks", *arguments],
        "cwd": root,
        "env": {**os.environ, "PYTHONPATH": path},
        "text": True,
    }


def known_rows(root: Path, device: str) -> list[str]:
    """The names of all rows."""
    done = subprocess.run(
        **_command(root, ["--list", "--device", device]), capture_output=True, check=False
    )
    if done.returncode:
        raise CommandError(done.stderr.strip().splitlines()[-1].partition(": ")[2])
    return done.stdout.split("\n")[:-1]


def run(options: argparse.Namespace, print_json: Callable[[Any], None]) -> int:
    """Measures, prints the table or JSON; 1 if a result was wrong."""
    root = checkout()
    need_package("rich")
    if options.threads < 1:
        raise UsageError(f"--threads: at least 1, got {options.threads}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda: torch sees no CUDA device; --device cpu is without")
    names = known_rows(root, options.device)
    names = [n for n in names if not options.only or any(part in n for part in options.only)]
    if not names:
        asked = " or ".join(map(repr, options.only))
        raise UsageError(f"no row contains {asked}; --list names them")
    if options.list:
        if options.json:
            print_json(names)
        else:
            print("\n".join(names))
        return 0
    arguments = ["--device", options.device, "--threads", str(options.threads)]
    arguments += ["--quick"] if options.quick else []
    arguments += [word for name in options.only for word in ("--only", name)]
    with _results_folder(options.out) as folder:
        code = _measure(root, [*arguments, "--out", str(folder)], names)
        file = folder / "benchmarks.json"
        if not file.is_file():
            raise CommandError(f"the benchmarks ended with {code} and wrote no results")
        content = json.loads(file.read_text(encoding="utf-8"))
        rows = read_results(file)
    limits = _cpu_ceilings(rows, options.threads)
    if options.json:
        print_json({**content, "cpu_ceiling_flops": limits})
    else:
        _show(rows, content, limits)
        if options.out is not None:
            print(f"written: {options.out / 'benchmarks.json'} and benchmarks.txt")
    return code


@contextlib.contextmanager
def _results_folder(out: Path | None) -> Iterator[Path]:
    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--out {out}: {error.strerror}") from error
    yield out.resolve()


def _measure(root: Path, arguments: list[str], names: list[str]) -> int:
    """Runs the benchmarks; a bar in a terminal, elsewhere a line a stage, on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    begun: set[str] = set()
    bar = Progress(*columns, console=console, disable=not console.is_terminal)
    with (
        subprocess.Popen(
            **_command(root, arguments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as process,
        bar,
    ):
        assert process.stderr is not None
        task = bar.add_task("starting", total=len(names))
        try:
            for line in process.stderr:
                stage = STAGE.match(line)
                if stage is None or not console.is_terminal:
                    console.print(line.rstrip(), soft_wrap=True, markup=False)
                if stage is not None:
                    begun |= {name for name in names if name in stage[1]}
                    done = max(0, len(begun) - 1)  # the last one has only begun
                    bar.update(task, description=stage[1][:60], completed=done)
        except KeyboardInterrupt:
            process.terminate()
            raise
        bar.update(task, description="done", completed=len(names))
    return process.returncode


def _cpu_ceilings(rows: list[Result], threads: int) -> dict[str, float]:
    """FLOP/s of a dense product on this CPU, in the dtypes that rows without a ceiling name."""
    wanted = {_dtype_of(r) for r in rows if r.device == "cpu" and r.flops and not r.ceiling_flops}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return {
            name: machine_limits(getattr(torch, name), torch.device("cpu"))[0]
            for name in sorted(wanted)
        }
    finally:
        torch.set_num_threads(before)


def _dtype_of(row: Result) -> str:
    for short, name in (("bf16", "bfloat16"), ("fp16", "float16"), ("fp64", "float64")):
        if short in row.name:
            return name
    return "float32"


def in_unit(seconds: float) -> str:
    """ "12.3 ms"."""
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def cells(row: Result, limits: dict[str, float], bar: str) -> list[str]:
    """A row as text; the ceiling is the rate of a dense product on the same device."""
    ceiling = row.ceiling_flops
    if ceiling is None and row.device == "cpu" and row.flops:
        ceiling = limits.get(_dtype_of(row))
    against = [f"{ratio:.2f}x {name}" for name, ratio in row.ratios.items()]
    return [
        row.name,
        "" if row.density is None else f"{row.density:.1%}",
        "" if row.seconds is None else in_unit(row.seconds),
        "" if not row.flops else f"{row.flops / 1e9:,.3g}",
        "" if not ceiling else f"{ceiling / 1e9:,.3g}",
        "" if not ceiling or not row.flops else f"{row.flops / ceiling:.0%}",
        ", ".join(against),
        bar,
    ]


def _bar(row: dict[str, Any]) -> str:
    if row.get("bar") is None:
        return ""
    wanted = f">= {row['bar']:g}x" if row["unit"] == "x" else f"<= {row['bar']:g} {row['unit']}"
    return f"{wanted} {'holds' if row['holds'] else 'does not hold'}"


def _show(rows: list[Result], content: dict[str, Any], limits: dict[str, float]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    bars = {row["name"]: _bar(row) for row in content["rows"]}
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for i, name in enumerate(HEAD):
        table.add_column(name, justify="right" if 0 < i < 6 else "left", no_wrap=0 < i < 6)
    for row in rows:
        table.add_row(*map(escape, cells(row, limits, bars[row.name])))
    console.print(table)
    for row in content["rows"]:
        if row.get("wrong"):
            console.print(f"[red]WRONG[/red] {escape(row['name'])}: {escape(row['wrong'])}")
        elif row["timing"] is None:
            console.print(f"{escape(row['name'])}: {escape('; '.join(row['notes']))}")
    console.print(
        "GFLOP/s of the stored part of the work; ceiling: GFLOP/s of a dense product on the same "
        "device; against: times faster than each rival."
    )
