"""The dense fallback: when it warns, what it says, when it is refused; settings and threads."""

from __future__ import annotations

import importlib
import threading
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import sparse_layouts as sl
from sparse_layouts.dispatch import current, fall_back, register_kernel, restored
from sparse_layouts.dispatch import fallback as fallback_setting
from sparse_layouts.dispatch.kernel_table import KERNELS

# the name in the package is the context manager
fallback_module = importlib.import_module("sparse_layouts.dispatch.fallback")


@pytest.fixture
def w() -> sl.BSRTensor:
    return sl.bsr(torch.eye(64), block_size=16)


def stub_in(message: str) -> str:
    """The code in a message: from the decorator to the body."""
    lines = message.splitlines()
    first = next(i for i, line in enumerate(lines) if line.lstrip().startswith("@sl."))
    indent = len(lines[first]) - len(lines[first].lstrip())
    return "\n".join(line[indent:] for line in lines[first : first + 3])


# --- policies -------------------------------------------------------------------------------------


def test_warn_says_what_is_missing_and_what_it_costs(w: sl.BSRTensor) -> None:
    with pytest.warns(sl.DenseFallbackWarning) as caught:
        result = torch.cumsum(w, 0)
    assert torch.equal(result, torch.cumsum(w.to_dense(), 0))
    (warning,) = caught
    text = str(warning.message)
    assert "torch.cumsum has no sparse implementation for input=BSRTensor" in text
    assert "16.0 KiB" in text  # 64 * 64 * 4 bytes
    assert "sl.fallback('allow')" in text
    assert warning.filename == __file__


def test_warn_is_once_a_call_site(w: sl.BSRTensor) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            torch.cumsum(w, 0)
        assert len(caught) == 1
        torch.cumsum(w, 0)
        assert len(caught) == 2
        assert caught[0].lineno != caught[1].lineno


def test_error(w: sl.BSRTensor) -> None:
    with (
        sl.fallback("error"),
        pytest.raises(sl.DenseFallbackError, match=r"no sparse implementation(.|\n)*16\.0 KiB"),
    ):
        torch.cumsum(w, 0)


def test_allow(w: sl.BSRTensor) -> None:
    with sl.fallback("allow"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(torch.cumsum(w, 0), torch.cumsum(w.to_dense(), 0))


def test_policies_nest_and_end(w: sl.BSRTensor) -> None:
    assert current().policy == "warn"
    with sl.fallback("error"):
        with sl.fallback("allow"):
            torch.cumsum(w, 0)
        assert current().policy == "error"
    assert current().policy == "warn"
    with pytest.raises(ZeroDivisionError), sl.fallback("allow"):
        raise ZeroDivisionError
    assert current().policy == "warn"


def test_a_policy_as_a_statement_holds_for_the_context() -> None:
    seen = []

    def run() -> None:
        sl.fallback("allow")
        seen.append(current().policy)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == ["allow"]
    assert current().policy == "warn"


def test_an_unknown_policy() -> None:
    with pytest.raises(ValueError, match="expected one of warn, error, allow; got 'silent'"):
        sl.fallback("silent")
    assert current().policy == "warn"


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["warn", "error", "allow"])
def test_more_than_is_free_raises_under_every_policy(
    policy: str, w: sl.BSRTensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fallback_module, "free_bytes", lambda device: 64 * 64 * 4 - 1)
    with (
        sl.fallback(policy),
        pytest.raises(
            sl.DenseFallbackError, match=r"needs 16\.0 KiB, and 16\.0 KiB are free on cpu"
        ),
    ):
        torch.cumsum(w, 0)
    monkeypatch.setattr(fallback_module, "free_bytes", lambda device: 64 * 64 * 4)
    with sl.fallback("allow"):
        torch.cumsum(w, 0)


def test_free_memory_is_known_here() -> None:
    free = fallback_module.free_bytes("cpu")
    assert free is None or 2**20 < free < 2**50
    assert fallback_module.free_bytes("mps") is None


def test_every_layout_of_the_call_counts(w: sl.BSRTensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback_module, "free_bytes", lambda device: 2 * 64 * 64 * 4 - 1)
    with sl.fallback("allow"), pytest.raises(sl.DenseFallbackError, match=r"32\.0 KiB"):
        torch.cat([w, w])


def test_a_missing_kernel_larger_than_memory_raises(
    w: sl.BSRTensor, monkeypatch: pytest.MonkeyPatch, no_matmul_kernel: None
) -> None:
    monkeypatch.setattr(fallback_module, "free_bytes", lambda device: 10)
    with sl.fallback("allow"), pytest.raises(sl.DenseFallbackError, match="10 B are free"):
        w @ torch.ones(64, 2)


# --- the stub to paste ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda w: torch.cumsum(w, 0),
        lambda w: w + 1,
        lambda w: torch.exp(w),
        lambda w: torch.matmul(w, w),
        lambda w: torch.nn.functional.gelu(w),
        lambda w: w.reshape(32, 128),
        lambda w: w.max(),
    ],
    ids=["cumsum", "add", "exp", "matmul", "gelu", "reshape", "max"],
)
def test_the_stub_compiles_registers_and_serves(
    call: Callable[[Tensor], Tensor], w: sl.BSRTensor
) -> None:
    with pytest.warns(sl.DenseFallbackWarning) as caught:
        call(w)
    stub = stub_in(str(caught[0].message))
    head, body = stub.rsplit("\n", 1)
    assert body.strip().startswith("...")
    namespace = {"torch": torch, "sl": sl, "F": torch.nn.functional, **vars(sl), "Tensor": Tensor}
    exec(f"{head}\n    return 'served'", namespace)
    (handler,) = [v for k, v in namespace.items() if k.startswith("my_")]
    try:
        with sl.fallback("error"):
            assert call(w) == "served"
    finally:
        handler.unregister()


