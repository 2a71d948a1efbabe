"""`sl.compare`: attention masks side by side: density, reach, and the keys that decoding keeps."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from sparse_layouts.bsr_tensor import BSRTensor
from sparse_layouts.dispatch.text import (
    folded,
    html_table,
    readable_bytes,
    terminal_width,
    text_table,
)
from sparse_layouts.layout_tensor import LayoutTensor
from sparse_layouts.viewing import figures
from sparse_layouts.viewing.causality import is_causal
from sparse_layouts.viewing.cells import cells_of
from sparse_layouts.viewing.pattern_picture import MAX_BYTES, svg
from sparse_layouts.viewing.reach import block_mask, influences, kept_keys

PANELS_IN_A_ROW = 4


class Compared(NamedTuple):
    """One mask: `reached` (layers, N) says which tokens can influence `token` after 1, 2, ...
    layers, `kept` how many keys each head keeps at once, `cache_bytes` what they and their values
    take in the head that keeps most; `density_of_causal` is None for a mask that is not causal.
    """

    name: str
    mask: BSRTensor
    density: float
    density_of_causal: float | None
    token: int
    reached: np.ndarray
    kept: list[int]
    cache_bytes: int
    bytes: int

    @property
    def reach(self) -> list[float]:
        """The share of tokens that can influence the token after 1, 2, ... layers: of those up to
        it for a causal mask, else of all.
        """
        among = (
            self.reached if self.density_of_causal is None else self.reached[:, : self.token + 1]
        )
        return among.mean(1).tolist()


class MaskComparison:
    """Masks side by side; prints as a table, in a notebook with pictures; `plot()` draws it."""

    def __init__(self, rows: list[Compared], layers: int, cache: str) -> None:
        self.rows = rows
        self.layers = layers
        self.cache = cache

    @property
    def about(self) -> str:
        """What the columns mean."""
        tokens = {row.token for row in self.rows}
        token = f"token {tokens.pop()}" if len(tokens) == 1 else "the last token"
        return (
            f"Reach: the share of the tokens that can influence {token} after so many layers. "
            f"KV cache: {self.cache}."
        )

    def __iter__(self) -> Any:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> Compared:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no mask {name!r}; there are {', '.join(row.name for row in self.rows)}")

    @property
    def _head(self) -> tuple[str, ...]:
        after = "reach" if self.layers == 1 else f"reach 1 to {self.layers}"
        return ("mask", "density", "of causal", after, "keys a head", "KV cache a head", "bytes")

    def _cells(self) -> list[list[str]]:
        rows = []
        for row in self.rows:
            causal = row.density_of_causal
            low, high = min(row.kept, default=0), max(row.kept, default=0)
            rows.append(
                [
                    row.name,
                    f"{row.density:.2%}",
                    "" if causal is None else f"{causal:.1%}",
                    " ".join(f"{share:.0%}" for share in row.reach),
                    f"{high:,}" if low == high else f"{low:,} to {high:,}",
                    readable_bytes(row.cache_bytes),
                    readable_bytes(row.bytes),
                ]
            )
        return rows

    def __repr__(self) -> str:
        width = terminal_width()
        about = "\n".join(folded(self.about, width))
        return f"{text_table(self._head, self._cells(), width=width)}\n{about}"

    def _repr_html_(self) -> str:
        most = MAX_BYTES // max(1, len(self.rows))
        pictures = "".join(
            f"<figure style='margin:0'><figcaption>{html.escape(row.name)}</figcaption>"
            f"{svg(row.mask, caption='', max_panels=1, max_bytes=most)}</figure>"
            for row in self.rows
        )
        return (
            f"<div>{html_table(self._head, self._cells())}<p>{html.escape(self.about)}</p>"
            f"<div style='display:flex;flex-wrap:wrap;gap:1.5em'>{pictures}</div></div>"
        )

    def plot(self, *, max_cells: int = 128, title: str | None = None) -> Any:
        """Draws the masks (of each the first head), below each which tokens can influence the token
        after 1, 2, ... layers, and returns the matplotlib figure.

        Raises `ModuleNotFoundError` with the pip command without matplotlib (extra `viz`).

        >>> import sparse_layouts as sl
        >>> masks = {"window": sl.sliding_window(256, block_size=32, window=64)}
        >>> len(sl.compare(masks).plot().axes)
        2
        """
        count = len(self.rows)
        columns = min(count, PANELS_IN_A_ROW)
        rows = -(-count // columns)
        figure = figures.new_figure("compare", max(4.0, columns * 2.9), rows * 4.1 + 0.7)
        grid = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[3, 1] * rows)
        for place, row in enumerate(self.rows):
            above = grid[place // columns * 2, place % columns]
            below = grid[place // columns * 2 + 1, place % columns]
            self._draw(row, above, below, max_cells)
        for place in range(count, rows * columns):
            for offset in (0, 1):
                grid[place // columns * 2 + offset, place % columns].set_axis_off()
        figure.suptitle(title or "Masks, and which tokens reach a token layer by layer")
        figures.note(figure, self.about)
        return figure

    def _draw(self, row: Compared, above: Any, below: Any, max_cells: int) -> None:
        n = row.mask.shape[-1]
        found = cells_of(row.mask, 1, max_cells)
        panel = found.panels[0]
        top = float(panel.density.max(initial=0.0)) or 1.0
        figures.draw_matrix(
            above,
            np.where(panel.stored > 0, panel.density, np.nan),
            (n, n),
            ("query token", "key token"),
            cmap=figures.pattern_map(),
            vmin=0.0,
            vmax=top,
        )
        if is_causal(row.mask):
            figures.draw_causal_edge(above, (n, n))
        head = "" if not panel.label else f", {panel.label}"
        above.set_title(f"{row.name}{head}\ndensity {row.density:.1%}", fontsize="medium")
        cut = max(1, -(-n // 512))
        shares = [np.add.reduceat(each, np.arange(0, each.size, cut)) / cut for each in row.reached]
        below.imshow(
            np.where(np.stack(shares) > 0, np.stack(shares), np.nan),
            extent=(0, n, self.layers + 0.5, 0.5),
            aspect="auto",
            interpolation="nearest",
            cmap=figures.pattern_map(),
            vmin=0.0,
            vmax=1.0,
        )
        below.set_yticks(range(1, self.layers + 1))
        below.set_xlim(0, n)
        below.set_ylabel("layers")
        below.set_xlabel(f"token that reaches {row.token}")
        keys = max(row.kept, default=0)
        below.set_title(f"reach {row.reach[-1]:.0%}, keeps {keys:,} keys a head", fontsize="small")


def compare(
    masks: Mapping[str, LayoutTensor] | Sequence[LayoutTensor],
    *,
    layers: int = 4,
    token: int | None = None,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
) -> MaskComparison:
    """Attention masks side by side: density, reach, and the KV cache that a head needs.

    `masks` by name, or in a sequence; each (N, N) or (H, N, N), their N may differ. Reach is the
    share of the tokens that can influence `token` (the last one by default; for a causal mask none
    after it can) after 1 to `layers` layers, all heads taken together. Keys a head: how many it has
    to keep at once when queries come one after another; the cache holds these keys and their values
    of `head_dim` entries in `dtype`, in the head that keeps most. The result prints as a table, is
    one with pictures in a notebook, and has `.rows` and `.plot()`.

    Raises `TypeError` for what is no layout, `ValueError` for no masks, masks that are not square,
    and numbers out of range.

    >>> import sparse_layouts as sl
    >>> window = sl.sliding_window(1024, block_size=64, window=128)
    >>> found = sl.compare({"window": window, "causal": sl.causal(1024, block_size=64)}, layers=2)
    >>> [(row.name, row.kept, round(row.reach[-1], 3)) for row in found]
    [('window', [128], 0.249), ('causal', [1024], 1.0)]
    """
    if isinstance(masks, LayoutTensor):
        raise TypeError("compare: expected several masks by name or in a list, got one")
    named = masks.items() if isinstance(masks, Mapping) else _named(masks)
    if layers < 1:
        raise ValueError(f"compare: expected at least 1 layer, got {layers}")
    if head_dim < 1:
        raise ValueError(f"compare: expected a head_dim of at least 1, got {head_dim}")
    rows = []
    for name, mask in named:
        blocks = block_mask(mask, "compare")
        n = blocks.shape[-1]
        at = n - 1 if token is None else token
        if not 0 <= at < n:
            raise ValueError(f"compare: expected a token from 0 to {n - 1} in {name}, got {at}")
        kept = kept_keys(blocks)
        rows.append(
            Compared(
                str(name),
                blocks,
                blocks.density,
                blocks.density_of_causal if is_causal(blocks) else None,
                at,
                influences(blocks, at, layers),
                kept,
                2 * head_dim * dtype.itemsize * max(kept, default=0),
                mask.nbytes,
            )
        )
    if not rows:
        raise ValueError("compare: expected at least one mask, got none")
    named_dtype = str(dtype).removeprefix("torch.")
    return MaskComparison(rows, layers, f"keys and values of {head_dim} entries in {named_dtype}")


def _named(masks: Sequence[LayoutTensor]) -> list[tuple[str, LayoutTensor]]:
    found = []
    for i, mask in enumerate(masks):
        details = mask.describe()[0] if isinstance(mask, LayoutTensor) else ""
        found.append((f"{i}: {type(mask).__name__} {details}".strip(), mask))
    return found
