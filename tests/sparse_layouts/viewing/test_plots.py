"""Figures: they look as the committed images do, say what they show, refuse what they cannot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sparse_layouts as sl
from sparse_layouts.viewing import figures
from tests.sparse_layouts.viewing import images

matplotlib = pytest.importorskip("matplotlib", reason="needs matplotlib, the extra viz")
ROOT = Path(__file__).resolve().parent.parent.parent.parent


@pytest.mark.parametrize("name", images.FIGURES)
def test_figure_looks_as_committed(name: str) -> None:
    """Nearer to the committed image than a third of what the smallest change makes."""
    from matplotlib.image import imread

    draw, changed = images.FIGURES[name]
    committed = (imread(images.FOLDER / f"{name}.png")[..., :3] * 255).round().astype(np.uint8)
    found = images.pixels(draw())
    change = images.distance(images.pixels(changed()), found)
    assert change > 0
    assert images.distance(found, committed) < change / 3


def shown(figure: object) -> list[np.ndarray]:
    """The cells of every panel, NaN where nothing is drawn."""
    found = [axes.get_images() for axes in figure.axes]  # type: ignore[attr-defined]
    return [each[0].get_array().filled(np.nan) for each in found if each]


def test_pattern_cells_are_what_is_stored() -> None:
    mask = sl.mask_from(torch.rand(40, 60) < 0.3, (8, 5))
    (cells,) = shown(mask.plot())
    np.testing.assert_array_equal(np.nan_to_num(cells), mask.to_dense().float().numpy())
    (coarse,) = shown(mask.plot(max_cells=20))
    assert coarse.shape == (20, 20)
    expected = mask.to_dense().float().view(20, 2, 20, 3).mean((1, 3)).numpy()
    np.testing.assert_allclose(np.nan_to_num(coarse), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: sl.bsr(x, 8, keep=sl.Magnitude(0.4)),
        lambda x: sl.csr(x, keep=sl.Magnitude(0.4)),
        lambda x: sl.csc(x, keep=sl.Magnitude(0.4)),
        lambda x: sl.nm(x, 2, 4),
        lambda x: sl.grouped_nm(x, 2, 4, 2),
    ],
)
def test_magnitudes_are_those_of_the_values(make) -> None:  # type: ignore[no-untyped-def]
    w = make(images.weights())
    (cells,) = shown(w.plot(show="magnitude"))
    np.testing.assert_allclose(np.nan_to_num(cells), w.to_dense().abs().numpy(), rtol=1e-6)


def test_magnitudes_of_a_batch_are_its_mean() -> None:
    mask = sl.bsr_mask(torch.eye(4, dtype=torch.bool), 16)
    w = torch.randn(3, 64, 64).sparse_mask(mask)
    (cells,) = shown(w.plot(show="magnitude"))
    expected = w.to_dense().abs().mean(0).numpy()
    np.testing.assert_allclose(np.nan_to_num(cells), expected, rtol=1e-6)


def test_counts_are_those_of_the_blocks() -> None:
    counts = torch.tensor([[2, 0, 1], [1, 3, 0], [0, 1, 1]])
    figure = sl.bsr_mask(counts, 16).plot()  # the default where something counts twice
    (cells,) = shown(figure)
    np.testing.assert_array_equal(np.nan_to_num(cells)[::16, ::16], counts.numpy())
    assert figure.axes[-1].get_ylabel() == "times a block counts"
    assert list(figure.axes[-1].get_yticks()) == [1, 2, 3]


def test_groups_show_the_place_in_the_group() -> None:
    w = sl.nm(images.weights(), 2, 4)
    figure = w.plot()
    (cells,) = shown(figure)
    stored = w.pattern.to_dense()[:32, :32].numpy()
    places = np.where(stored, np.arange(32) % 4, np.nan)
    np.testing.assert_array_equal(cells, places)
    assert "groups of 4, of each of which 2 are stored" in figure.get_supxlabel()
    (flipped,) = shown(w.mT.plot())
    np.testing.assert_array_equal(flipped, places.T)


def test_axes_titles_and_heads() -> None:
    mask = sl.local_stride(256, block_size=32, local_blocks=1, vert_stride=4, num_heads=8)
    figure = mask.plot()
    assert figure.get_suptitle() == f"LocalStrideTensor 8 x 256 x 256, density {mask.density:.2%}"
    panels = [axes for axes in figure.axes if axes.get_images()]
    assert [axes.get_title() for axes in panels[:2]] == ["heads 0, 4", "heads 1, 5"]
    assert panels[0].get_ylabel() == "query token"
    assert panels[-1].get_xlabel() == "key token"
    assert panels[0].get_xlim() == (0, 256)
    assert panels[0].get_ylim() == (256, 0)
    chosen = mask.plot(heads=[1, 6], title="Two of them")
    assert [axes.get_title() for axes in chosen.axes if axes.get_images()] == ["head 1", "head 6"]
    assert chosen.get_suptitle() == "Two of them"
    few = mask.plot(max_panels=1)
    assert "3 more patterns not drawn" in few.get_supxlabel()
    weights = sl.csr(images.weights(), keep=sl.Magnitude(0.1)).plot()
    assert (weights.axes[0].get_ylabel(), weights.axes[0].get_xlabel()) == ("row", "column")


def test_the_causal_edge_is_drawn_for_causal_masks() -> None:
    def has_edge(figure: object) -> bool:
        return bool(figure.axes[0].get_lines())  # type: ignore[attr-defined]

    causal, window = (
        sl.causal(64, block_size=16),
        sl.sliding_window(64, block_size=16, window=9, causal=False),
    )
    assert has_edge(causal.plot())
    assert not has_edge(window.plot())
    assert has_edge(window.plot(causal_edge=True))
    assert not has_edge(causal.plot(causal_edge=False))
    assert not has_edge(sl.bsr(torch.eye(64), 16).plot())


def test_a_huge_mask_is_drawn_reduced_with_a_note() -> None:
    mask = sl.local_stride(65536, block_size=16, local_blocks=16, vert_stride=8, num_heads=8)
    figure = mask.plot(max_cells=64)
    assert "a cell is 64 x 64 blocks; drawn from" in figure.get_supxlabel()
    counted = sl.bigbird(32768, num_heads=2, source="hf-eval").plot(max_cells=64)
    assert "a cell is 8 x 8 blocks" in counted.get_supxlabel()
    assert counted.axes[-1].get_ylabel() == "times a block counts"


@pytest.mark.parametrize("show", ["pattern", "magnitude", "count"])
def test_in_whole_blocks_it_is_the_same(show: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is too much to be listed is drawn from blocks; cells of whole blocks show the same."""
    counts = torch.randint(0, 4, (2, 12, 12)).tril()
    layout: sl.LayoutTensor = sl.bsr_mask(counts, 8, causal=True, shape=(93, 93))
    if show == "magnitude":
        layout = torch.randn(3, 2, 93, 93).sparse_mask(layout)
    from sparse_layouts.viewing import entry_cells

    whole = shown(layout.plot(show=show, heads=[1, 0], max_cells=6))  # cells of 16 entries
    monkeypatch.setattr(entry_cells, "MOST_ENTRIES", 0)
    blocks = shown(layout.plot(show=show, heads=[1, 0], max_cells=6))  # of 2 blocks
    assert len(whole) == len(blocks) == 2
    for one, other in zip(whole, blocks, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_magnitudes_of_too_many_single_entries_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sparse_layouts.viewing import entry_cells

    monkeypatch.setattr(entry_cells, "MOST_ENTRIES", 100)
    w = sl.csr(images.weights(), keep=sl.Magnitude(0.5))
    assert "a cell is" in w.plot(max_cells=16).get_supxlabel()  # the pattern is not
    with pytest.raises(ValueError, match=r"here are 3072; draw a slice, such as w\[:4096, :4096\]"):
        w.plot(show="magnitude")


def test_nothing_stored_and_nothing_at_all() -> None:
    sl.bsr(torch.zeros(64, 64), 16).plot().canvas.draw()
    sl.bsr(torch.zeros(64, 64), 16).plot(show="magnitude").canvas.draw()
    sl.causal(0, block_size=16).plot().canvas.draw()
    sl.nm(torch.zeros(0, 8), 2, 4).plot().canvas.draw()


def test_every_layout_plots(one_layout: sl.LayoutTensor) -> None:
    one_layout.plot().canvas.draw()
    one_layout.plot(show="magnitude").canvas.draw()


def test_every_mask_plots(one_mask: sl.LayoutTensor) -> None:
    one_mask.plot(show="pattern").canvas.draw()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"show": "colours"}, "one of pattern, magnitude, count, groups, got 'colours'"),
        ({"show": "magnitude"}, "is for values, and this BSRTensor is a mask"),
        ({"show": "count"}, "this BSRTensor counts each once"),
        ({"show": "groups"}, "for n:m layouts, not for a BSRTensor"),
        ({"heads": 2}, "heads from 0 to 1, got 2"),
        ({"heads": [0, "x"]}, "heads from 0 to 1, got 'x'"),
        ({"max_panels": 0}, "max_panels of at least 1, got 0"),
        ({"max_cells": 0}, "max_cells of at least 1, got 0"),
    ],
)
def test_errors_say_what_was_expected(options: dict[str, object], message: str) -> None:
    mask = sl.bsr_mask(torch.rand(2, 4, 4) < 0.5, 16)
    with pytest.raises(ValueError, match=message):
        mask.plot(**options)


