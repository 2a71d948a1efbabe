"""The pages' tables against the library: what README.md says of every layout and the site of every
sparsifier; and the form of docstrings.
"""

from __future__ import annotations

import ast
import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import sparse_layouts as sl
from sparse_layouts.dispatch import Explanation, Facts

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = sorted((ROOT / "docs" / "pages").rglob("*.md"))
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(str(page.relative_to(ROOT)) for page in DOCS),
]
Row = dict[str, str]


def tables(text: str) -> list[list[Row]]:
    """The Markdown tables of a page, each a row's cells by the words of its column's head."""
    found = []
    for lines in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *body = ([c.strip() for c in line.split("|")[1:-1]] for line in lines.splitlines())
        found.append([dict(zip(head, cells, strict=True)) for cells in body])
    return found


def table_of(head: str, text: str = README) -> list[Row]:
    """The one table whose first column has this head."""
    (found,) = [rows for rows in tables(text) if rows and next(iter(rows[0])) == head]
    return found


def names(text: str) -> set[str]:
    """What a text calls `sl.<name>`."""
    return set(re.findall(r"\bsl\.(\w+)", text))


LAYOUTS = {row["layout"].strip("`"): row for row in table_of("layout")}
MADE: dict[str, Callable[[], Any]] = {  # a mask of each layout, and for the block ones of 16 x 16
    "BSRTensor": lambda: sl.bsr_mask(torch.eye(4, dtype=torch.bool), 16),
    "LocalStrideTensor": lambda: sl.local_stride(64, block_size=16, local_blocks=1, vert_stride=2),
    "BigBirdTensor": lambda: sl.bigbird(128, block_size=16, source="hf-eval"),
    "NMTensor": lambda: sl.nm(torch.randn(64, 64), 2, 4).pattern,
    "GroupedNMTensor": lambda: sl.grouped_nm(torch.randn(96, 96), 2, 4, 4).pattern,
    "ReorderedTensor": lambda: sl.reorder(sl.bsr(torch.eye(64), 16), 16).pattern,
    "CSRTensor": lambda: sl.csr(torch.eye(64)).pattern,
    "CSCTensor": lambda: sl.csc(torch.eye(64)).pattern,
}


def with_values(name: str, dtype: torch.dtype = torch.float32) -> Any:
    mask = MADE[name]()
    return torch.randn(mask.shape, dtype=dtype).sparse_mask(mask).requires_grad_()


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_every_name_on_a_page_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    missing = {name for name in names(text) if not hasattr(sl, name)}
    assert not missing


def test_every_public_name_is_on_a_page() -> None:
    pages = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    pages = re.sub(r"^:::.*$", "", pages, flags=re.MULTILINE)  # a directive explains nothing
    missing = set(sl.__all__) - set(re.findall(r"\b(?:sl\.)?([A-Z]\w+)\b", pages)) - names(pages)
    # these two are what a warning or an error says itself
    assert missing <= {"DenseFallbackError", "DenseFallbackWarning"}


def test_every_layout_has_a_row_and_an_example() -> None:
    public = {
        name
        for name in sl.__all__
        if inspect.isclass(cls := getattr(sl, name))
        and issubclass(cls, sl.LayoutTensor)
        and cls is not sl.LayoutTensor
    }
    assert set(LAYOUTS) == public == set(MADE)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_made_by_the_functions_of_its_row(name: str) -> None:
    makers = set()
    for public in sl.__all__:
        annotated = getattr(getattr(sl, public), "__annotations__", {})
        taken = next(iter(annotated.values()), "")  # a mask of a mask is not made, but changed
        if annotated.get("return") == name and taken != name:
            makers.add(public)
    assert names(LAYOUTS[name]["made by"]) == makers
    assert type(MADE[name]()) is getattr(sl, name)


# --- where it is sparse ---------------------------------------------------------------------------


def column(head: str) -> list[Any]:
    """(layout, cell) of a column, for parametrising."""
    return [pytest.param(name, row[head], id=name) for name, row in LAYOUTS.items()]


def check_cell(cell: str, explained: Explanation, call: Callable[[], torch.Tensor]) -> None:
    """Holds "CPU", "GPU" and "dense" to what a call does on the CPU, forward and backward, and to
    what the requirements of its ops' kernels say of a GPU.
    """
    assert set(re.findall(r"CPU|GPU|dense", cell))
    with sl.fallback("error"):
        if "CPU" not in cell:
            with pytest.raises(sl.DenseFallbackError):
                call()
        else:
            assert explained.kernel != "dense fallback"
            call().to_dense().square().sum().backward()
    on_gpu = Facts(
        "cuda",
        torch.float32,
        capability=(9, 0),
        triton=(3, 6, 0),
        block_size=(16, 16),
        head_dim=16,
        n_of_m=(2, 4),
        columns=16,
        divisor=64,
    )
    taken = [any(v.kernel.requires(on_gpu) is None for v in p.verdicts) for p in explained.ops]
    if "CPU" in cell:
        assert all(taken) == ("GPU" in cell)


@pytest.mark.parametrize(("name", "cell"), column("`@`, `sl.sddmm`"))
@pytest.mark.parametrize("side", ["left", "right", "transposed", "linear", "sddmm"])
def test_products(side: str, name: str, cell: str) -> None:
    w = with_values(name)
    a, b = torch.randn(8, w.shape[0]), torch.randn(w.shape[1], 8)
    calls: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "left": (torch.matmul, (w, b)),
        "right": (torch.matmul, (a, w)),
        "transposed": (torch.matmul, (w.mT, a.mT)),
        "linear": (F.linear, (b.mT, w)),
        "sddmm": (sl.sddmm, (a.mT.clone().requires_grad_(), b.mT, w.pattern)),
    }
    function, args = calls[side]
    check_cell(cell, sl.explain(function, *args), lambda: function(*args))


