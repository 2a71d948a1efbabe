"""Products with n:m weights on a GPU: `python benchmarks/nm.py`.

Weights are prepacked (`w.prepack()`), in bf16. Every result is compared with float64 first, and a
wrong one gets no number. Then it is timed in turns with cuBLAS's dense product and, of 2:4, torch's
semi-structured one (cuSPARSELt), each as an eager call (the L2 emptied before) and in a CUDA graph
in which several weights take turns, so that the L2 holds none. GB/s count the stored weights and
the dense operands once; the ceiling is the rate of a copy or cuBLAS's, whichever bounds the row, in
the same run. Ratios within one run are what can be compared.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

if __name__ == "__main__" and not __package__:
    # a script finds what lies beside it; the packages lie one folder up
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from benchmarks import attention, gpu_command, report
from benchmarks import nm_cases as cases
from benchmarks.attention_preparation import Task, default_processes, prepare_all
from benchmarks.gpu import DTYPE, OURS, QUICK, Effort
from benchmarks.gpu_command import Tell
from benchmarks.matmul import Differs, as_product, show
from benchmarks.matmul_preparation import BETWEEN, tasks
from benchmarks.matmul_rows import (
    HEAD,
    Ceilings,
    Product,
    ceilings_of,
    cells,
    hold_to_bar,
    time_row,
)
from benchmarks.matmul_variants import Variant
from benchmarks.nm_cases import CASES, QUICK_CASES, Case, Checked, Operands, check, operands
from benchmarks.timing import Row, attempt, guarded_rows, selected
from sparse_layouts.measuring import relative_error, synchronize

PROGRAM = "python benchmarks/nm.py"
SUBJECT = "nm"  # of the files
FULL = Effort(rep_ms=15)
PREPARING_SHARE = 0.4  # of the time there is, at most


class Run(NamedTuple):
    """How the rows are measured. `deadline` is of `time.monotonic`; `show` takes each row when it
    is done; so many `processes` compile beforehand, None: as many as the machine takes.
    """

    tell: Callable[[str], None]
    deadline: float = float("inf")
    quick: bool = False
    processes: int | None = None
    show: Callable[[Row], None] = lambda row: None
    device: str = "cuda"

    @property
    def effort(self) -> Effort:
        """How often each thing is timed."""
        return QUICK if self.quick else FULL

    @property
    def cases(self) -> Sequence[Case]:
        """The rows there are."""
        return QUICK_CASES if self.quick else CASES


def names(quick: bool) -> list[str]:
    """The rows there are."""
    return [case.name for case in (QUICK_CASES if quick else CASES)]


def run(only: Sequence[str], how: Run) -> list[Row]:
    """The rows whose names contain one of `only`; past the deadline the rest says so."""
    wanted = selected([case.name for case in how.cases], only)
    ceilings = Ceilings(how.device, how.effort)
    rows: list[Row] = []
    prepare(wanted, how)
    for case in how.cases:
        if case.name not in wanted:
            continue
        made: Iterator[Row]
        if time.monotonic() > how.deadline:
            made = iter([Product(case.name, how.device, notes=["left out: no time left"])])
        else:
            made = measure(case, how, ceilings)
        for row in guarded_rows(case.name, how.device, made):
            row = as_product(row)
            rows.append(row)
            how.show(row)
    cases.weight.cache_clear()
    if how.device == "cuda":
        torch.cuda.empty_cache()
    return rows


def prepare(wanted: Sequence[str], how: Run) -> None:
    """Compiles everything on all cores."""
    processes = default_processes() if how.processes is None else how.processes
    now = time.monotonic()
    if how.device != "cuda" or how.quick or not processes or not wanted or now > how.deadline:
        return
    todo = tasks(wanted, processes)
    how.tell(f"compiling for {len(wanted)} rows in {len(todo)} processes")
    until = now + min(60.0, PREPARING_SHARE * (how.deadline - now))
    for words in prepare_all(todo, processes, until, how.tell, command).values():
        how.tell(f"a preparation ended by {words}")


def command(task: Task) -> list[str]:
    """How a task's process is started."""
    return [sys.executable, "-m", "benchmarks.nm", "--prepare", *task.case.split(BETWEEN)]


