"""Sparse tensor layouts for PyTorch: build one, multiply it, take a softmax of it, hand it to
attention as the mask, train it.

>>> import torch, sparse_layouts as sl
>>> w = sl.bsr(torch.eye(64), block_size=16)
>>> torch.matmul(w, torch.ones(64, 2)).shape
torch.Size([64, 2])
"""

from pathlib import Path

_root = Path(__file__).resolve().parent.parent
if not (_root / "sparse_layouts" / "kernels").is_dir() and (_root / "pyproject.toml").is_file():
    __path__.append(str(_root))  # a source checkout: dispatch/ and kernels/ lie beside this folder

__version__ = "0.1.0"

from sparse_layouts.bsr_factory import bsr
from sparse_layouts.bsr_tensor import BSRTensor
from sparse_layouts.dispatch import (
    DenseFallbackError,
    DenseFallbackWarning,
    explain,
    fallback,
    kernel,
    kernel_choice,
    route,
    table,
    trace,
)
from sparse_layouts.layout_tensor import LayoutTensor
from sparse_layouts.local_stride_tensor import LocalStrideTensor, local_stride
from sparse_layouts.mask_algebra import without_counts
from sparse_layouts.mask_factories import (
    bsr_mask,
    causal,
    document,
    mask_from,
    sink_window,
    sliding_window,
)
from sparse_layouts.sparsifiers import Magnitude

# the ops, last: importing them registers their routes and kernels
from sparse_layouts import layout_routes  # noqa: F401  isort: skip
from sparse_layouts.kernels import block_matmul as _block_matmul  # noqa: F401  isort: skip
from sparse_layouts.kernels import block_softmax as _block_softmax  # noqa: F401  isort: skip
from sparse_layouts.kernels.block_attention import attention  # isort: skip
from sparse_layouts.kernels.sddmm import sddmm  # isort: skip

__all__ = [
    "BSRTensor",
    "DenseFallbackError",
    "DenseFallbackWarning",
    "LayoutTensor",
    "LocalStrideTensor",
    "Magnitude",
    "attention",
    "bsr",
    "bsr_mask",
    "causal",
    "document",
    "explain",
    "fallback",
    "kernel",
    "kernel_choice",
    "local_stride",
    "mask_from",
    "route",
    "sddmm",
    "sink_window",
    "sliding_window",
    "table",
    "trace",
    "without_counts",
]
