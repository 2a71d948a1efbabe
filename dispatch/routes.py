"""The table of routes: which function handles a torch function for which operand layouts."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from sparse_layouts.dispatch.faces import (
    PARAMETERS,
    Function,
    Reading,
    canonical,
    name_of,
    read_call,
    wider_readings,
)
from sparse_layouts.dispatch.kernel_table import Facts, place_of_caller
from sparse_layouts.dispatch.layout import Layout

F = TypeVar("F", bound=Callable[..., Any])


class Use(NamedTuple):
    """An op that a route will run: what for ("forward", "gradient of other"), and the facts it will
    choose a kernel by.
    """

    purpose: str
    op: str
    facts: Facts


@dataclasses.dataclass(frozen=True)
class Route:
    """One row: `handler` takes calls of `function` whose layout operands are exactly `operands`
    (subclasses included).
    """

    function: Function
    operands: tuple[tuple[str, type], ...]
    handler: Callable[..., Any]
    uses: Callable[..., list[Use]] | None
    place: str
    positional: int | None  # arguments that the handler takes by position; None: any number
    keywords: frozenset[str] | None  # those that it takes by name; None: any
    is_own: bool  # whether the handler is one of this library's

    def takes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the handler has a parameter for every argument of a call."""
        if self.positional is not None and len(args) > self.positional:
            return False
        return not kwargs or self.keywords is None or self.keywords.issuperset(kwargs)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names by which operands are found, in positional order."""
        return PARAMETERS.get(self.function) or tuple(inspect.signature(self.handler).parameters)

    def __str__(self) -> str:
        operands = ", ".join(f"{name}={cls.__name__}" for name, cls in self.operands)
        return f"{name_of(self.function)}({operands})"


class RouteTable:
    """Routes by canonical function, and what lookups found so far."""

    def __init__(self) -> None:
        self.rows: dict[Function, list[Route]] = {}
        self.found: dict[Any, Route | None] = {}
        self.shortcuts: dict[Function, list[Callable[..., Any]]] = {}
        self.changes = 0  # what was decided before a change may be wrong after it


ROUTES = RouteTable()


def shortcut(function: Function) -> Callable[[F], F]:
    """Registers the decorated `shortcut(args, kwargs)` as what is tried first, before a call of
    `function` is read and its route found, in eager mode, after those that were registered before.

    It returns `NotImplemented` unless it is sure which route the call would take, and that
    :attr:`RouteTable.changes` is what it was then.
    """

    def register(handler: F) -> F:
        ROUTES.shortcuts.setdefault(function, []).append(handler)
        return handler

    return register


def route(
    function: Function,
    *,
    uses: Callable[..., list[Use]] | None = None,
    **operands: type,
) -> Callable[[F], F]:
    """Registers the decorated function as the handler of `function` for operands of the given
    layouts.

    `operands` names each operand that is a layout by torch's parameter name: `@sl.route(torch.mm,
    input=MyLayout)`. The handler gets the call's arguments as they are; it may return
    `NotImplemented` to decline (the call goes on to the dense fallback). A route for one function
    serves its other faces (`@`, `Tensor.mm`, `F.linear`) where the shapes allow, and subclasses of
    its layouts. `uses(*args, **kwargs)`, for `sl.explain`, lists the ops that the handler will run.
    The handler gets `.unregister()`.

    Raises `ValueError` if the same operands have a route (naming both places) or a parameter name
    is unknown, `TypeError` if an operand is no layout.

    >>> import torch, sparse_layouts as sl
    >>> @sl.route(torch.trace, input=sl.BSRTensor)
    ... def trace_of_blocks(input):
    ...     return torch.diagonal(input.to_dense()).sum()
    >>> torch.trace(sl.bsr(torch.eye(64), block_size=16))
    tensor(64.)
    >>> trace_of_blocks.unregister()
    """
    place = place_of_caller()
    function = canonical(function)
    if not operands:
        raise TypeError(
            f"route: name at least one operand, as in route({name_of(function)}, input=MyLayout)"
        )
    for name, cls in operands.items():
        if not (isinstance(cls, type) and issubclass(cls, Layout)):
            raise TypeError(f"route: {name}={cls!r} is not a layout class")

    def register(handler: F) -> F:
        row = Route(
            function,
            tuple(sorted(operands.items(), key=lambda o: o[0])),
            handler,
            uses,
            place,
            *_accepted(handler),
            (getattr(handler, "__module__", None) or "").startswith("sparse_layouts."),
        )
        unknown = set(operands) - set(row.parameters)
        if unknown:
            raise ValueError(
                f"route: {name_of(function)} has no operand {', '.join(sorted(unknown))}; "
                f"it has {', '.join(row.parameters)}"
            )
        rows = ROUTES.rows.setdefault(function, [])
        for other in rows:
            if other.operands == row.operands:
                raise ValueError(
                    f"{row} is registered twice: at {other.place} and at {place}. "
                    "Call .unregister() on the first handler to replace it."
                )
        rows.append(row)
        ROUTES.found.clear()
        ROUTES.changes += 1
        before = getattr(handler, "unregister", None)
        handler.unregister = functools.partial(_unregister, row, before)  # type: ignore[attr-defined]
        return handler

    return register


def _accepted(handler: Callable[..., Any]) -> tuple[int | None, frozenset[str] | None]:
    """How many arguments a handler takes by position, and which by name; None without a limit."""
    parameters = inspect.signature(handler).parameters.values()
    kinds = [p.kind for p in parameters]
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    by_name = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = (
        None
        if inspect.Parameter.VAR_POSITIONAL in kinds
        else sum(kind in by_place for kind in kinds)
    )
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return positional, None
    return positional, frozenset(p.name for p in parameters if p.kind in by_name)


def _unregister(row: Route, before: Callable[[], None] | None) -> None:
    rows = ROUTES.rows.get(row.function, [])
    if row in rows:
        rows.remove(row)
    ROUTES.found.clear()
    ROUTES.changes += 1
    if before is not None:
        before()


def _layout_operands(
    function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], names: tuple[str, ...]
) -> tuple[tuple[str, type], ...]:
    """(name, class) of every layout among the arguments; "?" for one without a name."""
    found = []
    for i, value in enumerate(args):
        if isinstance(value, Layout):
            found.append((names[i] if i < len(names) else "?", type(value)))
        elif isinstance(value, (tuple, list)) and any(isinstance(v, Layout) for v in value):
            found.append(("?", Layout))
    for name, value in kwargs.items():
        if isinstance(value, Layout):
            found.append((name, type(value)))
    return tuple(found)


def find_route(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Route | None:
    """The most special route for a canonical call, or None; one whose handler has no parameter for
    an argument (`out=`) does not serve the call.
    """
    row = _most_special(function, args, kwargs)
    return row if row is not None and row.takes(args, kwargs) else None


def _most_special(
    function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Route | None:
    rows = ROUTES.rows.get(function)
    if not rows:
        return None
    operands = _layout_operands(function, args, kwargs, rows[0].parameters)
    key = (function, operands)
    if key in ROUTES.found:
        return ROUTES.found[key]
    best, best_distance = None, None
    for row in rows:
        distance = _distance(row, operands)
        if distance is not None and (best_distance is None or distance < best_distance):
            best, best_distance = row, distance
    ROUTES.found[key] = best
    return best


def _distance(row: Route, operands: tuple[tuple[str, type], ...]) -> int | None:
    """How many steps of inheritance lie between a call's layouts and the route's; None if it does
    not serve them.
    """
    wanted = dict(row.operands)
    if {name for name, _ in operands} != set(wanted) or len(operands) != len(wanted):
        return None
    total = 0
    for name, cls in operands:
        if not issubclass(cls, wanted[name]):
            return None
        total += cls.__mro__.index(wanted[name])
    return total


class Match(NamedTuple):
    """A route, and the call as that route reads it."""

    route: Route
    reading: Reading


def matches(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Match]:
    """The routes that serve a call, under its own name first, then under wider ones."""
    first = read_call(function, args, kwargs)
    found = []
    row = find_route(first.function, first.args, first.kwargs)
    if row is not None:
        found.append(Match(row, first))
    for reading in wider_readings(first):
        row = find_route(reading.function, reading.args, reading.kwargs)
        if row is not None:
            found.append(Match(row, reading))
    return found


def _run(row: Route, reading: Reading) -> Any:
    """What the handler returns; more is done for one from outside this library."""
    if not row.is_own:
        from sparse_layouts.dispatch.outside_routes import run_outside

        return run_outside(row, reading)
    return row.handler(*reading.args, **reading.kwargs)


def call_route(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of the first route that serves the call and does not decline, if any."""
    first = read_call(function, args, kwargs)
    row = find_route(first.function, first.args, first.kwargs)
    if row is not None:
        result = _run(row, first)
        if result is not NotImplemented:
            return result
    for reading in wider_readings(first):
        row = find_route(reading.function, reading.args, reading.kwargs)
        if row is None:
            continue
        result = _run(row, reading)
        if result is not NotImplemented:
            return result if reading.finish is None else reading.finish(result)
    return NotImplemented


def stub(function: Function, operands: dict[str, type]) -> str:
    """Code to paste: a route for such a call."""
    function = canonical(function)
    parameters = PARAMETERS.get(function)
    if parameters is None:
        last = max([0, *(int(n[8:]) for n in operands if n.startswith("operand_"))])
        places = ("input", *(f"operand_{i}" for i in range(1, last + 1)))
        named = tuple(n for n in operands if n not in places)
        parameters = (*places, *named, "*rest", "**options")
    declared = ", ".join(f"{name}={cls.__name__}" for name, cls in operands.items())
    name = name_of(function)
    return (
        f"    @sl.route({name}, {declared})\n"
        f"    def my_{name.rpartition('.')[2].strip('_')}({', '.join(parameters)}):\n"
        "        ...  # return the result, or NotImplemented to decline"
    )


def operands_by_name(
    function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, type]:
    """The call's layout operands under their canonical names, for messages."""
    reading = read_call(function, args, kwargs)
    names = PARAMETERS.get(reading.function) or tuple(
        f"{'input' if i == 0 else f'operand_{i}'}" for i in range(len(reading.args))
    )
    found = _layout_operands(reading.function, reading.args, reading.kwargs, names)
    return {name: cls for name, cls in found if name != "?"}
