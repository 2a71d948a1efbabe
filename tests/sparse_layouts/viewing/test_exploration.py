"""Families and their parameters, what the explorer shows of them, and the explorer itself."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import sparse_layouts as sl
from sparse_layouts.viewing import exploration as exploration_module
from sparse_layouts.viewing.exploration import Exploration, exploration
from sparse_layouts.viewing.explorer_page import fragment
from sparse_layouts.viewing.families import FAMILIES, document_bounds, family_of
from sparse_layouts.viewing.measured import measure, typical_call

ipywidgets = pytest.importorskip("ipywidgets", reason="needs ipywidgets, the extra notebooks")


# --- families -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_the_line_of_code_builds_what_is_shown(name: str) -> None:
    family = FAMILIES[name]
    values = family.values({"seq_len": 512} if family.is_mask else {"rows": 128, "columns": 256})
    layout = family.build(values)
    again = eval(family.code(values), {"sl": sl, "torch": torch})
    assert type(again) is type(layout)
    assert (again.shape, again.dtype) == (layout.shape, layout.dtype)
    assert (layout.dtype == torch.bool) == family.is_mask
    if family.is_mask:
        assert torch.equal(again.to_dense(), layout.to_dense())
    else:
        assert again.density == layout.density


@pytest.mark.parametrize("name", FAMILIES)
def test_controls_offer_the_defaults(name: str) -> None:
    for p in FAMILIES[name].parameters:
        assert p.default in p.on_page
        if p.choices:
            assert set(p.on_page) <= set(p.choices)
        elif not isinstance(p.default, bool):
            assert all(p.low <= value <= p.high for value in p.on_page)


def test_families_are_found_by_what_people_call_them() -> None:
    for spelling in ("local_stride", "local-stride", "Local Stride", "localstride"):
        assert family_of(spelling).name == "local_stride"
    assert family_of("2:4".replace("2:4", "n:m")).name == "nm"
    with pytest.raises(
        ValueError, match=r"^no family 'butterfly'; there are local_stride, bigbird"
    ):
        family_of("butterfly")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"widnow": 3}, "sliding_window has no parameter 'widnow'; it has seq_len, block_size"),
        ({"window": "wide"}, "window: expected a whole number, got 'wide'"),
        ({"window": 3.5}, "window: expected a whole number, got 3.5"),
        ({"window": True}, "window: expected a whole number, got True"),
        ({"causal": "perhaps"}, "causal: expected true or false, got 'perhaps'"),
    ],
)
def test_unknown_parameters_get_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        FAMILIES["sliding_window"].values(given)
    assert "\n" not in str(raised.value)


def test_values_from_a_command_line() -> None:
    read = FAMILIES["sliding_window"].values({"window": "100", "causal": "no"})
    assert (read["window"], read["causal"]) == (100, False)
    assert FAMILIES["csr"].values({"density": "0.5"})["density"] == 0.5
    assert FAMILIES["bigbird"].values({"source": "google"})["source"] == "google"


def test_documents_of_different_lengths() -> None:
    bounds = document_bounds(1000, 4)
    assert bounds == [0, 100, 300, 600, 1000]
    assert document_bounds(3, 3) == [0, 0, 1, 3]
    with pytest.raises(ValueError, match="documents: expected 1 to 10, got 11"):
        document_bounds(10, 11)


# --- what is shown --------------------------------------------------------------------------------


def test_facts_of_a_mask_and_of_weights() -> None:
    mask = exploration(FAMILIES["sliding_window"], {"seq_len": 512, "window": 128})
    facts = dict(mask.facts())
    assert facts["density"] == f"{mask.layout.density:.2%}"
    assert facts["of causal"] == f"{mask.layout.density_of_causal:.1%}"
    assert f"dense {512 * 512 / 1024:.1f} KiB" in facts["bytes"]
    flop = 4 * 64 * mask.layout.nnz
    assert facts["FLOPs"].startswith(f"{flop:.3g}, dense {4 * 64 * 512 * 512:.3g}: ")
    assert facts["measured here"] == "not yet"
    weights = exploration(FAMILIES["csr"], {"density": 0.1})
    assert "of causal" not in dict(weights.facts())
    assert "product with 256 columns" in dict(weights.facts())["FLOPs"]
    assert "<code>sl.csr(torch.randn(512, 512), keep=sl.Magnitude(0.1))</code>" in weights.as_html()


def test_what_the_factory_refuses_is_shown_in_one_line() -> None:
    state = exploration(FAMILIES["nm"], {"n": 8, "m": 4})
    assert state.layout is None
    assert "expected 1 &lt;= n &lt; m" in state.as_html()
    assert "<svg" not in state.as_html()
    assert state.why_not_measured(asked=True) == "nothing to measure"
    state.measure()  # does nothing
    assert state.measured is None


def test_measured_times_name_kernel_and_rival() -> None:
    state = exploration(FAMILIES["sliding_window"], {"seq_len": 256})
    state.measure()
    said = dict(state.facts())["measured here"]
    assert re.search(r"ms \(cpu\), dense causal attention .* ms: .*x (faster|slower)", said)
    own = measure(sl.bsr(torch.randn(64, 64), 16), repeats=1)
    assert own.dense_is == "dense matmul"
    assert own.ratio == own.dense.median_s / own.sparse.median_s


def test_a_long_one_is_measured_when_asked_and_a_longer_one_never(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = exploration(FAMILIES["causal"], {"seq_len": 256})
    monkeypatch.setattr(exploration_module, "MEASURED_UNASKED_FLOP", 1.0)
    state.measure(asked=False)
    assert state.measured is None
    assert dict(state.facts())["measured here"] == "a long one: measured when asked"
    state.measure()
    assert state.measured is not None
    monkeypatch.setattr(exploration_module, "MEASURED_FLOP", 1.0)
    assert "too long to measure here" in state.why_not_measured(asked=True)


def test_calls_that_are_timed_compute_the_same() -> None:
    for name, given in (("local_stride", {"seq_len": 256}), ("bsr", {"rows": 128})):
        call = typical_call(exploration(FAMILIES[name], given).layout)
        assert call.run().shape == call.dense().shape
    causal = typical_call(sl.causal(64, block_size=16))
    torch.testing.assert_close(causal.run(), causal.dense())
    with pytest.raises(NotImplementedError, match=r"make blocks of it with sl\.mask_from"):
        typical_call(sl.nm(torch.randn(8, 8), 2, 4).pattern)


# --- the widgets ----------------------------------------------------------------------------------


def view(explorer: Any) -> str:
    return explorer.widget.children[-1].value


def controls(explorer: Any) -> dict[str, Any]:
    return {control.description: control for control in explorer.widget.children[1].children}


def test_dragging_changes_everything_that_is_shown() -> None:
    explorer = sl.explore("sliding_window", seq_len=512, window=100)
    assert explorer.layout.shape == (512, 512)
    before = view(explorer)
    assert "window=100" in before
    controls(explorer)["window"].value = 200
    assert explorer.code == "sl.sliding_window(512, block_size=64, window=200, causal=True)"
    assert "window=200" in view(explorer)
    assert f"{explorer.layout.density:.2%}" in view(explorer)
    controls(explorer)["causal"].value = False
    assert "causal=False" in view(explorer)


def test_choosing_a_family_brings_its_controls() -> None:
    explorer = sl.explore()
    family = explorer.widget.children[0].children[0]
    assert {name for _, name in family.options} == set(FAMILIES)
    for name in FAMILIES:
        family.value = name
        assert explorer.family == name
        assert list(controls(explorer)) == [p.name for p in FAMILIES[name].parameters]
        assert "<svg" in view(explorer)
        assert FAMILIES[name].about in explorer.widget.children[0].children[1].value


def test_what_makes_no_layout_is_said_and_mended() -> None:
    explorer = sl.explore("nm", n=2, m=4)
    controls(explorer)["n"].value = 9
    assert "expected 1 &lt;= n &lt; m" in view(explorer)
    with pytest.raises(ValueError, match="expected 1 <= n < m"):
        explorer.layout  # noqa: B018
    assert explorer.widget.children[2].children[0].disabled  # Measure
    controls(explorer)["m"].value = 16
    assert "<svg" in view(explorer)


def test_set_does_what_the_controls_do() -> None:
    explorer = sl.explore("bsr", density=0.1)
    assert controls(explorer.set(density=0.5))["density"].value == 0.5
    assert explorer.layout.density == 0.5
    explorer.set("csr", density=0.05)
    assert explorer.family == "csr"
    assert explorer.widget.children[0].children[0].value == "csr"
    assert repr(explorer) == f"Explorer: {explorer.code}"
    with pytest.raises(ValueError, match="csr has no parameter 'block_size'"):
        explorer.set(block_size=3)
    assert explorer.family == "csr"


@pytest.mark.parametrize(
    ("family", "given", "message"),
    [
        ("butterfly", {}, "no family 'butterfly'; there are"),
        ("bsr", {"blocks": 3}, "bsr has no parameter 'blocks'; it has rows, columns, block_size"),
        ("bsr", {"density": 0.3}, "explore: density is one of 0.01, 0.02, 0.05"),
        ("nm", {"n": 99}, "explore: n is from 1 to 15, got 99"),
    ],
)
def test_errors_get_one_line(family: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        sl.explore(family, **given)
    assert "\n" not in str(raised.value)


def test_the_button_measures() -> None:
    explorer = sl.explore("sliding_window", seq_len=256, measure=False)
    assert "not yet" in view(explorer)
    explorer.widget.children[2].children[0].click()
    assert re.search(r"x (faster|slower)", view(explorer))


def test_what_has_settled_is_measured_and_what_is_dragged_on_is_not() -> None:
    async def drag() -> tuple[str, str]:
        explorer = sl.explore("sliding_window", seq_len=256)
        controls(explorer)["window"].value = 50
        first = explorer.state
        controls(explorer)["window"].value = 60
        await asyncio.sleep(1.0)
        assert first.measured is None
        return view(explorer), explorer.code

    shown, code = asyncio.run(drag())
    assert "window=60" in code
    assert re.search(r"x (faster|slower)", shown)


def test_displaying_brings_the_widget_and_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    from IPython import display

    shown: list[Any] = []
    monkeypatch.setattr(display, "display", shown.append)
    explorer = sl.explore("csr")
    explorer._ipython_display_()
    assert shown[0] is explorer.widget
    assert "sl-explorer-page" in shown[1].data
    shown.clear()
    sl.explore("csr", exported=False)._ipython_display_()
    assert len(shown) == 1


# --- the page without Python ----------------------------------------------------------------------


class Page(HTMLParser):
    """Links and the packed data of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.data: dict[str, Any] = {}
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        self.inside = named.get("class") or ""

    def handle_data(self, data: str) -> None:
        if self.inside == "sl-explorer-data":
            self.data = json.loads(gzip.decompress(base64.b64decode(data)))
        self.inside = ""


def test_a_saved_page_holds_every_state_and_loads_nothing(tmp_path: Path) -> None:
    path = sl.explore("csr").save(tmp_path / "page.html")
    text = path.read_text(encoding="utf-8")
    assert len(text) < 200_000
    page = Page(text)
    assert not page.links
    assert not re.search(r"(?<!w3\.org/2000/svg)https?://(?!www\.w3\.org/2000/svg)", text)
    assert page.data["start"] == "csr"
    for family in page.data["families"]:
        own = FAMILIES[family["name"]]
        assert [p["values"] for p in family["parameters"]] == [
            [str(value) for value in p.on_page] for p in own.parameters
        ]
        first = family["states"][",".join(str(p["start"]) for p in family["parameters"])]
        assert own.code(own.values({})).replace("'", "&#x27;") in first
        assert all("<code>" in state for state in family["states"].values())


def test_a_page_shows_what_was_measured() -> None:
    start = Exploration(FAMILIES["causal"], FAMILIES["causal"].values({}))
    page = Page(fragment(start))
    (causal,) = (f for f in page.data["families"] if f["name"] == "causal")
    measured = [key for key, state in causal["states"].items() if "dense causal" in state]
    assert measured == [",".join(str(p["start"]) for p in causal["parameters"])]
