"""The benchmark of block products: no wrong result gets a number, and bars are what they say."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import sparse_layouts as sl
from benchmarks import gpu, gpu_command, matmul, matmul_rows, report
from benchmarks import matmul_break_even as even
from benchmarks import matmul_cases as cases
from benchmarks import matmul_dlmc as dlmc
from benchmarks import matmul_preparation as preparation
from benchmarks import matmul_variants as variants
from benchmarks.gpu import OURS, Effort
from benchmarks.matmul_cases import BSR, CASES, CSR, DENSE, OUR_DSD, TRITON, Bar, Case
from benchmarks.matmul_reference import check
from benchmarks.matmul_rows import Ceilings, Product
from benchmarks.matmul_training import memory_notes
from benchmarks.timing import WrongResult
from sparse_layouts.kernels.block_matmul import cpu
from sparse_layouts.kernels.sddmm import cpu as cpu_sddmm
from sparse_layouts.measuring import Timing, interleaved

TINY = Effort(1, 1, 32)


def tiny(case: Case) -> Case:
    """The same on few entries, in a dtype that the CPU multiplies fast."""
    edge = 2 * max(case.block)
    dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    size = {"m": edge, "k": 2 * edge, "n": min(case.n, 8)}
    more = {"heads": case.heads and 3, "batch": case.batch and 2, "dtype": dtype}
    return dataclasses.replace(case, **size, **more)  # type: ignore[arg-type]


def named(name: str) -> Case:
    return tiny(next(case for case in CASES if case.name == name))


def distinct() -> Iterator[Any]:
    """The cases that still differ when they are tiny."""
    seen = set()
    for case in CASES:
        small = tiny(case)
        key = dataclasses.replace(small, name="", n=0, rivals=(), bar=None, tf32=False)
        if key not in seen:
            seen.add(key)
            yield pytest.param(small, id=case.name)


EVERY = list(distinct())
DSD = named("dsd 25% block 16")


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


def on_cpu(**more: Any) -> matmul.Run:
    return matmul.Run(tell=lambda stage: None, device="cpu", **more)


def timing(seconds: float) -> Timing:
    return Timing(seconds, 0.9 * seconds, 1.1 * seconds, 3)


def row_of(case: Case, **more: Any) -> Product:
    (row,) = matmul.measure(case, on_cpu(**more), Ceilings("cpu", TINY), TINY)
    return row


# --- patterns and operands ------------------------------------------------------------------------


@pytest.mark.parametrize("case", EVERY)
def test_operands_are_the_pattern(case: Case) -> None:
    given = variants.operands(case, "cpu")
    bm, bn = case.block
    kept = case.kept().repeat_interleave(bm, 1).repeat_interleave(bn, 2)
    kept = kept if case.heads else kept[0]
    assert torch.equal(given.dense != 0, kept)
    assert torch.equal(given.layout.to_dense(), given.dense)
    assert given.layout.block_size == case.block
    assert given.weight_bytes >= given.layout.nnz * given.dense.element_size()
    assert all(other.dtype == case.dtype for other in given.others)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_patterns_store_their_share(share: float) -> None:
    def density(pattern: cases.Pattern) -> float:
        table = pattern.blocks(64, 64, torch.Generator().manual_seed(0))
        assert table.shape == (64, 64)
        return float(table.float().mean())

    assert density(cases.RandomBlocks(share)) == pytest.approx(share, abs=1 / 4096)
    assert density(cases.Banded(share)) == pytest.approx(share, rel=0.2)
    assert density(cases.PowerLaw(share)) == pytest.approx(share, rel=0.05)


def test_rows_of_a_power_law_differ_and_a_band_is_one() -> None:
    lengths = cases.PowerLaw(0.1).blocks(64, 64, torch.Generator().manual_seed(0)).sum(1)
    assert int(lengths.max()) > 8 * int(lengths.median())
    assert int(lengths.min()) >= 1
    band = cases.Banded(0.25).blocks(8, 16, torch.Generator())
    assert bool(band[0, 0])
    assert not bool(band[0, 3:].any())
    assert not bool(band[7, :12].any())


def test_dense_operands_lie_as_the_case_says() -> None:
    by_columns = variants.operands(named("dsd x by columns"), "cpu").others[0]
    assert by_columns.mT.is_contiguous()
    strided = variants.operands(named("dsd x strided"), "cpu").others[0]
    assert strided.stride(-1) == 2
    assert variants.operands(named("dsd 16 heads, batch 2"), "cpu").others[0].shape[:2] == (2, 3)


# --- right and wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", EVERY)
def test_results_and_gradients_are_compared_with_float64(case: Case) -> None:
    checked = check(case, variants.operands(case, "cpu"))
    names = {"da", "db"} if case.kind == cases.SDD else {"dx", "dw"}
    assert set(checked.gradients) == names
    for error, dense_error in [(checked.error, checked.dense_error), *checked.gradients.values()]:
        assert error < 1e-5
        assert dense_error < 1e-5
    assert checked.kernel == ("sddmm cpu" if case.kind == cases.SDD else "block_matmul cpu")
    assert checked.backward_kernel


@pytest.fixture
def wrong_kernel() -> Iterator[Callable[..., None]]:
    """Registers a kernel before the others, for the test."""
    made: list[Any] = []

    def register(op: str, function: Callable[..., Any]) -> None:
        made.append(sl.kernel(op, name="wrong")(function))

    yield register
    for kernel in made:
        kernel.unregister()


def test_a_wrong_product_gets_no_number(wrong_kernel: Callable[..., None]) -> None:
    def wrong(*args: Any, **more: Any) -> Any:
        return cpu.block_matmul(*args, **more) * 1.001

    wrong_kernel("block_matmul", wrong)
    with pytest.raises(WrongResult, match=r"dsd 25% block 16, out: relative error 1\.00e-03"):
        row_of(DSD)


def test_a_wrong_gradient_gets_no_number(
    wrong_kernel: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args: Any) -> Any:
        return cpu_sddmm.sddmm(*args) * 1.001

    wrong_kernel("sddmm", wrong)
    monkeypatch.setattr(matmul, "QUICK", TINY)
    monkeypatch.setattr(matmul, "QUICK_CASES", (DSD,))
    (row,) = matmul.run([DSD.name], on_cpu(quick=True))
    assert isinstance(row, Product)
    assert "dw: relative error 1.00e-03" in row.wrong
    assert row.timing is None
    assert matmul.cells(row)[-1] == "no"
    assert "WRONG" in matmul.cells(row)[-3]


def test_results_that_change_between_runs_are_wrong(wrong_kernel: Callable[..., None]) -> None:
    runs = iter(range(100))

    def unsteady(*args: Any, **more: Any) -> Any:
        return cpu.block_matmul(*args, **more) * (1 + next(runs) * 1e-6)

    wrong_kernel("block_matmul", unsteady)
    with pytest.raises(WrongResult, match="differs in its bits between two runs"):
        check(DSD, variants.operands(DSD, "cpu"))


def test_a_case_that_no_kernel_takes_is_left_out() -> None:
    with sl.kernel_choice(block_matmul="triton"), pytest.raises(Exception, match="triton"):
        row_of(DSD)  # asked for by name: an error

    def refused(case: Case, given: Any) -> Any:
        raise sl.DenseFallbackError("no kernel takes blocks of (1, 32)\nand more")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul, "check", refused)
        row = row_of(DSD)
    assert row.notes[-1] == "left out, no kernel takes it: no kernel takes blocks of (1, 32)"
    assert not row.wrong
    assert row.timing is None
    assert "left out" in matmul.cells(row)[6]


# --- rivals ---------------------------------------------------------------------------------------


def test_reordering_is_a_rival_and_its_gain_a_note() -> None:
    case = Case(
        "shuffled",
        cases.Shuffled(cases.Banded(0.2)),
        (16, 16),
        m=512,
        k=512,
        n=8,
        dtype=torch.float32,
        rivals=(cases.REORDERED,),
    )
    kept, band = case.kept()[0], cases.Banded(0.2).blocks(32, 32, torch.Generator())
    assert not torch.equal(kept, band)
    assert torch.equal(kept.int().sum(0), band.int().sum(0))
    row = row_of(case)
    (note,) = [note for note in row.notes if note.startswith("reordered")]
    ratio = row.timing.median_s / row.rivals[cases.REORDERED].median_s
    assert f"eager {ratio:.2f}x as fast, modelled " in note
    assert f" blocks for {int(band.sum())} of (" in note


def test_a_row_against_its_rivals() -> None:
    row = row_of(dataclasses.replace(DSD, rivals=(DENSE, BSR, CSR, TRITON, OUR_DSD)))
    assert {DENSE, CSR, OUR_DSD} <= set(row.rivals)
    notes = " | ".join(row.notes)
    assert f"{TRITON}: NotInstalled: triton.ops.blocksparse is not importable" in notes
    assert "kernel block_matmul cpu" in notes
    assert row.graph is None
    assert row.flop == 2 * 8 * row.density * 32 * 64  # type: ignore[operator]
    assert row.of_ceiling is not None
    assert row.bar == 2.5
    assert row.density == pytest.approx(0.25)


@pytest.mark.parametrize("name", ["sdd 25% block 64", "dds 25% block 64", "decode batch 8"])
def test_other_products_against_dense_and_our_own(name: str) -> None:
    row = row_of(named(name), without=[BSR])
    assert DENSE in row.rivals
    assert (OUR_DSD in row.rivals) == (not name.startswith("decode"))
    if name.startswith("decode"):
        assert f"{BSR}: left out, as asked" in row.notes
        assert row.measured is None  # the bar is of graphs, and there are none here
    else:
        assert row.measured == row.ratios[OUR_DSD]


def test_a_rival_with_another_result_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(case: Case, given: Any) -> variants.Variant:
        return variants.Variant(lambda w: 2 * (w @ given.others[0]), given.dense)

    monkeypatch.setitem(variants.RIVALS, CSR, other)
    row = row_of(dataclasses.replace(DSD, rivals=(DENSE, CSR)))
    assert list(row.rivals) == [DENSE]
    assert f"{CSR}: Differs: left out, its result differs by 1.0e+00" in row.notes


def test_weights_take_turns() -> None:
    given = variants.operands(DSD, "cpu")
    mine = variants.ours(DSD, given)
    seen: list[Any] = []

    def call(w: Any) -> Any:
        seen.append(w)
        return mine.call(w)

    watched = mine._replace(call=call)
    outs = watched.turns(3)()()
    assert len(seen) == 3
    assert len({w.values().data_ptr() for w in seen}) == 3
    assert all(torch.equal(out, outs[0]) for out in outs)
    training = dataclasses.replace(DSD, kind=cases.TRAINING)
    step = variants.ours(training, variants.operands(training, "cpu"))
    assert step.weight.requires_grad
    dx, dw = step.turns(2)()()[1]
    assert type(dx) is torch.Tensor
    assert isinstance(dw, sl.BSRTensor)


def test_times_in_graphs_are_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def replay(make: Callable[[], Callable[[], Any]]) -> Callable[[], Any]:
        run = make()
        run()  # as a capture does
        return run

    def times(every: Any, *, rounds: int, rep_ms: int) -> dict[str, Timing]:
        return {name: timing(len(run() or [1]) * 1e-3) for name, run in every.items()}

    def broken(w: Any) -> Any:
        if torch.is_tensor(w):
            return [1] * 7  # an eager call of 7 ms: no graph
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(matmul_rows, "captured", replay)
    monkeypatch.setattr(matmul_rows, "copies_of", lambda weight_bytes, device: 4)
    monkeypatch.setattr(matmul_rows, "gpu_times", times)
    given = variants.operands(DSD, "cpu")
    calls = iter(range(1, 100))

    def fails_later(w: Any) -> Any:
        return None if next(calls) == 1 else broken(None)

    every = {
        OURS: variants.ours(DSD, given)._replace(call=lambda w: None),
        DENSE: variants.dense(DSD, given)._replace(call=lambda w: None),
        BSR: variants.Variant(fails_later, given.dense),
        CSR: variants.Variant(broken, given.dense),
    }
    row = Product("a", "cpu")
    matmul_rows.time_row(row, every, TINY, True, 1e6)
    assert row.timing == timing(1e-3)
    assert row.graph is not None
    assert row.graph.median_s == pytest.approx(1e-3)  # four calls in 4 ms
    assert set(row.rivals) == {DENSE, BSR, CSR}
    assert set(row.graph_rivals) == {DENSE}
    assert f"{BSR}: no CUDA graph: RuntimeError: operation not permitted" in row.notes
    assert "in graphs 4 weights take turns" in row.notes


def test_training_keeps_what_is_stored() -> None:
    case = dataclasses.replace(named("linear training 20% block 64"), m=512, k=512, n=4)
    given = variants.operands(case, "cpu")
    notes, found = memory_notes(given)
    mine, dense = found[OURS], found["dense"]
    values = given.layout.values().nbytes
    assert dense["weight"] == dense["gradient"] == 512 * 512 * 4
    assert dense["state"] >= 2 * dense["weight"]
    assert values <= mine["weight"] < 1.1 * values
    assert values <= mine["gradient"] < 1.1 * values
    assert 2 * values <= mine["state"] < 2.1 * values
    assert mine["total"] < 0.25 * dense["total"]
    assert "of the dense layer's bytes" in notes[-1]


# --- rows and bars --------------------------------------------------------------------------------


def test_a_bar_is_of_eager_calls_or_of_graphs() -> None:
    row = Product("a", "cuda", timing=timing(2e-4), graph=timing(1e-4), density=0.25, flop=4e10)
    row.rivals, row.graph_rivals = {DENSE: timing(4e-4)}, {DENSE: timing(3e-4)}
    row.moved, row.ceiling_flops, row.ceiling_bytes = 1e8, 8e14, 4e12
    matmul_rows.hold_to_bar(row, Bar(2.5, DENSE))
    assert (row.measured, row.holds) == (pytest.approx(2.0), False)
    matmul_rows.hold_to_bar(row, Bar(2.5, DENSE, aim=3.5, graph=True))
    assert (row.measured, row.holds) == (pytest.approx(3.0), True)
    assert row.of_ceiling == pytest.approx(0.5)  # 50 us of arithmetic, 25 of memory
    assert not row.by_bytes
    assert matmul.cells(row) == [
        *("a", "25.0%", "200 us ±10%", "100 us", "400 TFLOP/s", "50%"),
        *("2.00x (3.00x) dense", ">= 2.5x dense in graphs (aim 3.5)", "yes"),
    ]
    row.moved = 4e8
    assert row.by_bytes
    assert matmul.cells(row)[4] == "400 TFLOP/s, 4000 GB/s"
    assert row.as_json()["graph_ratios"] == {DENSE: pytest.approx(3.0)}
    assert "copy 4 TB/s; cuBLAS 800 TFLOP/s" in matmul_rows.ceilings_of([row])
    row.rivals = {}
    matmul_rows.hold_to_bar(row, Bar(1.4, BSR))
    assert row.holds is None  # nobody to compare with


def test_the_bars() -> None:
    bars = {case.name: case.bar for case in CASES if case.bar is not None}
    assert bars["dsd 25% block 16"] == Bar(2.5, BSR, 3.5)
    assert bars["dsd 10% block 128"] == Bar(3.8, DENSE)
    assert bars["decode batch 16"] == Bar(2.5, DENSE, graph=True)
    assert len(bars) == 12
    for case in CASES:
        assert DENSE in case.rivals  # always the ratio to dense
        assert case.bar is None or case.bar.over in case.rivals


# --- break-even -----------------------------------------------------------------------------------


def test_break_even_lies_between_two_points() -> None:
    def curve(*ratios: float) -> list[dict[str, Any]]:
        shares = (0.1, 0.3, 0.5)
        made = zip(shares, ratios, strict=True)
        return [{"density": d, "ratio": 9.0, "graph_ratio": r} for d, r in made]

    assert even.break_even(curve(4.0, 2.0, 0.5)) == pytest.approx(0.4)
    assert even.break_even(curve(4.0, 1.0, 0.5)) == pytest.approx(0.3)
    assert even.break_even(curve(4.0, 2.0, 1.5)) is None
    assert even.break_even(curve(0.9, 0.8, 0.5)) is None


def curves() -> list[Product]:
    rows = []
    for density, ratio in ((0.1, 4.0), (0.5, 0.5)):
        row = Product("", "cuda", density=density, timing=timing(1.0), kernel="block_matmul x")
        row.rivals = {DENSE: timing(ratio)}
        rows.append(row)
    return [even.summary("break-even block 64", "cuda", rows)]


def test_a_curve_is_a_row_a_table_and_a_plot(tmp_path: Path) -> None:
    (row,) = curves()
    assert row.measured == pytest.approx(0.1 + 0.4 * 2 / 3)
    assert matmul.cells(row)[6] == "37% of the blocks"
    assert report.cells(row)[4] == "0.367 density"
    lines = even.table([row]).splitlines()
    assert lines[0].split()[-3:] == ["10%", "50%", "break-even"]
    assert lines[-1].split() == ["block", "64", "4.00", "0.50", "37%"]
    assert even.table([]) == ""
    done = even.plot([row], tmp_path / "h200_matmul_break_even", "a title")
    if done.startswith("drawn"):
        assert {file.suffix for file in tmp_path.iterdir()} == {".png", ".svg"}
    else:
        assert done == "no plot: matplotlib is not installed"


# --- DLMC -----------------------------------------------------------------------------------------


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    """Two matrices, one of which 16 does not divide."""
    folder = tmp_path / "dlmc"
    folder.mkdir()
    for name, (rows, columns) in {"even": (32, 64), "odd": (8, 24)}.items():
        kept = torch.zeros(rows, columns, dtype=torch.bool)
        kept[0, ::3] = kept[rows - 1, 1] = True
        crow = [0, *kept.sum(1).cumsum(0).tolist()]
        lines = [f"{rows}, {columns}, {crow[-1]}", crow, kept.nonzero()[:, 1].tolist()]
        text = [line if isinstance(line, str) else " ".join(map(str, line)) for line in lines]
        (folder / f"{name}.smtx").write_text("\n".join(text) + "\n")
    return folder


def test_real_matrices_are_one_row_a_block_size(
    collection: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "QUICK", TINY)
    how = on_cpu(quick=True, matrices=collection, without=[BSR])
    (row,) = matmul.run(["DLMC block 16"], how)
    assert not row.wrong
    assert row.density == pytest.approx(5 / 8)  # four blocks of the first row, one of the last
    assert row.timing is not None
    notes = " | ".join(row.notes)
    assert "even 32 x 64: 1.1% of the entries, 62% of the blocks: " in notes
    assert "odd: left out, 16 does not divide 8 x 24" in notes


def test_without_the_matrices_rows_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = matmul.run(["DLMC"], on_cpu(quick=True, matrices=tmp_path))
    assert [row.name for row in rows] == list(dlmc.NAMES)
    for row in rows:
        assert row.notes[-1].startswith(f"left out: {tmp_path} holds no .smtx file that fits")
        assert not row.wrong
    monkeypatch.setenv(dlmc.VARIABLE, str(tmp_path / "elsewhere"))
    assert dlmc.folder() == tmp_path / "elsewhere"


# --- the command ----------------------------------------------------------------------------------


def test_rows_are_shown_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(matmul, "QUICK", TINY)
    monkeypatch.setattr(matmul, "QUICK_CASES", (DSD, named("linear training 20% block 64")))
    how = on_cpu(quick=True, matrices=tmp_path, show=matmul.show)
    rows = matmul.run(["dsd 25%", "training", "DLMC block 16"], how)
    assert [row.name for row in rows] == [
        *("dsd 25% block 16", "linear training 20% block 64", "DLMC block 16")
    ]
    assert [row.wrong for row in rows] == ["", "", ""]
    assert all(row.bar is None for row in rows)  # small sizes are held to none
    matmul.write(tmp_path, "NVIDIA H200", [*rows, *curves()], {"commit": "abc"}, True, 3)
    found = json.loads((tmp_path / "h200_matmul.json").read_text(encoding="utf-8"))
    assert (found["commit"], found["quick"], found["seconds"]) == ("abc", True, 3)
    first, training, *_, last = found["rows"]
    assert first["timing"]["median_s"] > 0
    assert first["ratios"][DENSE] > 0
    assert first["bound_by"] in ("bytes", "flops")
    assert set(training["memory"]) == {OURS, "dense"}
    assert training["kernel"] == "block_matmul cpu; backward sddmm cpu, block_matmul cpu"
    assert [point["density"] for point in last["points"]] == [0.1, 0.5]
    text = (tmp_path / "h200_matmul.txt").read_text(encoding="utf-8")
    assert "Ceilings: a copy" in text
    assert "times faster than dense at" in text
    assert "in all" in text
    assert "kernel block_matmul cpu" in capsys.readouterr().out


def test_the_command_measures_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(matmul, "QUICK", TINY)
    monkeypatch.setattr(matmul, "QUICK_CASES", (DSD,))
    monkeypatch.setattr(matmul, "Run", functools.partial(matmul.Run, device="cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(report, "environment", lambda: {"load_average": 0.0})
    options = ["--quick", "--only", "dsd 25%", "--without", TRITON, "--no-graph"]
    assert matmul.main([*options, "--out", str(tmp_path / "results")]) == 0
    assert {file.name for file in (tmp_path / "results").iterdir()} == {
        *("h200_matmul.json", "h200_matmul.txt")
    }
    out = capsys.readouterr().out
    assert f"NVIDIA H200, torch {torch.__version__}" in out
    assert out.count("dsd 25% block 16") >= 2
    assert "Ratios are how many times faster" in out


def test_past_the_deadline_rows_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = matmul.run([], on_cpu(quick=True, deadline=0.0))
    assert [row.name for row in rows] == matmul.names(True)
    assert all(row.notes == ["left out: no time left"] for row in rows)


def test_rows_are_dealt_out_to_processes() -> None:
    (first, second) = preparation.tasks(["a b", "c", "d"], 2)
    assert preparation.command(first)[-2:] == ["a b", "d"]
    assert preparation.command(second)[-1] == "c"
    assert len(preparation.tasks(["a"], 12)) == 1


def test_a_preparation_runs_the_product_and_its_rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "CASES", (DSD, named("dsd fp64")))
    with sl.trace() as steps:
        assert preparation.main([DSD.name], "cpu") == 0
    assert [step.what for step in steps].count("sddmm") == 1
    assert [step.what for step in steps].count("block_matmul") == 3


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert matmul.main(["--list"]) == 0
    assert capsys.readouterr().out.splitlines() == matmul.names(False)
    assert len(set(matmul.names(False))) == len(matmul.names(False))
    assert set(cases.QUICK_NAMES) == {case.name for case in cases.QUICK_CASES}
    with pytest.raises(SystemExit) as stopped:
        matmul.main(["--only", "no such row"])
    assert stopped.value.code == 2
    assert "no row contains 'no such row'; --list names them" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert matmul.main(["--only", "dsd"]) == 1
        assert "torch sees no CUDA device" in capsys.readouterr().err
    assert gpu_command.file_name("NVIDIA H200", matmul.SUBJECT) == "h200_matmul"


def test_the_file_runs_as_a_script(tmp_path: Path) -> None:
    script = Path(matmul.__file__)
    done = subprocess.run(
        [sys.executable, str(script), "--list"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == matmul.names(False)


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")
@pytest.mark.gpu
def test_tiny_rows_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the device's clock
    chosen = ["--quick", "--only", "dsd 25% block 64", "--only", "decode", "--out", str(tmp_path)]
    assert matmul.main(chosen) == 0
    (file,) = tmp_path.glob("*_matmul.json")
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [row["name"] for row in rows] == ["dsd 25% block 64", "decode batch 1"]
    for row in rows:
        assert row["timing"]["median_s"] > 0
        assert row["graph"]["median_s"] > 0, row["notes"]
        assert row["kernel"].startswith("block_matmul ")
        assert row["graph_ratios"][DENSE] > 0
