"""The documentation site's own parts: what generates it, what checks it, and that it is complete.

`make docs` builds it, strictly, and checks its links.
"""

from __future__ import annotations

import doctest
import json
import re
from pathlib import Path
from typing import Any

import pytest

import sparse_layouts as sl
from docs import check_site, markers, operations
from sparse_layouts.dispatch.kernel_table import KERNELS
from sparse_layouts.viewing import benchmark_results

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "pages"


# --- what is generated ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", operations.MASKS)
def test_tables_name_kernels_that_are_there(name: str) -> None:
    known = {row.name for rows in KERNELS.rows.values() for row in rows} | {"torch", "dense", ""}
    for row in operations.operations(name):
        for cell in row[2:]:
            by_dtype = [part.rsplit(" in ", 1)[0] for part in cell.split("; ")]
            assert {name for part in by_dtype for name in part.split(", ")} <= known, row


def test_a_table_follows_the_kernel_table() -> None:
    def first(name: str) -> operations.Operation:
        return operations.operations(name)[0]

    assert first("BSRTensor")[1:4] == ("`block_matmul`", "cpu", "hopper in bf16; triton in fp32")
    assert first("GroupedNMTensor").gpu == "dense"
    attention = next(r for r in operations.operations("BSRTensor") if "attention" in r.written)
    assert attention.gpu == attention.gradients_gpu == "hopper in bf16; triton in fp32"
    assert "| `hopper` in bf16; `triton` in fp32 |" in markers.operations_table("BSRTensor")

    @sl.kernel("block_matmul", requires=lambda facts: None, name="everywhere")
    def everywhere() -> None: ...

    try:
        assert (first("BSRTensor").cpu, first("BSRTensor").gpu) == ("everywhere", "everywhere")
    finally:
        everywhere.unregister()
    assert first("BSRTensor").cpu == "cpu"


def test_every_layout_has_a_page_with_its_picture_and_table() -> None:
    public = {
        name
        for name in sl.__all__
        if isinstance(getattr(sl, name), type) and issubclass(getattr(sl, name), sl.LayoutTensor)
    } - {"LayoutTensor"}
    assert set(operations.MASKS) == public
    for name in public:
        text = (PAGES / "layouts" / f"{name}.md").read_text(encoding="utf-8")
        assert "<!-- picture: " in text
        assert f"<!-- operations: {name} -->" in text
        assert f"::: sparse_layouts.{name}" in text


def test_every_public_name_is_in_the_reference() -> None:
    text = "".join(p.read_text(encoding="utf-8") for p in (PAGES / "reference").glob("*.md"))
    missing = {name for name in sl.__all__ if f"::: sparse_layouts.{name}\n" not in text}
    assert not missing


def test_markers_are_filled() -> None:
    assert "<svg" in markers.filled("<!-- picture: sl.causal(64, block_size=16) -->")
    assert "<table>" in markers.filled("<!-- look: sl.causal(64, block_size=16) -->")
    assert "| `w @ x, 2 columns` |" in markers.filled("<!-- operations: NMTensor -->")
    assert "| `torch.matmul` |" in markers.filled("<!-- routes: NMTensor -->")
    assert markers.filled("    <!-- overview -->").startswith("    | layout |")
    assert "$ python -m sparse_layouts explain" in markers.filled(
        "<!-- output: explain matmul bsr rows=64 columns=64 -->"
    )
    assert markers.filled("<!-- a comment, not a marker --> here") == (
        "<!-- a comment, not a marker --> here"
    )
    with pytest.raises(ValueError, match="no marker 'pictrue'; there are picture, look"):
        markers.filled("<!-- pictrue: x -->")
    with pytest.raises(ValueError, match="explain x y ended with 2"):
        markers.filled("<!-- output: explain x y -->")


def test_every_committed_result_is_on_the_page() -> None:
    text = markers.filled("<!-- results -->")
    for row in markers.read_results():
        assert f"| {row.name} |" in text


