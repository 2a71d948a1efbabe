"""Generated matrices that stand in for real ones, and the text files that they are read from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.sparse


def power_law(
    rows: int, cols: int, entries: int, *, exponent: float = 1.0, seed: int = 0
) -> scipy.sparse.csr_array:
    """About `entries` random values (rows, cols), float64: row and column r are drawn with weight
    `1 / (1 + r) ** exponent`, in a random order, as links of a web or words of a text fall.

    A few rows and columns hold most entries, many rows none.
    """
    source = np.random.default_rng(seed)

    def drawn(size: int) -> np.ndarray:
        weight = (1.0 + np.arange(size)) ** -exponent
        return source.permutation(size)[source.choice(size, entries, p=weight / weight.sum())]

    places = np.unique(drawn(rows) * cols + drawn(cols))
    values = source.standard_normal(places.size)
    made = scipy.sparse.coo_array((values, (places // cols, places % cols)), shape=(rows, cols))
    return made.tocsr()


def banded(size: int, width: int, *, seed: int = 0) -> scipy.sparse.csr_array:
    """Random values (size, size), float64, in the `width` diagonals on each side of the main one
    and in that, as a discretised operator has them.
    """
    source = np.random.default_rng(seed)
    offsets = list(range(-width, width + 1))
    diagonals = [source.standard_normal(size - abs(k)) for k in offsets]
    return scipy.sparse.diags_array(diagonals, offsets=offsets, shape=(size, size)).tocsr()


def write_smtx(path: Path, matrix: scipy.sparse.csr_array) -> Path:
    """Writes where a matrix has entries, as the Deep Learning Matrix Collection does."""
    lines = (
        ", ".join(map(str, (*matrix.shape, matrix.nnz))),
        "".join(f"{pointer} " for pointer in matrix.indptr),
        "".join(f"{index} " for index in matrix.indices),
    )
    path.write_text("\n".join(lines) + "\n")
    return path
