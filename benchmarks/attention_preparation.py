"""Compiles what the attention rows need before anything is timed, in many processes at once.

dkernel tunes itself over 22 configurations a size, FlexAttention and FlashAttention-4 compile for
every case: one after the other that takes longer than all the timing. Their compilers keep what
they made on disk, where the process that measures finds it. Started as
`python -m benchmarks.attention_preparation CASE WHO`, this prepares one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import attention_rivals as rivals
from benchmarks.attention_cases import CASES, DIRECTIONS, DKERNEL, FLASH4, FLEX, OURS, Case
from benchmarks.timing import attempt

LONGEST_FIRST = (DKERNEL, FLEX, FLASH4, OURS)
SECONDS_TO_TRY = 90.0  # for FlexAttention's candidates
ROOT = Path(__file__).resolve().parent.parent


class Task(NamedTuple):
    """What one process compiles."""

    case: str
    who: str


class Started(NamedTuple):
    """A task's process and where it writes its errors."""

    task: Task
    process: subprocess.Popen[bytes]
    errors: Path


def tasks(chosen: Sequence[Case], without: Sequence[str]) -> list[Task]:
    """One for each case and each of those who compile something, the longest first."""
    return [
        Task(case.name, who)
        for who in LONGEST_FIRST
        for case in chosen
        if who not in without and who in (*case.rivals, OURS)
    ]


def default_processes() -> int:
    """As many as leave the machine some cores; none where there are few."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(0, min(12, (cores or 1) - 2))


def command(task: Task) -> list[str]:
    """How a task's process is started."""
    return [sys.executable, "-m", "benchmarks.attention_preparation", *task]


def prepare_all(
    todo: Sequence[Task],
    processes: int,
    until: float,
    tell: Callable[[str], None],
    command: Callable[[Task], list[str]] = command,
) -> dict[Task, str]:
    """Runs the tasks, so many at once, and ends those that still run at `until` (of
    `time.monotonic`). Returns those whose process died, with its last words.
    """
    waiting, running = list(todo), list[Started]()
    died: dict[Task, str] = {}
    # modules are found where this process found them, from another folder too
    path = os.pathsep.join([str(ROOT), *(str(Path(p).resolve()) for p in sys.path if p)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "2"}
    with tempfile.TemporaryDirectory() as folder:
        try:
            while (waiting or running) and time.monotonic() < until:
                while waiting and len(running) < processes:
                    errors = Path(folder) / f"{len(waiting)}.txt"
                    running.append(start(waiting.pop(0), command, errors, environment))
                time.sleep(0.1)
                for each in [r for r in running if r.process.poll() is not None]:
                    running.remove(each)
                    if each.process.returncode:
                        words = last_line(each.errors)
                        died[each.task] = f"exit {each.process.returncode}: {words}"
        finally:
            for each in running:
                each.process.kill()
                each.process.wait()
    if waiting or running:
        tell(f"{len(waiting) + len(running)} of {len(todo)} preparations had no time left")
    return died


def start(
    task: Task,
    command: Callable[[Task], list[str]],
    errors: Path,
    environment: dict[str, str],
) -> Started:
    """Starts a task's process."""
    with errors.open("wb") as file:
        process = subprocess.Popen(
            command(task),
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=file,
        )
    return Started(task, process, errors)


def last_line(errors: Path) -> str:
    """The last line that is not empty, shortened."""
    lines = [line.strip() for line in errors.read_text(errors="replace").splitlines()]
    return ([line for line in lines if line] or ["it wrote nothing"])[-1][:160]


def prepare(case: Case, who: str) -> None:
    """Runs both directions once. A rival that raises will do so again where it is noted; only what
    breaks the device or the process ends this one.
    """
    given = rivals.operands(case, "cuda")
    for direction in DIRECTIONS:
        if who == OURS:
            mask = case.pattern.mask(case, "cuda")
            rivals.ours(case, given, mask).run(direction)()
        else:
            attempt(lambda d=direction: run_once(case, who, given, d))
        torch.cuda.synchronize()


def run_once(case: Case, who: str, given: rivals.Operands, direction: str) -> None:
    """Makes a rival's variant and runs it."""
    rivals.RIVALS[who](case, given, direction, SECONDS_TO_TRY).run(direction)()


def main(arguments: Sequence[str]) -> int:
    """One task: a case's name and who computes it."""
    name, who = arguments
    prepare({case.name: case for case in CASES}[name], who)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
