"""The demo: its inputs are what it says, its numbers are honest, its report is one safe page."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch
import torch.nn.functional as F

import sparse_layouts as sl
from sparse_layouts.command_line import demo, demo_report
from sparse_layouts.command_line.demo import Comparison, Result
from sparse_layouts.measuring import (
    Timing,
    dense_attention,
    interleaved,
    relative_error,
)


@pytest.fixture(scope="module")
def result() -> Result:
    return demo.run("cpu", quick=True)


def test_text_is_real_and_long_enough() -> None:
    text = demo.read_text()
    assert len(text.encode("utf-8")) > 8192
    assert "statement" in text


def test_co_occurrence_counts_neighbours() -> None:
    counts, words = demo.co_occurrence("b a b. A c; b A")
    assert words == ["b", "a", "c"]
    assert counts.shape == (16, 16)
    expected = torch.zeros(16, 16)
    expected[:3, :3] = torch.tensor([[0.0, 4, 1], [4, 0, 1], [1, 1, 0]])
    assert torch.equal(counts, expected)


def test_co_occurrence_of_the_most_frequent_words_leaves_out_the_others() -> None:
    counts, words = demo.co_occurrence("a x a b a b", most_words=2)
    assert words == ["a", "b"]
    assert counts[0, 0] == 0  # a and a stand beside x, not beside each other
    assert counts[0, 1] == counts[1, 0] == 3


def test_the_co_occurrence_matrix_of_the_text_is_large_and_sparse() -> None:
    counts, words = demo.co_occurrence(demo.read_text())
    assert len(words) > 2000
    assert counts.shape[0] % demo.BLOCK_OF_WORDS == 0
    assert torch.equal(counts, counts.T)
    assert float((counts != 0).double().mean()) < 0.02


def test_errors_are_those_of_the_dtype(result: Result) -> None:
    for part in result.parts:
        for each in part.errors:
            assert 0 < each.dense < 1e-5, each
            assert each.sparse <= 4 * each.dense, each
    assert [e.what for e in result.parts[1].errors] == [
        "output",
        "gradient of q",
        "gradient of k",
        "gradient of v",
    ]


def test_a_wrong_kernel_shows_in_the_errors() -> None:
    @sl.kernel("block_matmul", name="wrong")
    def wrong(values, pattern, x, *, transposed_output=False):  # type: ignore[no-untyped-def]
        return x.new_zeros(*x.shape[:2], pattern.shape[0], x.shape[-1])

    try:
        part = demo.matmul_part(demo.read_text(), "cpu", lambda stage: None, True)
    finally:
        wrong.unregister()
    assert part.errors[0].sparse == pytest.approx(1.0)
    assert part.explanation.kernel == "wrong"


def test_shares_and_bytes_add_up(result: Result) -> None:
    matmul, attention = result.parts
    assert matmul.density == pytest.approx(demo.KEPT_BLOCKS, abs=0.01)
    mass = matmul.facts["share of the matrix's mass in the kept blocks"]
    assert matmul.density < mass < 1  # the heaviest blocks hold more than their share
    lost = matmul.facts["what dropping the other blocks changes in the product"]
    assert 0 < lost < 1
    sizes = list(matmul.memory_bytes.values())
    assert sizes[0] < sizes[1]
    assert attention.density_of_causal is not None
    assert attention.density < attention.density_of_causal < 1


def test_numbers_are_json(result: Result) -> None:
    found = json.loads(json.dumps(result.as_json()))
    assert found["matmul"]["kernel"] == found["attention"]["kernel"] == "cpu"
    times = found["attention"]["times"]
    assert [t["what"] for t in times] == ["forward", "forward and backward"]
    for each in times:
        ratio = each["dense"]["median_s"] / each["sparse"]["median_s"]
        assert each["dense_over_sparse"] == pytest.approx(ratio)


def test_both_ways_of_a_comparison_are_said() -> None:
    fast, slow = Timing(0.1, 0.1, 0.1, 3), Timing(0.2, 0.2, 0.2, 3)
    assert demo_report.verdict(Comparison("x", fast, slow).ratio) == "2.00x faster"
    assert demo_report.verdict(Comparison("x", slow, fast).ratio) == "2.00x slower"


@pytest.mark.parametrize(
    ("median", "text"),
    [(1.5, "1.5 s (1.4-1.6)"), (0.0015, "1.5 ms (1.4-1.6)"), (1.5e-6, "1.5 us (1.4-1.6)")],
)
def test_times_have_units(median: float, text: str) -> None:
    timing = Timing(median, median * 1.4 / 1.5, median * 1.6 / 1.5, 5)
    assert demo_report.seconds(timing) == text


class Page(HTMLParser):
    """The tags of a page, and whether they nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag != "meta":
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)


