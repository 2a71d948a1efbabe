"""`sl.explain` and `sl.table`: what the two tables say of a call, without running it."""

from __future__ import annotations

import html
from typing import Any, NamedTuple

import torch

from sparse_layouts.dispatch import settings
from sparse_layouts.dispatch.faces import Function, name_of
from sparse_layouts.dispatch.fallback import free_bytes, layouts_in, route_missing
from sparse_layouts.dispatch.kernel_table import (
    KERNELS,
    Facts,
    Verdict,
    triton_version,
    verdicts,
)
from sparse_layouts.dispatch.layout import dense_bytes
from sparse_layouts.dispatch.routes import ROUTES, Match, matches
from sparse_layouts.dispatch.text import (
    folded,
    html_table,
    readable_bytes,
    terminal_width,
    text_table,
)


class OpPlan(NamedTuple):
    """An op of the call: what for, every kernel's verdict, and the facts that it rests on."""

    purpose: str
    op: str
    verdicts: list[Verdict]
    facts: Facts


class Explanation:
    """What a call will do, as something that prints itself.

    `.route`, `.ops`, `.kernel` (the forward's, or "dense fallback"), `.dense_bytes`.
    """

    def __init__(
        self,
        call: str,
        match: Match | None,
        ops: list[OpPlan],
        missing: str,
        count: int,
        native: bool,
    ) -> None:
        self.call = call
        self.route = None if match is None else match.route
        self.ops = ops
        self.missing = missing
        self.dense_bytes = count
        self.native = native

    @property
    def kernel(self) -> str:
        """The name of the forward's kernel, "dense fallback" without one, "" for a route that runs
        no op.
        """
        if self.missing:
            return "dense fallback"
        for plan in self.ops:
            chosen = [v.kernel.name for v in plan.verdicts if v.chosen]
            return chosen[0] if chosen else "dense fallback"
        return ""

    def on_gpu(
        self, capability: tuple[int, int], triton: tuple[int, ...] | None = None
    ) -> Explanation:
        """The same call as if its operands were on an NVIDIA GPU of this compute capability, which
        need not be there: from the kernels' requirements alone.

        `triton` is the version there, by default the installed one or else 3.6; torch has
        cuSPARSELt, and the operands are aligned, contiguous, and of a size for which each kernel
        has the memory.

        >>> import torch, sparse_layouts as sl
        >>> w = sl.bsr(torch.eye(64), block_size=16)
        >>> sl.explain(torch.matmul, w, torch.ones(64, 2)).on_gpu((9, 0)).kernel
        'triton_few_columns'
        """
        version = triton or triton_version() or (3, 6, 0)
        ops = []
        for plan in self.ops:
            row_bytes = plan.facts.head_dim * plan.facts.dtype.itemsize
            facts = plan.facts._replace(
                device="cuda",
                capability=capability,
                triton=version,
                cusparselt=True,
                tma=capability == (9, 0) and row_bytes % 16 == 0,
            )
            ops.append(plan._replace(verdicts=verdicts(plan.op, facts), facts=facts))
        said = Explanation(self.call, None, ops, self.missing, self.dense_bytes, self.native)
        said.route = self.route
        return said

    def as_json(self) -> dict[str, Any]:
        """All that it says, as JSON can hold it."""
        return {
            "call": self.call,
            "route": None if self.route is None else str(self.route),
            "kernel": self.kernel,
            "says": self._headline(),
            "ops": [
                {
                    "purpose": plan.purpose,
                    "op": plan.op,
                    "kernels": [
                        {
                            "kernel": v.kernel.name,
                            "chosen": v.chosen,
                            "reason": v.reason,
                            "source": v.kernel.source,
                        }
                        for v in plan.verdicts
                    ],
                }
                for plan in self.ops
            ],
            "dense_bytes": self.dense_bytes if self._needs_cost() else 0,
            "policy": settings.current().policy,
        }

    _HEAD = ("kernel", "verdict", "source")

    def _rows(self, plan: OpPlan) -> list[list[str]]:
        rows = []
        for v in plan.verdicts:
            verdict = "chosen" if v.chosen else (v.reason or "could, but comes later")
            rows.append([v.kernel.name, verdict, v.kernel.source])
        return rows

    def _headline(self) -> str:
        if self.missing:
            return self.missing
        if self.native:
            return "kept by every layout: works on the stored entries"
        assert self.route is not None
        handler = self.route.handler
        return f"route {self.route}  [{handler.__module__}:{handler.__qualname__}]"

    def _cost(self) -> str:
        return (
            f"Densifying costs {readable_bytes(self.dense_bytes)}; "
            f"policy {settings.current().policy!r}."
        )

    def _needs_cost(self) -> bool:
        return bool(self.missing) or any(not any(v.chosen for v in p.verdicts) for p in self.ops)

    def __repr__(self) -> str:
        return self.text(terminal_width())

    def text(self, width: int | None = None) -> str:
        """What it prints, in lines of at most `width` (None: as long as they are); code to paste
        stays whole.
        """
        lines = _fitted(self.call, width, "", "    ")
        for line in self._headline().split("\n"):
            lines += ["  " + line] if line.startswith(" ") else _fitted(line, width, "  ", "    ")
        for plan in self.ops:
            none = "" if any(v.chosen for v in plan.verdicts) else ": no kernel, dense fallback"
            lines += _fitted(f"{plan.purpose}: {plan.op}{none}", width, "  ", "    ")
            lines.append(text_table(self._HEAD, self._rows(plan), "    ", width))
        if self._needs_cost():
            lines += _fitted(self._cost(), width, "  ", "    ")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        parts = [f"<p><b>{html.escape(self.call)}</b></p>"]
        text = html.escape(self._headline())
        parts.append(f'<pre style="white-space:pre-wrap">{text}</pre>')
        for plan in self.ops:
            parts.append(f"<p>{html.escape(plan.purpose)}: <code>{html.escape(plan.op)}</code></p>")
            chosen = [i for i, v in enumerate(plan.verdicts) if v.chosen]
            parts.append(html_table(self._HEAD, self._rows(plan), strong=chosen))
        if self._needs_cost():
            parts.append(f"<p>{html.escape(self._cost())}</p>")
        return "<div>" + "".join(parts) + "</div>"


