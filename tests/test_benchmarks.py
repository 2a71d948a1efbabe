"""The benchmarks run, check before they measure, and say what holds."""

from __future__ import annotations

import gc
import itertools
import json
import time
from pathlib import Path

import pytest
import torch

import sparse_layouts as sl
from benchmarks import attention, bigbird, cpu, gpu_layouts, layouts, matmul, nm
from benchmarks.__main__ import main
from benchmarks.report import cells
from benchmarks.timing import (
    TIMES_TF32,
    Row,
    WrongResult,
    attempt,
    check_error,
    host_time,
    selected,
)
from sparse_layouts.measuring import Timing

QUICK = ["--quick", "--device", "cpu", "--threads", str(torch.get_num_threads())]


@pytest.fixture(autouse=True)
def same_threads() -> None:
    """The command sets torch's threads; the other tests keep theirs."""
    QUICK[-1] = str(torch.get_num_threads())


def test_quick_run_measures_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, "--out", str(tmp_path / "bench")]) == 0
    found = json.loads((tmp_path / "bench" / "benchmarks.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in found["rows"]] != []
    assert {row["name"] for row in found["rows"]} == {*cpu.NAMES, *layouts.NAMES, *bigbird.NAMES}
    assert {"date", "commit", "versions", "devices", "threads", "load_average"} <= set(found)
    for row in found["rows"]:
        assert row["timing"]["median_s"] > 0, row["name"]
        assert row["density"] is not None
        assert row["bar"] is None  # small sizes are held to none
        if row["unit"] == "x":
            assert row["error"] <= 2 * row["dense_error"] + 1e-2
            assert row["flops"] > 0
            assert row["measured"] == pytest.approx(next(iter(row["ratios"].values())))
    out = capsys.readouterr().out
    assert "attention bf16 block 64" in out
    assert "attention bf16 block 64" in (tmp_path / "bench" / "benchmarks.txt").read_text()


def test_only_some_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, "--only", "matmul fp32", "--only", "explain"]) == 0
    out = capsys.readouterr().out
    assert "matmul fp32 block 64" in out
    assert "explain" in out
    assert "attention fp32" not in out


