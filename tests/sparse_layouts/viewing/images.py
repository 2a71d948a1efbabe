"""The figures that are compared with committed images, and how: by pixels, without text.

`python -m tests.sparse_layouts.viewing.images` writes the images anew; look at them before they are
committed.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sparse_layouts as sl

FOLDER = Path(__file__).resolve().parent / "images"
DPI = 50


def weights() -> torch.Tensor:
    """(64, 96), some columns larger, the same every time."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(64, 96, generator=draw) * torch.linspace(0.1, 2, 96)


# name -> (the figure, the same figure of a layout that differs in one block or entry)
FIGURES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "causal_edge": (
        lambda: sl.sink_window(256, block_size=16, window=60, sinks=16).plot(),
        lambda: sl.sink_window(256, block_size=16, window=60, sinks=15).plot(),
    ),
    "heads": (
        lambda: sl.local_stride(
            512, block_size=32, local_blocks=2, vert_stride=4, num_heads=4
        ).plot(max_cells=64),
        lambda: sl.local_stride(
            512, block_size=32, local_blocks=2, vert_stride=4, num_heads=4, head_offset=1
        ).plot(max_cells=64),
    ),
    "counts": (
        lambda: sl.bigbird(512, block_size=32, source="hf-eval").plot(),
        lambda: sl.bigbird(512, block_size=32, source="hf-eval", num_random_blocks=2).plot(),
    ),
    "magnitudes": (
        lambda: sl.bsr(weights(), 8, keep=sl.Magnitude(0.4)).plot(show="magnitude"),
        lambda: sl.bsr(weights(), 8, keep=sl.Magnitude(0.39)).plot(show="magnitude"),
    ),
    "groups": (
        lambda: sl.nm(weights(), 2, 4).plot(),
        lambda: sl.nm(weights().roll(1, 0), 2, 4).plot(),
    ),
    "compared": (
        lambda: sl.compare(
            {
                "window": sl.sliding_window(512, block_size=32, window=64),
                "documents": sl.document([0, 100, 512], block_size=32),
            }
        ).plot(),
        lambda: sl.compare(
            {
                "window": sl.sliding_window(512, block_size=32, window=96),
                "documents": sl.document([0, 100, 512], block_size=32),
            }
        ).plot(),
    ),
}


def pixels(figure: Any) -> np.ndarray:
    """uint8 (height, width, 3): the figure without its text, whose letters differ from machine to
    machine.
    """
    from matplotlib.image import imread
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, dpi=DPI, format="png")
    content.seek(0)
    return (imread(content)[..., :3] * 255).round().astype(np.uint8)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """The root mean square difference of two images of one size; infinite for others."""
    if a.shape != b.shape:
        return float("inf")
    return float(np.sqrt(np.mean((a.astype(float) - b) ** 2)))


def write() -> None:
    """Writes the committed images."""
    from matplotlib.image import imsave

    FOLDER.mkdir(exist_ok=True)
    for name, (draw, _) in FIGURES.items():
        imsave(FOLDER / f"{name}.png", pixels(draw()))


if __name__ == "__main__":
    write()
