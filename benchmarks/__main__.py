"""`python -m benchmarks --out build/bench`: measures, prints a table, writes it as JSON."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import attention, bigbird, cpu, gpu_layouts, layouts, matmul, nm, report
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
        default=15.0,
        help="start no GPU row after this long (default: %(default)s)",
    )
    own.add_argument(
        "--quick",
        action="store_true",
        help="small sizes, few repeats, no bars: whether it runs at all",
    )
    own.add_argument("--list", action="store_true", help="print the rows' names and leave")
    return own


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures; returns 0, 1 if a result was wrong, 2 for a wrong command line.

    A bar that does not hold is a finding, not a failure.
    """
    own = parser()
    options = own.parse_args(arguments)
    if options.threads < 1:
        own.error(f"--threads: at least 1, got {options.threads}")
    with_gpu = torch.cuda.is_available() and options.device != "cpu"
    if options.device == "cuda" and not with_gpu:
        print(f"{PROGRAM}: --device cuda: torch sees no CUDA device", file=sys.stderr)
        return 1
    with_cpu = options.device != "cuda"
    known = [*cpu.NAMES, *layouts.NAMES, *bigbird.NAMES] if with_cpu else []
    if with_gpu:
        known += [*matmul.names(options.quick), *nm.names(options.quick), *gpu_layouts.NAMES]
        known += attention.names(options.quick)
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
    where, begin = report.environment(), time.monotonic()
    warning = info.disturbance(where["load_average"])
    if warning:
        print(warning, file=sys.stderr)

    def tell(stage: str) -> None:
        print(f"{time.monotonic() - begin:6.1f} s  {stage}", file=sys.stderr, flush=True)

    rows: list[Row] = []
    if with_gpu:
        deadline = begin + 60 * options.minutes
        products = matmul.Run(tell=tell, deadline=deadline, quick=options.quick)
        rows += matmul.run(options.only, products)
        rows += nm.run(options.only, nm.Run(tell=tell, deadline=deadline, quick=options.quick))
        rows += gpu_layouts.run(options.only, options.quick, tell, deadline)
        run = attention.Run(tell=tell, deadline=deadline, quick=options.quick)
        rows += attention.run(options.only, run)
    if with_cpu:
        rows += cpu.run(options.only, options.quick, tell)
        rows += layouts.run(options.only, options.quick, tell)
        rows += bigbird.run(options.only, options.quick, tell)
    report.print_table(rows)
    if options.out is not None:
        more = {"threads": options.threads, "quick": options.quick}
        report.write(options.out, "benchmarks", rows, where, **more)
    return 1 if any(row.wrong for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