@pytest.fixture
def no_matmul_kernel() -> Iterator[None]:
    """block_matmul without any kernel."""
    rows = KERNELS.rows["block_matmul"]
    KERNELS.rows["block_matmul"] = []
    KERNELS.chosen.clear()
    yield
    KERNELS.rows["block_matmul"] = rows
    KERNELS.chosen.clear()


def test_a_missing_kernel_computes_the_reference_and_says_so(
    w: sl.BSRTensor, no_matmul_kernel: None
) -> None:
    x = torch.randn(64, 2)
    with pytest.warns(sl.DenseFallbackWarning, match=r"block_matmul has no kernel") as caught:
        result = w @ x
    assert torch.equal(result, x)
    text = str(caught[0].message)
    assert "float32 on cpu" in text
    assert "16.0 KiB" in text
    head = stub_in(text).rsplit("\n", 1)[0]
    namespace = {"sl": sl}
    body = "    return x.new_full((1, 1, 64, x.shape[-1]), 7.0)"
    exec(f"{head}\n{body}", namespace)
    with sl.fallback("error"):
        assert bool((w @ x == 7).all())
    namespace["my_block_matmul"].unregister()


def test_integers_are_multiplied_densely(w: sl.BSRTensor) -> None:
    x = torch.arange(128, dtype=torch.int32).view(64, 2)
    with pytest.warns(sl.DenseFallbackWarning, match="torch.matmul"):
        assert torch.equal(w.to(torch.int32) @ x, x)


def test_a_missing_kernel_gives_every_reason(w: sl.BSRTensor) -> None:
    rows = KERNELS.rows["block_matmul"]
    KERNELS.rows["block_matmul"] = []
    register_kernel("block_matmul", "never", "no:where", lambda facts: "not on a Friday")
    try:
        with pytest.warns(sl.DenseFallbackWarning, match="never: not on a Friday"):
            w @ torch.ones(64, 2)
    finally:
        KERNELS.rows["block_matmul"] = rows
        KERNELS.chosen.clear()


# --- what never falls back ------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["warn", "allow"])
def test_in_place_without_a_route_raises(policy: str, w: sl.BSRTensor) -> None:
    with sl.fallback(policy), pytest.raises(TypeError, match=r"Tensor\.cumsum_.*sparse_mask"):
        w.cumsum_(0)
    assert torch.equal(w.to_dense(), torch.eye(64))


def test_out_of_a_layout_raises(w: sl.BSRTensor) -> None:
    with sl.fallback("allow"), pytest.raises(TypeError, match="which entries of a BSRTensor"):
        torch.add(torch.ones(64, 64), 1, out=w)


def test_arguments_in_lists_and_keywords_are_found(w: sl.BSRTensor) -> None:
    with sl.fallback("allow"):
        stacked = fall_back(torch.stack, ([w, torch.zeros(64, 64)],), {"dim": 1})
        keyed = fall_back(torch.add, (), {"input": w, "other": w})
    assert torch.equal(stacked, torch.stack([torch.eye(64), torch.zeros(64, 64)], 1))
    assert torch.equal(keyed, 2 * torch.eye(64))


# --- settings and threads -------------------------------------------------------------------------


def test_another_thread_has_the_defaults_until_restored() -> None:
    seen = []
    with fallback_setting("error"):
        held = current()

        def run() -> None:
            seen.append(current().policy)
            with restored(held):
                seen.append(current().policy)
            seen.append(current().policy)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert seen == ["warn", "error", "warn"]


def test_backward_on_another_thread_has_the_forwards_settings(
    w: sl.BSRTensor, no_matmul_kernel: None
) -> None:
    x = torch.randn(64, 2, requires_grad=True)
    with sl.fallback("allow"), sl.trace() as steps:
        total = (w.requires_grad_() @ x).sum()
    failures = []

    def run() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                total.backward()
            except Warning as warning:
                failures.append(warning)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert failures == []
    assert torch.equal(x.grad, torch.ones(64, 2))
    assert [s.what for s in steps] == ["block_matmul", "sddmm", "block_matmul"]
    assert [s.kernel for s in steps] == ["dense fallback", "cpu", "dense fallback"]


def test_the_policy_error_holds_in_the_backward(w: sl.BSRTensor) -> None:
    x = torch.randn(64, 2, requires_grad=True)
    with sl.fallback("error"):
        total = (w @ x).sum()
    rows = KERNELS.rows["block_matmul"]
    KERNELS.rows["block_matmul"] = []
    KERNELS.chosen.clear()
    try:
        with pytest.raises(sl.DenseFallbackError):
            total.backward()
    finally:
        KERNELS.rows["block_matmul"] = rows
        KERNELS.chosen.clear()
