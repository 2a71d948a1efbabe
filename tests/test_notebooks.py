"""The notebooks as files: without outputs, each a question, their code in form. `make notebooks`
executes them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def faults(content: dict[str, Any]) -> list[str]:
    """What a committed notebook may not hold."""
    found = []
    for cell in content["cells"]:
        if cell["cell_type"] != "code":
            continue
        if cell["outputs"]:
            found.append(f"cell {cell['id']} has outputs")
        if cell["execution_count"] is not None:
            found.append(f"cell {cell['id']} has an execution count")
        if cell["metadata"]:
            found.append(f"cell {cell['id']} has metadata")
    if "widgets" in content["metadata"]:
        found.append("it holds the state of widgets")
    return found


def test_there_is_a_notebook_for_every_question() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{n:02}" for n in range(1, 9)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_stripped_and_asks_a_question(path: Path) -> None:
    content = read(path)
    assert faults(content) == []
    title = "".join(content["cells"][0]["source"]).splitlines()[0]
    assert title.startswith("# ")
    assert title.endswith("?")
    assert content["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in content["cells"]]
    assert len(set(ids)) == len(ids)


def test_a_notebook_with_outputs_is_found() -> None:
    content = read(NOTEBOOKS[0])
    code = next(cell for cell in content["cells"] if cell["cell_type"] == "code")
    code["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["x"]}]
    code["execution_count"] = 1
    content["metadata"]["widgets"] = {}
    assert len(faults(content)) == 3
