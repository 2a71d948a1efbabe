"""`sl.load_smtx`: the sparse matrices of the Deep Learning Matrix Collection."""

from __future__ import annotations

import re
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from sparse_layouts.csr_tensor import CSRTensor
from sparse_layouts.file_errors import (
    LARGEST_INDEX,
    LONGEST_LINE,
    PathLike,
    check_values_dtype,
    file_size,
    refuse_file,
    shown,
    size_in_header,
)

WIDEST_NUMBER = 32  # bytes that a file may spend on a number, with the space around it

SHAPE_FIELDS = ("rows", "cols", "nnz")


def load_smtx(
    path: PathLike,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> CSRTensor:
    """The matrix (rows, cols) of an `.smtx` file, 1 at every stored entry.

    The format has three lines: `rows, cols, nnz`, then rows + 1 row pointers, then nnz column
    indices from 0, ascending within a row. It holds no values. A row that is not sorted or names a
    column twice is refused, not repaired: what such a file means is a guess.

    Raises `ValueError` that names file, line and field for whatever is not such a file: cut off,
    counts that do not fit, numbers that are negative, out of range or no numbers. Memory is bounded
    by a few times the file's size. Source: https://github.com/google-research/google-research,
    folder `sgk`, the data set of https://arxiv.org/abs/2006.10901.

    >>> import os, tempfile, sparse_layouts as sl
    >>> path = os.path.join(tempfile.mkdtemp(), "small.smtx")
    >>> with open(path, "w") as file:
    ...     _ = file.write("2, 3, 3\\n0 2 3\\n0 2 1\\n")
    >>> sl.load_smtx(path).to_dense()
    tensor([[1., 0., 1.],
            [0., 1., 0.]])
    """
    check_values_dtype(dtype, "load_smtx")
    shape, crow, col = read_smtx(path)
    ones = torch.ones(col.shape[0], dtype=dtype, device=device)
    return CSRTensor(ones, crow.to(ones.device), col.to(ones.device), shape=shape)


def read_smtx(path: PathLike) -> tuple[tuple[int, int], Tensor, Tensor]:
    """(rows, cols), row pointers (rows + 1,) int32, column indices (nnz,) int32 of an `.smtx`."""
    size = file_size(path)
    with open(path, "rb") as file:
        header = file.readline(LONGEST_LINE)
        rows, cols, nnz = _smtx_header(path, header, size - len(header))
        pointers_line = file.readline(size)
        indices_line = file.readline(size)
        rest = file.read(size).strip()
    if rest:
        refuse_file(path, 4, "", "the end of the file", shown(rest))
    pointers = _whole_numbers(path, 2, "row pointers", pointers_line, rows + 1)
    _check_pointers(path, pointers, nnz)
    indices = _whole_numbers(path, 3, "column indices", indices_line, nnz)
    _check_indices(path, indices, pointers, cols)
    crow, col = (torch.from_numpy(a.astype(np.int32)) for a in (pointers, indices))
    return (rows, cols), crow, col


def _smtx_header(path: PathLike, line: bytes, left: int) -> tuple[int, int, int]:
    """rows, cols and nnz; refused where `left`, the bytes after the header, cannot hold them."""
    texts = re.split(rb"\s*,\s*|\s+", line.strip())
    if len(texts) != 3 or len(line) == LONGEST_LINE:
        refuse_file(path, 1, "", "'rows, cols, nnz'", shown(line))
    rows, cols, nnz = (
        size_in_header(path, 1, field, text)
        for field, text in zip(SHAPE_FIELDS, texts, strict=True)
    )
    if nnz > rows * cols:
        refuse_file(path, 1, "nnz", f"at most {rows} * {cols} entries", str(nnz))
    numbers = rows + 1 + nnz
    least, most = 2 * numbers - 1, WIDEST_NUMBER * numbers + LONGEST_LINE
    if not least <= left <= most:
        which = "rows and nnz"
        expected = f"{least} to {most} bytes of text after this line for {numbers} numbers"
        refuse_file(path, 1, which, expected, f"{left}: the file is cut off, or not what this says")
    return rows, cols, nnz


def _whole_numbers(path: PathLike, line: int, field: str, text: bytes, count: int) -> np.ndarray:
    """`count` numbers, none negative or above int32, as int64."""
    odd = re.search(rb"[^0-9\s]", text)
    if odd is not None:
        at = odd.start()
        left = re.split(rb"\s", text[max(0, at - WIDEST_NUMBER) : at])[-1]
        right = re.split(rb"\s", text[at : at + WIDEST_NUMBER])[0]
        before = _parsed(text[: at - len(left)])
        where, got = f"{field}, number {before.size}", shown(left + right)
        refuse_file(path, line, where, "a whole number from 0", got)
    numbers = _parsed(text)
    if numbers.size != count:
        refuse_file(path, line, field, f"{count} numbers", f"{numbers.size}")
    if numbers.size and int(numbers.max()) > LARGEST_INDEX:
        at = int((numbers > LARGEST_INDEX).argmax())
        got = "one that is larger"  # how large is not known: it may have been cut to 64 bits
        refuse_file(path, line, f"{field}, number {at}", f"at most {LARGEST_INDEX} (int32)", got)
    return numbers


def _parsed(text: bytes) -> np.ndarray:
    """The numbers of a text of digits and white space; what exceeds int64 becomes its maximum."""
    # of blanks alone numpy reads a 0
    return np.fromstring(text if text.strip() else b"", dtype=np.int64, sep=" ")


def _check_pointers(path: PathLike, pointers: np.ndarray, nnz: int) -> None:
    if pointers[0] != 0:
        refuse_file(path, 2, "row pointers, number 0", "0", str(pointers[0]))
    falls = np.flatnonzero(pointers[1:] < pointers[:-1])
    if falls.size:
        at = int(falls[0]) + 1
        expected = f"at least {pointers[at - 1]}, the pointer before it"
        refuse_file(path, 2, f"row pointers, number {at}", expected, str(pointers[at]))
    if pointers[-1] != nnz:
        at, expected = pointers.size - 1, f"{nnz}, the nnz of line 1"
        refuse_file(path, 2, f"row pointers, number {at} (the last)", expected, str(pointers[-1]))


def _check_indices(path: PathLike, indices: np.ndarray, pointers: np.ndarray, cols: int) -> None:
    def refuse(at: int, expected: str) -> NoReturn:
        row = int(np.searchsorted(pointers, at, side="right")) - 1
        field = f"column indices, number {at} (row {row})"
        refuse_file(path, 3, field, expected, str(indices[at]))

    beyond = np.flatnonzero(indices >= cols)
    if beyond.size:
        refuse(int(beyond[0]), f"a column below {cols}")
    falls = indices[1:] <= indices[:-1]
    edges = pointers[(pointers > 0) & (pointers < indices.size)]
    falls[edges - 1] = False  # a row may begin left of where the row before it ended
    if falls.any():
        at = int(falls.argmax()) + 1
        refuse(at, f"a column above {indices[at - 1]} (ascending within a row, none twice)")
