"""How wrong a kernel may be: derived, for every call, from what torch loses on the same inputs.

The measuring stick is the op's reference in float64 on the rounded inputs. Two dense computations in torch say what is
lost on the way: `dense_torch`, every step in the inputs' dtype, as dense torch does it, and `accumulated`, every step
in float32 and only the factors of products rounded to the inputs' dtype, as tensor cores want them. A kernel may err at most twice as
much as either of them, and a few eps of its result's dtype.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse_layouts import kernels
from sparse_layouts.block_pattern import BlockPattern, dense_counts
from sparse_layouts.kernels.block_attention.reference import _dense_bias, dropout_keep
from sparse_layouts.kernels.block_matmul.reference import densify
from sparse_layouts.kernels.sddmm.reference import sample
from tests.kernels.cases import Call, stored_entries

EPS_OF_A_RESULT = 4
Results = tuple["Tensor | None", ...]


def reference_of(op: str) -> Callable[..., Any]:
    """The function of the op's name in a `kernels/<folder>/reference.py`."""
    for folder in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        if not folder.ispkg:
            continue
        module = importlib.import_module(f"{folder.name}.reference")
        found = getattr(module, op, None)
        if found is not None and found.__module__ == module.__name__:
            return found
    raise LookupError(f"no kernels/*/reference.py defines {op}")


def as_results(returned: Any) -> Results:
    """What an op returned, as a tuple."""
    return returned if isinstance(returned, tuple) else (returned,)


# --- dense torch, step by step ----------------------------------------------------------------------------------------


class Arithmetic:
    """Products of factors in `dtype`, added up in float32 (float64 for float64); everything else in `work`."""

    def __init__(self, dtype: torch.dtype, work: torch.dtype) -> None:
        self.dtype, self.work = dtype, work
        self.accumulate = torch.promote_types(dtype, torch.float32)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """`a @ b`."""
        a, b = (t.to(self.dtype).to(self.accumulate) for t in (a, b))
        return (a @ b).to(self.work)


def lists_as_heads(pattern: BlockPattern) -> BlockPattern:
    """The pattern with its list sets as leading dimension."""
    return pattern._replace(head_map=None, lead=(pattern.num_patterns,))


def dense_block_matmul(
    a: Arithmetic, values: Tensor, pattern: BlockPattern, x: Tensor, *, transposed_output: bool
) -> Results:
    return (a.product(densify(values, pattern), x).to(x.dtype),)


def dense_sddmm(a: Arithmetic, left: Tensor, right: Tensor, pattern: BlockPattern) -> Results:
    return (sample(a.product(left, right).to(left.dtype), pattern),)


def dense_block_softmax(
    a: Arithmetic, values: Tensor, pattern: BlockPattern, *, log: bool
) -> Results:
    counts = dense_counts(lists_as_heads(pattern))
    scores = densify(values.to(a.work), pattern)
    scores = scores + counts.log().to(a.work)  # -inf where nothing is stored
    out = torch.log_softmax(scores, -1) if log else torch.softmax(scores, -1)
    if log:
        out = out - counts.log().to(a.work)
    out = torch.where(counts == 0, 0.0, out.to(values.dtype))
    return (sample(out if not log else out.nan_to_num(0.0), pattern),)


def dense_block_softmax_backward(
    a: Arithmetic, grad: Tensor, out: Tensor, pattern: BlockPattern, *, log: bool
) -> Results:
    stored = dense_counts(lists_as_heads(pattern)) != 0
    g, o = densify(grad.to(a.work), pattern), densify(out.to(a.work), pattern)
    g = torch.where(stored, g, 0.0)
    if log:
        dx = g - o.exp() * g.sum(-1, keepdim=True)
    else:
        dx = o * (g - (g * o).sum(-1, keepdim=True))
    return (sample(torch.where(stored, dx, 0.0).to(grad.dtype), pattern),)


