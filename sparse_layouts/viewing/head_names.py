"""Names of heads and of other leading indices, for what stands above a picture."""

from __future__ import annotations

import numpy as np


def head_names(indices: list[int], lead: tuple[int, ...]) -> str:
    """ "head 3", "heads 0, 4, 8, 12, ... (32)", "index (0, 1)"; "" for a single matrix.

    `indices` count along the flattened leading dimensions `lead`.

    >>> from sparse_layouts.viewing.head_names import head_names
    >>> head_names([0, 4], (8,)), head_names([5], (2, 3)), head_names([0], ())
    ('heads 0, 4', 'index (1, 2)', '')
    """
    if not lead:
        return ""
    if len(lead) == 1:
        names = [str(i) for i in indices]
    else:
        names = [str(tuple(int(x) for x in np.unravel_index(i, lead))) for i in indices]
    word = "head" if len(lead) == 1 else "index"
    if len(names) == 1:
        return f"{word} {names[0]}"
    plural = "heads" if len(lead) == 1 else "indices"
    few = 4 if len(lead) == 1 else 2
    text = ", ".join(names[:few])
    return f"{plural} {text}" + (f", ... ({len(names)})" if len(names) > few else "")
