"""Who computes a case's attention: this library, cuDNN, FlexAttention, dkernel, FlashAttention-4.

A maker takes the case, the operands, a direction and how many seconds it may try; it returns a
variant. Whatever a rival's maker raises is a note in the row.
"""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import sparse_layouts as sl
from benchmarks import attention_cases as cases
from benchmarks.attention_cases import Case
from benchmarks.timing import attempt, backward_of, forward_of, gpu_times
from sparse_layouts.measuring import synchronize

Maker = Callable[[Case, "Operands", str, float], "Variant"]


class NotInstalled(Exception):
    """A package is not there."""


class Operands(NamedTuple):
    """q, k, v (B, H or Hkv, N, D), which require gradients, and the output's gradient."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is differentiated."""
        return self.q, self.k, self.v


class Variant(NamedTuple):
    """Attention in one way: `attend(*leaves)` is the output, `dout` its gradient.

    `tokens_first`: in (B, N, H, D) rather than (B, H, N, D). `same`: computes the case's pattern
    (its counts apart) and not a dense one. `note`: what was chosen.
    """

    attend: Callable[..., Tensor]
    leaves: tuple[Tensor, ...]
    dout: Tensor
    tokens_first: bool = False
    same: bool = True
    note: str = ""

    def run(self, direction: str) -> Callable[[], Any]:
        """What is timed: the output without a graph, or the gradients on one that is kept."""
        if direction == "forward":
            return forward_of(self.attend, self.leaves)
        return backward_of(self.attend, self.leaves, self.dout)

    def results(self, direction: str) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of one run, in (B, H, N, D)."""
        found = self.run(direction)()
        tensors = (found,) if direction == "forward" else found
        names = ("out",) if direction == "forward" else ("dq", "dk", "dv")
        for name, tensor in zip(names, tensors, strict=True):
            yield name, tensor.detach().transpose(1, 2) if self.tokens_first else tensor.detach()


def operands(case: Case, device: str) -> Operands:
    """Random operands, the same every time on a device."""
    draw = torch.Generator(device=device).manual_seed(0)
    q, k, v, dout = (
        torch.randn(
            (case.batch, heads, case.seq_len, case.head_dim),
            device=device,
            dtype=case.dtype,
            generator=draw,
        )
        for heads in (case.heads, case.keys, case.keys, case.heads)
    )
    return Operands(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout)


def ours(case: Case, given: Operands, mask: sl.BSRTensor) -> Variant:
    """This library, through torch's own function."""

    how = {"enable_gqa": True} if case.group > 1 else {}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **how)

    return Variant(attend, given.leaves, given.dout)


def dense(backend: SDPBackend) -> Maker:
    """torch's dense attention, causal where the pattern is, by one backend."""

    def make(case: Case, given: Operands, direction: str, seconds: float) -> Variant:
        how = {"is_causal": case.pattern.causal, "enable_gqa": case.group > 1}

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, **how)

        same = isinstance(case.pattern, cases.Causal)
        return Variant(attend, given.leaves, given.dout, same=same)

    return make


def dkernel(case: Case, given: Operands, direction: str, seconds: float) -> Variant:
    """https://github.com/linxihui/dkernel, which tunes itself at the first call of a size."""
    if not installed("dkernel"):
        raise NotInstalled("dkernel is not importable")
    from dkernel import LocalStrideSparseAttention

    pattern = case.pattern
    assert isinstance(pattern, cases.LocalStride)
    attend = LocalStrideSparseAttention(
        case.heads,
        case.seq_len,
        case.block,
        pattern.local,
        pattern.stride,
        num_dense_heads=pattern.dense_heads,
        seq_dim=2,
    ).to(given.q.device)
    return Variant(lambda q, k, v: attend(q, k, v), given.leaves, given.dout)


# --- FlexAttention --------------------------------------------------------------------------------