def test_results_of_a_new_file_are_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib, the extra viz")

    def content(gpu: str, *rows: dict[str, Any]) -> str:
        return json.dumps(
            {
                "date": "2026-01-02",
                "versions": {"torch": "2.13.0", "triton": "3.7.1"},
                "devices": [{"device": "cuda:0", "name": gpu}],
                "rows": rows,
            }
        )

    row = {"name": "new", "density": 0.5, "timing": {"median_s": 1e-3}, "flops": 1e12}
    share = {"name": "shared", "timing": {"median_s": 1e-3}, "share": 0.5, "share_of": "cuDNN"}
    left_out = {"name": "left out", "timing": None}
    first = content("One", {**row, "notes": ["N 8192"]}, share, left_out)
    (tmp_path / "one_matmul.json").write_text(first, encoding="utf-8")
    (tmp_path / "two_nm.json").write_text(content("Two", row), encoding="utf-8")
    (tmp_path / "three.json").write_text(content("Three", share), encoding="utf-8")
    monkeypatch.setattr(benchmark_results, "results_folder", lambda: tmp_path)
    monkeypatch.setattr(markers, "results_folder", lambda: tmp_path)

    figures = markers.filled("<!-- rooflines -->")
    assert re.findall('alt="(.*?)"', figures) == ["One", "Two"]  # nothing of Three can be drawn
    text = markers.filled("<!-- results -->")
    assert "### one matmul\n\nOne, torch 2.13.0, Triton 3.7.1, 2026-01-02" in text
    assert "- new: N 8192" in text
    assert "| shared |  | 1&nbsp;ms | 50% of cuDNN |" in text
    assert "left out" not in text


def test_docstrings_become_markdown() -> None:
    pytest.importorskip("griffe", reason="needs griffe, which the extra docs brings")
    from docs.docstrings import as_markdown

    text = "One :class:`A`, (*batch, M) of `f(*x)`::\n\n    x = 1\n\nTwo.\n\n>>> 1 + 1\n2\n\nEnd."
    assert as_markdown(text).split("\n") == [
        r"One `A`, (\*batch, M) of `f(*x)`:",
        "",
        "```text",
        "x = 1",
        "```",
        "",
        "Two.",
        "",
        "```pycon",
        ">>> 1 + 1",
        "2",
        "```",
        "",
        "End.",
    ]


def test_examples_of_the_markers() -> None:
    assert doctest.testmod(markers).failed == 0


# --- what is checked ------------------------------------------------------------------------------


def site(folder: Path, **pages: str) -> Path:
    for name, body in pages.items():
        (folder / f"{name}.html").write_text(f"<html><body>{body}</body></html>")
    return folder


def test_a_whole_site_has_no_faults(tmp_path: Path) -> None:
    two = '<h2 id="part">Part</h2><a href="#part">up</a><a href="https://pytorch.org">out</a>'
    one = '<a href="two.html#part">two</a><img src="data:image/png;base64,x"><a href=".">home</a>'
    site(tmp_path, index="", one=one, two=two)
    assert check_site.faults(tmp_path) == []


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ('<a href="three.html">x</a>', "three.html: is not there"),
        ('<a href="../outside.html">x</a>', "../outside.html: is not there"),
        ('<a href="two.html#none">x</a>', "the page has no place 'none'"),
        ('<a href="#none">x</a>', "the page has no place 'none'"),
        ('<a href="/two.html">x</a>', "is absolute"),
        ('<a href="http://pytorch.org">x</a>', "is not https"),
        ('<img src="picture.png">', "picture.png: is not there"),
        ('<script src="https://cdn.example/x.js"></script>', "from elsewhere"),
        ('<link rel="stylesheet" href="https://fonts.example/x.css">', "from elsewhere"),
    ],
)
def test_a_link_that_leads_nowhere_is_found(body: str, fault: str, tmp_path: Path) -> None:
    (tmp_path / "outside.html").touch()
    folder = tmp_path / "site"
    folder.mkdir()
    (found,) = check_site.faults(site(folder, one=body, two=""))
    assert fault in found


def test_no_site_is_a_fault(tmp_path: Path) -> None:
    assert check_site.faults(tmp_path) == [f"no page in {tmp_path}"]
