"""Whether a case's product is right: against float64, with its gradients, the same bits twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sparse_layouts as sl
from benchmarks import matmul_cases as cases
from benchmarks.matmul_cases import Case
from benchmarks.matmul_variants import Operands, product
from benchmarks.timing import WrongResult, check_error
from sparse_layouts.measuring import relative_error


class Checked(NamedTuple):
    """The result, dense; its error and dense torch's, the same of each gradient, and the kernels
    that ran.
    """

    result: Tensor
    error: float
    dense_error: float
    gradients: dict[str, tuple[float, float]]
    kernel: str
    backward_kernel: str


def check(case: Case, given: Operands) -> Checked:
    """Compares the result, without a graph and with one, and the gradients to W's stored entries
    and to the dense operands with float64, by relative norm.

    Raises :class:`WrongResult` if one is wrong or differs in its bits between two runs, and
    `sl.DenseFallbackError` where no kernel takes the case.
    """
    with sl.fallback("error"):
        with sl.trace() as forward:
            out = dense_form(product(case.kind, given.layout, given.others))
        with sl.trace() as both:
            found = results_of(case, given.layout, given.others)
        again = results_of(case, given.layout, given.others)
    for name, tensor in found.items():
        if not torch.equal(tensor, again.pop(name)):
            raise WrongResult(f"{case.name}: {name} differs in its bits between two runs")
    exact = results_of(case, given.dense.double(), [t.double() for t in given.others], given)
    plain = results_of(case, given.dense, given.others, given)

    def errors(name: str, tensor: Tensor) -> tuple[float, float]:
        pair = relative_error(tensor, exact[name]), relative_error(plain[name], exact[name])
        check_error(f"{case.name}, {name}", *pair, case.dtype, tf32=case.tf32)
        return pair

    error, dense_error = errors("out", out)
    gradients = {name: errors(name, tensor) for name, tensor in found.items()}
    del gradients["out"]
    names = kernels_of(list(forward)), kernels_of(list(both)[len(forward) :])
    return Checked(out, error, dense_error, gradients, *names)


def results_of(
    case: Case, w: Any, others: Sequence[Tensor], given: Operands | None = None
) -> dict[str, Tensor]:
    """The result and the gradients, dense, for a random gradient of the result. Of a dense `w` the
    part that `given` stores.
    """
    stored = None if given is None else given.layout.pattern.to_dense()
    sampled = case.kind == cases.SDD
    leaves = [t.detach().requires_grad_() for t in others]
    names = ["da", "db"] if sampled else ["dx"]
    if sampled:
        out = product(case.kind, w, leaves)
    else:
        leaves.append(w.detach().requires_grad_())
        names.append("dw")
        out = product(case.kind, leaves[-1], leaves[:-1])
    out = dense_form(out)
    if sampled and stored is not None:
        out = out * stored
    draw = torch.Generator(device=out.device).manual_seed(1)
    dout = torch.randn(out.shape, device=out.device, dtype=case.dtype, generator=draw)
    gradients = torch.autograd.grad(out, leaves, dout.to(out.dtype))
    found = dict(zip(names, map(dense_form, gradients), strict=True))
    if "dw" in found and stored is not None:
        found["dw"] = found["dw"] * stored
    return {"out": out.detach(), **found}


def dense_form(t: Any) -> Tensor:
    """A layout's dense form; another tensor as it is."""
    return t.to_dense() if isinstance(t, sl.LayoutTensor) else t


def kernels_of(steps: Sequence[Any]) -> str:
    """ "block_matmul triton, sddmm triton": the kernels that ops took, once each."""
    return ", ".join(dict.fromkeys(f"{step.what} {step.kernel}" for step in steps))
