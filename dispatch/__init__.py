"""Routing of torch functions on layouts to kernels: two tables, a fallback policy, explain and
trace.

Knows torch, and of a layout only that it is one and can be made dense.
"""

from sparse_layouts.dispatch.explain import Explanation, Table, explain, table
from sparse_layouts.dispatch.fallback import (
    DenseFallbackError,
    DenseFallbackWarning,
    fall_back,
    permit,
)
from sparse_layouts.dispatch.kernel_table import (
    Facts,
    Kernel,
    capability_of,
    choose,
    facts_of,
    kernel,
    kernels_of,
    register_kernel,
    run,
)
from sparse_layouts.dispatch.layout import Layout, dense_bytes
from sparse_layouts.dispatch.routes import Route, Use, call_route, route
from sparse_layouts.dispatch.settings import Settings, current, fallback, kernel_choice, restored
from sparse_layouts.dispatch.tracing import Step, Trace, record, trace

__all__ = [
    "DenseFallbackError",
    "DenseFallbackWarning",
    "Explanation",
    "Facts",
    "Kernel",
    "Layout",
    "Route",
    "Settings",
    "Step",
    "Table",
    "Trace",
    "Use",
    "call_route",
    "choose",
    "current",
    "dense_bytes",
    "explain",
    "capability_of",
    "facts_of",
    "fall_back",
    "fallback",
    "kernel",
    "kernel_choice",
    "kernels_of",
    "permit",
    "record",
    "register_kernel",
    "restored",
    "route",
    "run",
    "table",
    "trace",
]