class DenseAttention:
    """Scores and probabilities of a call of attention, (B, H, Nq, N)."""

    def __init__(
        self,
        a: Arithmetic,
        q: Tensor,
        k: Tensor,
        pattern: BlockPattern,
        head_map: Tensor,
        *,
        scale: float,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
        bias: Tensor | None = None,
        bias_base: Tensor | None = None,
    ) -> None:
        (batch, heads, nq, _), (m, n) = q.shape, pattern.shape
        self.group = heads // k.shape[1]
        self.k = k.repeat_interleave(self.group, 1)
        counts = dense_counts(lists_as_heads(pattern))[head_map.long(), m - nq :]
        self.scores = scale * a.product(q, self.k.mT)
        if bias is not None:
            assert bias_base is not None
            dense_bias = _dense_bias(bias, bias_base, pattern, head_map)
            self.scores = self.scores + dense_bias[:, :, m - nq :].to(a.work)
        self.scores = self.scores + counts.log().to(a.work)
        self.probabilities = torch.softmax(self.scores, -1)
        self.probabilities = torch.where(counts == 0, 0.0, self.probabilities)
        self.keep = torch.ones((), dtype=a.work, device=q.device)
        if dropout_p:
            assert seed is not None
            sizes = ((0, batch), (0, heads), (m - nq, m), (0, n))
            index = torch.meshgrid(
                *(torch.arange(*size, device=q.device) for size in sizes), indexing="ij"
            )
            self.keep = dropout_keep(seed, dropout_p, *index).to(a.work) / (1 - dropout_p)

    def over_groups(self, t: Tensor) -> Tensor:
        """The sum over the query heads that share a KV head."""
        return t.unflatten(1, (-1, self.group)).sum(2)


def dense_block_attention(
    a: Arithmetic,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    head_map: Tensor,
    **options: Any,
) -> Results:
    dense = DenseAttention(a, q, k, pattern, head_map, **options)
    v = v.repeat_interleave(dense.group, 1)
    out = a.product(dense.probabilities * dense.keep, v)
    return out.to(q.dtype), dense.scores.logsumexp(-1).to(a.accumulate)


