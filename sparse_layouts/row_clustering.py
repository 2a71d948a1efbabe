"""Groups of block rows that store the same columns, for `sl.reorder`: on the host, from lists."""

from __future__ import annotations

import numpy as np

# A column that more block rows store says little of which of them are alike: it is not looked at,
# so that a few full columns do not make every row a neighbour of every other.
MOST_ROWS_OF_A_COLUMN = 1024


def similar_rows(crow: np.ndarray, col: np.ndarray, columns: int, size: int) -> np.ndarray:
    """int64 (rows,): the rows of a pattern (row offsets `crow`, ascending columns `col`), `size`
    after `size` a group of rows that store the same columns as far as possible.

    Greedy: a group begins with the free row that is most like the group before (the shortest one
    where none is), and grows by the free row of the greatest Jaccard similarity, the shared columns
    over all columns of both, to the group's columns; of equal ones by the first. The same lists
    give the same order. Time: the stored blocks times the rows of a column (at most
    `MOST_ROWS_OF_A_COLUMN`), and a look at all rows for each row; memory: the lists.

    >>> import numpy as np
    >>> similar_rows(np.array([0, 2, 3, 5, 6]), np.array([0, 1, 2, 0, 1, 2]), 3, 2).tolist()
    [1, 3, 0, 2]
    """
    rows = len(crow) - 1
    lengths = np.diff(crow)
    by_column = np.argsort(col, kind="stable")
    row_of = np.repeat(np.arange(rows), lengths)[by_column]
    degree = np.bincount(col, minlength=columns)
    ccol = np.concatenate([np.zeros(1, np.int64), degree.cumsum()])
    telling = degree <= MOST_ROWS_OF_A_COLUMN

    order = np.empty(rows, np.int64)
    free = np.ones(rows, bool)
    shared = np.zeros(rows, np.int64)  # of a free row with the group: how many telling columns
    stored = np.zeros(columns, bool)  # the group's columns
    width = 0  # how many they are
    shortest = iter(np.argsort(lengths, kind="stable"))
    for place in range(rows):
        near = np.flatnonzero(shared)
        if len(near):
            both = shared[near]
            row = int(near[np.argmax(both / (width + lengths[near] - both))])
        else:
            row = int(next(r for r in shortest if free[r]))
        if place % size == 0:
            shared[:], stored[:], width = 0, False, 0
        order[place], free[row], shared[row] = row, False, 0
        own = col[crow[row] : crow[row + 1]]
        new = own[~stored[own]]
        stored[new] = True
        width += len(new)
        lists = [row_of[ccol[c] : ccol[c + 1]] for c in new[telling[new]]]
        if lists:
            found = np.concatenate(lists)
            shared += np.bincount(found[free[found]], minlength=rows)
    return order


def in_groups(
    crow: np.ndarray, col: np.ndarray, columns: int, order: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The blocks of groups of rows, `size` after `size` in this order, that store what any of their
    rows does: int64 (blocks,), ascending, group * columns + column; and for each block of the rows,
    int64: which of these it is in, and as which of its `size` parts.
    """
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    row = np.repeat(place, np.diff(crow))
    cells, which = np.unique(row // size * columns + col, return_inverse=True)
    return cells, which.reshape(-1), row % size