def test_a_wrong_kernel_gets_no_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    @sl.kernel("block_matmul", name="wrong")
    def wrong(values, pattern, x, *, transposed_output=False):  # type: ignore[no-untyped-def]
        return x.new_zeros(*x.shape[:2], pattern.shape[0], x.shape[-1])

    try:
        code = main([*QUICK, "--only", "matmul", "--only", "call", "--out", str(tmp_path)])
    finally:
        wrong.unregister()
    assert code == 1
    rows = json.loads((tmp_path / "benchmarks.json").read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 3
    for row in rows:
        assert "relative error 1.00e+00 against float64" in row["wrong"]
        assert row["timing"] is None
        assert row["measured"] is None
    assert "WRONG" in capsys.readouterr().out


def test_a_kernel_that_raises_costs_its_own_rows_only(capsys: pytest.CaptureFixture[str]) -> None:
    @sl.kernel("block_matmul", name="broken")
    def broken(values, pattern, x, *, transposed_output=False):  # type: ignore[no-untyped-def]
        raise RuntimeError("no registers left")

    try:
        code = main([*QUICK, "--only", "matmul fp32", "--only", "build"])
    finally:
        broken.unregister()
    assert code == 1
    out, err = capsys.readouterr()
    assert "RuntimeError: no registers left" in " ".join(out.split())
    assert "build local_stride" in out
    assert "Traceback" in err


def test_wrong_command_lines(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments, message in (
        (["--only", "no such row"], "no row contains 'no such row'; --list names them"),
        (["--threads", "0"], "--threads: at least 1, got 0"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main([*QUICK, "--out", str(tmp_path / "file" / "bench")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_list_names_rows_and_measures_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines() == [*cpu.NAMES, *layouts.NAMES, *bigbird.NAMES]


@pytest.mark.parametrize("error", [1e-3, float("nan"), float("inf")])
def test_an_error_beyond_the_dtype_is_found(error: float) -> None:
    check_error("x", 1.9e-7, 1e-7, torch.float32)
    with pytest.raises(WrongResult, match=r"x: relative error .* against float64"):
        check_error("x", error, 1e-7, torch.float32)


def test_an_entry_that_is_cut_off_may_err_more_than_one_that_is_rounded() -> None:
    entries = torch.randn(2, 2**20, dtype=torch.float64)
    u = 2.0**-10
    step = u * 2.0 ** entries.abs().log2().floor()
    cut = (entries / step).trunc() * step
    rounded = (entries / step).round() * step

    def error(read: torch.Tensor) -> float:
        products, exact = read.prod(0), entries.prod(0)
        return float((products - exact).norm() / exact.norm())

    assert 2.0 * error(rounded) < error(cut) < 2.0 * TIMES_TF32 * error(rounded)
    assert error(cut) / error(rounded) == pytest.approx(TIMES_TF32, rel=0.1)
    check_error("x", error(cut), error(rounded), torch.float32, tf32=True)
    with pytest.raises(WrongResult):
        check_error("x", error(cut), error(rounded), torch.float32)


def timing(seconds: float) -> Timing:
    return Timing(seconds, 0.9 * seconds, 1.1 * seconds, 5)


def test_bars() -> None:
    row = Row("a", "cpu", bar=2.0, timing=timing(1.0), rivals={"dense": timing(3.0)}, flop=1e9)
    assert row.holds is None  # not measured
    row.measured = row.ratios["dense"]
    assert row.holds
    assert cells(row)[1:] == ["", "1 s ±10%", "1", "3.00x dense 3 s", ">= 2x", "yes"]
    row.measured = 1.5
    assert row.holds is False
    slow = Row("b", "cpu", unit="us", bar=60.0, timing=timing(1e-4), measured=70.0)
    assert slow.holds is False
    slow.measured = 50.0
    assert slow.holds
    assert cells(slow)[-2:] == ["<= 60 us", "yes"]


def test_selection() -> None:
    names = ["a 1", "a 2", "b"]
    assert selected(names, []) == names
    assert selected(names, ["a"]) == ["a 1", "a 2"]
    assert selected(names, ["2", "b"]) == ["a 2", "b"]


@pytest.mark.parametrize("heads", [2, 8, 32])
def test_the_formula_of_the_references_is_the_pattern(heads: int) -> None:
    mask = sl.local_stride(
        300, block_size=16, local_blocks=2, vert_stride=8, num_heads=heads
    ).to_dense()
    step = max(1, 8 // heads)
    two = [0, heads - 1]
    rows = cpu.local_stride_rows(100, 300, 300, 16, 2, 8, two, step)
    assert torch.equal(rows, mask[two, 100:])


def test_gpu_rows_have_names() -> None:
    assert {f"dsd 25% block {block}" for block in (16, 32, 64, 128)} < set(matmul.names(False))
    known = [*matmul.names(False), *nm.names(False), *gpu_layouts.NAMES]
    known += attention.names(False)
    known += [*cpu.NAMES, *layouts.NAMES, *bigbird.NAMES]
    assert len(set(known)) == len(known)


def test_a_rival_that_fails_is_a_note() -> None:
    def broken() -> None:
        raise RuntimeError("no such kernel\nand a long story")

    assert attempt(broken) == ("RuntimeError: no such kernel", None)
    assert attempt(lambda: 3) == ("", 3)


def test_the_time_of_a_call_is_the_smallest_median_of_single_calls() -> None:
    begin = time.monotonic()
    waits = itertools.cycle([0.001, 0.001, 0.02])

    def call() -> None:
        time.sleep(next(waits))

    found = host_time(call, calls=6, rounds=3, device="cpu")
    assert 0.001 <= found.median_s == found.low_s <= found.high_s < 0.02
    assert found.repeats == 3
    assert time.monotonic() - begin > 3 * 6 * 0.001
    assert gc.isenabled()


@pytest.mark.gpu
def test_quick_run_on_a_gpu(tmp_path: Path) -> None:
    assert main(["--quick", "--device", "cuda", "--only", "block", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "benchmarks.json").read_text(encoding="utf-8"))["rows"]
    known = [*matmul.names(True), *nm.names(True), *gpu_layouts.NAMES, *attention.names(True)]
    assert [row["name"] for row in rows] == selected(known, ["block"])
    for row in rows:
        curve = row["name"].startswith("break-even")
        if not curve and "left out" not in " ".join(row["notes"]):
            assert row["timing"]["median_s"] > 0, row["name"]
