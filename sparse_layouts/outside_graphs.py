"""How torch.compile meets functions that compute on the host: it calls them and traces nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def outside_graphs(function: F) -> F:
    """Marks a function that compiled code calls between two graphs.

    With fullgraph=True that is an error. `torch.compiler.disable` would import torch._dynamo, which
    takes seconds, for those who compile nothing; these are the marks that it leaves.
    """
    dynamo = torch._C._dynamo.eval_frame
    skip = dynamo._FrameAction.SKIP
    dynamo.set_code_exec_strategy(function.__code__, dynamo._FrameExecStrategy(skip, skip))
    marks = vars(function)
    marks["_torchdynamo_disable"] = True
    marks["_torchdynamo_disable_msg"] = "it computes on the host: call it before the compiled code"
    return function


def constant_in_graphs(function: F) -> F:
    """Marks a function of numbers alone, which gives the same every time: it is called while code
    is compiled, and what it returns is a constant of the graph.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return outside_graphs(function)
