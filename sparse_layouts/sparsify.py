"""`sl.sparsify_globally`: one choice over several tensors, e.g. all weights of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_layouts.bsr_tensor import block_size_pair
from sparse_layouts.dense_rows import check_dense, check_divides
from sparse_layouts.sparsifier_protocol import Sparsifier, as_sparsifier
from sparse_layouts.structured_sparsifiers import Blockwise, SamePattern

Where = Callable[[str, Tensor], bool]


def sparsify_globally(
    tensors: Mapping[str, Tensor] | Iterable[Tensor] | torch.nn.Module,
    sparsifier: Any,
    *,
    layout: Callable[..., Tensor] | None = None,
    block_size: int | tuple[int, int] | None = None,
    where: Where | None = None,
    progress: bool = False,
) -> Any:
    """Chooses what to keep of several dense tensors as if they were one: with
    `sl.Magnitude(0.1)` the largest tenth of all entries, wherever they are.

    `tensors`: names and tensors, an iterable of tensors, or a module: its parameters by name, by
    default those with at least two dimensions. `where(name, tensor)` picks among the named ones.
    Dtypes, shapes and devices may differ.

    `layout` is a factory such as `sl.csr`, called as `layout(tensor, keep=...)` for each; None
    gives bool masks. `block_size` ranks blocks by Frobenius norm instead of entries and is handed
    on to the factory: `layout=sl.bsr, block_size=32`. For blocks in a layout of entries, or by
    another norm, pass `sl.Blockwise(...)` as the sparsifier; `block_size` is then the factory's.

    Returns a dict of the picked names, a tuple for a tuple, else a list. Differentiable where the
    factory is. `progress=True` shows a bar of the entries looked at, on stderr (tqdm, extra `cli`).

    `Magnitude` and `Random` keep exactly `round(density * number of all)`. Of equals, the first
    tensor's come first. The other sparsifiers of this library choose for each tensor by itself; one
    of your own with scope "materialising" gets all magnitudes in one vector. Besides the results,
    memory is that of a chunk of rows and of one mask (a byte an entry of one tensor), with blocks
    that of all norms; no magnitudes are concatenated for the sparsifiers of this library.

    Raises `TypeError` for what is no dense tensor of numbers or no sparsifier, `ValueError` that
    names the tensor for NaN and for sizes that the block does not divide, `ImportError` where
    `progress` finds no tqdm.

    >>> import torch, sparse_layouts as sl
    >>> weights = {"small": torch.full((2, 2), 0.1), "large": torch.ones(2, 2)}
    >>> {name: kept.sum().item() for name, kept in
    ...     sl.sparsify_globally(weights, sl.Magnitude(0.5)).items()}
    {'small': 0, 'large': 4}
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 64))
    >>> kept = sl.sparsify_globally(model, sl.Magnitude(0.25), layout=sl.bsr, block_size=16)
    >>> for name, weight in kept.items():      # put them into the model, to train what is stored
    ...     owner, _, leaf = name.rpartition(".")
    ...     setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(weight.detach()))
    >>> sum(weight.nnz for weight in kept.values()) / (2 * 64 * 32)
    0.25
    """
    named = _named(tensors, where)
    chooser = as_sparsifier(sparsifier, "sparsify_globally", "sparsifier")
    options: dict[str, Any] = {}
    if block_size is not None:
        block = block_size_pair(block_size, "sparsify_globally")
        if not isinstance(chooser, Blockwise):
            chooser = Blockwise(chooser, block)
        options["block_size"] = block
    plain = [_checked(name, tensor, chooser) for name, tensor in named]
    made: list[Tensor] = []
    passes = chooser.passes(plain)
    with _progress_bar(progress, passes * sum(dense.numel() for dense in plain)) as done:
        chosen = _choices(chooser, plain, done)
        for _, tensor in named:
            try:
                keep, mask = next(chosen)
            except ValueError as error:
                raise ValueError(_blame(error, named)) from error
            made.append(mask() if layout is None else layout(tensor, **options, keep=keep))
            del keep, mask  # before the next one is made
    if isinstance(tensors, (Mapping, torch.nn.Module)):
        return {name: result for (name, _), result in zip(named, made, strict=True)}
    return tuple(made) if isinstance(tensors, tuple) else made


def _choices(
    chooser: Sparsifier, tensors: list[Tensor], done: Callable[[int], None]
) -> Iterator[tuple[Sparsifier, Callable[[], Tensor]]]:
    """What is kept of each tensor: as a sparsifier that keeps just that, and as a mask."""
    if isinstance(chooser, Blockwise):
        for dense, blocks in zip(tensors, chooser.blocks_together(tensors, done), strict=True):
            same = Blockwise(SamePattern(blocks), chooser.block_size)
            yield same, lambda same=same, dense=dense: same.keep(dense)  # type: ignore[misc]
        return
    for kept in chooser.keep_together(tensors, done):
        yield SamePattern(kept), lambda kept=kept: kept  # type: ignore[misc]


def _named(tensors: Any, where: Where | None) -> list[tuple[str, Any]]:
    """The tensors with a name each, those that `where` picks."""
    if isinstance(tensors, Tensor):
        raise TypeError(
            "sparsify_globally: expected several tensors, got one; a factory takes one: "
            "sl.bsr(x, keep=sl.Magnitude(0.25))"
        )
    if isinstance(tensors, torch.nn.Module):
        pick = where if where is not None else lambda name, tensor: tensor.dim() >= 2
        return [(name, p) for name, p in tensors.named_parameters() if pick(name, p)]
    if isinstance(tensors, Mapping):
        named = list(tensors.items())
        return named if where is None else [pair for pair in named if where(*pair)]
    if where is not None:
        raise TypeError(
            "sparsify_globally: where picks by name, expected a module or a dict with it, got "
            f"{type(tensors).__name__}"
        )
    if not isinstance(tensors, Iterable):
        raise TypeError(
            "sparsify_globally: expected a module, a dict or an iterable of tensors, got "
            f"{type(tensors).__name__}"
        )
    return [(f"tensor {i}", tensor) for i, tensor in enumerate(tensors)]


def _checked(name: str, tensor: Any, chooser: Sparsifier) -> Tensor:
    """The tensor without gradient, or an error that names it."""
    what = f"sparsify_globally: {name}"
    dense = check_dense(tensor, what)
    if isinstance(chooser, Blockwise):
        check_divides(tuple(dense.shape), chooser.block_size, what)
    return dense


def _blame(error: ValueError, named: list[tuple[str, Tensor]]) -> str:
    """The error's text, and which of the tensors have NaN, if that is what it is about."""
    if " NaN " not in str(error):
        return f"sparsify_globally: {error}"
    found = ", ".join(name for name, tensor in named if bool(tensor.isnan().any()))
    return f"sparsify_globally: NaN in {found}. {error}"


@contextlib.contextmanager
def _progress_bar(progress: bool, total: int) -> Iterator[Callable[[int], Any]]:
    """What counts entries: a bar of tqdm, or nothing."""
    if not progress:
        yield lambda entries: None
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            "sparsify_globally: progress=True needs tqdm: pip install 'sparse_layouts[cli]'; "
            "or leave progress out"
        ) from error
    with tqdm(total=total, desc="sparsify", unit=" entries", unit_scale=True) as bar:
        yield bar.update
