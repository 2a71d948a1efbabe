"""The explorer and the reprs in a real browser: in JupyterLab, and in pages without Python."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sparse_layouts as sl
from tests.sparse_layouts.viewing import browser

pytestmark = pytest.mark.browser

CELLS = (
    "import sparse_layouts as sl\nexplorer = sl.explore()\nexplorer",
    "sl.causal(131072, block_size=64)",
)


def code_line(root: Any) -> str:
    return root.locator("code").first.inner_text()


def drag(page: Any, handle: Any, by: int) -> None:
    """Drags with the mouse, as a person does."""
    box = handle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + by, y, steps=8)
    page.mouse.up()


def test_explorer_in_jupyterlab(tmp_path: Path) -> None:
    browser.notebook(tmp_path / "explore.ipynb", *CELLS)
    with browser.jupyterlab(tmp_path) as address, browser.pages() as context:
        page = context.new_page()
        page.goto(f"{address}/lab/tree/explore.ipynb?token={browser.TOKEN}")
        page.wait_for_selector(".jp-Notebook .jp-Cell .cm-content", timeout=90_000)
        page.wait_for_selector("text=Python 3 (ipykernel) | Idle", timeout=90_000)
        for cell in range(len(CELLS)):
            page.locator(".jp-Cell .cm-content").nth(cell).click()
            page.keyboard.press("Control+Enter")
        live = page.locator(".sl-explorer-live")
        live.locator("svg").wait_for(timeout=90_000)
        first = code_line(live)
        assert first.startswith(
            "sl.local_stride(2048, block_size=64, local_blocks=4, vert_stride=8"
        )
        picture = live.locator("svg").inner_html()
        # measured by itself, once it has settled
        live.locator("text=/x (faster|slower)/").wait_for(timeout=60_000)

        sliders = live.locator(".noUi-handle")
        drag(page, sliders.nth(3), 60)  # vert_stride
        page.wait_for_function(
            "before => document.querySelector('.sl-explorer-live code').innerText !== before",
            arg=first,
            timeout=30_000,
        )
        dragged = code_line(live)
        assert "vert_stride=8" not in dragged
        assert "local_blocks=4" in dragged
        assert live.locator("svg").inner_html() != picture

        live.locator("select").first.select_option(label="n:m")
        page.wait_for_selector(".sl-explorer-live code:has-text('sl.nm(')", timeout=30_000)
        sliders.nth(2).focus()  # n, up to m and beyond
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        live.locator("text=expected 1 <= n < m").wait_for(timeout=30_000)
        live.locator("select").first.select_option(label="BSR")
        page.wait_for_selector(".sl-explorer-live code:has-text('sl.bsr(')", timeout=30_000)
        live.locator("button:has-text('Measure')").click()
        live.locator("text=/dense matmul .*x (faster|slower)/").wait_for(timeout=60_000)

        # the page for exports stays hidden beside a live one; the repr of the next cell is there
        page.wait_for_timeout(4000)
        assert not page.locator(".sl-explorer-page").is_visible()
        assert page.locator(".jp-RenderedHTML td:has-text('131072 x 131072')").count() == 1


def check_page(page: Any) -> None:
    """The explorer that needs no Python does what the live one does."""
    root = page.locator(".sl-explorer-page")
    root.wait_for(state="visible", timeout=30_000)
    root.locator("input[type=range]").first.wait_for(timeout=30_000)
    first, picture = code_line(root), root.locator("svg").inner_html()
    assert first.startswith("sl.local_stride(")
    assert root.locator("text=/x (faster|slower)/").count() == 1
    slider = root.locator("input[name=vert_stride]")
    box = slider.bounding_box()
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 2 / 3, y)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 3, y, steps=8)
    page.mouse.up()
    assert "vert_stride=16" in code_line(root)
    assert root.locator("svg").inner_html() != picture
    for family in ("bigbird", "sliding_window", "sink_window", "document", "nm", "bsr"):
        root.locator("select").select_option(family)
        assert code_line(root).startswith(f"sl.{family}(")
        assert root.locator("svg").count() == 1
        assert root.locator("th:has-text('FLOPs')").count() == 1


def test_explorer_in_an_exported_page(tmp_path: Path) -> None:
    pytest.importorskip("nbconvert", reason="needs nbconvert, the extra notebooks")
    source = browser.notebook(tmp_path / "explore.ipynb", *CELLS)
    subprocess.run(
        [sys.executable, "-m", "nbconvert", "--to", "html", "--execute", source.name],
        cwd=tmp_path,
        env=browser.jupyter_environment(tmp_path),
        check=True,
        capture_output=True,
        timeout=300,
    )
    with browser.pages(offline=True) as context:
        page = context.new_page()
        page.goto((tmp_path / "explore.html").as_uri())
        check_page(page)
        assert not page.locator(".sl-explorer-live").is_visible()
        assert page.locator("td:has-text('131072 x 131072')").count() == 1


def test_explorer_in_a_saved_page(tmp_path: Path) -> None:
    path = sl.explore().save(tmp_path / "page.html")
    with browser.pages(offline=True) as context:
        page = context.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(path.as_uri())
        check_page(page)
        assert not errors


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures_take_the_colours_of_the_page(scheme: str) -> None:
    shown = sl.bigbird(1024, num_heads=2)._repr_html_()
    with browser.pages(color_scheme=scheme) as context:
        page = context.new_page()
        page.set_content(f"<style>:root {{ color-scheme: light dark }}</style>{shown}")
        ask = "selector => getComputedStyle(document.querySelector(selector))[{!r}]"
        text = page.evaluate(ask.format("color"), "body")
        assert page.evaluate(ask.format("stroke"), "svg path") == text
        assert page.evaluate(ask.format("fill"), "svg text") == text
        assert (text == "rgb(0, 0, 0)") == (scheme == "light")
