"""`.smtx` and MatrixMarket files: real and generated ones as scipy has them, hostile ones refused.

The real ones lie beside the repository, in ../shared/data; where they do not, those tests skip.
"""

from __future__ import annotations

import bz2
import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import scipy.sparse
import torch
from torch import Tensor

import sparse_layouts as sl
from sparse_layouts.csr_tensor import CSRTensor
from sparse_layouts.matrix_files import read_smtx
from tests.sparse_layouts.stand_ins import banded, power_law, write_smtx

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
REAL_SMTX = sorted(DATA.glob("dlmc/**/*.smtx"))
REAL_MTX = sorted(DATA.glob("mtx/*.mtx"))
NONE = pytest.param(None, marks=pytest.mark.skip(reason=f"no real matrices in {DATA}"))

STAND_INS: dict[str, Callable[[], scipy.sparse.csr_array]] = {
    "power-law": lambda: power_law(300, 500, 4000),
    "banded": lambda: banded(200, 3),
}

SMALL = "3, 4, 4\n0 2 2 4\n0 3 1 2\n"
HEAD = "%%MatrixMarket matrix coordinate real general\n"


def assert_equals_scipy(made: CSRTensor, expected: scipy.sparse.csr_array) -> None:
    made.validate()
    assert type(made) is CSRTensor
    assert tuple(made.shape) == expected.shape
    assert np.array_equal(made.crow_indices().numpy(), expected.indptr)
    assert np.array_equal(made.col_indices().numpy(), expected.indices)
    assert np.array_equal(made.values().numpy(), expected.data)


def parsed_slowly(path: Path) -> scipy.sparse.csr_array:
    """An `.smtx` file as plain Python reads it."""
    shape, *lists = (
        list(map(int, line.replace(",", " ").split())) for line in path.read_text().splitlines()
    )
    pointers, indices = lists
    ones = np.ones(len(indices), dtype=np.float32)
    return scipy.sparse.csr_array((ones, indices, pointers), shape=shape[:2])


# --- what the files hold --------------------------------------------------------------------------


@pytest.mark.parametrize("path", REAL_SMTX or [NONE], ids=lambda path: str(path)[-40:])
def test_real_smtx(path: Path) -> None:
    made = sl.load_smtx(path)
    assert_equals_scipy(made, parsed_slowly(path))
    assert made.dtype == torch.float32


@pytest.mark.parametrize("path", REAL_MTX or [NONE], ids=lambda path: str(path)[-40:])
def test_real_mtx(path: Path) -> None:
    expected = scipy.sparse.csr_array(scipy.io.mmread(path))
    assert_equals_scipy(sl.load_mtx(path, dtype=torch.float64), expected)


@pytest.mark.parametrize("name", STAND_INS)
def test_stand_ins(name: str, tmp_path: Path) -> None:
    matrix = STAND_INS[name]()
    assert 0.001 < matrix.nnz / np.prod(matrix.shape) < 0.1
    path = write_smtx(tmp_path / "matrix.smtx", matrix)
    ones = scipy.sparse.csr_array(
        (np.ones(matrix.nnz, np.float32), matrix.indices, matrix.indptr), shape=matrix.shape
    )
    assert_equals_scipy(sl.load_smtx(path), ones)
    scipy.io.mmwrite(tmp_path / "matrix.mtx", matrix, precision=17)
    assert_equals_scipy(sl.load_mtx(tmp_path / "matrix.mtx", dtype=torch.float64), matrix)


def test_a_power_law_has_long_and_empty_rows() -> None:
    lengths = np.diff(power_law(300, 500, 4000).indptr)
    assert lengths.max() > 10 * lengths.mean()
    assert (lengths == 0).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    (tmp_path / "a.smtx").write_text(SMALL)
    (tmp_path / "a.mtx").write_text(HEAD + "3 4 2\n1 1 0.1\n3 4 -2\n")
    ones = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0]], dtype=dtype)
    assert torch.equal(sl.load_smtx(tmp_path / "a.smtx", dtype=dtype).to_dense(), ones)
    values = sl.load_mtx(tmp_path / "a.mtx", dtype=dtype).values()
    assert torch.equal(values, torch.tensor([0.1, -2], dtype=torch.float64).to(dtype))


def test_devices(tmp_path: Path) -> None:
    (tmp_path / "a.smtx").write_text(SMALL)
    (tmp_path / "a.mtx").write_text(HEAD + "3 4 1\n1 1 0.1\n")
    for made in (
        sl.load_smtx(str(tmp_path / "a.smtx"), device="meta"),
        sl.load_mtx(str(tmp_path / "a.mtx"), device="meta"),
    ):
        assert made.device.type == "meta"
        assert all(t.device.type == "meta" for t in made.inner_tensors())


