"""`sl.compare`: its numbers, its table, its pictures, its errors."""

from __future__ import annotations

import pytest
import torch

import sparse_layouts as sl

N = 512
MASKS = {
    "causal": lambda: sl.causal(N, block_size=32),
    "window": lambda: sl.sliding_window(N, block_size=32, window=64),
    "two heads": lambda: sl.local_stride(
        N, block_size=32, local_blocks=1, vert_stride=4, num_heads=2
    ),
    "bigbird": lambda: sl.bigbird(N, block_size=32, source="hf-eval"),
    "csr": lambda: sl.csr(torch.eye(N)).pattern,
}


@pytest.fixture(scope="module")
def compared() -> sl.viewing.comparison.MaskComparison:
    return sl.compare({name: make() for name, make in MASKS.items()}, layers=3)


def test_numbers(compared: sl.viewing.comparison.MaskComparison) -> None:
    assert [row.name for row in compared] == list(MASKS)
    assert len(compared) == len(MASKS)
    window = compared["window"]
    assert window.density == pytest.approx(MASKS["window"]().density)
    assert window.reach == [64 / N, 127 / N, 190 / N]
    assert window.kept == [64]
    assert window.cache_bytes == 2 * 128 * 2 * 64
    assert compared["causal"].density_of_causal == 1
    assert compared["bigbird"].density_of_causal is None
    assert len(compared["two heads"].kept) == 2
    assert compared["csr"].reach == [1 / N] * 3
    with pytest.raises(KeyError, match="no mask 'x'; there are causal, window"):
        compared["x"]


def test_reach_of_another_token_counts_the_tokens_up_to_it() -> None:
    found = sl.compare([sl.sliding_window(N, block_size=32, window=64)], token=99, layers=1)
    assert found.rows[0].reach == [0.64]
    assert "token 99" in repr(found)


def test_text_fits_a_terminal_and_says_everything(
    compared: sl.viewing.comparison.MaskComparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    for width in (80, 160):
        monkeypatch.setenv("COLUMNS", str(width))
        assert max(map(len, repr(compared).splitlines())) <= width
    for part in ("two heads", "12% 25% 37%", "32.0 KiB", "of 128 entries in bfloat16"):
        assert part in repr(compared)


def test_html_has_a_picture_of_each_and_is_escaped() -> None:
    shown = sl.compare({"<b>": sl.causal(N, block_size=32)})._repr_html_()
    assert shown.count("<svg") == 1
    assert "<b>" not in shown.replace("<b></b>", "")
    assert "&lt;b&gt;" in shown


def test_many_masks_stay_small() -> None:
    masks = [sl.bsr_mask(torch.rand(64, 64) < 0.5, 16) for _ in range(6)]
    assert len(sl.compare(masks)._repr_html_()) < 50_000


def test_names_of_a_list_are_told_apart() -> None:
    found = sl.compare([sl.causal(64, block_size=16), sl.causal(64, block_size=32)])
    assert [row.name for row in found] == ["0: BSRTensor block 16", "1: BSRTensor block 32"]


def test_errors_say_what_was_expected() -> None:
    mask = sl.causal(64, block_size=16)
    with pytest.raises(ValueError, match="at least one mask, got none"):
        sl.compare([])
    with pytest.raises(TypeError, match="several masks by name or in a list, got one"):
        sl.compare(mask)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected layouts, got Tensor"):
        sl.compare({"dense": torch.ones(4, 4)})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="a token from 0 to 63 in causal, got 64"):
        sl.compare({"causal": mask}, token=64)
    with pytest.raises(ValueError, match="at least 1 layer, got 0"):
        sl.compare([mask], layers=0)
    with pytest.raises(ValueError, match="head_dim of at least 1, got 0"):
        sl.compare([mask], head_dim=0)