def test_no_figure_is_kept_open() -> None:
    from matplotlib import pyplot

    sl.causal(64, block_size=16).plot()
    assert not pyplot.get_fignums()


def test_colours_differ_for_the_colour_blind() -> None:
    """Points by their markers, cells by their lightness, which every colour map changes one way."""
    from matplotlib import colormaps

    assert len(set(figures.MARKERS)) == len(set(figures.COLOURS)) == len(figures.COLOURS)
    for colours in (colormaps[figures.VALUE_MAP], figures.pattern_map()):
        grey = colours(np.linspace(0, 1, 64))[:, :3] @ (0.2126, 0.7152, 0.0722)
        steps = np.diff(grey)
        assert (steps > -1e-3).all() or (steps < 1e-3).all()


WITHOUT = """
import importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] in ("matplotlib", "ipywidgets"):
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
sys.meta_path.insert(0, Blocker())
import torch, sparse_layouts as sl
mask = sl.causal(64, block_size=16)
assert "<svg" in mask._repr_html_()
compared = sl.compare([mask])
assert "<svg" in compared._repr_html_()
of_a_call = lambda: sl.roofline(torch.matmul, mask)
for call in (mask.plot, compared.plot, sl.roofline, of_a_call, sl.explore):
    try:
        call()
    except ModuleNotFoundError as error:
        print(error)
"""


def test_a_missing_extra_names_the_pip_command() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert done.stdout.splitlines() == [
        "plot needs the package matplotlib: pip install 'sparse_layouts[viz]'",
        "compare needs the package matplotlib: pip install 'sparse_layouts[viz]'",
        "roofline needs the package matplotlib: pip install 'sparse_layouts[viz]'",
        "roofline needs the package matplotlib: pip install 'sparse_layouts[viz]'",
        "explore needs the package ipywidgets: pip install 'sparse_layouts[notebooks]'",
    ]
