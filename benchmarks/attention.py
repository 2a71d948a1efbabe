"""Attention on a Hopper GPU: `python benchmarks/attention.py`.

Every case is compared with float64 first, and a wrong one gets no number. Then it is timed in turns
with cuDNN's dense attention, FlexAttention, dkernel and FlashAttention-4, where they are on
`sys.path` or installed. TFLOP/s are effective: 4 * D a stored pair of query and key forward, 2.5
times that backward, diagonal blocks counted by token. Backward is `torch.autograd.grad` on a
retained graph. Ratios within one run are what can be compared. Rows in 8 bits (`--only FP8`) say
what they lose against float64 and against 16 bits.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__" and not __package__:
    # a script finds what lies beside it; the packages lie one folder up
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor

import sparse_layouts as sl
from benchmarks import attention_calls as calls
from benchmarks import attention_fp8 as fp8
from benchmarks import attention_rivals as rivals
from benchmarks import gpu_command, report
from benchmarks.attention_cases import (
    BEST,
    CASES,
    CUDNN,
    DIRECTIONS,
    FLASH2,
    FLASH4,
    FLEX,
    OURS,
    QUICK_CASES,
    Case,
)
from benchmarks.attention_preparation import Task, default_processes, prepare_all, tasks
from benchmarks.attention_reference import check, results_of
from benchmarks.gpu_command import Tell
from benchmarks.timing import Row, attempt, gpu_times, graphed, guarded_rows, selected
from sparse_layouts.measuring import relative_error, synchronize

PROGRAM = "python benchmarks/attention.py"
SUBJECT = "attention"  # of the files
ROUNDS, REP_MS = 3, 60
DIFFERS = 0.02  # two kernels in 16 bits differ by less
FLEX_SECONDS = 10.0  # for a direction's candidates
PREPARING_SHARE = 0.35  # of the time there is, at most
SHORT = {CUDNN: "cuDNN", FLASH2: "FA2", FLASH4: "FA4", FLEX: "Flex", fp8.IN_16_BITS: "bf16"}
HEAD = ("row", "density", "time", "TFLOP/s", "of cuDNN", "against", "bar", "holds")


class Run(NamedTuple):
    """How the rows are measured. `deadline` is of `time.monotonic`; `show` takes each row when it
    is done; `without` names rivals to leave out; so many `processes` compile beforehand, None: as
    many as the machine takes.
    """

    tell: Callable[[str], None]
    deadline: float = float("inf")
    quick: bool = False
    graph: bool = False
    without: Sequence[str] = ()
    processes: int | None = None
    show: Callable[[Row], None] = lambda row: None
    device: str = "cuda"


def names(quick: bool) -> list[str]:
    """The rows there are: what calls cost, each case forward and backward, then 8 bits."""
    cases = QUICK_CASES if quick else CASES
    of_cases = (f"{case.name} {d}" for case in cases for d in DIRECTIONS)
    return [*calls.NAMES, *of_cases, *fp8.names(quick)]


def run(only: Sequence[str], how: Run) -> list[Row]:
    """The rows whose names contain one of `only`; past the deadline the rest says so."""
    wanted = selected(names(how.quick), only)
    chosen = [
        (case, directions)
        for case in (QUICK_CASES if how.quick else CASES)
        if (directions := [d for d in DIRECTIONS if f"{case.name} {d}" in wanted])
    ]
    rows: list[Row] = []

    def add(made: Iterator[Row] | list[Row]) -> None:
        for row in made:
            rows.append(row)
            how.show(row)

    broken = prepared([case for case, _ in chosen], how)
    add(calls.run(only, how.quick, how.tell, how.deadline, how.device))
    for case, directions in chosen:
        if time.monotonic() > how.deadline:
            late = "left out: no time left"
            add([Row(f"{case.name} {d}", how.device, notes=[late]) for d in directions])
            continue
        add(guarded_rows(case.name, how.device, measure(case, directions, how, broken)))
        torch.cuda.empty_cache()
    add(fp8.run(only, how.quick, how.tell, how.deadline, how.device, **effort(how.quick)))
    if how.quick:
        for row in rows:
            row.bar = None  # bars are for full sizes
    return rows


def prepared(chosen: Sequence[Case], how: Run) -> dict[Task, str]:
    """Compiles everything on all cores; returns the rivals that broke their process."""
    if how.device != "cuda":
        return {}
    # What is compiled beforehand is found on disk; one kernel a graph needs no pool of compilers.
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    processes = how.processes
    if processes is None:
        processes = 0 if how.quick else default_processes()
    todo, now = tasks(chosen, how.without), time.monotonic()
    if not processes or not todo or now > how.deadline:
        return {}
    how.tell(f"{len(todo)} preparations for {len(chosen)} cases, in {processes} processes")
    until = now + min(600.0, PREPARING_SHARE * (how.deadline - now))
    died = prepare_all(todo, processes, until, how.tell)
    for task, words in died.items():
        how.tell(f"{task.case}: preparing {task.who} ended by {words}")
    return died


# --- a case ---------------------------------------------------------------------------------------


def measure(
    case: Case, directions: Sequence[str], how: Run, broken: dict[Task, str]
) -> Iterator[Row]:
    """One case: checked, then timed in turns with every rival whose result is right."""
    given = rivals.operands(case, how.device)
    mask = case.pattern.mask(case, how.device)
    mine = rivals.ours(case, given, mask)
    how.tell(f"{case.name}: comparing with float64")
    checked = check(case, given, mine)
    expected = checked.results
    if counts := mask.block_counts() is not None:
        expected = results_of(rivals.ours(case, given, sl.without_counts(mask)))
    if FLEX in case.rivals and FLEX not in how.without:
        torch.compiler.reset()
    for direction in directions:
        row = Row(f"{case.name} {direction}", how.device, density=case.density(mask))
        row.flop = case.flop(case.pairs(mask), direction)
        row.wrong, row.kernel = checked.wrong[direction], checked.kernels[direction]
        row.error, row.dense_error = checked.errors[direction]
        row.notes = [case.describe(), f"kernel {row.kernel}"]
        if counts:
            row.notes.append("only this library counts blocks as often as drawn")
        if not row.wrong:
            variants, missing = found_rivals(case, given, row, direction, how, broken, expected)
            how.tell(f"{case.name}: timing {direction}")
            time_row(case, row, mine, variants, direction, how)
            hold_to_bar(row, case.bars.get(direction), missing)
        yield row


def found_rivals(
    case: Case,
    given: rivals.Operands,
    row: Row,
    direction: str,
    how: Run,
    broken: dict[Task, str],
    expected: dict[str, Tensor],
) -> tuple[dict[str, rivals.Variant], list[str]]:
    """The rivals that run one direction and are right, and those that could not be asked; the row's
    notes say why.
    """
    notes = row.notes
    found: dict[str, rivals.Variant] = {}
    missing: list[str] = []
    for name in case.rivals:
        why = ""
        if name in how.without:
            why = "left out, as asked"
        elif Task(case.name, name) in broken:
            why = f"left out, its process ended by {broken[Task(case.name, name)]}"
        elif time.monotonic() > how.deadline:
            why = "left out, no time left"
        if why:
            missing.append(name)
            notes.append(f"{name}: {why}")
            continue
        how.tell(f"{case.name}: preparing {name}, {direction}")
        failed, variant = attempt(lambda name=name: right(name, case, given, direction, expected))
        if failed:
            notes.append(f"{name}: {failed}")
            if failed.startswith(rivals.NotInstalled.__name__):
                missing.append(name)
            continue
        found[name] = variant
        if variant.note:
            notes.append(f"{name}: {variant.note}")
    if CUDNN in case.rivals and CUDNN not in found and CUDNN not in missing:
        failed, variant = attempt(lambda: right(FLASH2, case, given, direction, expected))
        if failed:
            notes.append(f"{FLASH2}: {failed}")
        else:
            found[FLASH2] = variant
    return found, missing


class Differs(Exception):
    """A rival's result is not that of the checked one."""


