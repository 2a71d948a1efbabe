"""What every test shares: one mode per process, threads, seeds, and poisoned memory.

A process either interprets Triton kernels (`TRITON_INTERPRET=1`, read when Triton is imported) or
compiles them. Tests marked `interpreter` need the first; `gpu`, `aot` and `aot_all` the second.
`make test` starts one process for each. A plain `pytest` skips the tests of the other mode and says
so; a run that asks by `-m` for nothing but such tests stops instead.
"""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.sparse_layouts import contract_table

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
REASON = pytest.StashKey[tuple[Callable[[str], Any], str]]()

if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import settings

    # The same examples every time: a test is red because of the code, not because of the day.
    settings.register_profile("sparse_layouts", deadline=None, derandomize=True, max_examples=30)
    settings.load_profile("sparse_layouts")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--expect-triton",
        metavar="VERSION",
        help="stop unless this is the Triton that the tests import",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "contract(behaviour): a cell of the contract table (layout x behaviour)"
    )
    expected = config.getoption("--expect-triton")
    if expected is not None:
        import triton

        if triton.__version__ != expected:
            raise pytest.UsageError(
                f"expected Triton {expected}, got {triton.__version__} from {triton.__file__}"
            )
    # One thread per core over all processes: two workers with two threads each are slower than
    # one. Child processes follow.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = max(1, (cores or 1) // workers)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)


def reason_not_to_run(item: pytest.Item) -> str | None:
    """Why this process cannot run `item`, or None."""
    interpreted = item.get_closest_marker("interpreter") is not None
    compiled = any(item.get_closest_marker(name) for name in ("gpu", "aot", "aot_all"))
    if interpreted and compiled:
        raise pytest.UsageError(
            f"{item.nodeid}: `interpreter` excludes `gpu` and `aot`: one mode per process"
        )
    if (interpreted or compiled) and not HAS_TRITON:
        return "needs Triton, which has wheels for Linux only"
    if interpreted and not INTERPRETED:
        return "needs TRITON_INTERPRET=1 (`make test` sets it)"
    if compiled and INTERPRETED:
        return "needs TRITON_INTERPRET unset: it compiles kernels"
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        return "needs a CUDA device: `make test-gpu` on a machine with one"
    return None


@pytest.hookimpl(trylast=True)  # after -m and -k have removed what was not asked for
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        marker = item.get_closest_marker("contract")
        if marker is not None:
            cell = contract_table.cell_of(item.name, *marker.args)
            item.user_properties.append((contract_table.PROPERTY, tuple(cell)))
    reasons = {item: reason for item in items if (reason := reason_not_to_run(item))}
    # A run whose every test is skipped looks green and has tested nothing.
    in_vain = HAS_TRITON and items and len(reasons) == len(items) and config.option.markexpr
    if in_vain and not hasattr(config, "workerinput"):
        why = "; ".join(sorted(set(reasons.values())))
        raise pytest.UsageError(f"nothing that -m '{config.option.markexpr}' asks for runs: {why}")
    for item, reason in reasons.items():
        item.stash[REASON] = (pytest.fail if in_vain else pytest.skip), reason


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints the contract table, on the process that reports."""
    outcomes = []
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) != "call" and getattr(report, "passed", True):
                continue  # a setup or teardown that went well says nothing
            for name, value in getattr(report, "user_properties", ()):
                if name == contract_table.PROPERTY:
                    outcomes.append((contract_table.Cell(*value), report.outcome))
    lines = contract_table.table(outcomes)
    if lines:
        terminalreporter.section("contract: layout x behaviour")
        for line in lines:
            terminalreporter.line(line)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if REASON in item.stash:
        skip_or_fail, reason = item.stash[REASON]
        skip_or_fail(reason)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - for code under test that draws from the global state
    random.seed(0)


def poison(made: Any) -> Any:
    """Fill a plain tensor with what a kernel must not read: NaN, or the largest integer."""
    if type(made) is not torch.Tensor or made.is_meta or made.is_quantized:
        return made
    with torch.no_grad():
        if made.is_floating_point() or made.is_complex():
            made.fill_(float("nan"))
        elif made.dtype is torch.bool:
            made.fill_(True)
        else:
            made.fill_(torch.iinfo(made.dtype).max)
    return made


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` and its relatives return NaN (integers: the maximum) instead of what lay there.

    A kernel that forgets to write an entry, or reads one before it is written, then gives a wrong
    answer every time. torch's own `fill_uninitialized_memory` works in deterministic mode only,
    which also changes the kernels that are chosen.
    """

    def poisoned(allocate: Callable[..., Any]) -> Callable[..., Any]:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> Any:
            return poison(allocate(*args, **kwargs))

        return allocate_poisoned

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))
