"""What a caller may set for a stretch of code: the fallback policy, kernel choices, a trace.

All of it lives in one ContextVar. CUDA runs backward passes on another thread, where the ContextVar
has its default, so an `autograd.Function` keeps :func:`current` in its context and runs its
backward under :func:`restored`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar, Token
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from sparse_layouts.dispatch.tracing import Trace

POLICIES = ("warn", "error", "allow")


class Settings(NamedTuple):
    """The settings in force; immutable, so that capturing them is taking a reference."""

    policy: str = "warn"
    choices: tuple[tuple[str, str], ...] = ()
    trace: Trace | None = None


_settings: ContextVar[Settings] = ContextVar("sparse_layouts.settings")
_DEFAULT = Settings()


def current() -> Settings:
    """The settings in force here; the defaults while torch.compile traces (kernels are chosen when
    its code runs).
    """
    if torch.compiler.is_dynamo_compiling():
        return _DEFAULT
    return _settings.get(_DEFAULT)


def restored(settings: Settings) -> contextlib.AbstractContextManager[None]:
    """Runs a backward pass under settings captured earlier, on whatever thread.

    `torch.autograd.grad` with a layout among its inputs switches `__torch_function__` off around
    the whole pass; here it is on again.
    """
    if torch.compiler.is_dynamo_compiling():
        return contextlib.nullcontext()
    return _restored(settings)


@contextlib.contextmanager
def _restored(settings: Settings) -> Iterator[None]:
    token = _settings.set(settings)
    try:
        with torch._C._EnableTorchFunction():
            yield
    finally:
        _settings.reset(token)


class _Setting:
    """A change of the settings that holds from construction on, or to the end of the `with` block
    that it opens.
    """

    def __init__(self, settings: Settings) -> None:
        self._token: Token[Settings] | None = _settings.set(settings)

    def __enter__(self) -> _Setting:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._token is not None:
            _settings.reset(self._token)
            self._token = None


class fallback(_Setting):
    """Sets what a call without a sparse kernel does: `"warn"` once a call site (the default),
    `"error"`, or `"allow"`.

    As a statement it holds for the rest of the current context, as a context manager for its block.
    A fallback that would need more memory than is free raises under every policy.

    Raises `ValueError` for an unknown policy.

    >>> import torch, sparse_layouts as sl
    >>> w = sl.bsr(torch.eye(64), block_size=16)
    >>> with sl.fallback("allow"):
    ...     torch.cumsum(w, 0).shape
    torch.Size([64, 64])
    """

    def __init__(self, policy: str) -> None:
        if policy not in POLICIES:
            raise ValueError(f"fallback: expected one of {', '.join(POLICIES)}; got {policy!r}")
        super().__init__(current()._replace(policy=policy))


class kernel_choice(_Setting):
    """Makes an op use the named kernel: `with sl.kernel_choice(block_attention="cpu"): ...`, or
    `op=` and `kernel=`.

    The kernel's own requirements still hold: a call that it cannot take raises
    `NotImplementedError` with its reason instead of trying another kernel. Raises `ValueError` for
    an op or kernel that is not in the table.

    >>> import torch, sparse_layouts as sl
    >>> w = sl.bsr(torch.eye(64), block_size=16)
    >>> with sl.kernel_choice(op="block_matmul", kernel="cpu"):
    ...     torch.equal(w @ torch.ones(64, 2), torch.ones(64, 2))
    True
    """

    def __init__(self, *, op: str | None = None, kernel: str | None = None, **names: str) -> None:
        from sparse_layouts.dispatch.kernel_table import kernels_of

        if (op is None) != (kernel is None):
            raise ValueError("kernel_choice: op= and kernel= go together")
        if op is not None and kernel is not None:
            names = {**names, op: kernel}
        for each, name in names.items():
            known = [row.name for row in kernels_of(each)]
            if name not in known:
                raise ValueError(
                    f"kernel_choice: {each!r} has no kernel {name!r}; it has {', '.join(known)}"
                )
        settings = current()
        choices = {**dict(settings.choices), **names}
        super().__init__(settings._replace(choices=tuple(sorted(choices.items()))))
