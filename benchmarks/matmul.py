"""Block-sparse products on a GPU: `python benchmarks/matmul.py`.

Every case and its gradients are compared with float64 first, and a wrong one gets no number. Then
it is timed in turns with cuBLAS's dense product, torch.sparse's BSR and CSR, each as an eager call
(the L2 emptied before) and in a CUDA graph in which several weights take turns, so that the L2
holds none. TFLOP/s are effective: 2 a stored entry of the sparse matrix and column of the dense
one. The ceiling is cuBLAS's rate or that of a copy, whichever bounds the row, in the same run.
Ratios within one run are what can be compared.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

if __name__ == "__main__" and not __package__:
    # a script finds what lies beside it; the packages lie one folder up
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

import sparse_layouts as sl
from benchmarks import attention, gpu_command, report
from benchmarks import matmul_break_even as even
from benchmarks import matmul_dlmc as dlmc
from benchmarks import matmul_variants as variants
from benchmarks.attention_preparation import default_processes, prepare_all
from benchmarks.gpu import OURS, QUICK, Effort
from benchmarks.gpu_command import Tell
from benchmarks.matmul_cases import CASES, QUICK_CASES, REORDERED, SDD, TRAINING, Case
from benchmarks.matmul_preparation import command, tasks
from benchmarks.matmul_reference import Checked, check
from benchmarks.matmul_rows import (
    FULL,
    HEAD,
    SHORT,
    Ceilings,
    Product,
    ceilings_of,
    cells,
    hold_to_bar,
    time_row,
)
from benchmarks.matmul_training import memory_notes
from benchmarks.matmul_variants import Operands, Variant
from benchmarks.timing import Row, attempt, guarded_rows, selected
from sparse_layouts.measuring import relative_error, synchronize

PROGRAM = "python benchmarks/matmul.py"
SUBJECT = "matmul"  # of the files
PREPARING_SHARE = 0.35  # of the time there is, at most
# what is timed for a table of many: once each
MANY = Effort(1, 10)


class Run(NamedTuple):
    """How the rows are measured. `deadline` is of `time.monotonic`; `show` takes each row when it
    is done; `graph`: also in CUDA graphs; `without` names rivals to leave out; so many `processes`
    compile beforehand, None: as many as the machine takes. `matrices`: the folder of DLMC.
    """

    tell: Callable[[str], None]
    deadline: float = float("inf")
    quick: bool = False
    graph: bool = True
    without: Sequence[str] = ()
    processes: int | None = None
    show: Callable[[Row], None] = lambda row: None
    device: str = "cuda"
    matrices: Path | None = None

    @property
    def effort(self) -> Effort:
        """How often each thing is timed."""
        return QUICK if self.quick else FULL

    @property
    def many(self) -> Effort:
        """The same for each of many things that make one row."""
        return QUICK if self.quick else MANY


def names(quick: bool) -> list[str]:
    """The rows there are."""
    return [*(case.name for case in (QUICK_CASES if quick else CASES)), *dlmc.NAMES, *even.NAMES]


def run(only: Sequence[str], how: Run) -> list[Row]:
    """The rows whose names contain one of `only`; past the deadline the rest says so."""
    wanted = selected(names(how.quick), only)
    chosen = {case.name: case for case in (QUICK_CASES if how.quick else CASES)}
    ceilings = Ceilings(how.device, how.effort)
    rows: list[Row] = []
    if any(name in chosen for name in wanted):
        prepare([name for name in wanted if name in chosen], how)
    for name in wanted:
        made: Iterator[Row]
        if time.monotonic() > how.deadline:
            made = iter([Product(name, how.device, notes=["left out: no time left"])])
        elif name in chosen:
            made = measure(chosen[name], how, ceilings, how.effort)
        elif name in dlmc.NAMES:
            made = matrices(name, how, ceilings)
        else:
            made = curve(name, how, ceilings)
        for row in guarded_rows(name, how.device, made):
            row = as_product(row)
            row.bar = None if how.quick else row.bar  # bars are for full sizes
            rows.append(row)
            how.show(row)
        if how.device == "cuda":
            torch.cuda.empty_cache()
    return rows


def as_product(row: Row) -> Product:
    """A row of this benchmark, also where a plain one says what went wrong."""
    if isinstance(row, Product):
        return row
    return Product(row.name, row.device, wrong=row.wrong, notes=row.notes)


def prepare(chosen: Sequence[str], how: Run) -> None:
    """Compiles everything on all cores."""
    processes = default_processes() if how.processes is None else how.processes
    now = time.monotonic()
    if how.device != "cuda" or how.quick or not processes or now > how.deadline:
        return
    todo = tasks(chosen, processes)
    how.tell(f"compiling for {len(chosen)} rows in {len(todo)} processes")
    until = now + min(120.0, PREPARING_SHARE * (how.deadline - now))
    for words in prepare_all(todo, processes, until, how.tell, command).values():
        how.tell(f"a preparation ended by {words}")


# --- a case ---------------------------------------------------------------------------------------


def measure(case: Case, how: Run, ceilings: Ceilings, effort: Effort) -> Iterator[Product]:
    """One case: checked, then timed in turns with every rival whose result is right."""
    row = Product(case.name, how.device, notes=[case.describe()])
    with variants.float32_as(case.tf32):
        given = variants.operands(case, how.device)
        row.density = given.layout.density
        how.tell(f"{case.name}: comparing with float64")
        try:
            checked = check(case, given)
        except sl.DenseFallbackError as error:
            row.notes.append(f"left out, no kernel takes it: {first_line(error)}")
            yield row
            return
        describe(row, case, given, checked)
        row.ceiling_flops = ceilings.flops(case.dtype, case.tf32)
        row.ceiling_bytes = ceilings.bytes_rate()
        every = {OURS: variants.ours(case, given), **rivals(case, given, row, how, checked)}
        del checked
        how.tell(f"{case.name}: timing")
        turning = given.others[0].nbytes if case.kind == SDD else given.weight_bytes
        time_row(row, every, effort, how.graph and how.device == "cuda", turning)
        hold_to_bar(row, case.bar)
        if REORDERED in every:
            row.notes.append(gain(row, every[REORDERED].weight))
        if case.kind == TRAINING:
            notes, row.memory = memory_notes(given)
            row.notes += notes
    yield row


def gain(row: Product, weight: sl.ReorderedTensor) -> str:
    """What reordering brings, measured and modelled."""
    assert row.timing is not None
    parts = [f"eager {row.timing.median_s / row.rivals[REORDERED].median_s:.2f}x as fast"]
    if row.graph is not None and REORDERED in row.graph_rivals:
        parts.append(f"in graphs {row.graph.median_s / row.graph_rivals[REORDERED].median_s:.2f}x")
    modelled = weight.gain
    blocks = f"{modelled.blocks_after} blocks for {modelled.blocks_before}"
    after = f"of {modelled.block_after}, fill-in {modelled.fill_in:.0%}"
    return f"reordered: {', '.join(parts)}, modelled {modelled.speedup:.2f}x; {blocks} {after}"


def first_line(error: Exception) -> str:
    """Of its text."""
    return (str(error).strip().splitlines() or [""])[0][:160]


def describe(row: Product, case: Case, given: Operands, checked: Checked) -> None:
    """Errors, kernels, operations and bytes of a case."""
    row.error, row.dense_error = checked.error, checked.dense_error
    row.kernel = checked.kernel
    if case.kind == TRAINING:
        row.kernel += f"; backward {checked.backward_kernel}"
    row.flop = 2.0 * case.products * case.n * given.layout.nnz
    out = 0 if case.kind == SDD else checked.result.nbytes
    each = 3 if case.kind == TRAINING else 1
    row.moved = float(each * (given.weight_bytes + given.other_bytes + out))
    row.notes.append(f"kernel {row.kernel}")
    gradients = ", ".join(f"{n} {e:.1e} (dense {d:.1e})" for n, (e, d) in checked.gradients.items())
    row.notes.append(f"errors: out {row.error:.1e} (dense {row.dense_error:.1e}), {gradients}")


class Differs(Exception):
    """A rival's result is not that of the checked one."""


