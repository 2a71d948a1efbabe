"""A notebook answers its question in less than 45 seconds, on a CPU."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

LIMIT_S = 45.0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, Any, Any]:
    """Fails a notebook that took longer."""
    report = yield
    if report.when == "call" and report.passed and call.duration > LIMIT_S:
        report.outcome = "failed"
        report.longrepr = f"{item.name} took {call.duration:.0f} s, the limit is {LIMIT_S:.0f} s"
    return report
