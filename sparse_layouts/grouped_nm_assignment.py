"""Which choice of rows each column of a grouped n:m matrix gets."""

from __future__ import annotations

import torch
from torch import Tensor

# Entries of the table of magnitudes (chunks x columns x choices) that are looked at together.
STEP_ENTRIES = 2**22


def assign_patterns(dense: Tensor, choices: Tensor, m: int, g: int) -> Tensor:
    """int16 (Mb, S): the columns of every chunk, those with the first choice of rows first.

    dense (M, K), choices (C, n). Pairs of a column and a choice are taken by descending magnitude
    (the sum of the absolute values that the choice keeps) as long as the column has none and the
    choice has fewer than g; among equals the first column, then the first choice. Raises
    `ValueError` for NaN, whose rank is nowhere.
    """
    if bool(dense.isnan().any()):
        raise ValueError("grouped_nm: the matrix has NaN, which has no magnitude")
    rows, cols = dense.shape
    count, chunk = choices.shape[0], choices.shape[0] * g
    blocks, chunks = -(-rows // m), -(-cols // chunk)
    out = torch.empty(blocks, chunks * chunk, dtype=torch.int16, device=dense.device)
    step = max(1, STEP_ENTRIES // max(1, chunks * chunk * count))
    work = torch.promote_types(dense.dtype, torch.float32)
    for first in range(0, blocks, step):
        part = dense[first * m : (first + step) * m].to(work).abs()
        mine = -(-part.shape[0] // m)
        padded = torch.nn.functional.pad(
            part, (0, chunks * chunk - cols, 0, mine * m - part.shape[0])
        )
        by_column = padded.view(mine, m, chunks, chunk).permute(0, 2, 3, 1)
        kept = by_column[..., choices].sum(-1)  # (blocks, chunks, columns, choices)
        order = _order_of_columns(kept.flatten(0, 1), g)
        out[first : first + mine] = order.view(mine, chunks * chunk).to(torch.int16)
    return out


def _order_of_columns(kept: Tensor, g: int) -> Tensor:
    """int64 (T, L): for every chunk its columns, g for each choice; kept (T, L, C).

    Taking pairs by descending magnitude is a stable matching in which both sides rank by the same
    number. So it can be had in a few rounds over all chunks at once: every column asks for its best
    choice that has not refused it, every choice keeps the g best that ask.
    """
    ranked, wish = kept.sort(dim=-1, descending=True, stable=True)
    at = torch.zeros(kept.shape[:2], dtype=torch.long, device=kept.device)
    result = torch.empty_like(at)
    place = torch.arange(kept.shape[1], device=kept.device)
    chunks = torch.arange(kept.shape[0], device=kept.device)
    while chunks.numel():
        asked = wish.gather(-1, at[..., None])[..., 0]
        offer = ranked.gather(-1, at[..., None])[..., 0]
        # by choice, within it by descending offer, within that by column
        best = offer.argsort(dim=-1, descending=True, stable=True)
        order = best.gather(-1, asked.gather(-1, best).argsort(dim=-1, stable=True))
        sorted_choice = asked.gather(-1, order)
        refused = place - torch.searchsorted(sorted_choice, sorted_choice) >= g
        at.scatter_add_(-1, order, refused.long())
        going_on = refused.any(-1)
        result[chunks[~going_on]] = order[~going_on]
        chunks = chunks[going_on]
        ranked, wish, at = ranked[going_on], wish[going_on], at[going_on]
    return result
