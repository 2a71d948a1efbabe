"""The command line that the benchmarks of a GPU share: options, what is said before and after, and
what ends them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import report
from benchmarks.timing import Row, selected
from sparse_layouts import info

Tell = Callable[[str], None]


def parser(
    program: str, description: str, subject: str, deadline: float, also: str = ""
) -> argparse.ArgumentParser:
    """The options that all have; `subject` names the files, `also` what is written beside them."""
    own = argparse.ArgumentParser(prog=program, description=description)
    own.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="rows whose name contains NAME; repeatable",
    )
    own.add_argument(
        "--out",
        type=Path,
        help=f"a folder, such as benchmarks/results, for <gpu>_{subject}.json and .txt{also}",
    )
    own.add_argument(
        "--deadline",
        type=float,
        default=deadline,
        metavar="SECONDS",
        help="start no row after this long (default: %(default)s)",
    )
    own.add_argument(
        "--processes",
        type=int,
        default=None,
        help="compile in so many processes beforehand; 0: each thing when its turn comes "
        "(default: two less than there are cores, at most 12)",
    )
    own.add_argument(
        "--quick", action="store_true", help="small sizes, few repeats, no bars: whether it runs"
    )
    own.add_argument("--list", action="store_true", help="print the rows' names and leave")
    return own


def add_without(own: argparse.ArgumentParser, rivals: Sequence[str]) -> None:
    """The option that leaves rivals out."""
    own.add_argument(
        "--without",
        action="append",
        default=[],
        choices=list(rivals),
        help="leaves a rival out; repeatable",
    )


class Finished(NamedTuple):
    """A run: the GPU's name, the rows, the machine before it, and the seconds it took."""

    gpu: str
    rows: Sequence[Row]
    where: dict[str, Any]
    seconds: int


def cannot_run(
    own: argparse.ArgumentParser, options: argparse.Namespace, known: Sequence[str]
) -> int | None:
    """What the command returns without a measurement, None where there is one to make; raises
    `SystemExit` for a wrong command line.
    """
    if options.list:
        print("\n".join(known))
        return 0
    if not selected(known, options.only):
        own.error(f"no row contains {' or '.join(map(repr, options.only))}; --list names them")
    if not torch.cuda.is_available():
        print(f"{own.prog}: torch sees no CUDA device", file=sys.stderr)
        return 1
    return None


def measure(
    options: argparse.Namespace,
    run: Callable[[Tell, float], Sequence[Row]],
    print_rows: Callable[[Sequence[Row]], None],
) -> Finished:
    """Makes the folder, runs, prints; `run` takes where to tell a stage, and the deadline, of
    `time.monotonic`.
    """
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    where, begin = report.environment(), time.monotonic()
    warning = info.disturbance(where["load_average"])
    if warning:
        print(warning, file=sys.stderr)

    def tell(stage: str) -> None:
        print(f"{time.monotonic() - begin:6.1f} s  {stage}", file=sys.stderr, flush=True)

    rows = run(tell, begin + options.deadline)
    gpu, seconds = torch.cuda.get_device_name(), time.monotonic() - begin
    print(f"\n{gpu}, torch {torch.__version__}, {seconds:.0f} s")
    print_rows(rows)
    return Finished(gpu, rows, where, round(seconds))


def status(rows: Sequence[Row]) -> int:
    """1 if a result was wrong; a bar that does not hold is a finding, not a failure."""
    return 1 if any(row.wrong for row in rows) else 0


def file_name(device: str, subject: str) -> str:
    """ "h200_attention" for "NVIDIA H200" and "attention"."""
    words = [word for word in device.lower().split() if word not in ("nvidia", "geforce")]
    return "_".join([*words[:1], subject])
