"""`sl.explore`: choose a family of layouts, drag its parameters, and see what they make."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

from sparse_layouts.viewing.exploration import Exploration, exploration
from sparse_layouts.viewing.extras import needed
from sparse_layouts.viewing.families import FAMILIES, Family, Parameter, Values, family_of

SETTLED_S = 0.4  # a parameter that has rested for so long is measured


class Explorer:
    """The explorer of a notebook: displays itself; `layout` is what is shown, `code` the line that
    builds it, `set(...)` changes it, `save(path)` writes a page that works without Python.
    """

    def __init__(self, family: Family, values: Values, *, measure: bool, exported: bool) -> None:
        self._widgets = needed("ipywidgets", "explore")
        self._measures, self._exported = measure, exported
        self._timer: asyncio.TimerHandle | None = None
        self._by_hand = True
        self.state = Exploration(family, values)
        w = self._widgets
        self._family = w.Dropdown(
            options=[(each.title, each.name) for each in FAMILIES.values()],
            value=family.name,
            description="family",
            style={"description_width": "12em"},
        )
        self._about = w.HTML()
        self._rows = w.VBox()
        self._view = w.HTML()
        self._button = w.Button(description="Measure", tooltip="time it against dense torch")
        self._unasked = w.Checkbox(
            value=measure, description="measure after every change", indent=False
        )
        self._controls: dict[str, Any] = {}
        self.widget = w.VBox(
            [
                w.HBox([self._family, self._about]),
                self._rows,
                w.HBox([self._button, self._unasked]),
                self._view,
            ]
        )
        self.widget.add_class("sl-explorer-live")
        self._family.observe(self._family_chosen, "value")
        self._button.on_click(self._asked)
        self._lay_out_controls()
        self._show()

    @property
    def family(self) -> str:
        """The name of the family."""
        return self.state.family.name

    @property
    def layout(self) -> Any:
        """The layout that is shown; raises `ValueError` where the parameters make none."""
        if self.state.layout is None:
            raise ValueError(self.state.error)
        return self.state.layout

    @property
    def code(self) -> str:
        """The line that builds it."""
        return self.state.code

    def set(self, family: str | None = None, **values: Any) -> Explorer:
        """Changes the family (to its defaults) or parameters, as the controls do.

        Raises `ValueError` with one line for unknown ones.
        """
        own = self.state.family if family is None else family_of(family)
        before = self.state.values if own is self.state.family else {}
        read = own.values({**before, **values})
        _check_offered(own, read)
        self._by_hand = False
        try:
            self._family.value = own.name
            self.state = Exploration(own, read)
            self._lay_out_controls()
        finally:
            self._by_hand = True
        self._show()
        return self

    def measure(self) -> Explorer:
        """Times what is shown against dense torch, on this machine."""
        self.state.measure()
        self._show()
        return self

    def save(self, path: str | Path, *, measured: bool = False) -> Path:
        """Writes a page that works without Python and loads nothing from elsewhere; with
        `measured`, every state of it is timed first, which takes a minute or two.
        """
        from sparse_layouts.viewing.explorer_page import page

        path = Path(path)
        path.write_text(page(self.state, measured=measured), encoding="utf-8")
        return path

    def __repr__(self) -> str:
        return f"Explorer: {self.code}"

    def _ipython_display_(self) -> None:
        display = needed("IPython.display", "explore")
        display.display(self.widget)
        if self._exported:  # stays hidden as long as the widget is alive
            from sparse_layouts.viewing.explorer_page import fragment

            display.display(display.HTML(fragment(self.state)))
            self._view.value = self.state.as_html()  # measured on the way

    # --- what the controls do ---

    def _control(self, parameter: Parameter, value: Any) -> Any:
        w = self._widgets
        how = {
            "description": parameter.name,
            "tooltip": parameter.about,
            "style": {"description_width": "12em"},
            "layout": {"width": "32em"},
        }
        if isinstance(parameter.default, bool):
            return w.Checkbox(value=value, description=parameter.name)
        if parameter.choices and isinstance(parameter.default, str):
            return w.Dropdown(options=list(parameter.choices), value=value, **how)
        if parameter.choices:
            return w.SelectionSlider(options=list(parameter.choices), value=value, **how)
        return w.IntSlider(value=value, min=parameter.low, max=parameter.high, **how)

    def _lay_out_controls(self) -> None:
        state = self.state
        self._about.value = f"<span style='margin-left:1em'>{state.family.about}</span>"
        self._controls = {
            p.name: self._control(p, state.values[p.name]) for p in state.family.parameters
        }
        for control in self._controls.values():
            control.observe(self._dragged, "value")
        self._rows.children = tuple(self._controls.values())

    def _family_chosen(self, change: Any) -> None:
        if self._by_hand:
            self.state = exploration(FAMILIES[change["new"]], {})
            self._lay_out_controls()
            self._show()

    def _dragged(self, change: Any) -> None:
        if self._by_hand:
            values = {name: control.value for name, control in self._controls.items()}
            self.state = Exploration(self.state.family, values)
            self._show()

    def _asked(self, button: Any) -> None:
        self.measure()

    def _show(self) -> None:
        self._view.value = self.state.as_html()
        self._button.disabled = bool(self.state.why_not_measured(asked=True))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._unasked.value and self.state.measured is None:
            with contextlib.suppress(RuntimeError):  # no event loop: not in a notebook
                loop = asyncio.get_running_loop()
                self._timer = loop.call_later(SETTLED_S, self._settled, self.state)

    def _settled(self, state: Exploration) -> None:
        if state is self.state and state.measured is None:
            state.measure(asked=False)
            if state.measured is not None:
                self._view.value = state.as_html()


def _check_offered(family: Family, values: Values) -> None:
    """Raises `ValueError` for a value that no control of the explorer can show."""
    for p in family.parameters:
        value = values[p.name]
        if p.choices and value not in p.choices:
            offered = ", ".join(map(str, p.choices))
            raise ValueError(f"explore: {p.name} is one of {offered}, got {value!r}")
        if p.high and not p.low <= value <= p.high:
            raise ValueError(f"explore: {p.name} is from {p.low} to {p.high}, got {value!r}")


def explore(
    family: str = "local_stride", *, measure: bool = True, exported: bool = True, **parameters: Any
) -> Explorer:
    """An explorer for notebooks (extra `notebooks`): choose a family of layouts, drag its
    parameters, see the pattern, density, bytes, FLOPs against dense, the line of code that builds
    it, and a time measured on this machine.

    `family` is the name of its function (`"local_stride"`, `"bigbird"`, `"sliding_window"`,
    `"sink_window"`, `"document"`, `"causal"`, `"nm"`, `"grouped_nm"`, `"bsr"`, `"csr"`, `"csc"`),
    `parameters` what its sliders begin with. `measure`: time it after every change, if that is
    quick. `exported`: bring along what a page exported from the notebook needs to work without
    Python (200 kB); `explore().save("page.html")` writes such a page by itself.

    Raises `ValueError` with one line for an unknown family or parameter, or a value that the
    controls do not offer, `ModuleNotFoundError` with the pip command without ipywidgets.

    >>> import sparse_layouts as sl
    >>> sl.explore("sliding_window", window=100)
    Explorer: sl.sliding_window(2048, block_size=64, window=100, causal=True)
    """
    own = family_of(family)
    values = own.values(parameters)
    _check_offered(own, values)
    return Explorer(own, values, measure=measure, exported=exported)
