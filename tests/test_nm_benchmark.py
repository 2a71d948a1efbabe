"""The benchmark of n:m products: no wrong result gets a number, and bars are what they say."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import sparse_layouts as sl
from benchmarks import gpu, gpu_command, matmul_rows, nm, report
from benchmarks import nm_cases as cases
from benchmarks.gpu import OURS, Effort
from benchmarks.matmul_cases import DENSE, Bar
from benchmarks.matmul_rows import Ceilings, Product
from benchmarks.nm_cases import BY_ROWS, CASES, QUICK_CASES, TORCH, Case
from benchmarks.timing import WrongResult
from sparse_layouts.kernels.nm_matmul import reference
from sparse_layouts.measuring import Timing, interleaved

TINY = Effort(1, 1, 32)
SMALL = Case(2, 4, 64, 8)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Products so small are the slower for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def cpu_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times by the CPU's clock, where there is no device's."""

    def times(every: Any, *, rounds: int, rep_ms: int) -> dict[str, Timing]:
        return interleaved(every, repeats=2)

    monkeypatch.setattr(gpu, "gpu_times", times)
    monkeypatch.setattr(matmul_rows, "gpu_times", times)
    monkeypatch.setattr(nm, "QUICK", TINY)
    monkeypatch.setattr(nm, "QUICK_CASES", tuple(small(case) for case in QUICK_CASES))


def small(case: Case) -> Case:
    return dataclasses.replace(case, size=64)


def on_cpu(**more: Any) -> nm.Run:
    return nm.Run(tell=lambda stage: None, device="cpu", **more)


def row_of(case: Case) -> Product:
    (row,) = nm.measure(case, on_cpu(), Ceilings("cpu", TINY))
    return row


@pytest.mark.parametrize(("n", "m"), cases.RATIOS)
def test_operands_and_results(n: int, m: int) -> None:
    case = Case(n, m, 64, 3)
    given = cases.operands(case, "cpu")
    stored = (given.dense != 0).view(64, -1, m).sum(-1)
    assert bool((stored <= n).all())
    assert torch.equal(given.layout.to_dense(), given.dense)
    assert torch.equal(given.rows.to_dense(), given.dense)
    assert given.weight_bytes == given.layout.nbytes
    assert given.x.shape == (3, 64)
    checked = cases.check(case, given)
    assert checked.error < 4e-3
    assert checked.kernel.startswith("nm_matmul ")
    again = cases.operands(case, "cpu")
    assert torch.equal(again.x, given.x)
    assert again.layout is given.layout  # shared by the cases of a matrix


@pytest.fixture
def wrong_kernel(request: pytest.FixtureRequest) -> Iterator[None]:
    """Registers a kernel before the others, for the test."""
    runs = iter(range(100))

    def wrong(*args: Any, **more: Any) -> Any:
        step = next(runs) if request.param == "unsteady" else 1
        return reference.nm_matmul(*args, **more) * (1 + 0.125 * step)

    kernel = sl.kernel("nm_matmul", name="wrong")(wrong)
    yield
    kernel.unregister()


@pytest.mark.parametrize(
    ("wrong_kernel", "why"),
    [("wrong", "relative error 1.25e-01"), ("unsteady", "differs in its bits between calls")],
    indirect=["wrong_kernel"],
)
@pytest.mark.usefixtures("wrong_kernel")
def test_a_wrong_product_gets_no_number(why: str) -> None:
    with pytest.raises(WrongResult, match=why):
        row_of(SMALL)
    (row,) = nm.run(["nm 1:4 64 batch 1"], on_cpu(quick=True))[:1]
    assert why in row.wrong
    assert row.timing is None
    assert nm.cells(row)[-1] == "no"


def test_a_row_against_its_rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(dense: Any) -> Any:
        raise RuntimeError("only cuda tensors are supported")

    monkeypatch.setattr(cases, "compress", refuses)
    row = row_of(SMALL)
    assert list(row.rivals) == [DENSE]
    assert f"{TORCH}: RuntimeError: only cuda tensors are supported" in row.notes
    assert row.flop == 2 * 8 * 64 * 32
    assert row.moved == 64 * 32 * 2 + 64 * 2 * 4 + 2 * 8 * 64 * 2
    assert row.bytes_rate is not None
    assert row.of_ceiling is not None
    assert "dense" in nm.cells(row)[6]
    assert row.graph is None


def test_a_rival_with_another_result_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "compress", lambda dense: 2 * dense)
    row = row_of(SMALL)
    assert list(row.rivals) == [DENSE]
    assert f"{TORCH}: Differs: left out, its result differs by 1.0e+00" in row.notes


