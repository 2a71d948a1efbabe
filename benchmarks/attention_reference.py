"""Whether a case's attention is right: against float64, and the same bits twice."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import sparse_layouts as sl
from benchmarks.attention_cases import DIRECTIONS, Case, rows_of
from benchmarks.attention_rivals import Operands, Variant
from benchmarks.timing import WrongResult, check_error
from sparse_layouts.measuring import dense_attention, relative_error

NAMES = ("out", "dq", "dk", "dv")


class Checked(NamedTuple):
    """By direction: what is wrong ("": nothing), the largest error and dense torch's at that place,
    the kernel that ran; and the results by name, (B, H, N, D).
    """

    wrong: dict[str, str]
    errors: dict[str, tuple[float, float]]
    kernels: dict[str, str]
    results: dict[str, Tensor]

    def sound(self) -> None:
        """Raises :class:`WrongResult` if anything is wrong."""
        for message in self.wrong.values():
            if message:
                raise WrongResult(message)


def direction_of(name: str) -> str:
    """Of a result's name."""
    return "forward" if name == "out" else "backward"


def results_of(variant: Variant) -> dict[str, Tensor]:
    """Output and gradients of one run."""
    out = variant.attend(*variant.leaves)
    gradients = torch.autograd.grad(out, variant.leaves, variant.dout)
    return dict(zip(NAMES, (out.detach(), *gradients), strict=True))


def places(case: Case) -> list[tuple[int, int]]:
    """The (sample, KV head) pairs that are compared: the first, a middle one, the last."""
    middle = (case.batch // 2, case.keys // 2)
    return list(dict.fromkeys([(0, 0), middle, (case.batch - 1, case.keys - 1)]))


def check(case: Case, given: Operands, variant: Variant) -> Checked:
    """Compares two or three (sample, KV head) pairs, with all query heads of each, by relative norm
    at the default scale; some rows at a time, so that no (N, N) matrix is made.

    Gradients must also come in the same bits twice. A wrong output makes both directions wrong.
    """
    with sl.fallback("error"), sl.trace() as steps:
        found = results_of(variant)
    again = results_of(variant)
    wrong = dict.fromkeys(DIRECTIONS, "")
    errors = dict.fromkeys(DIRECTIONS, (0.0, 0.0))
    for name in NAMES:
        if not torch.equal(found[name], again[name]):
            what = f"{case.name}: {name} differs in its bits between two runs"
            wrong[direction_of(name)] = wrong[direction_of(name)] or what
    device = str(given.q.device)
    for sample, kv_head in places(case):
        heads = range(kv_head * case.group, (kv_head + 1) * case.group)
        of_q = (slice(sample, sample + 1), slice(heads.start, heads.stop))
        of_k = (slice(sample, sample + 1), slice(kv_head, kv_head + 1))
        where = dict(zip(NAMES, (of_q, of_q, of_k, of_k), strict=True))
        stored = rows_of(case, heads, device)
        slices = (given.q[of_q], given.k[of_k], given.v[of_k], stored, given.dout[of_q])
        exact = dense_attention(*slices, causal=case.pattern.causal)
        dense = dense_attention(*slices, causal=case.pattern.causal, dtype=case.dtype)
        for name, e, d in zip(NAMES, exact, dense, strict=True):
            direction = direction_of(name)
            error = relative_error(found[name][where[name]], e)
            dense_error = relative_error(d, e)
            if not error <= errors[direction][0]:
                errors[direction] = (error, dense_error)
            try:
                what = f"{case.name}, {name} of KV head {kv_head}, sample {sample}"
                check_error(what, error, dense_error, case.dtype)
            except WrongResult as difference:
                wrong[direction] = wrong[direction] or str(difference)
    wrong["backward"] = wrong["backward"] or wrong["forward"]
    kernels = {
        "forward": kernel_of(steps, "block_attention"),
        "backward": kernel_of(steps, "block_attention_backward"),
    }
    return Checked(wrong, errors, kernels, found)


def kernel_of(steps: sl.dispatch.Trace, op: str) -> str:
    """The kernels that an op took, once each."""
    return ", ".join(dict.fromkeys(step.kernel for step in steps if step.what == op))
