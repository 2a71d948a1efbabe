"""Work, benchmark results read from JSON, and the figure of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import sparse_layouts as sl
from sparse_layouts.viewing.benchmark_results import named, read_results, results_folder
from sparse_layouts.viewing.work import work_of

WHERE = {
    "date": "2026-01-02T03:04:05+00:00",
    "versions": {"torch": "2.13.0", "triton": "3.7.1"},
    "devices": [{"device": "cpu", "name": "A CPU"}],
    "threads": 2,
}


def row(name: str, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "device": "cpu",
        "density": 0.25,
        "timing": {"median_s": 0.001},
        "ratios": {"dense causal": 2.0, "another": 3.0},
        "flops": 5e9,
        "ceiling_flops": 1e10,
        "holds": True,
        "notes": ["a note"],
        **more,
    }


def written(folder: Path, *rows: dict[str, Any], **where: Any) -> Path:
    file = folder / "results.json"
    file.write_text(json.dumps({**WHERE, **where, "rows": list(rows)}), encoding="utf-8")
    return file


def test_rows_are_read_by_field(tmp_path: Path) -> None:
    skipped = row("left out", timing=None, ratios={})
    wrong = row("wrong", wrong="an error")
    more = row("more", a_field_of_tomorrow=1, ceiling_flops=None, density=None, ratios={})
    first, last = read_results(written(tmp_path, row("matmul"), skipped, wrong, more))
    assert (first.name, first.seconds, first.density) == ("matmul", 0.001, 0.25)
    assert first.over_dense == 2.0
    assert first.of_ceiling == 0.5
    assert first.where == "A CPU, 2 threads, torch 2.13.0, Triton 3.7.1, 2026-01-02"
    assert (last.over_dense, last.of_ceiling) == (None, None)


def test_another_measure_of_the_ceiling(tmp_path: Path) -> None:
    (only,) = read_results(
        written(tmp_path, row("x", ceiling_flops=None, share=0.7, share_of="cuDNN"))
    )
    assert (only.of_ceiling, only.share_of) == (0.7, "cuDNN")


def test_a_gpu_is_where_the_results_are_from(tmp_path: Path) -> None:
    devices = [{"device": "cpu", "name": "A CPU"}, {"device": "cuda:0", "name": "A GPU"}]
    (only,) = read_results(written(tmp_path, row("x"), devices=devices))
    assert only.where.startswith("A GPU, torch")


def test_names_are_found_by_words_and_by_file(tmp_path: Path) -> None:
    found = read_results(written(tmp_path, row("A1 forward"), row("A1 backward"), row("matmul")))
    assert [r.name for r in named(found, "a1")] == ["A1 forward", "A1 backward"]
    assert [r.name for r in named(found, "A1 back")] == ["A1 backward"]
    assert len(named(found, "results.json")) == 3
    assert named(found, "nothing") == []


def test_committed_results_are_read() -> None:
    found = read_results()
    assert {r.file for r in found} == {f.name for f in results_folder().glob("*.json")}
    assert all(r.seconds for r in found)
    assert any(r.of_ceiling for r in found)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no benchmark results .JSONDecodeError"),
        ("[]", "no benchmark results .TypeError"),
        ('{"rows": []}', "no benchmark results .KeyError: 'devices'"),
        (json.dumps({**WHERE, "rows": [{"name": "x"}]}), "KeyError: 'timing'"),
        (json.dumps({**WHERE, "rows": [row("x", timing={"median_s": float("nan")})]}), "time of"),
    ],
)
def test_files_that_hold_no_results_are_named(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=f"bad.json: .*{message}"):
        read_results(file)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no benchmark results at .*nowhere"):
        read_results(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no \.json file in "):
        read_results(tmp_path)


# --- work -----------------------------------------------------------------------------------------


def test_work_of_products() -> None:
    w = sl.bsr(torch.eye(64), block_size=16)  # 4 of 16 blocks
    x = torch.ones(64, 10)
    for call in (
        (torch.matmul, w, x),
        (torch.Tensor.__matmul__, w, x),
        (torch.mm, w, x),
        (torch.matmul, x.mT, w),
        (F.linear, x.mT, w),
    ):
        work = work_of(*call)
        assert (work.flop, work.dense_flop) == (2 * w.nnz * 10, 2 * 64 * 64 * 10)
        assert work.share == 0.25
        assert work.bytes == w.nbytes + 2 * 64 * 10 * 4
        assert work.dense_bytes == 64 * 64 * 4 + 2 * 64 * 10 * 4
    several = torch.randn(3, 64, 64).sparse_mask(w.pattern)
    assert work_of(torch.matmul, several, x).flop == 2 * several.nnz * 10
    assert work_of(torch.bmm, several, x.expand(3, -1, -1)).flop == 2 * several.nnz * 10


def test_work_of_attention() -> None:
    mask = sl.local_stride(64, block_size=16, local_blocks=1, vert_stride=2, num_heads=2)
    q = torch.ones(3, 2, 64, 8)
    work = work_of(F.scaled_dot_product_attention, q, q, q, attn_mask=mask)
    assert work.flop == pytest.approx(3 * 4 * 8 * mask.nnz)
    assert work.dense_flop == 3 * 2 * 4 * 8 * 64 * 64
    assert work.bytes == 4 * q.nbytes + mask.nbytes
    assert work_of(sl.attention, q, q, q, mask) == work


def test_work_that_is_not_known() -> None:
    w = sl.bsr(torch.eye(64), block_size=16)
    with pytest.raises(NotImplementedError, match=r"products and attention, not torch\.softmax"):
        work_of(torch.softmax, w, -1)
    with pytest.raises(TypeError, match="one layout among the operands, got 0"):
        work_of(torch.matmul, torch.eye(2), torch.eye(2))
    with pytest.raises(TypeError, match="got 2"):
        work_of(torch.matmul, w, w)


# --- the figure -----------------------------------------------------------------------------------


def test_figure_of_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib, the extra viz")
    file = written(
        tmp_path,
        row("fast", density=0.1, ratios={"dense": 8.0}),
        row("slow", density=0.5, ratios={"dense": 0.5}, flops=1e9),
        row("without a rival", density=0.2, ratios={}),
    )
    figure = sl.roofline(results=file)
    rates, gains = figure.axes
    marks = {line.get_label(): line for line in rates.get_lines()}
    place = "A CPU, 2 threads, torch 2.13.0, Triton 3.7.1, 2026-01-02"
    assert list(marks[place].get_xdata()) == [0.1, 0.5, 0.2]
    assert list(marks[place].get_ydata()) == [5, 1, 5]
    (ceiling,) = (line for name, line in marks.items() if name.startswith("dense product"))
    assert set(ceiling.get_ydata()) == {10}
    lines = {line.get_label(): line for line in gains.get_lines()}
    assert list(lines[place].get_ydata()) == [8, 0.5]
    roof = lines["1 / density: all work skipped"]
    assert [x * y for x, y in zip(roof.get_xdata(), roof.get_ydata(), strict=True)] == (
        pytest.approx([1] * 64)
    )
    assert rates.get_ylabel() == "GFLOP/s of the stored part"
    assert figure.get_suptitle() == "Benchmark results"
    figure.canvas.draw()


def test_figure_of_rows_without_a_dense_rival(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib, the extra viz")
    figure = sl.roofline("x", results=written(tmp_path, row("x", ratios={})))
    assert "no row has a dense rival" in [text.get_text() for text in figure.axes[1].texts]
    assert figure.get_suptitle() == "Benchmark results: x"


def test_figure_of_the_committed_results() -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib, the extra viz")
    sl.roofline().canvas.draw()


def test_figure_of_a_call() -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib, the extra viz")
    w = sl.bsr(torch.randn(256, 256), 32, keep=sl.Magnitude(0.25)).requires_grad_()
    figure = sl.roofline(torch.matmul, w, torch.randn(256, 64))
    (axes,) = figure.axes
    roof, layout, dense = axes.get_lines()
    assert layout.get_label().startswith("BSRTensor: ")
    assert dense.get_label().startswith("dense: ")
    assert "GB/s, measured" in roof.get_label()
    work = work_of(torch.matmul, w, torch.randn(256, 64))
    assert layout.get_xdata()[0] == pytest.approx(work.intensity)
    assert "25% of the dense work" in axes.get_title()


def test_errors_say_what_was_expected(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib, the extra viz")
    file = written(tmp_path, row("matmul"), row("attention"))
    with pytest.raises(ValueError, match="called 'softmax'; there are attention, matmul"):
        sl.roofline("softmax", results=file)
    with pytest.raises(TypeError, match="expected a name or a function, got int"):
        sl.roofline(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="operands go with a function"):
        sl.roofline("matmul", torch.eye(3))
