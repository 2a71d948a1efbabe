"""Sparse tensor layouts for PyTorch: build one, multiply it, take a softmax of it, hand it to
attention as the mask, train it.

>>> import torch, sparse_layouts as sl
>>> w = sl.bsr(torch.eye(64), block_size=16)
>>> torch.matmul(w, torch.ones(64, 2)).shape
torch.Size([64, 2])
"""

import gc
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch  # noqa: F401

# What torch has made stays: a collection meanwhile would look through it for 77 ms, in vain.
gc.freeze()
_root = Path(__file__).resolve().parent.parent
if not (_root / "sparse_layouts" / "kernels").is_dir() and (_root / "pyproject.toml").is_file():
    __path__.append(str(_root))  # a source checkout: dispatch/ and kernels/ lie beside this folder

__version__ = "0.1.0"

from sparse_layouts.band_masks import causal, sink_window, sliding_window
from sparse_layouts.bigbird_tensor import BigBirdTensor, bigbird
from sparse_layouts.bsr_factory import bsr
from sparse_layouts.bsr_tensor import BSRTensor
from sparse_layouts.csr_factory import csc, csr
from sparse_layouts.csr_tensor import CSCTensor, CSRTensor
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
from sparse_layouts.document_masks import document
from sparse_layouts.grouped_nm_tensor import GroupedNMTensor, grouped_nm
from sparse_layouts.layout_tensor import LayoutTensor
from sparse_layouts.local_stride_tensor import LocalStrideTensor, local_stride
from sparse_layouts.mask_algebra import without_counts
from sparse_layouts.mask_factories import bsr_mask, mask_from
from sparse_layouts.matrix_files import load_smtx
from sparse_layouts.matrix_market import load_mtx
from sparse_layouts.nm_factory import nm
from sparse_layouts.nm_tensor import NMTensor
from sparse_layouts.reordered_tensor import ReorderedTensor
from sparse_layouts.reordering import reorder
from sparse_layouts.safetensors_files import load_safetensors, save_safetensors
from sparse_layouts.sparsified_calls import sparsified
from sparse_layouts.sparsifiers import KeepAll, Magnitude, Random, Sparsifier, Threshold
from sparse_layouts.sparsify import sparsify_globally
from sparse_layouts.structured_sparsifiers import NM, Blockwise, SamePattern

# the ops, last: importing them registers their routes and kernels
from sparse_layouts import layout_routes, module_masks, shape_routes  # noqa: F401  isort: skip
from sparse_layouts import csr_masks, csr_slices, nm_routes  # noqa: F401  isort: skip
from sparse_layouts.kernels import block_matmul as _block_matmul  # noqa: F401  isort: skip
from sparse_layouts.kernels import block_softmax as _block_softmax  # noqa: F401  isort: skip
from sparse_layouts.kernels import csr_matmul as _csr_matmul  # noqa: F401  isort: skip
from sparse_layouts.kernels import csr_sddmm as _csr_sddmm  # noqa: F401  isort: skip
from sparse_layouts.kernels import csr_softmax as _csr_softmax  # noqa: F401  isort: skip
from sparse_layouts.kernels import grouped_nm as _grouped_nm  # noqa: F401  isort: skip
from sparse_layouts.kernels import nm_matmul as _nm_matmul  # noqa: F401  isort: skip
from sparse_layouts.kernels import nm_sddmm as _nm_sddmm  # noqa: F401  isort: skip
from sparse_layouts.kernels import reordered_products as _reordered  # noqa: F401  isort: skip
from sparse_layouts.kernels.block_matmul import recall as _recall  # noqa: F401  isort: skip
from sparse_layouts.kernels.nm_matmul import recall as _nm_recall  # noqa: F401  isort: skip
from sparse_layouts.kernels.block_attention.calls import attention  # isort: skip
from sparse_layouts.kernels.block_attention_fp8.operands import (  # isort: skip
    FP8Operand,
    quantize_fp8,
)
from sparse_layouts.kernels.linear_layers import linear  # isort: skip
from sparse_layouts.kernels.sddmm import sddmm  # isort: skip

if TYPE_CHECKING:
    from sparse_layouts.viewing.comparison import compare
    from sparse_layouts.viewing.explorer import explore
    from sparse_layouts.viewing.roofline import roofline

_LOOKING = {"compare": "comparison", "explore": "explorer", "roofline": "roofline"}


def __getattr__(name: str) -> Any:
    """What people look at is imported when it is first asked for."""
    if name not in _LOOKING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.viewing.{_LOOKING[name]}"), name)


gc.unfreeze()

__all__ = [
    "BSRTensor",
    "BigBirdTensor",
    "Blockwise",
    "CSCTensor",
    "CSRTensor",
    "DenseFallbackError",
    "DenseFallbackWarning",
    "FP8Operand",
    "GroupedNMTensor",
    "KeepAll",
    "LayoutTensor",
    "LocalStrideTensor",
    "Magnitude",
    "NM",
    "NMTensor",
    "Random",
    "ReorderedTensor",
    "SamePattern",
    "Sparsifier",
    "Threshold",
    "attention",
    "bigbird",
    "bsr",
    "bsr_mask",
    "causal",
    "compare",
    "csc",
    "csr",
    "document",
    "explain",
    "explore",
    "fallback",
    "grouped_nm",
    "kernel",
    "kernel_choice",
    "linear",
    "load_mtx",
    "load_safetensors",
    "load_smtx",
    "local_stride",
    "mask_from",
    "nm",
    "quantize_fp8",
    "reorder",
    "roofline",
    "route",
    "save_safetensors",
    "sddmm",
    "sink_window",
    "sliding_window",
    "sparsified",
    "sparsify_globally",
    "table",
    "trace",
    "without_counts",
]
