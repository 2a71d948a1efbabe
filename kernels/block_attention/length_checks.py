"""What the lengths of sequences must be, as attention's caller gives them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_layouts.kernels.block_attention.sequences import Sequences
from sparse_layouts.layout_tensor import LayoutTensor


class Lengths(NamedTuple):
    """Where sequences lie, as arguments of `sl.attention`: at least one; None is not given."""

    cu_seqlens_q: Any = None
    cu_seqlens_k: Any = None
    q_lens: Any = None
    kv_lens: Any = None
    kv_starts: Any = None

    @property
    def given(self) -> list[str]:
        """The names of those that are not None."""
        return [name for name, t in zip(self._fields, self, strict=True) if t is not None]

    @property
    def packed(self) -> bool:
        """Whether they are of packed operands."""
        return self.cu_seqlens_q is not None or self.cu_seqlens_k is not None


def lengths_of(*arguments: Any) -> Lengths | None:
    """The arguments in the order of `Lengths`; None where none is given: the plain batch."""
    return None if all(t is None for t in arguments) else Lengths(*arguments)


def check_kinds(what: str, lengths: Lengths) -> None:
    """Raises `TypeError` or `ValueError` for lengths that are wrong whatever the operands are."""
    given = lengths.given
    if lengths.packed and any(t is not None for t in lengths[2:]):
        raise ValueError(
            f"{what}: expected cu_seqlens_q and cu_seqlens_k (packed sequences) or q_lens, "
            f"kv_lens, kv_starts (a padded batch), got {', '.join(given)}; packed sequences have "
            f"no padding: leave out one kind"
        )
    if lengths.packed and len(given) == 1:
        other = "cu_seqlens_k" if given[0] == "cu_seqlens_q" else "cu_seqlens_q"
        raise ValueError(
            f"{what}: expected cu_seqlens_q and cu_seqlens_k, got {given[0]} alone; for "
            f"self-attention pass {other}={given[0]}"
        )
    for name in given:
        t = getattr(lengths, name)
        if not isinstance(t, Tensor) or isinstance(t, LayoutTensor):
            raise TypeError(
                f"{what}: {name} is an int32 or int64 tensor, got {type(t).__name__}; "
                f"torch.tensor({name}, dtype=torch.int32, device=q.device) makes one"
            )
        if t.dtype not in (torch.int32, torch.int64):
            raise TypeError(
                f"{what}: {name} is an int32 or int64 tensor, got {t.dtype}; convert with "
                f"{name}.to(torch.int32)"
            )
        if lengths.packed and (t.dim() != 1 or t.shape[0] == 0):
            raise ValueError(
                f"{what}: {name} is (B + 1,) for B sequences, got shape {tuple(t.shape)}; of their "
                f"lengths (B,) it is torch.nn.functional.pad(lengths.cumsum(0), (1, 0))"
            )
    q, k = lengths[:2]
    if lengths.packed and q.shape != k.shape:
        raise ValueError(
            f"{what}: expected cu_seqlens_q and cu_seqlens_k of the same sequences, got shapes "
            f"{tuple(q.shape)} and {tuple(k.shape)}; a sequence without queries or keys has length "
            f"0 in one of them"
        )


def check_places(what: str, lengths: Lengths, device: torch.device, batch: int) -> None:
    """Raises `ValueError` for lengths on another device or, of a padded batch, of another size."""
    for name in lengths.given:
        t = getattr(lengths, name)
        if t.device != device:
            raise ValueError(
                f"{what}: {name} is on {t.device}, q on {device}; move it once, outside of the "
                f"step, with {name}.to({str(device)!r})"
            )
        if not lengths.packed and tuple(t.shape) != (batch,):
            raise ValueError(
                f"{what}: expected {name} of shape ({batch},), a number for each sample, got "
                f"{tuple(t.shape)}; one number for all is torch.full(({batch},), number)"
            )


def check_values(
    what: str, sequences: Sequences, q_rows: int, k_rows: int, mask: tuple[int, int]
) -> None:
    """Raises `ValueError` where sequences on the CPU are not in the tensors or not in the mask.

    On a GPU nobody looks: lengths are clamped there.
    """
    if sequences.packed:
        _check_cumulative(what, "q", sequences.q_starts, sequences.q_lens, q_rows)
        _check_cumulative(what, "k", sequences.k_starts, sequences.k_lens, k_rows)
    else:
        starts = sequences.k_starts
        first = [0] * sequences.num_sequences if starts is None else starts.tolist()
        _check_range(
            what, "q_lens", sequences.q_lens.tolist(), [q_rows] * sequences.num_sequences, "q"
        )
        _check_range(what, "kv_starts", first, [k_rows] * sequences.num_sequences, "k")
        rest = [k_rows - start for start in first]
        _check_range(what, "kv_lens", sequences.k_lens.tolist(), rest, "k from there on")
    longest = max(sequences.k_lens.tolist(), default=0)
    if longest > min(mask):
        raise ValueError(
            f"{what}: expected a mask that is at least as long as the longest sequence, got "
            f"{tuple(mask)} for one of {longest} keys; build it for {longest} or more"
        )


def _check_cumulative(
    what: str, which: str, starts: Tensor | None, lens: Tensor, rows: int
) -> None:
    assert starts is not None
    name = f"cu_seqlens_{which}"
    begin, length = starts.tolist(), lens.tolist()
    if not begin:
        return
    ends = [start + n for start, n in zip(begin, length, strict=True)]
    if begin[0] != 0:
        raise ValueError(
            f"{what}: {name} begins at 0, got {begin[0]}; torch.nn.functional.pad("
            f"lengths.cumsum(0), (1, 0)) makes it of lengths"
        )
    for start, end in zip(begin, ends, strict=True):
        if end < start:
            raise ValueError(
                f"{what}: {name} must not decrease, got {end} after {start}; it holds where "
                f"sequences end, not how long they are: torch.nn.functional.pad("
                f"lengths.cumsum(0), (1, 0))"
            )
    if ends[-1] > rows:
        raise ValueError(
            f"{what}: {name} ends at {rows}, the rows of {which}, or before, got {ends[-1]}; leave "
            f"out what is not there"
        )


def _check_range(what: str, name: str, got: list[int], most: list[int], rows: str) -> None:
    for b, (number, limit) in enumerate(zip(got, most, strict=True)):
        if not 0 <= number <= limit:
            raise ValueError(
                f"{what}: expected {name} from 0 to {limit}, the rows of {rows}, got {number} for "
                f"sample {b}; clamp it"
            )
