"""How wrong a kernel may be: derived, for every call, from what torch loses on the same inputs.

The measuring stick is the op's reference in float64 on the rounded inputs. Two dense computations
in torch say what is lost on the way: `dense_torch`, every step in the inputs' dtype, as dense torch
does it, and `accumulated`, every step in float32 and only the factors of products rounded to the
inputs' dtype, as tensor cores want them. A kernel may err at most twice as much as either of them,
and a few eps of the dtype in which it adds up.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse_layouts import kernels
from sparse_layouts.block_pattern import BlockPattern, dense_counts
from sparse_layouts.kernels.activations import finish
from sparse_layouts.kernels.block_attention.reference import _dense_bias, dropout_keep
from sparse_layouts.kernels.block_attention.sequences import Sequences
from sparse_layouts.kernels.block_matmul.reference import densify
from sparse_layouts.kernels.sddmm.reference import sample
from tests.kernels.cases import Call, stored_entries
from tests.kernels.ops import dense_of, exported
from tests.kernels.sequence_calls import backward_alone, forward_alone

# By norm, and for the largest entry, which varies more than a norm does: times what torch loses.
FACTORS = {"norm": 2, "largest": 4}
# The order of a sum is the kernel's own; it is made in float32 at least.
EPS_OF_ACCUMULATION = 4
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


# --- dense torch, step by step --------------------------------------------------------------------


class Arithmetic:
    """Products of factors in `dtype`, added up in float32 (float64 for float64); everything else in
    `work`.
    """

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
    a: Arithmetic,
    values: Tensor,
    pattern: BlockPattern,
    x: Tensor,
    *,
    transposed_output: bool,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Results:
    return (finish(a.product(densify(values, pattern), x), bias, activation).to(x.dtype),)


def dense_sddmm(a: Arithmetic, left: Tensor, right: Tensor, pattern: BlockPattern) -> Results:
    return (sample(a.product(left, right).to(left.dtype), pattern),)


def dense_block_softmax(
    a: Arithmetic, values: Tensor, pattern: BlockPattern, *, log: bool
) -> Results:
    counts = dense_counts(lists_as_heads(pattern))
    scores = densify(values.to(a.work), pattern)
    scores = scores + counts.to(a.work).log()  # -inf where nothing is stored
    out = torch.log_softmax(scores, -1) if log else torch.softmax(scores, -1)
    return (sample(torch.where(counts == 0, 0.0, out).to(values.dtype), pattern),)


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
    """Scores and probabilities of a call of attention, (B, H, Nq, N); backward has them from the
    forward's logsumexp.
    """

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
        lse: Tensor | None = None,
        first_sample: int = 0,
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
        self.scores = self.scores + counts.to(a.work).log()
        self.lse = self.scores.logsumexp(-1).to(a.accumulate) if lse is None else lse
        log_p = self.scores.to(a.accumulate) - self.lse[..., None]
        self.probabilities = torch.where(counts == 0, 0.0, log_p.exp()).to(a.work)
        self.keep = torch.ones((), dtype=a.work, device=q.device)
        if dropout_p:
            assert seed is not None
            samples = (first_sample, first_sample + batch)
            sizes = (samples, (0, heads), (m - nq, m), (0, n))
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
    *,
    sequences: Sequences | None = None,
    **options: Any,
) -> Results:
    if sequences is not None:
        out = q.new_zeros(*q.shape[:3], v.shape[3])
        lse = torch.full(q.shape[:3], -torch.inf, dtype=a.accumulate, device=q.device)
        alone = functools.partial(dense_block_attention, a)
        operands = (q, k, v, pattern, head_map)
        return forward_alone(alone, (out, lse), *operands, sequences=sequences, **options)
    dense = DenseAttention(a, q, k, pattern, head_map, **options)
    v = v.repeat_interleave(dense.group, 1)
    out = a.product(dense.probabilities * dense.keep, v)
    return out.to(q.dtype), dense.lse


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
    sequences: Sequences | None = None,
    **options: Any,
) -> Results:
    if sequences is not None:
        operands = (dout, dlse, q, k, v, out, lse, pattern, head_map)
        options |= {"sequences": sequences, "dbias_base": dbias_base, "dbias_blocks": dbias_blocks}
        dbias = None
        if dbias_base is not None:
            samples = 1 if dbias_base.shape[0] > 1 else sequences.num_sequences
            dbias = q.new_zeros(samples, dbias_blocks, *pattern.block_size)
        whole = (*(torch.zeros_like(x) for x in (q, k, v)), dbias)
        alone = functools.partial(dense_block_attention_backward, a, scale=scale)
        return backward_alone(alone, whole, *operands, **options)
    dense = DenseAttention(a, q, k, pattern, head_map, scale=scale, lse=lse, **options)
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


# --- what is zero by definition -------------------------------------------------------------------


def zeros_by_definition(op: str, call: Call) -> Results:
    """For every result of an op where it is exactly 0: bool, or None where nothing is known."""
    if op not in DENSE:
        own = exported("ZEROS", op)
        count = len(exact_results(op, call)) if own is None else 0
        return (None,) * count if own is None else own(call)
    pattern = call.pattern
    if op == "block_matmul":
        if call.kwargs.get("bias") is not None:
            return (None,)
        rows = dense_counts(lists_as_heads(pattern)).any(-1)
        return (~rows[None, :, :, None],)
    if op in ("sddmm", "block_softmax", "block_softmax_backward"):
        return (~stored_entries(pattern)[None],)
    q, k, head_map = (*call.args[:2], call.args[4])
    if op == "block_attention_backward":
        q, k, head_map = (*call.args[2:4], call.args[8])
    if call.kwargs.get("sequences") is not None:
        return zeros_of_sequences(op, call, q, k)
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


def zeros_of_sequences(op: str, call: Call, q: Tensor, k: Tensor) -> Results:
    """`zeros_by_definition` of every sequence; elsewhere everything is 0."""

    def alone(*args: Any, **kwargs: Any) -> Results:
        return zeros_by_definition(op, Call(args, kwargs))

    def everywhere(*shape: int) -> Tensor:
        return torch.ones(*shape, dtype=torch.bool, device=q.device)

    of_rows, of_keys = everywhere(*q.shape[:3], 1), everywhere(*k.shape[:3], 1)
    if op == "block_attention":
        return forward_alone(alone, (of_rows, None), *call.args, **call.kwargs)
    base, dbias = call.kwargs.get("dbias_base"), None
    if base is not None:
        samples = 1 if base.shape[0] > 1 else call.kwargs["sequences"].num_sequences
        dbias = everywhere(samples, call.kwargs["dbias_blocks"], *call.pattern.block_size)
    whole = (of_rows, of_keys, of_keys.clone(), dbias)
    return backward_alone(alone, whole, *call.args, **call.kwargs)


# --- the comparison -------------------------------------------------------------------------------


def norms(t: Tensor) -> dict[str, float]:
    """The Euclidean norm, which all entries share, and the largest entry, which one wrong entry
    cannot hide from.
    """
    if t.numel() == 0:
        return {"norm": 0.0, "largest": 0.0}
    return {"norm": float(t.norm()), "largest": float(t.abs().max())}


def lost_by_torch(op: str, call: Call) -> list[dict[str, float] | None]:
    """For every result the smaller error of the two dense computations, by norm and by largest
    entry.

    In float64 nothing better is there to compare with: then it is what float32 loses, scaled to
    float64's eps, and what the reference, which errs there too, loses beside it.
    """
    if call.dtype == torch.float64:
        call = call.map(Tensor.float)
        unit = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        own = errors_of(reference_of(op)(*call.args, **call.kwargs), exact_results(op, call))
        return [
            a and b and {kind: unit * (a[kind] + b[kind]) for kind in FACTORS}
            for a, b in zip(lost_by_torch(op, call), own, strict=True)
        ]
    exact = exact_results(op, call)
    of_dtype, of_float32 = (
        errors_of(dense_of(op)(Arithmetic(call.dtype, work), *call.args, **call.kwargs), exact)
        for work in (call.dtype, torch.float32)
    )
    return [
        a and b and {kind: min(a[kind], b[kind]) for kind in FACTORS}
        for a, b in zip(of_dtype, of_float32, strict=True)
    ]


def errors_of(returned: Any, exact: Results) -> list[dict[str, float] | None]:
    """The norms of every result's error; None where the op returns None."""
    return [
        None if a is None or b is None else norms(finite(a.double()) - finite(b))
        for a, b in zip(as_results(returned), exact, strict=True)
    ]