def rivals(
    case: Case, given: Operands, row: Product, how: Run, checked: Checked
) -> dict[str, Variant]:
    """The rivals that run and are right; the row's notes say why others are not there."""
    found: dict[str, Variant] = {}
    for name in case.rivals:
        if name in how.without:
            row.notes.append(f"{name}: left out, as asked")
            continue
        failed, variant = attempt(lambda name=name: right(name, case, given, checked))
        if failed:
            row.notes.append(f"{name}: {failed}")
        else:
            found[name] = variant
    return found


def right(name: str, case: Case, given: Operands, checked: Checked) -> Variant:
    """A rival's variant, run once; raises :class:`Differs` where it computes the same, and other
    numbers.
    """
    variant = variants.RIVALS[name](case, given)
    out = variant.run()
    if variants.is_same(case, name):
        difference = relative_error(out, checked.result)
        if not difference < attention.DIFFERS:
            raise Differs(f"left out, its result differs by {difference:.1e}")
    synchronize(given.dense.device)
    return variant


# --- rows of many cases ---------------------------------------------------------------------------


def matrices(name: str, how: Run, ceilings: Ceilings) -> Iterator[Product]:
    """A block size over the matrices of DLMC."""
    where = how.matrices or dlmc.folder()
    most, n = (2, 64) if how.quick else (dlmc.MATRICES, 4096)
    chosen, notes = dlmc.cases(where, dlmc.NAMES[name], n, most)
    if not chosen:
        notes.append(f"left out: {where} holds no .smtx file that fits (--dlmc FOLDER)")
        yield Product(name, how.device, notes=notes)
        return
    rows = [row for case in chosen for row in measure(case, how, ceilings, how.many)]
    out = dlmc.summary(name, how.device, chosen, rows)
    out.notes += notes
    yield out