def lists(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Of bool tiles: how many a row has (1, H, rows), and which, first (1, H, rows, columns)."""
    order = (~tiles).to(torch.int8).argsort(dim=-1, stable=True)
    return tiles.sum(-1, dtype=torch.int32)[None], order.int()[None].contiguous()


def block_mask(case: Case, sparse_block: int | tuple[int, int], device: str) -> Any:
    """FlexAttention's BlockMask of the case, from the formula; without its own, slow, builder."""
    from torch.nn.attention.flex_attention import BlockMask

    edges = (sparse_block, sparse_block) if isinstance(sparse_block, int) else sparse_block
    some, full = cases.tiles_of(case, *edges, device)
    entry = case.pattern.entry(case, device)

    def stored(b: Any, h: Any, i: Any, j: Any) -> Any:
        own = entry(h, i, j)
        return own > 0 if own.dtype != torch.bool else own

    return BlockMask.from_kv_blocks(
        *lists(some & ~full), *lists(full), BLOCK_SIZE=edges, mask_mod=stored
    )


def flex_attention(case: Case, given: Operands, direction: str, seconds: float) -> Variant:
    """FlexAttention, compiled, at the fastest of the case's candidates; counts are left out."""
    import torch._dynamo.config
    import torch._functorch.config
    from torch.nn.attention.flex_attention import flex_attention as flex

    torch._functorch.config.donated_buffer = False  # the graph is retained
    torch._dynamo.config.recompile_limit = 64  # every candidate is one
    masks: dict[Any, Any] = {}

    def candidate(edges: Any, options: dict[str, Any] | None) -> Variant:
        if edges not in masks:
            masks[edges] = block_mask(case, edges, str(given.q.device))
        compiled, mask, grouped = torch.compile(flex, dynamic=False), masks[edges], case.group > 1

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return compiled(
                q,
                k,
                v,
                block_mask=mask,
                enable_gqa=grouped,
                kernel_options=options,
            )

        note = f"block {edges}" + (f" {options}" if options else "")
        return Variant(attend, given.leaves, given.dout, note=note)

    order = list(case.flex)
    if direction == "backward":  # where smaller blocks than 128 mostly do not compile
        order.sort(key=lambda each: each[0] != 128)
    candidates = [functools.partial(candidate, *each) for each in order]
    return fastest(candidates, direction, time.monotonic() + seconds)


def fastest(candidates: Sequence[Callable[[], Variant]], direction: str, until: float) -> Variant:
    """The candidate that is the fastest in one direction; its note says what became of the others.

    After `until` (of `time.monotonic`) no further one is tried, once one has run. Raises
    `RuntimeError` if none runs.
    """
    best: tuple[float, Variant] | None = None
    failures: list[str] = []
    tried = 0
    for make in candidates:
        if best is not None and time.monotonic() > until:
            break
        tried += 1
        failed, found = attempt(lambda make=make: timed(make(), direction))
        if failed:
            failures.append(failed)
        elif best is None or found[0] < best[0]:
            best = found
    if best is None:
        raise RuntimeError("no candidate runs: " + "; ".join(dict.fromkeys(failures)))
    note = f"{best[1].note}, the fastest of {tried - len(failures)}"
    if tried < len(candidates):
        note += f", {len(candidates) - tried} not tried"
    for failed in dict.fromkeys(failures):
        note += f"; {failures.count(failed)} failed: {failed}"
    return best[1]._replace(note=note)


def timed(variant: Variant, direction: str) -> tuple[float, Variant]:
    """Seconds of a quick look, with the variant."""
    run = variant.run(direction)
    run()
    synchronize(variant.dout.device)
    return gpu_times({"": run}, rounds=1, rep_ms=15)[""].median_s, variant


# --- FlashAttention-4 -----------------------------------------------------------------------------


def flash_attention_4(case: Case, given: Operands, direction: str, seconds: float) -> Variant:
    """FlashAttention-4 (`flash_attn.cute`): its own causal mask or window, else block-sparse, whose
    tiles are the case's blocks; counts are left out.
    """
    if not installed("flash_attn.cute"):
        raise NotInstalled("flash_attn.cute is not importable")
    from flash_attn.cute.interface import flash_attn_func

    pattern = case.pattern
    if isinstance(pattern, cases.Causal):
        how: dict[str, Any] = {"causal": True}
    elif isinstance(pattern, cases.Window):
        how = {"causal": True, "window_size": (pattern.window - 1, 0)}
    else:
        how = block_sparse(case, str(given.q.device))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_func(q, k, v, **how)[0]

    swapped = tuple(t.detach().transpose(1, 2).contiguous().requires_grad_() for t in given.leaves)
    dout = given.dout.transpose(1, 2).contiguous()
    return Variant(attend, swapped, dout, tokens_first=True)


def block_sparse(case: Case, device: str) -> dict[str, Any]:
    """FlashAttention-4's arguments for whole blocks, causal in those on the diagonal."""
    import cutlass.cute as cute
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    @cute.jit
    def causal(batch, head, query, key, seqlen_info, aux):  # type: ignore[no-untyped-def]
        return key <= query

    some, full = diagonal_tiles(case, device)
    partial = some & ~full

    def tensors(partial: Tensor, full: Tensor) -> Any:
        (some_count, some_index), (full_count, full_index) = lists(partial), lists(full)
        return BlockSparseTensorsTorch(
            mask_block_cnt=some_count,
            mask_block_idx=some_index,
            full_block_cnt=full_count,
            full_block_idx=full_index,
            block_size=(case.block, case.block),
        )

    return {
        "mask_mod": causal if bool(partial.any()) else None,
        "block_sparse_tensors": tensors(partial, full),
        "block_sparse_tensors_bwd": tensors(partial.mT, full.mT),
    }


def diagonal_tiles(case: Case, device: str) -> tuple[Tensor, Tensor]:
    """`cases.tiles_of` the case's blocks; raises `ValueError` where a block is cut by anything but
    the diagonal, the one mask that `block_sparse` has.
    """
    some, full = cases.tiles_of(case, case.block, case.block, device)
    i = torch.arange(some.shape[-1], device=device)
    if not case.pattern.causal:
        cut = some & ~full
    else:
        cut = (some & ~full) & (i[:, None] != i)
    if bool(cut.any()):
        raise ValueError(f"{case.name}: blocks are cut by more than the diagonal")
    return some, full


def installed(name: str) -> bool:
    """Whether a module could be imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of its parent
        return False


RIVALS: dict[str, Maker] = {
    cases.CUDNN: dense(SDPBackend.CUDNN_ATTENTION),
    cases.FLASH2: dense(SDPBackend.FLASH_ATTENTION),
    cases.FLEX: flex_attention,
    cases.DKERNEL: dkernel,
    cases.FLASH4: flash_attention_4,
}