ACCEPTED_SMTX: dict[str, tuple[str, tuple[int, int], list[int], list[int]]] = {
    "as published": ("2, 3, 2\n0 1 2 \n2 0 \n", (2, 3), [0, 1, 2], [2, 0]),
    "white space": ("2 3 2\r\n0\t1  2\r\n2 0\r\n\r\n", (2, 3), [0, 1, 2], [2, 0]),
    "no last newline": ("2,3,2\n0 1 2\n2 0", (2, 3), [0, 1, 2], [2, 0]),
    "leading zeros": ("02,3,2\n0 01 2\n2 000", (2, 3), [0, 1, 2], [2, 0]),
    "no entry": ("2, 3, 0\n0 0 0\n\n", (2, 3), [0, 0, 0], []),
    "no third line": ("2, 3, 0\n0 0 0", (2, 3), [0, 0, 0], []),
    "no row": ("0, 3, 0\n0\n\n", (0, 3), [0], []),
    "no column": ("2, 0, 0\n0 0 0\n\n", (2, 0), [0, 0, 0], []),
    "wide": ("1, 2147483647, 1\n0 1\n2147483646\n", (1, 2**31 - 1), [0, 1], [2**31 - 2]),
}


@pytest.mark.parametrize("name", ACCEPTED_SMTX)
def test_smtx_variants(name: str, tmp_path: Path) -> None:
    text, shape, pointers, indices = ACCEPTED_SMTX[name]
    (tmp_path / "a.smtx").write_bytes(text.encode())
    found, crow, col = read_smtx(tmp_path / "a.smtx")
    assert found == shape
    assert crow.dtype == col.dtype == torch.int32
    assert (crow.tolist(), col.tolist()) == (pointers, indices)
    made = sl.load_smtx(tmp_path / "a.smtx")
    made.validate()
    assert tuple(made.shape) == shape
    assert made.nnz == len(indices)


def dense(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


ACCEPTED_MTX: dict[str, tuple[str, Tensor]] = {
    "general": (HEAD + "2 2 2\n2 1 0.5\n1 2 -1e1\n", dense([[0, -10], [0.5, 0]])),
    "comments": (HEAD + "% a\n\n%\n2 2 1\n\n2 1 0.5\n", dense([[0, 0], [0.5, 0]])),
    "case": (HEAD.replace("real", "Real") + "1 1 1\n1 1 5\n", dense([[5]])),
    "twice": (HEAD + "1 2 2\n1 1 5\n1 1 3\n", dense([[8, 0]])),
    "not finite": (HEAD + "1 2 2\n1 1 inf\n1 2 nan\n", dense([[float("inf"), float("nan")]])),
    "no entry": (HEAD + "2 3 0\n", torch.zeros(2, 3, dtype=torch.float64)),
    "no row": (HEAD + "0 3 0\n", torch.zeros(0, 3, dtype=torch.float64)),
    "symmetric": (
        HEAD.replace("general", "symmetric") + "2 2 2\n1 1 3\n2 1 0.5\n",
        dense([[3, 0.5], [0.5, 0]]),
    ),
    "skew": (
        HEAD.replace("real general", "integer skew-symmetric") + "2 2 1\n2 1 7\n",
        dense([[0, -7], [7, 0]]),
    ),
    "pattern": (HEAD.replace("real", "pattern") + "1 3 2\n1 3\n1 1\n", dense([[1, 0, 1]])),
    "array": (
        HEAD.replace("coordinate", "array") + "2 2\n1\n0\n3\n4\n",
        dense([[1, 3], [0, 4]]),
    ),
    "symmetric array": (
        HEAD.replace("coordinate real general", "array integer symmetric") + "2 2\n1\n2\n3\n",
        dense([[1, 2], [2, 3]]),
    ),
    "skew array": (
        HEAD.replace("coordinate real general", "array real skew-symmetric") + "2 2\n2\n",
        dense([[0, -2], [2, 0]]),
    ),
}


@pytest.mark.parametrize("name", ACCEPTED_MTX)
def test_mtx_variants(name: str, tmp_path: Path) -> None:
    text, expected = ACCEPTED_MTX[name]
    (tmp_path / "a.mtx").write_text(text)
    made = sl.load_mtx(tmp_path / "a.mtx", dtype=torch.float64)
    made.validate()
    torch.testing.assert_close(made.to_dense(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress], ids=["gz", "bz2"])
def test_packed_mtx(pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / f"a.mtx.{'gz' if pack is gzip.compress else 'bz2'}"
    matrix = banded(300, 2)
    scipy.io.mmwrite(tmp_path / "a.mtx", matrix, precision=17)
    path.write_bytes(pack((tmp_path / "a.mtx").read_bytes()))
    assert_equals_scipy(sl.load_mtx(path, dtype=torch.float64), matrix)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=rf"a\.mtx\.{path.suffix[1:]}: cannot be unpacked"):
        sl.load_mtx(path)
    path.write_bytes(b"no archive at all")
    with pytest.raises(ValueError, match="cannot be unpacked"):
        sl.load_mtx(path)
