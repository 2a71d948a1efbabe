"""The tensors of a state dict as a safetensors file wants them: plain, contiguous, each once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_layouts.layout_tensor import LayoutTensor


class TensorStore:
    """The tensors that go into a file, each once, under keys that no two share.

    `names` are those that tensors of layouts must not get.
    """

    def __init__(self, names: set[str]) -> None:
        self.reserved = set(names)
        self.tensors: dict[str, Tensor] = {}
        self.keys: dict[Any, str] = {}

    def add_layout(self, name: str, layout: LayoutTensor) -> dict[str, str]:
        """Adds a layout's tensors; their keys by field."""
        keys = {}
        for field, tensor in zip(layout.fields, layout.inner_tensors(), strict=True):
            if tensor is not None:
                key = f"{name}.{field}"
                while key in self.reserved:
                    key += "_"
                keys[field] = self.add(tensor, key, f"{name!r}, field {field!r}")
                self.reserved.add(key)
        return keys

    def add(self, tensor: Tensor, key: str, what: str) -> str:
        """The key under which a tensor is stored: `key`, or that of the same tensor."""
        _check_plain(tensor, what)
        identity = _identity(tensor)
        if identity not in self.keys:
            self.keys[identity] = key
            self.tensors[key] = tensor.detach()
        return self.keys[identity]

    def separate(self) -> dict[str, Tensor]:
        """The tensors by key, contiguous, and none in memory that another one uses too."""
        packed = {
            key: tensor.resolve_conj().resolve_neg().contiguous()
            for key, tensor in self.tensors.items()
        }
        end, device = 0, None
        for key in sorted(packed, key=lambda k: (str(packed[k].device), packed[k].data_ptr())):
            tensor = packed[key]
            if tensor.numel() and tensor.device == device and tensor.data_ptr() < end:
                packed[key] = tensor.clone()
            if tensor.numel():
                end = max(end if tensor.device == device else 0, tensor.data_ptr() + tensor.nbytes)
                device = tensor.device
        return packed


def _identity(tensor: Tensor) -> Any:
    """What two tensors have in common if they are the same entries of the same memory."""
    if not tensor.numel():
        return id(tensor)  # no memory to compare
    start = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
    view = tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg()
    return tensor.device, start, view


def _check_plain(tensor: Any, what: str) -> None:
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        kind = str(tensor.layout) if isinstance(tensor, Tensor) else type(tensor).__name__
        hint = "; sl.bsr and sl.csr make layouts of torch's sparse tensors"
        raise TypeError(
            f"save_safetensors: {what}: expected a layout or a dense tensor, got {kind}"
            f"{hint if isinstance(tensor, Tensor) else '; torch.save stores other objects'}"
        )
    if type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
        raise TypeError(
            f"save_safetensors: {what}: expected a layout or a plain tensor, got "
            f"{type(tensor).__name__}, of which the file would keep the entries alone; pass those, "
            "or use torch.save"
        )
    if tensor.is_meta:
        raise ValueError(
            f"save_safetensors: {what}: expected a tensor with data, got one on the meta device"
        )
