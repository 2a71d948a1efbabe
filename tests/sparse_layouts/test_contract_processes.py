"""Layouts between processes: data loaders, queues, process groups. Children are spawned."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import sparse_layouts as sl

Check = Callable[..., None]
START = "spawn"  # pinned: what is default differs by platform and version


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children start with one thread each."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


class Scaled(Dataset):
    """A layout times 1, 2, 3, ..."""

    def __init__(self, layout: Any, length: int) -> None:
        self.layout, self.length = layout, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.layout if self.layout.dtype == torch.bool else self.layout * (index + 1)


def first(batch: list[Any]) -> Any:
    """Collates a batch of one."""
    return batch[0]


def every_layout(masks: bool) -> list[Any]:
    from tests.sparse_layouts.conftest import first_of_each

    return [each.values[0]() for each in first_of_each(masks)]


# One set of workers for all layouts: a child that imports torch takes seconds to start.
class Mixed(Dataset):
    """All layouts, one after the other."""

    def __init__(self, layouts: list[Any]) -> None:
        self.layouts = layouts

    def __len__(self) -> int:
        return len(self.layouts)

    def __getitem__(self, index: int) -> Any:
        return index, self.layouts[index]


@pytest.fixture(scope="module")
def loaded() -> dict[str, tuple[Any, Any]]:
    """class -> what was put into a data loader with two workers, and what came out."""
    torch.manual_seed(0)
    layouts = every_layout(masks=False)
    loader = DataLoader(
        Mixed(layouts), collate_fn=first, num_workers=2, multiprocessing_context=START
    )
    return {type(w).__name__: (layouts[index], w) for index, w in loader}


@pytest.mark.contract("data loaders")
def test_data_loader_workers(
    one_layout: sl.LayoutTensor, loaded: dict[str, tuple[Any, Any]]
) -> None:
    put, got = loaded[type(one_layout).__name__]
    assert type(got) is type(put)
    assert got.same_pattern(put)
    got.validate()
    assert torch.equal(got.to_dense(), put.to_dense())


@pytest.mark.contract("data loaders")
def test_data_loader_in_this_process(one_layout: sl.LayoutTensor) -> None:
    for n, batch in enumerate(DataLoader(Scaled(one_layout, 3), batch_size=None)):
        assert type(batch) is type(one_layout)
        assert torch.equal(batch.to_dense(), one_layout.to_dense() * (n + 1))


def test_the_default_collation_stacks_densely(small: sl.BSRTensor) -> None:
    with pytest.warns(sl.DenseFallbackWarning, match="stack"):
        (batch,) = DataLoader(Scaled(small, 2), batch_size=2)
    assert torch.equal(batch, torch.stack([small.to_dense(), small.to_dense() * 2]))


# --- queues ---------------------------------------------------------------------------------------


def double(inbox: Any, outbox: Any) -> None:
    """What a child does: every layout that comes, times two; masks go back as they are."""
    while (given := inbox.get()) is not None:
        outbox.put(given if given.dtype == torch.bool else given * 2)
        del given
    outbox.put(None)
    inbox.get()  # shared memory lives until the other side has taken it


@pytest.fixture(scope="module")
def answered() -> dict[tuple[str, bool], tuple[Any, Any]]:
    """(class, is it a mask) -> what was sent to another process, and what it sent back."""
    torch.manual_seed(0)
    context = multiprocessing.get_context(START)
    inbox, outbox = context.Queue(), context.Queue()
    child = context.Process(target=double, args=(inbox, outbox), daemon=True)
    child.start()
    found = {}
    for given in (*every_layout(masks=False), *every_layout(masks=True)):
        inbox.put(given)
        answer = outbox.get(timeout=120)
        found[type(given).__name__, given.dtype == torch.bool] = given, answer.clone()
    inbox.put(None)
    outbox.get(timeout=120)
    inbox.put(None)
    child.join(timeout=120)
    assert child.exitcode == 0
    return found


@pytest.mark.contract("processes")
def test_queue(one_layout: sl.LayoutTensor, answered: dict[Any, tuple[Any, Any]]) -> None:
    sent, came = answered[type(one_layout).__name__, False]
    assert type(came) is type(sent)
    assert came.same_pattern(sent)
    came.validate()
    assert torch.equal(came.to_dense(), sent.to_dense() * 2)


@pytest.mark.contract("masks: copies and files")
def test_masks_in_a_queue(one_mask: Any, answered: dict[Any, tuple[Any, Any]]) -> None:
    sent, came = answered[type(one_mask).__name__, True]
    assert type(came) is type(sent)
    assert torch.equal(came.to_dense(), sent.to_dense())


@pytest.mark.contract("processes")
def test_shared_memory(one_layout: sl.LayoutTensor) -> None:
    module = nn.ParameterList([one_layout])
    before = one_layout.to_dense()
    module.share_memory()
    assert type(module[0]) is type(one_layout)
    assert module[0].is_shared()
    assert torch.equal(module[0].detach().to_dense(), before)


# --- DistributedDataParallel ----------------------------------------------------------------------


class Product(nn.Module):
    """x @ weight.mT + bias: a layout beside a dense parameter and a mask."""

    def __init__(self, weight: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(weight.shape[0], dtype=weight.dtype))
        self.register_buffer("mask", sl.causal(8, block_size=4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def steps(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for part in x.unbind(0):
        optimizer.zero_grad()
        model(part).square().mean().backward()
        optimizer.step()


def batches(width: int) -> Tensor:
    """Three batches of eight."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(3, 8, width, dtype=torch.float64, generator=generator)


def replica(rank: int, port: int, folder: str) -> None:
    """One of two processes: half of each batch; leaves its weights in a file."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        made = []
        for layout in torch.load(Path(folder) / "layouts.pt", weights_only=False):
            with sl.fallback("allow"):
                model = nn.parallel.DistributedDataParallel(Product(layout))
                steps(model, batches(layout.shape[1]).chunk(2, 1)[rank])
            made.append(model.module.weight)
        torch.save(made, Path(folder) / f"trained_{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def replicated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any, Any]]:
    """class -> the layout, and the weights that two processes trained from it."""
    torch.manual_seed(0)
    folder, layouts = tmp_path_factory.mktemp("ddp"), every_layout(masks=False)
    torch.save(layouts, folder / "layouts.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.start_processes(
        replica, (port, str(folder)), nprocs=2, start_method=START, join=True
    )
    trained = [torch.load(folder / f"trained_{rank}.pt", weights_only=False) for rank in range(2)]
    return {type(w).__name__: (w, a, b) for w, a, b in zip(layouts, *trained, strict=True)}


@pytest.mark.contract("DDP")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
def test_two_replicas_train_as_one_process(
    one_layout: sl.LayoutTensor, replicated: dict[str, tuple[Any, Any, Any]], assert_close: Check
) -> None:
    layout, one, other = replicated[type(one_layout).__name__]
    alone = Product(layout.clone())
    with sl.fallback("allow"):
        steps(alone, batches(layout.shape[1]))
    assert type(one) is type(layout)
    assert one.same_pattern(layout)
    assert torch.equal(one.detach().to_dense(), other.detach().to_dense())
    assert not torch.equal(one.detach().to_dense(), layout.to_dense())
    # an update is a gradient over its own size: what is lost there is relative to the rate
    assert_close(one.detach(), alone.weight.detach(), scale=layout.to_dense().norm().item() * 3)
