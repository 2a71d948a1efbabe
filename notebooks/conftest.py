"""A notebook answers its question in less than 45 seconds, on a CPU."""

from __future__ import annotations

import resource
from collections.abc import Generator
from typing import Any

import pytest

LIMIT_S = 45.0
CPU_SECONDS = pytest.StashKey[float]()


def cpu_seconds() -> float:
    """What the kernels that have ended took of the processor."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Counts what a notebook takes of the processor."""
    before = cpu_seconds()
    try:
        return (yield)
    finally:
        item.stash[CPU_SECONDS] = cpu_seconds() - before


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, Any, Any]:
    """Fails a notebook that took longer, by the clock and of the processor: one that waited for
    other programs did not.
    """
    report = yield
    if report.when == "call" and report.passed:
        least = min(call.duration, item.stash[CPU_SECONDS])
        if least > LIMIT_S:
            report.outcome = "failed"
            report.longrepr = f"{item.name} took {least:.0f} s, the limit is {LIMIT_S:.0f} s"
    return report
