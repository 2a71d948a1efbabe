"""How a layout shows itself in a notebook: a table of its sizes and a picture of its pattern."""

from __future__ import annotations

import html
import math

from sparse_layouts.bsr_tensor import BSRTensor
from sparse_layouts.dispatch import dense_bytes
from sparse_layouts.dispatch.text import readable_bytes
from sparse_layouts.layout_tensor import LayoutTensor
from sparse_layouts.viewing.causality import is_causal
from sparse_layouts.viewing.pattern_picture import svg


def facts(layout: LayoutTensor) -> list[tuple[str, str]]:
    """What the table says, by name: kind, sizes, density and bytes; of one without contents (on the
    meta device), what is known of it.
    """
    named = [
        ("layout", type(layout).__name__),
        ("shape", " x ".join(map(str, layout.shape)) or "()"),
        ("dtype", str(layout.dtype).removeprefix("torch.")),
        ("device", str(layout.device)),
    ]
    block = getattr(layout, "block_size", None)
    if block is not None:
        named.append(("block", f"{block[0]} x {block[1]}"))
    own = [each for each in layout.describe() if not each.startswith(("block ", "density "))]
    if own:
        named.append(("pattern", ", ".join(own)))
    if layout.device.type != "meta":
        named.append(("stored", f"{layout.nnz:,} of {layout.shape.numel():,} entries"))
        named.append(("density", f"{layout.density:.2%}"))
        causal = density_of_causal(layout)
        if causal is not None:
            named.append(("of causal", f"{causal:.2%}"))
        named.append(("bytes", readable_bytes(layout.nbytes)))
        if layout.cached_bytes:
            named.append(("bytes cached", readable_bytes(layout.cached_bytes)))
    named.append(("bytes of dense", readable_bytes(dense_bytes(layout))))
    if layout.requires_grad:
        named.append(("requires_grad", "True"))
    return named


def density_of_causal(layout: LayoutTensor) -> float | None:
    """Stored entries over those of a causal mask; None for what is no causal mask of blocks."""
    if not isinstance(layout, BSRTensor) or not layout.is_mask or not is_causal(layout):
        return None
    return layout.density_of_causal


def as_html(layout: LayoutTensor) -> str:
    """A table and an inline picture, in the colours of the page around them; all text escaped."""
    rows = "".join(
        f'<tr><th style="text-align:left">{html.escape(name)}</th>'
        f'<td style="text-align:left">{html.escape(value)}</td></tr>'
        for name, value in facts(layout)
    )
    return (
        '<div style="display:flex;flex-wrap:wrap;gap:1.5em;align-items:flex-start">'
        f"<table><tbody>{rows}</tbody></table>{_picture(layout)}</div>"
    )


def _picture(layout: LayoutTensor) -> str:
    if not math.prod(layout.shape):
        return ""
    try:
        return svg(layout, caption="")
    except ValueError as error:  # too large to be drawn, or nothing to draw
        return f"<p>No picture: {html.escape(str(error))}.</p>"
