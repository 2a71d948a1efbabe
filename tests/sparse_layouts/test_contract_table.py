"""The contract is whole: every behaviour has a test on every layout, and the table says so."""

from __future__ import annotations

import pytest

from tests.sparse_layouts import contract_table
from tests.sparse_layouts.contract_table import BEHAVIOURS, Cell, table


def cells(session: pytest.Session) -> set[Cell]:
    return {
        Cell(*value)
        for item in session.items
        for name, value in item.user_properties
        if name == contract_table.PROPERTY
    }


def missing(found: set[Cell], layouts: list[str], with_masks: list[str]) -> list[Cell]:
    """The cells without a test, of those behaviours that any test is about."""
    behaviours = [name for name in BEHAVIOURS if any(cell.behaviour == name for cell in found)]
    return [
        Cell(layout, behaviour)
        for behaviour in behaviours
        for layout in (with_masks if BEHAVIOURS[behaviour] else layouts)
        if Cell(layout, behaviour) not in found
    ]


def test_every_behaviour_is_tested_on_every_layout(
    request: pytest.FixtureRequest, contract_layouts: tuple[list[str], list[str]]
) -> None:
    found = cells(request.session)
    if not found:
        pytest.skip("no contract test was collected beside this one")
    assert missing(found, *contract_layouts) == []
    files = {item.path.name for item in request.session.items}
    if {path.name for path in request.path.parent.glob("test_*.py")} <= files:
        assert {cell.behaviour for cell in found} == set(BEHAVIOURS)


def test_a_missing_cell_is_found(contract_layouts: tuple[list[str], list[str]]) -> None:
    layouts, with_masks = contract_layouts
    whole = {
        Cell(layout, behaviour)
        for behaviour, of_masks in BEHAVIOURS.items()
        for layout in (with_masks if of_masks else layouts)
    }
    assert missing(whole, *contract_layouts) == []
    gap = Cell(layouts[0], "files")
    assert missing(whole - {gap}, *contract_layouts) == [gap]


def test_the_table() -> None:
    lines = table(
        [
            (Cell("ATensor", "files"), "passed"),
            (Cell("ATensor", "files"), "passed"),
            (Cell("ATensor", "DDP"), "skipped"),
            (Cell("ATensor", "masks: buffers"), "passed"),
            (Cell("LongerTensor", "files"), "passed"),
            (Cell("LongerTensor", "files"), "failed"),
        ]
    )
    assert [line.split() for line in lines[1:3]] == [
        ["ATensor", "+", "s", "+"],
        ["LongerTensor", "X", "-", "."],
    ]
    assert "3 files" in lines[3]
    assert table([]) == []


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("test_x[BSRTensor-matrix]", Cell("BSRTensor", "files")),
        ("test_x[Adam-fused-CSRTensor-random]", Cell("CSRTensor", "files")),
        ("test_x[DiagonalTensor]", Cell("DiagonalTensor", "files")),
    ],
)
def test_the_layout_is_read_from_a_tests_id(name: str, cell: Cell) -> None:
    assert contract_table.cell_of(name, "files") == cell


def test_a_contract_test_without_a_layout_or_behaviour_is_refused() -> None:
    with pytest.raises(ValueError, match="parametrised by layout"):
        contract_table.cell_of("test_x[matrix]", "files")
    with pytest.raises(ValueError, match="no behaviour 'flies'"):
        contract_table.cell_of("test_x[BSRTensor-matrix]", "flies")