def test_weights_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "compress", torch.clone)
    given = cases.operands(SMALL, "cpu")
    for who in (OURS, BY_ROWS, DENSE, TORCH):
        variant, seen = cases.variant(who, given), []

        def call(weight: Any, variant: Any = variant, seen: list[Any] = seen) -> Any:
            seen.append(weight)
            return variant.call(weight)

        outs = variant._replace(call=call).turns(3)()()
        assert len({id(weight) for weight in seen}) == 3
        assert all(torch.equal(out, outs[0]) for out in outs)


def test_the_bars() -> None:
    bars = {case.name: case.bar for case in CASES if case.bar is not None}
    assert bars == {
        "nm 2:4 8192 batch 1": Bar(1.55, DENSE, graph=True),
        "nm 2:4 8192 batch 8": Bar(1.55, DENSE, graph=True),
        "nm 2:4 8192 batch 16": Bar(1.45, DENSE, graph=True),
        "nm 1:4 8192 batch 8": Bar(2.4, DENSE, graph=True),
        "nm 1:8 8192 batch 8": Bar(3.0, DENSE, graph=True),
        "nm 2:4 4096 batch 4096": Bar(1.5, TORCH),
    }
    for case in CASES:
        assert DENSE in case.rivals  # always the ratio to dense
        assert (TORCH in case.rivals) == ((case.n, case.m) == (2, 4))
        assert (BY_ROWS in case.rivals) == (case.batch == cases.MANY)
        assert case.bar is None or case.bar.over in case.rivals
    names = nm.names(False)
    assert len(set(names)) == len(names) == 2 * (4 * len(cases.BATCHES) + 1)


def test_the_command_measures_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nm, "Run", functools.partial(nm.Run, device="cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    where = {"load_average": 0.0, "devices": [], "versions": {}}
    monkeypatch.setattr(report, "environment", lambda: where)
    chosen = ["--quick", "--only", "1:8", "--only", "2:8 64 batch 16"]
    assert nm.main([*chosen, "--out", str(tmp_path / "results")]) == 0
    files = {file.name for file in (tmp_path / "results").iterdir()}
    assert files == {"h200_nm.json", "h200_nm.txt"}
    found = json.loads((tmp_path / "results" / "h200_nm.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in found["rows"]] == [
        *("nm 2:8 64 batch 16", "nm 1:8 64 batch 1", "nm 1:8 64 batch 16")
    ]
    for row in found["rows"]:
        assert row["timing"]["median_s"] > 0
        assert row["ratios"][DENSE] > 0
        assert row["bytes_rate"] > 0
        assert row["bar"] is None  # small sizes are held to none
    out = capsys.readouterr().out
    assert f"NVIDIA H200, torch {torch.__version__}" in out
    assert out.count("nm 2:8 64 batch 16") >= 2
    assert "Ceilings: a copy" in out


def test_past_the_deadline_rows_say_so() -> None:
    rows = nm.run([], on_cpu(quick=True, deadline=0.0))
    assert len(rows) == len(QUICK_CASES)
    assert all(row.notes == ["left out: no time left"] for row in rows)


def test_a_preparation_runs_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nm, "CASES", (SMALL, Case(1, 8, 64, 8)))
    with sl.trace() as steps:
        assert nm.prepare_here(["nm 1:8 64 batch 8"], "cpu") == 0
    assert [step.what for step in steps] == ["nm_matmul"]
    (task,) = nm.tasks(["a b", "c"], 1)
    assert nm.command(task)[-3:] == ["--prepare", "a b", "c"]


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert nm.main(["--list"]) == 0
    assert capsys.readouterr().out.splitlines() == nm.names(False)
    with pytest.raises(SystemExit) as stopped:
        nm.main(["--only", "no such row"])
    assert stopped.value.code == 2
    assert "no row contains 'no such row'; --list names them" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert nm.main(["--only", "2:4"]) == 1
        assert "torch sees no CUDA device" in capsys.readouterr().err
    assert gpu_command.file_name("NVIDIA H200", nm.SUBJECT) == "h200_nm"


def test_the_file_runs_as_a_script(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(Path(nm.__file__)), "--list"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == nm.names(False)


@pytest.mark.gpu
def test_small_rows_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the device's clock, and sizes that have fragments
    assert nm.main(["--quick", "--only", "batch 16", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*_nm.json")
    for row in json.loads(file.read_text(encoding="utf-8"))["rows"]:
        assert row["timing"]["median_s"] > 0
        assert row["graph"]["median_s"] > 0, row["notes"]
        assert row["graph_ratios"][DENSE] > 0