def _fitted(text: str, width: int | None, indent: str, hanging: str) -> list[str]:
    """The text in lines of at most `width`, the first one behind `indent`."""
    return [indent + text] if width is None else folded(indent + text, width, hanging)


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        kind = type(value).__name__
        return (
            f"{kind}[{', '.join(map(str, value.shape))}] {str(value.dtype).removeprefix('torch.')}"
        )
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return f"{type(value).__name__}({_describe(value[0])}, ...)"
    return (
        repr(value)
        if not isinstance(value, (tuple, list))
        else f"[{', '.join(map(_describe, value))}]"
    )


def explain(function: Function, *args: Any, **kwargs: Any) -> Explanation:
    """Says which route and which kernels `function(*args, **kwargs)` would take, and why, without
    running it.

    Returns an :class:`Explanation` that prints as text and, in a notebook, as HTML: the route,
    every kernel of each op with chosen or why not, and where there is none the cost of densifying
    and the stub to paste.

    Raises what the call would raise for operands that do not fit, and `TypeError` if no argument is
    a layout.

    >>> import torch, sparse_layouts as sl
    >>> w = sl.bsr(torch.eye(64), block_size=16)
    >>> sl.explain(torch.matmul, w, torch.ones(64, 2)).kernel
    'cpu'
    >>> sl.explain(torch.cumsum, w, 0).kernel
    'dense fallback'
    """
    call = (
        f"{name_of(function)}("
        + ", ".join([*map(_describe, args), *(f"{k}={_describe(v)}" for k, v in kwargs.items())])
        + ")"
    )
    function = getattr(function, "__sparsified__", function)  # what sl.sparsified calls
    own = getattr(function, "__explain__", None)
    if own is not None:  # one of the library's own functions: it names its ops itself
        uses = own(*args, **kwargs)
        if isinstance(uses, tuple):  # it hands the call on to a torch function
            return explain(uses[0], *uses[1], **uses[2])
        plans = [OpPlan(u.purpose, u.op, verdicts(u.op, u.facts), u.facts) for u in uses]
        return Explanation(call, None, plans, "", 0, native=True)
    layouts = layouts_in(args) + layouts_in(kwargs)
    if not layouts:
        raise TypeError(f"explain: no argument of {call} is a layout; torch runs it as it is")
    count = sum(dense_bytes(layout) for layout in layouts)
    for match in matches(function, args, kwargs):
        uses = match.route.uses
        plans = []
        if uses is not None:
            found = uses(*match.reading.args, **match.reading.kwargs)
            if found is NotImplemented:
                continue
            plans = [OpPlan(u.purpose, u.op, verdicts(u.op, u.facts), u.facts) for u in found]
        return Explanation(call, match, plans, "", count, native=False)
    if any(getattr(type(layout), "keeps", lambda f: False)(function) for layout in layouts):
        return Explanation(call, None, [], "", count, native=True)
    device = layouts[0].device.type
    missing = route_missing(function, args, kwargs)
    free = free_bytes(device)
    if free is not None and count > free:
        missing += f"\nIt would raise: {readable_bytes(count)} dense, {readable_bytes(free)} free."
    return Explanation(call, None, [], missing, count, native=False)


class Table:
    """Both tables: routes by torch function, kernels by op; prints itself."""

    def _routes(self) -> list[list[str]]:
        rows = []
        for function, routes in ROUTES.rows.items():
            for row in routes:
                operands = ", ".join(f"{n}={c.__name__}" for n, c in row.operands)
                rows.append([name_of(function), operands, row.handler.__qualname__])
        return sorted(rows)

    def _kernels(self) -> list[list[str]]:
        return [
            [op, str(i + 1), row.name, row.source]
            for op, rows in sorted(KERNELS.rows.items())
            for i, row in enumerate(rows)
        ]

    _ROUTES = ("torch function", "operands", "handler")
    _KERNELS = ("op", "order", "kernel", "source")

    def __repr__(self) -> str:
        return self.text(terminal_width())

    def text(self, width: int | None = None) -> str:
        """What it prints, in lines of at most `width`; None: as long as they are."""
        routes = "Routes: torch function and operand layouts -> handler"
        kernels = "Kernels, most special first: the first whose requirements hold is taken"
        return "\n".join(
            [
                *_fitted(routes, width, "", "  "),
                text_table(self._ROUTES, self._routes(), "  ", width),
                "",
                *_fitted(kernels, width, "", "  "),
                text_table(self._KERNELS, self._kernels(), "  ", width),
            ]
        )

    def _repr_html_(self) -> str:
        return (
            "<div><p><b>Routes</b></p>"
            + html_table(self._ROUTES, self._routes())
            + "<p><b>Kernels</b>, most special first</p>"
            + html_table(self._KERNELS, self._kernels())
            + "</div>"
        )


def table() -> Table:
    """Both tables, as something that prints itself in a terminal and in a notebook.

    >>> import sparse_layouts as sl
    >>> "block_attention" in repr(sl.table())
    True
    """
    return Table()
