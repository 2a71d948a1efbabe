"""`sl.explain` and `sl.table`: what they say, in text and HTML, and that they run nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_layouts as sl
from sparse_layouts.dispatch import kernels_of
from sparse_layouts.dispatch.kernel_table import KERNELS

X = torch.ones(64, 3)
Q = torch.ones(1, 2, 64, 16)


@pytest.fixture
def w() -> sl.BSRTensor:
    return sl.bsr(torch.eye(64), block_size=16)


class NothingRuns(TorchDispatchMode):
    """Raises when an operator is reached that computes: anything but a view of a dense operand, and
    what has no memory.
    """

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        without_memory = torch.device((kwargs or {}).get("device") or "cpu").type == "meta"
        assert func.is_view or without_memory, f"{func} ran"
        return func(*args, **(kwargs or {}))


CALLS: dict[str, tuple[Callable[[Tensor], tuple[object, ...]], list[tuple[str, str]]]] = {
    "matmul": (lambda w: (torch.matmul, w, X), [("forward", "block_matmul")]),
    "mm": (lambda w: (torch.mm, w, X), [("forward", "block_matmul")]),
    "@": (lambda w: (torch.Tensor.__matmul__, w, X), [("forward", "block_matmul")]),
    "right": (lambda w: (torch.matmul, X.mT, w), [("forward", "block_matmul")]),
    "linear": (lambda w: (F.linear, X.mT, w), [("forward", "block_matmul")]),
    "softmax": (lambda w: (torch.softmax, w, -1), [("forward", "block_softmax")]),
    "sddmm": (lambda w: (sl.sddmm, X, X.mT, w.pattern), [("forward", "sddmm")]),
    "attention": (
        lambda w: (sl.attention, Q, Q, Q, sl.causal(64, block_size=16)),
        [("forward", "block_attention")],
    ),
    "attention with gradients": (
        lambda w: (sl.attention, *3 * [Q.clone().requires_grad_()], sl.causal(64, block_size=16)),
        [("forward", "block_attention"), ("gradients", "block_attention_backward")],
    ),
    "matmul with gradients": (
        lambda w: (torch.matmul, w.requires_grad_(), X.clone().requires_grad_()),
        [
            ("forward", "block_matmul"),
            ("gradient of the dense operand", "block_matmul"),
            ("gradient of the layout's values", "sddmm"),
        ],
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_kernel_is_named(name: str, w: sl.BSRTensor) -> None:
    make, ops = CALLS[name]
    said = sl.explain(*make(w))
    assert [(plan.purpose, plan.op) for plan in said.ops] == ops
    assert said.kernel == "cpu"
    text = said.text()
    for plan in said.ops:
        rows = kernels_of(plan.op)
        assert [v.kernel for v in plan.verdicts] == rows
        assert [v.chosen for v in plan.verdicts].count(True) == 1
        for row, verdict in zip(rows, plan.verdicts, strict=True):
            assert row.name in text
            assert row.source in text
            assert verdict.chosen or verdict.reason in text
    assert "works on cuda tensors, these are on cpu" in text


def test_attention_through_torch(w: sl.BSRTensor) -> None:
    mask = sl.causal(64, block_size=16)
    said = sl.explain(F.scaled_dot_product_attention, Q, Q, Q, attn_mask=mask)
    assert said.kernel == "cpu"
    assert said.ops[0].op == "block_attention"
    assert "BSRTensor[64, 64] bool" in repr(said)


@pytest.mark.parametrize("name", CALLS)
def test_nothing_runs(name: str, w: sl.BSRTensor) -> None:
    arguments = CALLS[name][0](w)
    with sl.trace() as steps, sl.fallback("error"):
        sl.explain(*arguments)
        sl.explain(torch.cumsum, w, 0)
        sl.explain(torch.neg, w)
    assert list(steps) == []
    if name in ("matmul", "mm", "linear", "softmax"):
        with NothingRuns():
            sl.explain(*arguments)


def test_a_missing_route(w: sl.BSRTensor) -> None:
    said = sl.explain(torch.cumsum, w, 0)
    assert said.route is None
    assert said.kernel == "dense fallback"
    assert said.dense_bytes == 64 * 64 * 4
    for part in (
        "torch.cumsum has no sparse",
        "@sl.route(torch.cumsum",
        "16.0 KiB",
        "policy 'warn'",
    ):
        assert part in repr(said)
    with sl.fallback("error"):
        assert "policy 'error'" in repr(sl.explain(torch.cumsum, w, 0))


def test_more_than_is_free_is_said() -> None:
    mask = sl.local_stride(2**20, block_size=1024, local_blocks=1, vert_stride=64, num_heads=64)
    said = sl.explain(torch.cumsum, mask, 0)
    assert said.dense_bytes == 64 * 2**40
    assert "It would raise: 64.0 TiB dense" in repr(said)


def test_what_every_layout_keeps(w: sl.BSRTensor) -> None:
    said = sl.explain(torch.neg, w)
    assert said.kernel == ""
    assert "works on the stored entries" in repr(said)
    assert "Densifying" not in repr(said)


def test_a_route_without_ops(w: sl.BSRTensor) -> None:
    said = sl.explain(torch.mul, w, 2)
    assert "scale_or_sample" in repr(said)
    assert "layout_routes.py" in said.route.place


def test_no_kernel_left(w: sl.BSRTensor) -> None:
    rows = KERNELS.rows["block_matmul"]
    KERNELS.rows["block_matmul"] = rows[:1]
    try:
        said = sl.explain(torch.matmul, w, X)
        assert said.kernel == "dense fallback"
        for part in (
            "no kernel, dense fallback",
            "works on cuda tensors",
            "Densifying costs 16.0 KiB",
        ):
            assert part in repr(said)
    finally:
        KERNELS.rows["block_matmul"] = rows


def test_a_choice_is_explained(w: sl.BSRTensor) -> None:
    with sl.kernel_choice(block_matmul="triton"):
        said = sl.explain(torch.matmul, w, X)
    assert "kernel_choice asks for 'triton'" in said.text()


def test_it_raises_what_the_call_would_raise(w: sl.BSRTensor) -> None:
    with pytest.raises(ValueError, match="64 and 63 must be equal"):
        sl.explain(torch.matmul, w, torch.ones(63, 2))
    with pytest.raises(TypeError, match="expected one dtype"):
        sl.explain(torch.matmul, w, X.double())


def test_no_layout_raises() -> None:
    with pytest.raises(TypeError, match=r"no argument of torch\.matmul\(Tensor\[64, 3\] float32"):
        sl.explain(torch.matmul, X, X.mT)


# --- HTML -----------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """Checks that tags close in order, and collects the text and the tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.data = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.data += data


