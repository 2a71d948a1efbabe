"""A user's own layout: the one of README.md, registered, traced, trained, and taken back."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import scipy.sparse
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse_layouts as sl
from sparse_layouts.dispatch.kernel_table import kernels_of
from tests.sparse_layouts.user_csc import CscTensor, csc_times_dense

Check = Callable[..., None]
F64 = torch.float64
ROOT = Path(__file__).resolve().parent.parent.parent
LINES = 25  # of README's example, as the formatter leaves them


@pytest.fixture
def dense() -> Tensor:
    return torch.randn(24, 40, dtype=F64) * (torch.rand(24, 40) < 0.3)


@pytest.fixture
def w(dense: Tensor) -> CscTensor:
    return CscTensor.from_dense(dense)


@pytest.fixture
def routed() -> Iterator[Callable[..., Tensor]]:
    sl.route(torch.mm, input=CscTensor)(csc_times_dense)
    yield csc_times_dense
    csc_times_dense.unregister()


X = torch.linspace(-1, 1, 40 * 3, dtype=F64).view(40, 3)

# --- the page -------------------------------------------------------------------------------------


def code_of_file() -> str:
    """`user_csc.py` from its first import on."""
    text = (ROOT / "tests" / "sparse_layouts" / "user_csc.py").read_text(encoding="utf-8")
    return text[text.index("import torch") :]


def block_of_page() -> str:
    """README's block that defines the layout."""
    blocks = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.S | re.M
    )
    found = [block for block in blocks if "class CscTensor" in block]
    assert len(found) == 1, "README.md shows the user's layout once"
    return found[0]


def test_readme_shows_this_layout() -> None:
    assert block_of_page() == code_of_file()


def test_it_is_as_short_as_promised() -> None:
    assert len(code_of_file().splitlines()) <= LINES
    tree = ast.parse(code_of_file())
    assert [type(node).__name__ for node in tree.body] == [
        "Import",
        "ImportFrom",
        "ClassDef",
        "FunctionDef",
    ]  # imports and the route count


@pytest.mark.skipif(importlib.util.find_spec("ruff") is None, reason="needs ruff, of extra dev")
def test_the_formatter_leaves_it_as_it_is() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--line-length=100", "--stdin-filename=page.py"],
        input=code_of_file(),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == code_of_file()


def test_it_runs_by_itself(tmp_path: Path) -> None:
    program = code_of_file() + (
        "\n\nw = CscTensor.from_dense(torch.eye(4)).requires_grad_()\n"
        "x = torch.arange(8.0).view(4, 2)\n"
        "with sl.trace() as steps:\n"
        "    assert torch.equal(w @ x, x)\n"
        "assert [s.kernel for s in steps] == ['csc_times_dense']\n"
        "with sl.fallback('allow'):\n"
        "    (w @ x).sum().backward()\n"
        "assert type(w.grad) is CscTensor\n"
    )
    (tmp_path / "own_layout.py").write_text(program, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "own_layout.py")],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


# --- what it computes -----------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(24, 40), (0, 40), (24, 0), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_scipy_and_torch_agree(
    dtype: torch.dtype,
    shape: tuple[int, int],
    density: float,
    routed: object,
    assert_close: Check,
) -> None:
    dense = torch.randn(shape, dtype=dtype) * (torch.rand(shape) < density)
    w = CscTensor.from_dense(dense)
    assert torch.equal(w.to_dense(), dense)
    assert w.nnz == int((dense != 0).sum())
    x = torch.randn(shape[1], 3, dtype=dtype)
    with sl.fallback("error"):
        for operand in (x, x[:, ::2], torch.randn(3, shape[1], dtype=dtype).mT, x[:, :0]):
            assert_close(w @ operand, dense @ operand)


def test_fields_are_those_of_scipy(w: CscTensor, dense: Tensor) -> None:
    expected = scipy.sparse.csc_array(dense.numpy())
    for found, wanted in zip(
        w.inner_tensors(), (expected.data, expected.indices, expected.indptr), strict=True
    ):
        assert torch.equal(found, torch.from_numpy(wanted))
    assert (w.to_scipy() != expected).nnz == 0


def test_nan_is_multiplied_as_a_sparse_product_does(w: CscTensor, routed: object) -> None:
    x = X.clone()
    x[7] = torch.nan
    stored = w.to_dense()[:, 7] != 0
    found = (w @ x).isnan().any(1)
    assert torch.equal(found, stored)


def test_what_scipy_does_not_take_is_declined(w: CscTensor, routed: object) -> None:
    assert sl.explain(torch.mm, w, X).route is not None
    for dtype in (torch.float16, torch.bfloat16):
        half, x = w.to(dtype), X.to(dtype)
        with pytest.warns(sl.DenseFallbackWarning, match="CscTensor"):
            assert torch.equal(half @ x, half.to_dense() @ x)
    with sl.fallback("allow"), pytest.raises(RuntimeError, match="dtype"):
        w @ X.float()  # as torch
    on_meta = w.to("meta")
    with sl.fallback("allow"):
        assert (on_meta @ X.to("meta")).shape == (24, 3)


