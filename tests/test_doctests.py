"""Every example runs: in docstrings, and the Python blocks of README.md, CONTRIBUTING.md and the
documentation's pages.

A block fenced as ```python runs, `>>>` lines as a doctest and others as they are, top to bottom in
one namespace a file, in a process of its own. A block fenced as ```python no-run is only shown.
"""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
FENCED = re.compile(r"^```python[ \t]*\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)
DOCS = sorted((ROOT / "docs" / "pages").rglob("*.md"))
OPTIONAL = {  # modules whose examples draw or show widgets
    "sparse_layouts.layout_tensor": "matplotlib",
    "sparse_layouts.viewing.comparison": "matplotlib",
    "sparse_layouts.viewing.explorer": "ipywidgets",
    "sparse_layouts.viewing.plots": "matplotlib",
    "sparse_layouts.viewing.roofline": "matplotlib",
}
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(str(page.relative_to(ROOT)) for page in DOCS if FENCED.search(page.read_text("utf-8"))),
]


def module_names() -> list[str]:
    """Import names of all files of the library, whichever of the three folders they are in."""
    names = []
    for folder, package in (
        ("sparse_layouts", "sparse_layouts"),
        ("dispatch", "sparse_layouts.dispatch"),
        ("kernels", "sparse_layouts.kernels"),
    ):
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            if parts[-1] == "__main__":
                continue  # importing it runs it
            names.append(".".join([package, *(p for p in parts if p != "__init__")]))
    return names


@pytest.mark.parametrize("name", module_names())
def test_examples_in_docstrings(name: str) -> None:
    is_kernel_body = name.rpartition(".")[2].startswith(("triton_", "hopper_"))
    if is_kernel_body and importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton, which has wheels for Linux only")
    if ".integrations." in name and importlib.util.find_spec(name.rpartition(".")[2]) is None:
        pytest.skip(f"needs {name.rpartition('.')[2]}, an optional dependency")
    optional = OPTIONAL.get(name)
    if optional is not None and importlib.util.find_spec(optional) is None:
        pytest.skip(f"needs {optional}, an optional dependency")
    result = doctest.testmod(importlib.import_module(name), optionflags=OPTIONS)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples; see the output"


def run_page(page: Path) -> int:
    """Run the Python blocks of a Markdown page; return the number of failed doctest examples."""
    text = page.read_text(encoding="utf-8")
    module = ModuleType("page_examples")  # so that classes defined on a page have a real module
    sys.modules[module.__name__] = module
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    for block in FENCED.finditer(text):
        line = text.count("\n", 0, block.start(1))
        if ">>>" in block[1]:
            test = doctest.DocTestParser().get_doctest(
                block[1], vars(module), page.name, str(page), line
            )
            runner.run(test, clear_globs=False)
            vars(module).update(test.globs)
        else:
            # Blank lines in front keep the page's line numbers in tracebacks.
            exec(compile("\n" * line + block[1], str(page), "exec"), vars(module))
    return runner.summarize().failed


def run_page_in_process(page: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Examples register routes and layouts, which must not reach the other tests."""
    return subprocess.run(
        [sys.executable, __file__, str(page)],
        cwd=folder,
        # Safe path: not the folder of this file, whose sub-folders are named as the library's.
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("page", PAGES)
def test_examples_on_pages(page: str, tmp_path: Path) -> None:
    needs_plots = ".plot(" in (ROOT / page).read_text(encoding="utf-8") or "roofline" in page
    if needs_plots and importlib.util.find_spec("matplotlib") is None:
        pytest.skip("needs matplotlib, the extra viz")
    done = run_page_in_process(ROOT / page, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "block", ["assert 1 == 2", ">>> 1 + 1\n3", "x = 1\n```\n\n```python\nassert x == 2"]
)
def test_a_wrong_example_is_found(block: str, tmp_path: Path) -> None:
    page = tmp_path / "PAGE.md"
    page.write_text(f"# Title\n\n```python\n{block}\n```\n")
    assert run_page_in_process(page, tmp_path).returncode != 0


def test_blocks_share_a_namespace_and_no_run_is_only_shown(tmp_path: Path) -> None:
    page = tmp_path / "PAGE.md"
    page.write_text(
        "```python\nx = 1\n```\n```python\n>>> y = x + 1\n>>> y\n2\n```\n"
        "```python\nassert y == 2\n```\n```python no-run\nraise RuntimeError\n```\n"
    )
    done = run_page_in_process(page, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    sys.exit(min(1, run_page(Path(sys.argv[1]))))
