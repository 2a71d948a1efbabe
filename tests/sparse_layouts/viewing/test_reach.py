"""Reach, kept keys and causality of masks, against dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import sparse_layouts as sl
from sparse_layouts.viewing.causality import is_causal
from sparse_layouts.viewing.reach import influences, kept_keys


def random_masks() -> list[tuple[sl.LayoutTensor, Tensor]]:
    """Layouts of many forms, each with its dense mask."""
    draw = torch.Generator().manual_seed(0)
    found: list[tuple[sl.LayoutTensor, Tensor]] = []
    for case in range(40):
        n, bm, bn = (int(torch.randint(1, most, (), generator=draw)) for most in (60, 14, 14))
        heads = (2,) if case % 2 else ()
        dense = torch.rand(*heads, n, n, generator=draw) < 0.08
        dense = dense.tril() if case % 3 else dense
        found.append((sl.mask_from(dense, (bm, bn)), dense))
        found.append((sl.mask_from(dense, (bm, bn)).mT, dense.mT))
        if not heads:
            found.append((sl.csr(dense.float()), dense))
    return found


def reached(dense: Tensor, token: int, layers: int) -> np.ndarray:
    mixed = (dense.any(0) if dense.dim() == 3 else dense).numpy()
    own = np.zeros(len(mixed), bool)
    own[token] = True
    found = []
    for _ in range(layers):
        own = own | mixed[own].any(0)
        found.append(own)
    return np.stack(found)


def kept(dense: Tensor) -> list[int]:
    """Keys alive at once, counted query by query."""
    found = []
    for head in dense if dense.dim() == 3 else dense[None]:
        readers = [row.nonzero().flatten() for row in head.mT]
        alive = [
            sum(len(q) and min(j, int(q[0])) <= t <= int(q[-1]) for j, q in enumerate(readers))
            for t in range(len(head))
        ]
        found.append(int(max(alive, default=0)))
    return found


def test_reach_is_that_of_the_dense_mask() -> None:
    for layout, dense in random_masks():
        n = len(dense[-1])
        for token in (0, n // 2, n - 1):
            np.testing.assert_array_equal(influences(layout, token, 3), reached(dense, token, 3))


def test_kept_keys_are_those_of_the_dense_mask() -> None:
    for layout, dense in random_masks():
        assert kept_keys(layout) == kept(dense)


def test_causality_is_that_of_the_dense_mask() -> None:
    seen = set()
    for layout, dense in random_masks():
        expected = bool(torch.equal(dense, dense.tril()))
        seen.add(expected)
        assert is_causal(layout) == expected
    assert seen == {True, False}


def test_causality_of_rectangles() -> None:
    for rows, columns in ((20, 50), (50, 20), (33, 34)):
        dense = torch.ones(rows, columns, dtype=torch.bool).tril()
        assert is_causal(sl.mask_from(dense, (8, 5)))
        dense[0, 1] = True
        assert not is_causal(sl.mask_from(dense, (8, 5)))


def test_known_masks() -> None:
    assert kept_keys(sl.causal(300, block_size=32)) == [300]
    assert kept_keys(sl.sink_window(300, block_size=32, window=40, sinks=8)) == [48]
    assert kept_keys(sl.document([0, 100, 300], block_size=32)) == [200]
    bigbird = sl.bigbird(512, block_size=32, num_heads=2)
    assert kept_keys(bigbird) == [512, 512]  # the first query attends to everything
    window = sl.sliding_window(1000, block_size=64, window=100)
    assert influences(window, 999, 3).sum(1).tolist() == [100, 199, 298]


def test_heads_that_share_a_pattern_keep_the_same() -> None:
    mask = sl.local_stride(512, block_size=32, local_blocks=1, vert_stride=2, num_heads=4)
    assert mask.block_pattern.num_patterns == 2
    first, second, *rest = kept_keys(mask)
    assert rest == [first, second]


def test_errors_say_what_was_expected() -> None:
    mask = sl.causal(64, block_size=16)
    with pytest.raises(ValueError, match="a token from 0 to 63, got 64"):
        influences(mask, 64, 1)
    with pytest.raises(ValueError, match="at least 1 layer, got 0"):
        influences(mask, 0, 0)
    with pytest.raises(ValueError, match="square masks, got 32 queries and 64 keys"):
        kept_keys(sl.bsr_mask(torch.ones(2, 4, dtype=torch.bool), 16))
    with pytest.raises(TypeError, match="expected layouts, got Tensor"):
        kept_keys(torch.ones(4, 4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"take one sample: mask\[0\]"):
        kept_keys(sl.document([[0, 7, 30], [0, 30, 30]], block_size=8))