def right(
    name: str, case: Case, given: rivals.Operands, direction: str, expected: dict[str, Tensor]
) -> rivals.Variant:
    """A rival's variant, run once; raises :class:`Differs` where it computes the same, and other
    numbers.
    """
    variant = rivals.RIVALS[name](case, given, direction, FLEX_SECONDS)
    for result, tensor in variant.results(direction):
        difference = relative_error(tensor, expected[result]) if variant.same else 0.0
        if not difference < DIFFERS:
            raise Differs(f"left out, its {result} differs by {difference:.1e}")
    synchronize(given.q.device)
    return variant


def effort(quick: bool) -> dict[str, int]:
    """How often everything is timed."""
    return {"rounds": 1, "rep_ms": 5} if quick else {"rounds": ROUNDS, "rep_ms": REP_MS}


def time_row(
    case: Case,
    row: Row,
    mine: rivals.Variant,
    variants: dict[str, rivals.Variant],
    direction: str,
    how: Run,
) -> None:
    """Times a row and its rivals in turns."""
    repeats = effort(how.quick)
    every: dict[str, Callable[[], Any]] = {OURS: mine.run(direction)}
    every |= {name: variant.run(direction) for name, variant in variants.items()}
    times = gpu_times(every, **repeats)
    row.timing = times.pop(OURS)
    row.rivals = times
    if CUDNN in times and row.flops is not None:
        dense_flops = case.flop(case.dense_pairs, direction) / times[CUDNN].median_s
        row.share, row.share_of = row.flops / dense_flops, CUDNN
    if how.graph:
        failed, replay = attempt(lambda: graphed(lambda: mine.run(direction)))
        if failed:
            row.notes.append(f"no CUDA graph: {failed}")
            return
        row.graph = gpu_times({"": replay}, **repeats)[""]
        assert row.flop is not None
        row.notes.append(
            f"in a CUDA graph {report.in_unit(row.graph.median_s)}, "
            f"{row.flop / row.graph.median_s / 1e12:.0f} TFLOP/s"
        )