def exact_results(op: str, call: Call) -> Results:
    """The op's reference in float64."""
    call = call.map(Tensor.double)
    return as_results(reference_of(op)(*call.args, **call.kwargs))


def without_nan(t: Tensor) -> Tensor:
    """0 in place of NaN."""
    if t.element_size() == 1:  # torch has no such function in 8 bits
        return t.float().nan_to_num(0.0).to(t.dtype)
    return t.nan_to_num(0.0)


def finite(t: Tensor) -> Tensor:
    """0 in place of the -inf that is the logsumexp of an empty row."""
    return t.masked_fill(t.isneginf(), 0.0)


def check_result(
    what: str, got: Tensor, exact: Tensor, lost: dict[str, float], zeros: Tensor | None = None
) -> None:
    """Raises AssertionError unless `got` is as close to `exact` as torch's own losses allow."""
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(exact.shape)}"
    wrong = int((got.isneginf() != exact.isneginf()).sum())
    assert not wrong, f"{what}: -inf is in the wrong place {wrong} times"
    computed, exact = finite(got.double()), finite(exact)
    unfit = int((~computed.isfinite()).sum())
    assert not unfit, f"{what}: {unfit} of {computed.numel()} entries are NaN or infinite"
    if zeros is not None:
        leaks = int((computed.masked_fill(~zeros, 0.0) != 0).sum())
        assert not leaks, f"{what}: {leaks} entries that are 0 by definition are not"
    size, error = norms(exact), norms(computed - exact)
    accumulator = torch.promote_types(got.dtype, torch.float32)
    for kind, factor in FACTORS.items():
        rounding = EPS_OF_ACCUMULATION * torch.finfo(accumulator).eps * size[kind]
        allowed = factor * lost[kind] + rounding
        assert error[kind] <= allowed, (
            f"{what}: error {error[kind]:.2e} ({kind}), allowed {allowed:.2e} = "
            f"{factor} x {lost[kind]:.2e} (dense torch) + {rounding:.2e}"
        )