def dense_block_attention_backward(
    a: Arithmetic,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pattern: BlockPattern,
    head_map: Tensor,
    *,
    scale: float,
    dbias_base: Tensor | None = None,
    dbias_blocks: int = 0,
    **options: Any,
) -> Results:
    dense = DenseAttention(a, q, k, pattern, head_map, scale=scale, **options)
    p, keep = dense.probabilities, dense.keep
    delta = (dout.to(a.work) * out.to(a.work)).sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta - dlse.to(a.work)[..., None]
    dp = a.product(dout, v.repeat_interleave(dense.group, 1).mT)
    ds = p * (keep * dp - delta)
    dq = scale * a.product(ds, dense.k)
    dk = scale * dense.over_groups(a.product(ds.mT, q))
    dv = dense.over_groups(a.product((p * keep).mT, dout))
    dbias = None
    if dbias_base is not None:
        dbias = own_blocks(ds, pattern, head_map, dbias_base, dbias_blocks).to(q.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbias


def own_blocks(
    dense: Tensor, pattern: BlockPattern, head_map: Tensor, base: Tensor, slots: int
) -> Tensor:
    """The stored blocks of (B, H, Nq, N) at slots of their own, (B or 1, slots, bm, bn)."""
    (batch, heads, nq, _), (m, n) = dense.shape, pattern.shape
    (bm, bn), (mb, nb) = pattern.block_size, pattern.grid
    dense = torch.nn.functional.pad(dense, (0, nb * bn - n, m - nq, mb * bm - m))
    blocks = dense.view(batch, heads, mb, bm, nb, bn).transpose(3, 4)
    out = dense.new_zeros(1 if base.shape[0] > 1 else batch, slots, bm, bn)
    for b in range(batch):
        for h in range(heads):
            crow = pattern.crow_indices[head_map[b % head_map.shape[0], h]].long()
            rows = torch.arange(mb, device=crow.device).repeat_interleave(crow.diff())
            columns = pattern.col_indices[crow[0] : crow[-1]].long()
            start = int(base[b % base.shape[0], h])
            out[b % out.shape[0], start : start + len(rows)] = blocks[b, h, rows, columns]
    return out


DENSE = {
    "block_matmul": dense_block_matmul,
    "sddmm": dense_sddmm,
    "block_softmax": dense_block_softmax,
    "block_softmax_backward": dense_block_softmax_backward,
    "block_attention": dense_block_attention,
    "block_attention_backward": dense_block_attention_backward,
}


# --- what is zero by definition ---------------------------------------------------------------------------------------


def zeros_by_definition(op: str, call: Call) -> Results:
    """For every result of an op where it is exactly 0: bool, or None where nothing is known."""
    pattern = call.pattern
    if op == "block_matmul":
        rows = dense_counts(lists_as_heads(pattern)).any(-1)
        return (~rows[None, :, :, None],)
    if op in ("sddmm", "block_softmax", "block_softmax_backward"):
        return (~stored_entries(pattern)[None],)
    q, k, head_map = (*call.args[:2], call.args[4])
    if op == "block_attention_backward":
        q, k, head_map = (*call.args[2:4], call.args[8])
    m, nq = pattern.shape[0], q.shape[2]
    stored = dense_counts(lists_as_heads(pattern))[head_map.long(), m - nq :] != 0
    stored = stored.expand(q.shape[0], -1, -1, -1)
    no_keys = ~stored.any(-1)[..., None]
    if op == "block_attention":
        return no_keys, None
    no_queries = ~stored.any(2).unflatten(1, (k.shape[1], -1)).any(2)[..., None]
    base, slots = call.kwargs.get("dbias_base"), call.kwargs.get("dbias_blocks", 0)
    own = None if base is None else own_blocks(stored.float(), pattern, head_map, base, slots) == 0
    return no_keys, no_queries, no_queries, own


# --- the comparison ---------------------------------------------------------------------------------------------------


def norms(t: Tensor) -> dict[str, float]:
    """The Euclidean norm, which all entries share, and the largest entry, which one wrong entry cannot hide from."""
    if t.numel() == 0:
        return {"norm": 0.0, "largest": 0.0}
    return {"norm": float(t.norm()), "largest": float(t.abs().max())}


def check_result(
    what: str,
    got: Tensor,
    exact: Tensor,
    dense_torch: Tensor,
    accumulated: Tensor,
    zeros: Tensor | None = None,
) -> None:
    """Raises AssertionError unless `got` is as close to `exact` as the two dense computations explain."""
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(exact.shape)}"
    assert got.dtype == accumulated.dtype, f"{what}: {got.dtype}, not {accumulated.dtype}"
    lowest = exact.isneginf()
    wrong = int((got.isneginf() != lowest).sum())
    assert not wrong, f"{what}: -inf is in the wrong place {wrong} times"
    exact, dense_torch, accumulated, computed = (
        t.double().masked_fill(lowest, 0.0) for t in (exact, dense_torch, accumulated, got)
    )
    unfit = int((~computed.isfinite()).sum())
    assert not unfit, f"{what}: {unfit} of {computed.numel()} entries are NaN or infinite"
    if zeros is not None:
        leaks = int((computed.masked_fill(~zeros, 0.0) != 0).sum())
        assert not leaks, f"{what}: {leaks} entries that are 0 by definition are not"
    size, error = norms(exact), norms(computed - exact)
    from_dense, from_accumulated = norms(dense_torch - exact), norms(accumulated - exact)
    for kind, value in error.items():
        explained = 2 * min(from_dense[kind], from_accumulated[kind])
        allowed = explained + EPS_OF_A_RESULT * torch.finfo(got.dtype).eps * size[kind]
        assert value <= allowed, (
            f"{what}: error {value:.2e} ({kind}), allowed {allowed:.2e} = 2 x min(dense torch "
            f"{from_dense[kind]:.2e}, accumulated {from_accumulated[kind]:.2e}) + {EPS_OF_A_RESULT} eps of {size[kind]:.2e}"
        )


def check_call(op: str, call: Call, returned: Any) -> None:
    """Compares what a kernel returned with the op's reference in float64."""
    clean = call.map(lambda t: t.nan_to_num(0.0))  # NaN stands only where nothing may be read
    in_double = clean.map(Tensor.double)
    exact = as_results(reference_of(op)(*in_double.args, **in_double.kwargs))
    got = as_results(returned)
    dtype = next(t.dtype for t in call.tensors if t.is_floating_point())
    dense_torch, accumulated = (
        DENSE[op](Arithmetic(dtype, work), *clean.args, **clean.kwargs)
        for work in (dtype, torch.promote_types(dtype, torch.float32))
    )
    zeros = zeros_by_definition(op, call)
    assert len(got) == len(exact), f"{op}: {len(got)} results, not {len(exact)}"
    for i, result in enumerate(got):
        if exact[i] is None:
            assert result is None, f"{op}: result {i} is a tensor, not None"
            continue
        assert result is not None, f"{op}: result {i} is None"
        check_result(f"{op}, result {i}", result, exact[i], dense_torch[i], accumulated[i], zeros[i])