@pytest.fixture
def nasty_kernel() -> Iterator[str]:
    reason = "<script>alert('x')</script> & more"

    @sl.kernel("block_matmul", requires=lambda facts: reason, name="<b>bold</b>")
    def nasty() -> None: ...

    yield reason
    nasty.unregister()


def test_html_is_escaped(w: sl.BSRTensor, nasty_kernel: str) -> None:
    for shown in (sl.explain(torch.matmul, w, X), sl.table(), sl.explain(torch.cumsum, w, 0)):
        page = Tags(shown._repr_html_())
        assert page.seen <= {
            "div",
            "p",
            "b",
            "pre",
            "code",
            "table",
            "thead",
            "tbody",
            "tr",
            "th",
            "td",
        }
    page = Tags(sl.explain(torch.matmul, w, X)._repr_html_())
    assert nasty_kernel in page.data
    assert "<b>bold</b>" in page.data
    assert "triton" in page.data
    assert "<b>bold</b>" in Tags(sl.table()._repr_html_()).data


def test_html_says_what_the_text_says(w: sl.BSRTensor) -> None:
    for said in (sl.explain(torch.matmul, w, X), sl.explain(torch.cumsum, w, 0)):
        shown = Tags(said._repr_html_()).data
        words = said.text().replace("-", " ").split()
        missing = [word for word in words if word not in shown]
        assert missing == []


def test_the_chosen_kernel_stands_out_in_html(w: sl.BSRTensor) -> None:
    shown = sl.explain(torch.matmul, w, X)._repr_html_()
    assert "><b>cpu</b></td>" in shown
    assert "><b>triton</b></td>" not in shown


# --- on a terminal, on another machine, for a program ---------------------------------------------