@pytest.mark.parametrize(("name", "cell"), column("softmax over stored entries"))
def test_softmax(name: str, cell: str) -> None:
    w = with_values(name)
    check_cell(cell, sl.explain(torch.softmax, w, -1), lambda: torch.softmax(w, -1))
    across = "dense" if "else dense" in cell else cell
    check_cell(across, sl.explain(torch.softmax, w, -2), lambda: torch.softmax(w, -2))


@pytest.mark.parametrize(("name", "cell"), column("attention mask"))
def test_attention(name: str, cell: str) -> None:
    mask = MADE[name]()
    q, k, v = (torch.randn(1, 1, len(mask), 16, requires_grad=True) for _ in range(3))
    function = F.scaled_dot_product_attention
    check_cell(
        cell,
        sl.explain(function, q, k, v, attn_mask=mask),
        lambda: function(q, k, v, attn_mask=mask),
    )
    if cell == "dense":  # the way out that the page names
        blocks = sl.mask_from(mask, 16)
        assert sl.explain(function, q, k, v, attn_mask=blocks).kernel == "cpu"


# --- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.bool])
@pytest.mark.parametrize("name", [n for n, row in LAYOUTS.items() if "`" in row["bytes"]])
def test_bytes(name: str, dtype: torch.dtype) -> None:
    w = MADE[name]() if dtype == torch.bool else with_values(name, dtype)
    (rows, columns), on_blocks = w.shape, isinstance(w, (sl.BSRTensor, sl.ReorderedTensor))
    known = {
        "b": 0 if dtype == torch.bool else dtype.itemsize,
        "i": 4,
        "S": w.nnz // (16 * 16) if on_blocks else w.nnz,
        "M": rows,
        "K": columns,
        "bm": 16,
        "bn": 16,
        "Mb": rows // 16,
        "Nb": columns // 16,
        "n": 2,
        "m": 4,
        "bits": math.ceil(math.log2(4)),
    }
    formula = re.findall(r"`(.*?)`", LAYOUTS[name]["bytes"])[0]
    assert w.nbytes == eval(formula, {"__builtins__": {}}, known)


def test_bytes_of_two_of_four() -> None:
    (said,) = re.findall(r"2:4 in bf16 ([\d.]+)", LAYOUTS["NMTensor"]["bytes"])
    w = with_values("NMTensor", torch.bfloat16)
    assert w.nbytes / w.numel() == float(said)


# --- sparsifiers ----------------------------------------------------------------------------------


def test_every_sparsifier_has_a_row_with_its_scope() -> None:
    page = ROOT / "docs" / "pages" / "reference" / "sparsifiers.md"
    rows = table_of("`keep=`", page.read_text(encoding="utf-8"))
    known = {"sl": sl, "value": 1.0, "density": 0.5, "like": torch.eye(4) > 0, "n": 2, "m": 4}
    for row in rows:
        assert eval(row["`keep=`"].strip("`"), known).scope == row["scope"], row
    public = {
        name
        for name in sl.__all__
        if inspect.isclass(cls := getattr(sl, name)) and issubclass(cls, sl.Sparsifier)
    }
    assert names(" ".join(row["`keep=`"] for row in rows)) == public - {"Sparsifier"}


# --- docstrings -----------------------------------------------------------------------------------

FOLDERS = ("sparse_layouts", "dispatch", "kernels", "benchmarks", "docs", "tests")
Documented = ast.Module | ast.ClassDef | ast.FunctionDef


def torn(source: str) -> list[str]:
    """The first paragraphs of docstrings that stop in the middle of a sentence."""
    found = []
    for node in ast.walk(ast.parse(source)):
        text = ast.get_docstring(node) if isinstance(node, Documented) else None
        first = (text or "").partition("\n\n")[0].rstrip()
        if first.endswith((":", ";", ",")) and not first.endswith("::"):
            found.append(first)
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_first_sentence_of_a_docstring_is_whole(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    assert not {str(f): t for f in files if (t := torn(f.read_text(encoding="utf-8")))}


@pytest.mark.parametrize("name", sl.__all__)
def test_a_public_name_says_what_it_is_and_shows_it(name: str) -> None:
    text = getattr(sl, name).__doc__
    assert text
    assert ">>> " in text


def test_a_module_says_what_it_is() -> None:
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            source = file.read_text(encoding="utf-8")
            assert not source.strip() or ast.get_docstring(ast.parse(source)), file


def test_a_torn_sentence_is_found() -> None:
    source = '''"""A table:\n\nof rows."""\ndef f():\n    """Whole.\n\n    And: more."""\n'''
    assert torn(source) == ["A table:"]


# --- the reader itself ----------------------------------------------------------------------------


def test_tables_are_read_by_their_heads() -> None:
    text = "words\n\n| a | b |\n|---|---|\n| 1 | `sl.bsr` |\n| 2 | |\n\n| c |\n|---|\n| 3 |\n"
    assert tables(text) == [[{"a": "1", "b": "`sl.bsr`"}, {"a": "2", "b": ""}], [{"c": "3"}]]
    assert names("`sl.bsr sl.csr`, sl") == {"bsr", "csr"}
    with pytest.raises(ValueError, match="unpack"):
        table_of("z", text)