class Measure:
    """What one call's results are compared with; made once, it judges any number of them."""

    def __init__(self, op: str, call: Call) -> None:
        call = call.map(without_nan)  # NaN stands only where nothing may be read
        self.op, self.dtype = op, call.dtype
        self.exact, self.lost = exact_results(op, call), lost_by_torch(op, call)
        self.zeros = zeros_by_definition(op, call)

    def check(self, returned: Any) -> None:
        """Raises AssertionError for results that are further off than torch's losses explain."""
        op, got = self.op, as_results(returned)
        assert len(got) == len(self.exact), f"{op}: {len(got)} results, not {len(self.exact)}"
        for i, result in enumerate(got):
            what, exact, lost = f"{op}, result {i}", self.exact[i], self.lost[i]
            if exact is None or lost is None:
                assert result is None, f"{what}: a tensor, not None"
                continue
            assert result is not None, f"{what}: None"
            is_lse = op in ("block_attention", "block_attention_fp8") and i == 1
            dtype = torch.promote_types(self.dtype, torch.float32) if is_lse else self.dtype
            assert result.dtype == dtype, f"{what}: {result.dtype}, not {dtype}"
            check_result(what, result, exact, lost, self.zeros[i])


def check_call(op: str, call: Call, returned: Any) -> None:
    """Compares what a kernel returned with the op's reference in float64."""
    Measure(op, call).check(returned)