@pytest.mark.parametrize("width", [40, 80, 132])
@pytest.mark.parametrize("name", [*CALLS, "cumsum", "table", "trace"])
def test_it_fits_a_terminal(
    name: str, width: int, w: sl.BSRTensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    with sl.trace() as steps, sl.fallback("allow"):
        torch.cumsum(w @ torch.ones(64, 64), 0)
        torch.cumsum(w, 0)
    shown: object
    if name in CALLS:
        shown = sl.explain(*CALLS[name][0](w))
    else:
        others = {"cumsum": sl.explain(torch.cumsum, w, 0), "table": sl.table(), "trace": steps}
        shown = others[name]
    text = repr(shown)
    lines = text.splitlines()
    if name == "cumsum":  # the stub, to be pasted, stays whole
        lines = [line for line in lines if not line.startswith("      ")]
    assert max(map(len, lines)) <= width
    whole = shown.text() if hasattr(shown, "text") else ""  # type: ignore[attr-defined]
    assert not whole or set("".join(whole.split())) == set("".join(text.split()))


def test_code_to_paste_is_not_folded(w: sl.BSRTensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    assert "      def my_cumsum(input, *rest, **options):" in repr(sl.explain(torch.cumsum, w, 0))


def test_as_if_on_a_gpu(w: sl.BSRTensor) -> None:
    here = sl.explain(torch.matmul, w, X)
    there = here.on_gpu((9, 0))
    assert (here.kernel, there.kernel) == ("cpu", "triton_few_columns")
    assert "works on cpu tensors, these are on cuda" in there.text()
    assert there.route is here.route
    old = here.on_gpu((7, 5))
    assert old.kernel == "dense fallback"
    assert "needs compute capability 8.0 or newer, found 7.5" in old.text()
    assert "needs Triton 3.6 or newer, found 3.5.1" in here.on_gpu((9, 0), (3, 5, 1)).text()
    assert sl.explain(torch.cumsum, w, 0).on_gpu((9, 0)).kernel == "dense fallback"


@pytest.mark.parametrize(
    ("columns", "block", "capability", "kernel"),
    [
        (1, 64, (9, 0), "triton_few_columns"),
        (32, 128, (9, 0), "triton_few_columns"),
        (33, 64, (9, 0), "hopper_few_columns"),
        (64, 128, (9, 0), "hopper_few_columns"),
        (65, 64, (9, 0), "hopper"),
        (40, 32, (9, 0), "triton_few_columns"),
        (40, 64, (10, 0), "triton_few_columns"),
        (40, 512, (9, 0), "triton_few_columns"),  # a warpgroup has no registers for so many rows
    ],
)
def test_few_columns_as_if_on_a_gpu(
    columns: int, block: int, capability: tuple[int, int], kernel: str
) -> None:
    w = sl.bsr(torch.ones(512, 512, dtype=torch.bfloat16), block)
    x = torch.ones(columns, 512, dtype=torch.bfloat16)
    said = sl.explain(torch.nn.functional.linear, x, w)
    assert said.on_gpu(capability).kernel == kernel


@pytest.mark.parametrize(
    ("shape", "columns", "kernel"),
    [
        ((64, 4096), 2048, "triton_few_columns"),
        ((64, 4096), 2049, "hopper"),  # 17 tiles
        ((128, 4096), 1024, "triton_few_columns"),
        ((128, 4096), 2048, "hopper"),
        ((64, 512), 2048, "hopper"),  # nothing to cut
        ((64, 4096), 64, "triton_few_columns"),
        ((64, 512), 64, "hopper_few_columns"),  # nothing to cut
    ],
)
def test_few_long_rows_as_if_on_a_gpu(shape: tuple[int, int], columns: int, kernel: str) -> None:
    w = sl.bsr(torch.ones(shape, dtype=torch.bfloat16), 64)
    x = torch.ones(columns + 7 & -8, shape[1], dtype=torch.bfloat16)[:columns]
    said = sl.explain(torch.nn.functional.linear, x, w).on_gpu((9, 0))
    assert said.kernel == kernel
    if kernel == "hopper":
        assert "but for few and long block rows" in said.text()


def test_gradients_of_few_long_rows_as_if_on_a_gpu() -> None:
    w = sl.bsr(torch.ones(64, 4096, dtype=torch.bfloat16), 64).requires_grad_()
    x = torch.ones(2048, 4096, dtype=torch.bfloat16, requires_grad=True)
    said = sl.explain(torch.nn.functional.linear, x, w).on_gpu((9, 0))
    kernels = [v.kernel.name for plan in said.ops for v in plan.verdicts if v.chosen]
    assert kernels == ["triton_few_columns", "hopper", "hopper"]


@pytest.mark.parametrize(
    ("head_dim", "dtype", "capability", "kernel"),
    [
        (64, torch.bfloat16, (9, 0), "hopper"),
        (64, torch.bfloat16, (8, 0), "triton"),
        (64, torch.float32, (9, 0), "triton"),
        (20, torch.bfloat16, (9, 0), "triton"),  # rows of 40 bytes, which TMA cannot read
    ],
)
def test_attention_as_if_on_a_gpu(
    head_dim: int, dtype: torch.dtype, capability: tuple[int, int], kernel: str
) -> None:
    q = torch.ones(1, 1, 128, head_dim, dtype=dtype)
    mask = sl.causal(128, block_size=64)
    said = sl.explain(F.scaled_dot_product_attention, q, q, q, attn_mask=mask)
    assert said.on_gpu(capability).kernel == kernel


def test_as_json_says_what_the_text_says(w: sl.BSRTensor) -> None:
    said = sl.explain(torch.matmul, w, X)
    found = json.loads(json.dumps(said.as_json()))
    assert found["kernel"] == "cpu"
    assert [k["kernel"] for k in found["ops"][0]["kernels"] if k["chosen"]] == ["cpu"]
    assert found["dense_bytes"] == 0
    missing = sl.explain(torch.cumsum, w, 0).as_json()
    assert (missing["kernel"], missing["route"], missing["ops"]) == ("dense fallback", None, [])
    assert missing["dense_bytes"] == 64 * 64 * 4


# --- the tables -----------------------------------------------------------------------------------


def test_table_lists_every_row() -> None:
    text = sl.table().text()
    for op, rows in KERNELS.rows.items():
        assert op in text
        for row in rows:
            assert row.source in text
    for part in ("torch.matmul", "F.linear", "attn_mask=BSRTensor", "layout_times_dense"):
        assert part in text
