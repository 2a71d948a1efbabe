"""`python -m sparse_layouts explain`: a call in words, and one clear line for what makes none."""

from __future__ import annotations

import json

import pytest

from sparse_layouts.__main__ import main
from sparse_layouts.command_line import explain
from sparse_layouts.viewing.families import FAMILIES

SMALL = ["rows=64", "columns=128"]


@pytest.mark.parametrize("operation", explain.OPERATIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_operation_on_every_family(
    name: str, operation: str, capsys: pytest.CaptureFixture[str]
) -> None:
    family = FAMILIES[name]
    length = 1024 if name == "bigbird" else 256  # drawing needs room
    given = [f"seq_len={length}", *(["num_heads=1"] if "num_heads" in family.values({}) else [])]
    code = main(["explain", operation, name, *(given if family.is_mask else SMALL), "--gradients"])
    out, err = capsys.readouterr()
    assert code == 0
    assert not err
    assert out.startswith(f"layout: sl.{name}(")
    assert "chosen" in out or "computing it densely" in out or "softmax_of_groups" in out


def test_as_if_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "explain",
        "attention",
        "local-stride",
        "seq_len=256",
        "--dtype",
        "bfloat16",
        "--json",
    ]
    kernels = []
    for gpu in ([], ["--gpu", "9.0"], ["--gpu", "sm_80"], ["--gpu", "7.5"]):
        assert main([*command, *gpu]) == 0
        kernels.append(json.loads(capsys.readouterr().out)["kernel"])
    assert kernels == ["cpu", "hopper", "triton", "dense fallback"]


def test_functions_of_torch(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("torch.cumsum", "F.gelu", "torch.linalg.svd", "Tensor.exp"):
        assert main(["explain", name, "csr", *SMALL]) == 0
        assert "computing it densely" in capsys.readouterr().out
    assert main(["explain", "torch.neg", "csr", *SMALL]) == 0
    assert "kept by every layout" in capsys.readouterr().out


def test_gradients_are_explained_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "matmul", "bsr", *SMALL]) == 0
    assert "gradient" not in capsys.readouterr().out
    assert main(["explain", "matmul", "bsr", *SMALL, "--gradients"]) == 0
    assert "gradient of the layout's values: sddmm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["multiply", "bsr"], "no operation 'multiply'; there are matmul, rmatmul, linear"),
        (["os.system", "bsr"], "no operation 'os.system'"),
        (["torch.float32", "bsr"], "no operation 'torch.float32'"),
        (["matmul", "bsrr"], "no family 'bsrr'; there are local_stride"),
        (["matmul", "bsr", "blocks=3"], "bsr has no parameter 'blocks'; it has rows, columns"),
        (["matmul", "bsr", "density"], "expected NAME=VALUE, got 'density'"),
        (["matmul", "bsr", "density="], "expected NAME=VALUE, got 'density='"),
        (["matmul", "bsr", "density=x"], "density: expected a number, got 'x'"),
        (["matmul", "bsr", "rows=8", "rows=8"], "rows is given twice"),
        (["matmul", "bsr", "rows=0"], "expected rows and columns of at least 1, got 0"),
        (["matmul", "bsr", "density=3"], "density"),
        (["matmul", "nm", "n=4", "m=2"], "expected 1 <= n < m"),
        (["attention", "bigbird", "seq_len=100"], "does not divide seq_len 100"),
        (["attention", "causal", f"seq_len={10**23}"], "too large for this machine's memory"),
        (["matmul", "bsr", "rows=99999999", "columns=99999999"], "too large for this machine"),
        (["matmul", "bsr", "--dense-columns", "999999999999999"], "the operands: too large"),
        (["linear", "local_stride"], "takes a matrix, not one a head"),
        (["matmul", "bsr", "--gpu", "hopper"], "--gpu: expected a compute capability such as 9.0"),
        (["matmul", "bsr", "--dense-columns", "0"], "--dense-columns: at least 1, got 0"),
    ],
)
def test_a_wrong_command_line_gets_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert err.startswith("python -m sparse_layouts explain: ")
    assert message in err


def test_argparse_refuses_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["explain"], ["explain", "matmul", "bsr", "--dtype", "int8"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
    assert "invalid choice: 'int8'" in capsys.readouterr().err
