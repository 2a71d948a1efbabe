"""Pickles of layouts that were forged: `torch.load(weights_only=True)` runs nothing of them."""

from __future__ import annotations

import collections
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_layouts as sl
from sparse_layouts.layout_tensor import rebuild
from tests.sparse_layouts.file_cases import assert_same


class Forged:
    """Pickles as a call of any function with any arguments."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def loaded_safely(value: object) -> object:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def parts(w: sl.LayoutTensor) -> list[Any]:
    """The arguments of `rebuild` that `w` pickles as."""
    return list(w.__reduce_ex__(2)[1])


def test_a_pickle_that_is_honest(small: sl.BSRTensor) -> None:
    assert_same(loaded_safely(Forged(rebuild, *parts(small))), small)


def test_a_pickle_runs_nothing(small: sl.BSRTensor, tmp_path: Path) -> None:
    payload = Forged(os.system, f"touch {tmp_path / 'executed'}")
    arguments = parts(small)
    for position in range(len(arguments)):
        forged = [*arguments[:position], payload, *arguments[position + 1 :]]
        with pytest.raises(Exception, match=r"nsupported (global: )?GLOBAL .*system"):
            loaded_safely(Forged(rebuild, *forged))
    inner = (payload, *arguments[1][1:])
    with pytest.raises(Exception, match=r"nsupported (global: )?GLOBAL .*system"):
        loaded_safely(Forged(rebuild, arguments[0], inner, *arguments[2:]))
    assert not (tmp_path / "executed").exists()


STATIC = (("block_size", (4, 8)), ("lead_dims", 0))
FORGERIES: dict[str, tuple[int, Any, type[Exception], str]] = {
    "class": (0, collections.OrderedDict, TypeError, "expected a layout class, got .*OrderedDict"),
    "tensor": (0, Tensor, TypeError, r"expected a layout class, got .*torch\.Tensor"),
    "function": (0, rebuild, TypeError, "expected a layout class, got <function rebuild"),
    "base": (0, nn.Parameter, TypeError, "expected a layout class"),
    "no tensors": (1, (), ValueError, r"expected the fields .*got 0 tensors"),
    "None alone": (1, (None,) * 11, TypeError, "expected a tensor or None for each"),
    "numbers": (1, (1.0,) * 11, TypeError, "expected a tensor or None for each"),
    "static": (2, (), ValueError, r"expected the fields .*and \(\)"),
    "options": (2, (*STATIC, ("requires_grad", True)), ValueError, "requires_grad"),
    "size": (3, (-24, 40), ValueError, r"expected sizes from 0, got \(-24, 40\)"),
    "size text": (3, ("24", 40), ValueError, "expected sizes from 0"),
    "dtype": (4, torch.float16, ValueError, r"dtype of values, torch\.float64, got torch\.float16"),
    "dtype text": (4, "float64", ValueError, "expected the dtype of values"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_pickles(name: str, small: sl.BSRTensor) -> None:
    position, value, error, message = FORGERIES[name]
    arguments = parts(small)
    arguments[position] = value
    with pytest.raises(error, match="rebuild: (?s:.*)" + message):
        rebuild(*arguments)
    if value is not rebuild and not (isinstance(value, type) and value is Tensor):
        with pytest.raises(error, match="rebuild: (?s:.*)" + message):
            loaded_safely(Forged(rebuild, *arguments))


def test_forged_indices_are_found_by_validate(small: sl.BSRTensor) -> None:
    arguments = parts(small)
    inner = list(arguments[1])
    inner[2] = torch.full_like(inner[2], 1000)
    again = loaded_safely(Forged(rebuild, arguments[0], tuple(inner), *arguments[2:]))
    with pytest.raises(ValueError, match="col_indices: expected values from 0 to 4, got 1000"):
        again.validate()