def test_report_is_one_page_that_loads_nothing(result: Result) -> None:
    page = Page(demo_report.as_html(result))
    assert not page.open
    assert page.tags.count("svg") == 2
    assert page.tags.count("table") >= 8
    assert "script" not in page.tags
    assert not page.links


def test_report_escapes_and_serves_dark_pages(result: Result) -> None:
    text = demo_report.as_html(result)
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"&(?!amp;|lt;|gt;|quot;|#x27;|#39;)", text)


def test_dense_attention_in_slices_is_dense_attention() -> None:
    q, k, v, dout = (torch.randn(1, 2, 100, 8, dtype=torch.float64) for _ in range(4))
    mask = sl.local_stride(100, block_size=16, local_blocks=2, vert_stride=2, num_heads=2)
    dense = mask.to_dense()
    sliced = dense_attention(
        q, k, v, lambda start, stop: dense[:, start:stop], dout, causal=True, rows_at_once=33
    )
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = F.scaled_dot_product_attention(*leaves, attn_mask=dense)
    whole = (out, *torch.autograd.grad(out, leaves, dout))
    for found, expected in zip(sliced, whole, strict=True):
        torch.testing.assert_close(found, expected)


def test_dense_attention_counts_entries_and_shares_kv_heads() -> None:
    q, dout = (torch.randn(2, 4, 64, 8, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(2, 2, 64, 8, dtype=torch.float64) for _ in range(2))
    counts = torch.randint(0, 3, (4, 64, 64)) + torch.eye(64, dtype=torch.long)
    sliced = dense_attention(
        q, k, v, lambda start, stop: counts[:, start:stop], dout, causal=False, rows_at_once=24
    )
    leaves = [t.requires_grad_() for t in (q, k, v)]
    scores = q @ k.repeat_interleave(2, 1).mT / 8**0.5
    weights = counts * (scores - scores.amax(-1, keepdim=True)).exp()
    out = (weights / weights.sum(-1, keepdim=True)) @ v.repeat_interleave(2, 1)
    whole = (out, *torch.autograd.grad(out, leaves, dout))
    for found, expected in zip(sliced, whole, strict=True):
        torch.testing.assert_close(found, expected)


def test_times_are_taken_in_turns() -> None:
    order: list[str] = []
    times = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=4)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab" + "ba"
    assert times["a"].repeats == 4
    assert times["a"].low_s <= times["a"].median_s <= times["a"].high_s


def test_a_budget_ends_the_repeats() -> None:
    times = interleaved({"a": lambda: None}, repeats=1000, budget_s=0.0, at_least=2)
    assert times["a"].repeats == 2


def test_relative_error_of_what_is_no_number() -> None:
    exact = torch.ones(3)
    assert relative_error(exact, exact) == 0
    assert math.isnan(relative_error(torch.tensor([1.0, math.nan, 1.0]), exact))


@pytest.mark.gpu
def test_demo_on_a_gpu() -> None:
    result = demo.run("cuda", quick=True)
    assert [part.explanation.kernel for part in result.parts] != ["dense fallback"] * 2
    for part in result.parts:
        for each in part.errors:
            assert each.sparse <= 3 * each.dense + 0.01, each