def prepare_here(wanted: Sequence[str], device: str = "cuda") -> int:
    """Runs the products of these names once: Triton's compilations stay on disk."""
    for case in CASES:
        if case.name in wanted:
            given = operands(case, device)
            for who in (OURS, *case.rivals):
                attempt(lambda who=who, given=given: cases.variant(who, given).run())
            synchronize(device)
    return 0


def measure(case: Case, how: Run, ceilings: Ceilings) -> Iterator[Product]:
    """One case: checked, then timed in turns with every rival whose result is right."""
    given = operands(case, how.device)
    row = Product(case.name, how.device, density=case.n / case.m)
    row.notes.append(f"F.linear(x, W), W {case.size} x {case.size}, {case.batch} rows of x, bf16")
    how.tell(f"{case.name}: comparing with float64")
    checked = check(case, given)
    row.error, row.dense_error, row.kernel = checked.error, checked.dense_error, checked.kernel
    row.flop = 2.0 * case.batch * given.layout.nnz
    row.moved = float(given.weight_bytes + given.x.nbytes + checked.result.nbytes)
    row.notes.append(f'kernel {row.kernel}, in the order of "{given.layout.order}"')
    row.notes.append(f"errors: {row.error:.1e} (dense {row.dense_error:.1e})")
    row.ceiling_flops, row.ceiling_bytes = ceilings.flops(DTYPE), ceilings.bytes_rate()
    every = {OURS: cases.variant(OURS, given)}
    for name in case.rivals:
        failed, rival = attempt(lambda name=name: right(name, given, checked))
        if failed:
            row.notes.append(f"{name}: {failed}")
        else:
            every[name] = rival
    how.tell(f"{case.name}: timing")
    time_row(row, every, how.effort, how.device == "cuda", given.weight_bytes)
    hold_to_bar(row, case.bar)
    yield row


def right(name: str, given: Operands, checked: Checked) -> Variant:
    """A rival, run once; raises :class:`Differs` where it computes other numbers."""
    rival = cases.variant(name, given)
    difference = relative_error(rival.run(), checked.result)
    if not difference < attention.DIFFERS:
        raise Differs(f"left out, its result differs by {difference:.1e}")
    return rival


# --- the command ----------------------------------------------------------------------------------


def print_short(rows: Sequence[Row], file: TextIO | None = None) -> None:
    """The final table, a line a row."""
    bad = [bool(row.wrong) or row.holds is False for row in rows]
    report.draw(HEAD, [cells(row) for row in rows], bad, file, width=180)
    print(
        "Ratios are how many times faster this library is by eager calls, in brackets in CUDA "
        "graphs. Rate and share of the ceiling are those in graphs, where there are any.",
        file=file,
    )
    for line in (ceilings_of(rows), report.accuracy(rows)):
        if line:
            print(line, file=file)


def print_all(rows: Sequence[Row], file: TextIO | None = None) -> None:
    """The final table, then the rows' notes."""
    print_short(rows, file)
    for row in rows:
        for note in row.notes:
            print(f"  {row.name}: {note}", file=file)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    about = "Products with n:m weights on a GPU against the best rivals."
    own = gpu_command.parser(PROGRAM, about, SUBJECT, deadline=90.0)
    own.add_argument("--prepare", nargs="+", metavar="NAME", help=argparse.SUPPRESS)
    return own


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures; returns 0, 1 if a result was wrong, 2 for a wrong command line."""
    own = parser()
    options = own.parse_args(arguments)
    ended = gpu_command.cannot_run(own, options, names(options.quick))
    if ended is not None:
        return ended
    if options.prepare:
        return prepare_here(options.prepare)

    def measured(tell: Tell, deadline: float) -> list[Row]:
        return run(options.only, Run(tell, deadline, options.quick, options.processes, show))

    done = gpu_command.measure(options, measured, print_short)
    if options.out is not None:
        name, more = gpu_command.file_name(done.gpu, SUBJECT), {"quick": options.quick}
        more["seconds"] = done.seconds
        report.write(options.out, name, done.rows, done.where, print_all, **more)
    return gpu_command.status(done.rows)


if __name__ == "__main__":
    sys.exit(main())
