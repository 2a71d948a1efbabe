"""One thing to look at in the explorer: a family with its parameters, what was built, what it
costs; as HTML. Knows neither widgets nor scripts.
"""

from __future__ import annotations

import html
from typing import Any

import torch

from sparse_layouts.dispatch import dense_bytes
from sparse_layouts.dispatch.text import readable_bytes
from sparse_layouts.layout_tensor import LayoutTensor
from sparse_layouts.measuring import Timing
from sparse_layouts.viewing.families import Family, Values
from sparse_layouts.viewing.measured import Measured, measure, typical_work
from sparse_layouts.viewing.pattern_picture import svg
from sparse_layouts.viewing.representation import density_of_causal
from sparse_layouts.viewing.work import Work

# Dense work above which nothing is measured unasked, and at all: a fifth of a second, and a minute,
# on two cores of a server.
MEASURED_UNASKED_FLOP, MEASURED_FLOP = 2e10, 5e12


class Exploration:
    """A family with these parameters: `layout`, or the one line of `error` why there is none."""

    def __init__(self, family: Family, values: Values) -> None:
        self.family = family
        self.values = values
        self.layout: LayoutTensor | None = None
        self.error = ""
        self.measured: Measured | None = None
        try:
            self.layout = family.built(values)
        except (ValueError, TypeError) as error:
            self.error = str(error)

    @property
    def code(self) -> str:
        """The line that builds it."""
        return self.family.code(self.values)

    @property
    def work(self) -> Work:
        """What the typical call costs."""
        assert self.layout is not None
        return typical_work(self.layout)

    def why_not_measured(self, asked: bool) -> str:
        """Why `measure` would do nothing, or ""."""
        if self.layout is None:
            return "nothing to measure"
        if self.work.dense_flop > MEASURED_FLOP:
            return f"{self.work.dense_flop:.1e} FLOP densely: too long to measure here"
        if not asked and self.work.dense_flop > MEASURED_UNASKED_FLOP:
            return "a long one: measured when asked"
        return ""

    def measure(self, *, asked: bool = True) -> None:
        """Times the typical call, unless that would take too long."""
        if not self.why_not_measured(asked):
            assert self.layout is not None
            self.measured = measure(self.layout)

    def facts(self, unmeasured: str = "not yet") -> list[tuple[str, str]]:
        """What stands below the picture, by name; `unmeasured` in place of a time."""
        assert self.layout is not None
        layout, work = self.layout, self.work
        found = [("density", f"{layout.density:.2%}")]
        causal = density_of_causal(layout)
        if causal is not None:
            found.append(("of causal", f"{causal:.1%}"))
        dense = dense_bytes(layout)
        found.append(("bytes", f"{readable_bytes(layout.nbytes)}, dense {readable_bytes(dense)}"))
        share = work.share
        kind = "attention" if layout.dtype == torch.bool else "product with 256 columns"
        found.append(
            (
                "FLOPs",
                f"{work.flop:.3g}, dense {work.dense_flop:.3g}: {share:.1%} ({kind}, forward)",
            )
        )
        found.append(("measured here", self._times(unmeasured)))
        return found

    def _times(self, unmeasured: str) -> str:
        if self.measured is None:
            return self.why_not_measured(asked=False) or unmeasured
        own = self.measured
        ratio = own.ratio
        verdict = f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"
        return (
            f"{in_ms(own.sparse)} ({own.kernel}), {own.dense_is} {in_ms(own.dense)}: {verdict}; "
            f"{own.what}"
        )

    def as_html(self, max_bytes: int = 30_000, unmeasured: str = "not yet") -> str:
        """The code line, the picture, the facts; or the error."""
        code = f"<p><code>{html.escape(self.code)}</code></p>"
        if self.layout is None:
            return f"{code}<p><b>{html.escape(self.error)}</b></p>"
        rows = "".join(
            f'<tr><th style="text-align:left;vertical-align:top;padding-right:1em">'
            f'{html.escape(name)}</th><td style="text-align:left">{html.escape(value)}</td></tr>'
            for name, value in self.facts(unmeasured)
        )
        picture = svg(self.layout, caption="", max_panels=4, max_bytes=max_bytes)
        return f"{code}{picture}<table><tbody>{rows}</tbody></table>"


def in_ms(timing: Timing) -> str:
    """ "1.23 ms"."""
    return f"{timing.median_s * 1e3:.3g} ms"


def exploration(family: Family, given: dict[str, Any]) -> Exploration:
    """What these parameters, and the defaults for the others, make.

    Raises `ValueError` for unknown parameters; one that the factory refuses is its `error`.
    """
    return Exploration(family, family.values(given))
