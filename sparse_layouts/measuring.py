"""What the demo and the benchmarks measure with: interleaved times, errors, exact attention."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# On a GPU torch chooses among its kernels by length and mask: these two take any.
ANY_MASK = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Timing(NamedTuple):
    """Wall time of one variant, in seconds: the median and the quartiles over `repeats` runs."""

    median_s: float
    low_s: float
    high_s: float
    repeats: int

    @property
    def spread(self) -> float:
        """The distance between the quartiles over the median."""
        return (self.high_s - self.low_s) / self.median_s if self.median_s else 0.0

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """The median and the quartiles of a list of seconds."""
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0], 1)
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, low, high, len(seconds))


def synchronize(device: torch.device | str) -> None:
    """Waits for a GPU's queue; does nothing on the CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    variants: Mapping[str, Callable[[], Any]],
    *,
    repeats: int = 7,
    budget_s: float = float("inf"),
    at_least: int = 3,
    device: torch.device | str = "cpu",
) -> dict[str, Timing]:
    """Times variants in turns, so that what disturbs the machine disturbs all of them.

    Each is run once before. Stops early when `budget_s` seconds are spent, but not before
    `at_least` repeats of each.

    >>> from sparse_layouts.measuring import interleaved
    >>> sorted(interleaved({"list": lambda: [0] * 10, "tuple": lambda: (0,) * 10}))
    ['list', 'tuple']
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    begin = time.perf_counter()
    for run in variants.values():
        run()
    for done in range(repeats):
        if done >= at_least and time.perf_counter() - begin > budget_s:
            break
        order = list(variants.items())
        for name, run in order if done % 2 == 0 else reversed(order):
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing.of(each) for name, each in seconds.items()}


def relative_error(found: Tensor, exact: Tensor) -> float:
    """The Frobenius norm of the difference over that of `exact`; NaN if `found` has one."""
    exact = exact.double()
    norm = torch.linalg.vector_norm(exact)
    return float(torch.linalg.vector_norm(found.double() - exact) / norm.clamp(min=1e-300))


def peak_bytes(function: Callable[[], Any], device: torch.device | str) -> int:
    """What a CUDA device allocates for `function` at most, beyond what was there before."""
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = function()
    synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stored: Callable[[int, int], Tensor],
    dout: Tensor | None = None,
    *,
    causal: bool,
    dtype: torch.dtype = torch.float64,
    rows_at_once: int = 1024,
) -> tuple[Tensor, ...]:
    """Dense attention under a mask, some rows at a time: fits into memory at any length.

    q (B, H, N, D), k and v (B, Hkv, N, D), computed in `dtype`; `stored(start, stop)` gives rows
    start..stop of the dense mask, broadcastable to (B, H, stop - start, N): bool, or integers, how
    often an entry counts in the softmax. `causal` promises that it stores nothing right of the
    diagonal, which saves half the work. Returns `(out,)`, or with the gradient `dout` of the output
    `(out, dq, dk, dv)`, the gradients in float64.
    """
    q, k, v = (t.detach().to(dtype) for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    # Gradients of the slices are added up in float64, so that slicing costs a narrow dtype nothing.
    dq, dk, dv = (torch.zeros_like(t, dtype=torch.float64) for t in (q, k, v))
    slices = []
    for start in range(0, q.shape[-2], rows_at_once):
        stop = min(start + rows_at_once, q.shape[-2])
        reach = stop if causal else k.shape[-2]
        parts = [q[..., start:stop, :], k[..., :reach, :], v[..., :reach, :]]
        if dout is not None:
            parts = [t.detach().requires_grad_() for t in parts]
        own = stored(start, stop)[..., :reach]
        if own.dtype != torch.bool:
            own = own.to(dtype).log()
        # one KV head for each query head: gradients of those that share one are added up
        keys, values = (t.repeat_interleave(group, 1) for t in parts[1:])
        with sdpa_kernel(ANY_MASK) if q.is_cuda else contextlib.nullcontext():
            out = F.scaled_dot_product_attention(parts[0], keys, values, attn_mask=own)
        slices.append(out.detach())
        if dout is not None:
            given = dout[..., start:stop, :].to(dtype)
            dq[..., start:stop, :], more_dk, more_dv = torch.autograd.grad(out, parts, given)
            dk[..., :reach, :] += more_dk
            dv[..., :reach, :] += more_dv
    whole = torch.cat(slices, -2)
    return (whole,) if dout is None else (whole, dq, dk, dv)