def curve(name: str, how: Run, ceilings: Ceilings) -> Iterator[Product]:
    """A block size over densities: where cuBLAS becomes the faster one."""
    rows: list[Product] = []
    for density in even.QUICK_DENSITIES if how.quick else even.DENSITIES:
        if time.monotonic() > how.deadline:
            how.tell(f"{name}: no time left at {density:.0%}")
            break
        case = even.case(even.NAMES[name], density, how.effort.matrix)
        rows += measure(case, how, ceilings, how.many)
    yield even.summary(name, how.device, rows)


# --- the command ----------------------------------------------------------------------------------


def print_short(rows: Sequence[Row], file: TextIO | None = None) -> None:
    """The final tables: a line a row, then densities."""
    bad = [bool(row.wrong) or row.holds is False for row in rows]
    report.draw(HEAD, [cells(row) for row in rows], bad, file, width=180)
    legend = ", ".join(f"{short}: {name}" for name, short in SHORT.items())
    print(
        "Ratios are how many times faster this library is by eager calls, in brackets in CUDA "
        f"graphs ({legend}). Rate and share of the ceiling are those in graphs, where there are "
        "any.",
        file=file,
    )
    for line in (ceilings_of(rows), report.accuracy(rows)):
        if line:
            print(line, file=file)
    densities = even.table(rows)
    if densities:
        print(f"\n{densities}", file=file)


def print_all(rows: Sequence[Row], file: TextIO | None = None) -> None:
    """The final tables, then the rows' notes."""
    print_short(rows, file)
    for row in rows:
        for note in row.notes:
            print(f"  {row.name}: {note}", file=file)


def show(row: Row) -> None:
    """A row as it is finished, with its notes."""
    print("  ".join(cell for cell in cells(row) if cell), flush=True)
    for note in row.notes:
        print(f"    {note}", flush=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    about = "Block-sparse products on a GPU against the best rivals."
    also = " and, with matplotlib, <gpu>_matmul_break_even.png and .svg"
    own = gpu_command.parser(PROGRAM, about, SUBJECT, deadline=170.0, also=also)
    gpu_command.add_without(own, list(variants.RIVALS))
    own.add_argument(
        "--dlmc",
        type=Path,
        metavar="FOLDER",
        help=f"where DLMC's .smtx files are (default: the variable {dlmc.VARIABLE}, or "
        "shared/data/dlmc beside the checkout)",
    )
    own.add_argument(
        "--graph",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also time all variants in CUDA graphs, as is the default",
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
            matrices=options.dlmc,
        )
        return run(options.only, how)

    done = gpu_command.measure(options, measured, print_short)
    if options.out is not None:
        write(options.out, done.gpu, done.rows, done.where, options.quick, done.seconds)
    return gpu_command.status(done.rows)


def write(
    folder: Path, gpu: str, rows: Sequence[Row], where: dict[str, Any], quick: bool, seconds: int
) -> None:
    """The numbers, the tables and, with matplotlib, the plot."""
    name = gpu_command.file_name(gpu, SUBJECT)
    report.write(folder, name, rows, where, print_all, quick=quick, seconds=seconds)
    done = even.plot(rows, folder / f"{name}_break_even", f"{gpu}, bf16")
    if done:
        print(done)


if __name__ == "__main__":
    sys.exit(main())
