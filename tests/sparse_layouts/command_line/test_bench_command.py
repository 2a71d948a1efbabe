"""`python -m sparse_layouts bench`: it measures by way of the benchmarks, and shows the ceiling."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparse_layouts.__main__ import main
from sparse_layouts.command_line import bench
from sparse_layouts.viewing.benchmark_results import Result

ROOT = Path(__file__).resolve().parent.parent.parent.parent
QUICK = ["bench", "--quick", "--device", "cpu", "--threads", "1"]


def test_it_measures_and_shows_the_ceiling(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "results"
    assert main([*QUICK, "--only", "matmul", "--out", str(out)]) == 0
    shown, told = capsys.readouterr()
    assert "ceiling" in shown
    assert "timing matmul fp32 block 64" in told  # progress is no part of the output
    rows = json.loads((out / "benchmarks.json").read_text(encoding="utf-8"))["rows"]
    assert {row["name"] for row in rows} == {"matmul fp32 block 64", "matmul bf16 block 64"}
    assert (out / "benchmarks.txt").is_file()


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, "--only", "matmul fp32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (row,) = found["rows"]
    assert row["timing"]["median_s"] > 0
    assert found["cpu_ceiling_flops"]["float32"] > row["flops"] / 10


def test_rows_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list", "--device", "cpu", "--only", "matmul"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert "matmul fp32 block 64" in names
    assert all("matmul" in name for name in names)
    assert main(["bench", "--list", "--device", "cpu", "--only", "matmul", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == names


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--only", "no such row"], 2, "no row contains 'no such row'; --list names them"),
        (["--threads", "0"], 2, "--threads: at least 1, got 0"),
        (["--device", "cuda"], 1, "torch sees no CUDA device"),
    ],
)
def test_wrong_command_lines_get_one_line(
    arguments: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([*QUICK, *arguments]) == code
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err


def test_a_folder_that_cannot_be_made(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert main([*QUICK, "--only", "matmul", "--out", str(tmp_path / "file" / "x")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_an_installed_library_has_no_benchmarks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench.sparse_layouts, "__file__", str(tmp_path / "x" / "__init__.py"))
    assert main(QUICK) == 1
    assert "clone the repository and run it there" in capsys.readouterr().err


def test_a_bar_in_a_terminal(tmp_path: Path) -> None:
    own, other = pty.openpty()
    done = subprocess.Popen(
        [sys.executable, "-m", "sparse_layouts", *QUICK, "--only", "matmul fp32"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"},
        stdout=subprocess.DEVNULL,
        stderr=other,
    )
    os.close(other)
    shown = b""
    while True:
        try:
            more = os.read(own, 4096)
        except OSError:  # the other side is closed
            break
        if not more:
            break
        shown += more
    os.close(own)
    assert done.wait(timeout=300) == 0
    assert b"1/1" in shown
    assert "━" in shown.decode()


def test_cells_show_the_share_of_the_ceiling() -> None:
    own = Result("x bf16", "cpu", 0.5, 2e-3, 1e9, None, {"dense": 2.0}, True, (), "", "")
    assert bench.cells(own, {"bfloat16": 4e9}, ">= 2x holds") == [
        "x bf16",
        "50.0%",
        "2 ms",
        "1",
        "4",
        "25%",
        "2.00x dense",
        ">= 2x holds",
    ]
    on_gpu = own._replace(device="cuda", ceiling_flops=2e9)
    assert bench.cells(on_gpu, {}, "")[4:6] == ["2", "50%"]
    unknown = own._replace(device="cuda", flops=None, density=None)
    assert bench.cells(unknown, {}, "")[1:6] == ["", "2 ms", "", "", ""]