def test_every_face_takes_the_route(w: CscTensor, dense: Tensor, routed: object) -> None:
    with sl.fallback("error"), sl.trace() as steps:
        results = [torch.mm(w, X), w @ X, w.matmul(X), F.linear(X.mT, w).mT, w.mm(X)]
    assert {s.kernel for s in steps} == {"csc_times_dense"}
    assert len(steps) == len(results)
    for result in results:
        assert torch.equal(result, results[0])


# --- registering, unregistering, overriding -------------------------------------------------------


def test_unregistered_and_registered_again(w: CscTensor, dense: Tensor) -> None:
    def seen() -> tuple[str, list[str]]:
        with sl.trace() as steps, sl.fallback("allow"):
            assert torch.allclose(w @ X, dense @ X)
        return repr(sl.explain(torch.mm, w, X)), [s.kernel for s in steps]

    text, kernels = seen()
    assert "no sparse implementation for input=CscTensor" in text
    assert "@sl.route(torch.mm, input=CscTensor)" in text
    assert kernels == ["dense fallback"]
    sl.route(torch.mm, input=CscTensor)(csc_times_dense)
    text, kernels = seen()
    assert "route torch.mm(input=CscTensor)" in text
    assert "tests.sparse_layouts.user_csc:csc_times_dense" in text
    assert kernels == ["csc_times_dense"]
    assert "csc_times_dense" in repr(sl.table())
    csc_times_dense.unregister()
    assert seen()[1] == ["dense fallback"]
    assert "csc_times_dense" not in repr(sl.table())


def test_a_built_in_kernel_is_overridden_for_one_call() -> None:
    w, x = sl.bsr(torch.eye(64), 16), torch.ones(64, 2)

    def mine(values: Tensor, pattern: object, x: Tensor, **options: object) -> Tensor:
        return x.new_full((x.shape[0], x.shape[1], 64, x.shape[-1]), 7.0)

    built_in = sl.explain(torch.matmul, w, x).kernel
    sl.kernel("block_matmul", name="mine")(mine)
    try:
        with sl.kernel_choice(op="block_matmul", kernel=built_in):
            with sl.trace() as steps, sl.kernel_choice(op="block_matmul", kernel="mine"):
                explained = sl.explain(torch.matmul, w, x)
                assert bool((w @ x == 7).all())
            assert explained.kernel == "mine"
            assert "kernel_choice asks for 'mine'" in explained.text()
            assert [(s.what, s.kernel) for s in steps] == [("block_matmul", "mine")]
            assert torch.equal(w @ x, x)
            assert sl.explain(torch.matmul, w, x).kernel == built_in
    finally:
        mine.unregister()
    assert "mine" not in [row.name for row in kernels_of("block_matmul")]
    assert torch.equal(w @ x, x)


# --- training -------------------------------------------------------------------------------------


def test_gradients(w: CscTensor, dense: Tensor, routed: object, assert_close: Check) -> None:
    w.requires_grad_()
    x, expected_x = (X.clone().requires_grad_() for _ in range(2))
    expected = dense.clone().requires_grad_()
    with sl.fallback("allow"), sl.trace() as steps:
        (w @ x).square().sum().backward()
    (expected @ expected_x).square().sum().backward()
    assert [s.kernel for s in steps] == ["csc_times_dense", "dense fallback"]
    assert type(w.grad) is CscTensor
    assert w.grad.same_pattern(w)
    assert_close(w.grad, expected.grad * (dense != 0))
    assert_close(x.grad, expected_x.grad)
    with sl.fallback("allow"):
        assert torch.autograd.gradcheck(lambda v: w.detach() @ v, x, fast_mode=True)


def test_it_trains(w: CscTensor, dense: Tensor, routed: object, assert_close: Check) -> None:
    model = nn.Linear(40, 24, dtype=F64)
    twin = nn.Linear(40, 24, dtype=F64)
    model.weight, twin.weight = nn.Parameter(w), nn.Parameter(dense.clone())
    twin.bias = nn.Parameter(model.bias.detach().clone())
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (model, twin)]
    x, target = torch.randn(16, 40, dtype=F64), torch.randn(16, 24, dtype=F64)
    losses = []
    with sl.fallback("allow"), sl.trace() as steps:
        for _ in range(10):
            for each, optimizer in zip((model, twin), optimizers, strict=True):
                optimizer.zero_grad()
                loss = F.mse_loss(each(x), target)
                loss.backward()
                if each is twin:
                    twin.weight.grad *= dense != 0
                optimizer.step()
                losses.append(loss.item())
    assert type(model.weight.data) is CscTensor
    assert torch.equal(model.weight.to_dense() != 0, dense != 0)
    # weight decay moves stored entries alone, as zero times anything is zero
    assert_close(model.weight.detach(), twin.weight.detach() * (dense != 0))
    assert losses[-2] < losses[0]
    assert sum(s.kernel == "csc_times_dense" for s in steps) == 10