def hold_to_bar(row: Row, bar: tuple[float, str] | None, missing: Sequence[str]) -> None:
    """Sets what is measured for the bar, where it can be said: over the best rival only if every
    rival could be asked, or one that was is too fast already.
    """
    if bar is None:
        return
    row.bar, row.over = bar
    if row.over != BEST:
        row.measured = row.ratios.get(row.over)
    elif row.ratios:
        smallest = min(row.ratios.values())
        if smallest < row.bar or not missing:
            row.measured = smallest
        else:
            row.notes.append(f"the bar is over the best rival, and {', '.join(missing)} is missing")


# --- the command ----------------------------------------------------------------------------------


def short_cells(row: Row) -> list[str]:
    """A row by `HEAD`, in one line."""
    if row.wrong or (row.timing is None and row.measured is None):
        text = f"WRONG: {row.wrong}" if row.wrong else "; ".join(row.notes[-1:])
        return [row.name, "", "", "", "", text[:90], "", "no" if row.wrong else ""]
    against = [f"{ratio:.2f}x {SHORT.get(name, name)}" for name, ratio in row.ratios.items()]
    if row.unit != "x":
        against = report.ratios_of(row)
    return [
        row.name,
        "" if row.density is None else f"{row.density:.1%}",
        report.time_of(row),
        "" if row.flops is None else f"{row.flops / 1e12:.0f}",
        "" if row.share is None else f"{row.share:.0%}",
        ", ".join(against),
        report.bar_of(row),
        report.holds_of(row),
    ]


def print_short(rows: Sequence[Row]) -> None:
    """The final table: a line a row."""
    bad = [bool(row.wrong) or row.holds is False for row in rows]
    report.draw(HEAD, [short_cells(row) for row in rows], bad, width=160)
    legend = ", ".join(f"{short}: {name}" for name, short in SHORT.items())
    print(f"Ratios are how many times faster this library is ({legend}).")
    line = report.accuracy(rows)
    if line:
        print(line)


def show(row: Row) -> None:
    """A row as it is finished, with its notes."""
    print("  ".join(cell for cell in short_cells(row) if cell), flush=True)
    if row.timing is not None or row.wrong:
        for note in row.notes:
            print(f"    {note}", flush=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    about = "Attention on a Hopper GPU against the best rivals."
    own = gpu_command.parser(PROGRAM, about, SUBJECT, deadline=400.0)
    gpu_command.add_without(own, [name for name in rivals.RIVALS if name != FLASH2])
    own.add_argument(
        "--graph", action="store_true", help="also time this library's calls in a CUDA graph"
    )
    return own


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures; returns 0, 1 if a result was wrong, 2 for a wrong command line."""
    own = parser()
    options = own.parse_args(arguments)
    ended = gpu_command.cannot_run(own, options, names(options.quick))
    if ended is not None:
        return ended

    def measured(tell: Tell, deadline: float) -> list[Row]:
        how = Run(
            tell=tell,
            deadline=deadline,
            quick=options.quick,
            graph=options.graph,
            without=options.without,
            processes=options.processes,
            show=show,
        )
        return run(options.only, how)

    done = gpu_command.measure(options, measured, print_short)
    if options.out is not None:
        name = gpu_command.file_name(done.gpu, SUBJECT)
        more = {"quick": options.quick, "seconds": done.seconds}
        report.write(options.out, name, done.rows, done.where, **more)
    return gpu_command.status(done.rows)


if __name__ == "__main__":
    sys.exit(main())
