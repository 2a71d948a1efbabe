"""Tables and lines that fit a terminal: nothing is lost in folding, and nothing sticks out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_layouts.dispatch.text import folded, html_table, readable_bytes, text_table

WORDS = st.text(alphabet="ab.:_ ,/", max_size=60)


@given(WORDS, st.integers(4, 40))
def test_folding_keeps_every_letter_and_the_width(text: str, width: int) -> None:
    lines = folded(text, width, hanging="  ")
    assert max(map(len, lines)) <= width
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(line.startswith("  ") for line in lines[1:])


def test_short_text_stays_as_it_is() -> None:
    assert folded("  as it is", 80) == ["  as it is"]
    assert folded("", 80) == [""]


def test_a_long_word_breaks_where_it_may() -> None:
    assert folded("a.module:function", 10) == ["a.module:", "function"]
    assert folded("unbreakable", 4) == ["unbr", "eaka", "ble"]


@given(st.lists(st.tuples(WORDS, WORDS, WORDS), max_size=4), st.integers(30, 80))
def test_a_table_fits_and_holds_everything(rows: list[tuple[str, str, str]], width: int) -> None:
    text = text_table(("first", "second", "third"), rows, "  ", width)
    assert max(map(len, text.splitlines())) <= width
    for row in rows:
        for cell in row:
            for letter in cell.replace(" ", ""):
                assert letter in text


def test_a_table_that_fits_is_not_folded() -> None:
    rows = [("one", "two words")]
    assert text_table(("a", "b"), rows, width=80) == text_table(("a", "b"), rows)


def test_strong_rows_are_bold_and_cells_escaped() -> None:
    shown = html_table(("<a>",), [("x < y",), ("z",)], strong=[1])
    assert ">&lt;a&gt;</th>" in shown
    assert ">x &lt; y</td>" in shown
    assert "><b>z</b></td>" in shown


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**50, "1024.0 TiB")]
)
def test_bytes_are_readable(count: int, text: str) -> None:
    assert readable_bytes(count) == text
