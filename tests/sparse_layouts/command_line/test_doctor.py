"""`python -m sparse_layouts doctor`: what it finds missing, and that it notices what is wrong."""

from __future__ import annotations

import importlib.util
import json
import shutil
from typing import Any

import pytest
import torch

import sparse_layouts as sl
from sparse_layouts.__main__ import main
from sparse_layouts.command_line import doctor
from sparse_layouts.dispatch.kernel_table import KERNELS


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine that seems to have a GPU; the checks stay on the CPU."""
    has: dict[str, Any] = {"capability": (9, 0), "triton": (3, 7, 1), "cusparselt": True}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: has["capability"])
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: has["cusparselt"])
    monkeypatch.setattr(doctor, "triton_version", lambda: has["triton"])
    monkeypatch.setattr(doctor.info, "devices", lambda: [])
    monkeypatch.setattr(doctor, "_checks", lambda: [])
    return has


def test_this_machine_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert not err
    assert "All is well." in out
    for op, rows in KERNELS.rows.items():
        assert op in out
        for row in rows:
            assert row.name in out
    assert "BSRTensor @ x" in out


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["is_well"]
    assert all(check["is_right"] for check in found["checks"])
    assert {"op", "kernel", "runs", "lacks"} == set(found["kernels"][0])
    assert {"what", "remedy", "is_broken"} == set(found["findings"][0])


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_every_cpu_kernel_runs() -> None:
    found = doctor.examine()
    by_name = {(row.op, row.kernel): row for row in found.kernels}
    for row in found.kernels:
        assert row.runs == (not row.lacks)
    assert by_name["block_matmul", "cpu"].runs
    assert by_name["block_matmul", "triton"].lacks == "a CUDA device"
    assert by_name["block_attention_backward", "hopper"].lacks == "a CUDA device"
    assert {row.op for row in found.kernels if row.runs} == set(KERNELS.rows)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("built_for", "driver", "message", "is_broken"),
    [
        (None, None, "torch is a CPU build", False),
        ("13.0", None, "built for CUDA 13.0 and sees no device; nvidia-smi is not there", False),
        ("13.0", "/usr/bin/nvidia-smi", "sees no device, though there is a driver", True),
    ],
)
def test_why_there_is_no_gpu(
    built_for: str | None,
    driver: str | None,
    message: str,
    is_broken: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(shutil, "which", lambda name: driver)
    (found,) = [f for f in doctor._gpu_findings() if message in f.what]
    assert found.is_broken == is_broken
    assert found.remedy


def lacks(op: str, kernel: str) -> str:
    (row,) = [r for r in doctor.examine().kernels if (r.op, r.kernel) == (op, kernel)]
    return row.lacks


def test_with_a_gpu_its_kernels_run(gpu: dict[str, Any]) -> None:
    found = doctor.examine()
    assert all(row.runs for row in found.kernels)
    assert not any(f.is_broken for f in found.findings)


def test_a_gpu_without_triton(gpu: dict[str, Any]) -> None:
    gpu["triton"] = ()
    assert (
        lacks("block_matmul", "triton")
        == "needs Triton, which is not installed (pip install triton)"
    )
    (found,) = [f for f in doctor.examine().findings if "Triton is not installed" in f.what]
    assert found.is_broken
    assert found.remedy == "pip install triton"
    assert not doctor.examine().is_well


def test_a_triton_that_is_too_old(gpu: dict[str, Any]) -> None:
    gpu["triton"] = (3, 5, 1)
    assert "needs Triton 3.6 or newer, found 3.5.1" in lacks("block_matmul", "triton")
    assert any(
        f.is_broken and "Triton 3.5.1 is older than 3.6" in f.what
        for f in doctor.examine().findings
    )


def test_a_gpu_that_is_too_old(gpu: dict[str, Any]) -> None:
    gpu["capability"] = (7, 5)
    assert "needs compute capability 8.0 or newer, found 7.5" in lacks("block_matmul", "triton")
    (found,) = [f for f in doctor.examine().findings if "compute capability 7.5" in f.what]
    assert not found.is_broken


def test_a_gpu_before_hopper(gpu: dict[str, Any]) -> None:
    gpu["capability"] = (8, 0)
    assert "is for compute capability 9.0" in lacks("block_attention", "hopper")
    assert not lacks("block_attention", "triton")
    assert not any("compute capability" in f.what for f in doctor.examine().findings)


def test_a_torch_without_cusparselt(gpu: dict[str, Any]) -> None:
    gpu["cusparselt"] = False
    assert "cuSPARSELt" in lacks("nm_matmul", "semi_structured")
    assert any("no cuSPARSELt" in f.what for f in doctor.examine().findings)


def test_a_torch_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    (found,) = [f for f in doctor._torch_findings() if "older than 2.11" in f.what]
    assert found.is_broken


def test_a_missing_extra_names_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == "matplotlib" else find_spec(n)
    )
    (found,) = [f for f in doctor._extra_findings() if "matplotlib" in f.what]
    assert found.remedy == "pip install 'sparse_layouts[viz]'"
    assert not found.is_broken


def test_a_wrong_kernel_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    @sl.kernel("block_matmul", name="wrong")
    def wrong(values, pattern, x, *, transposed_output=False):  # type: ignore[no-untyped-def]
        return x.new_zeros(*x.shape[:2], pattern.shape[0], x.shape[-1])

    try:
        assert main(["doctor"]) == 1
    finally:
        wrong.unregister()
    out = capsys.readouterr().out
    assert "WRONG" in out
    assert "relative error 1.0e+00" in out
    assert "Something that should work does not." in out


def test_a_kernel_that_raises_is_noticed() -> None:
    @sl.kernel("nm_matmul", name="broken")
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no registers left")

    try:
        found = doctor.examine()
    finally:
        broken.unregister()
    assert not found.is_well
    (check,) = [c for c in found.checks if not c.is_right]
    assert check.what == "NMTensor @ x"
    assert check.raised == "RuntimeError: no registers left"
    assert "RuntimeError: no registers left" in found.text(80)


def test_text_fits_a_terminal(gpu: dict[str, Any]) -> None:
    gpu["triton"] = ()
    assert max(map(len, doctor.examine().text(80).splitlines())) <= 80
