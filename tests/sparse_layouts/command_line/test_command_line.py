"""`python -m sparse_layouts`: exit codes, one-line errors, what is printed where."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparse_layouts as sl
from sparse_layouts import info
from sparse_layouts.__main__ import main

ROOT = Path(__file__).resolve().parent.parent.parent.parent

WITHOUT_RICH = """
import importlib.abc, runpy, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] in ("rich", "tqdm"):
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
sys.meta_path.insert(0, Blocker())
runpy.run_module("sparse_layouts", run_name="__main__")
"""


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_info_names_versions_devices_and_both_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out, err = capsys.readouterr()
    assert torch.__version__ in out
    assert f"torch uses {torch.get_num_threads()} threads" in out
    assert "F.scaled_dot_product_attention" in out
    assert "sparse_layouts.kernels.block_attention.cpu:block_attention" in out
    assert not err


def test_info_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["sparse_layouts"] == sl.__version__
    assert found["devices"][0]["device"] == "cpu"
    kernels = [row["kernel"] for row in found["kernels"]["block_matmul"]]
    assert "cpu" in kernels
    assert {"function", "operands", "handler"} == set(found["routes"][0])


def test_info_without_an_optional_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "PACKAGES", ("torch", "no-such-package"))
    assert info.versions()["no-such-package"] == "not installed"


def test_demo_prints_tables_and_names_its_report(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    report = tmp_path / "new" / "demo.html"
    assert main(["demo", "--quick", "--device", "cpu", "--out", str(report)]) == 0
    out, err = capsys.readouterr()
    assert str(report) in out.replace("\n", "")
    assert "relative error against float64" in out
    assert "gradient of q" in out
    assert "block_attention" in out
    assert "timing sparse and dense attention" in err  # progress is no part of the output
    assert report.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_demo_as_json_prints_nothing_else(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    report = tmp_path / "demo.html"
    assert main(["demo", "--quick", "--device", "cpu", "--json", "--out", str(report)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"] == str(report)
    assert found["attention"]["errors"][0]["sparse"] < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--device", "tpu"], "invalid choice: 'tpu'"),
        (["show"], "invalid choice: 'show'"),
        (["info", "--quick"], "unrecognized arguments: --quick"),
    ],
)
def test_a_wrong_command_line_exits_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert "demo" in err
    assert "info" in err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == sl.__version__


def test_a_report_that_cannot_be_written_is_found_before_the_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    assert main(["demo", "--out", str(tmp_path / "file" / "demo.html")]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("python -m sparse_layouts demo: --out ")


def test_cuda_that_is_not_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["demo", "--device", "cuda", "--out", str(tmp_path / "demo.html")]) == 1
    err = capsys.readouterr().err
    assert "torch sees no CUDA device" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "demo.html").exists()


def test_a_missing_extra_is_named_in_one_line(tmp_path: Path) -> None:
    done = run("-c", WITHOUT_RICH, "demo", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "python -m sparse_layouts demo: needs the package rich: pip install 'sparse_layouts[cli]'"
    )
    assert not done.stdout


def test_info_needs_no_extra_and_runs_as_a_module(tmp_path: Path) -> None:
    assert run("-c", WITHOUT_RICH, "info", cwd=tmp_path).returncode == 0
    done = run("-m", "sparse_layouts", "info", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Kernels, most special first" in done.stdout


def test_a_reader_that_stops_early_sees_no_traceback(tmp_path: Path) -> None:
    command = f"{sys.executable} -m sparse_layouts info | head -1"
    done = subprocess.run(
        command,
        shell=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "Traceback" not in done.stderr
