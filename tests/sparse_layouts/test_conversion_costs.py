"""What conversions share, that nothing is made dense, and what they refuse."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import Tensor

import sparse_layouts as sl
from tests.sparse_layouts.conversion_cases import address, random_matrix, scipy_blocks

pytestmark = pytest.mark.filterwarnings("ignore:Sparse")

# --- what shares memory: every line of the table --------------------------------------------------


NO_COPY: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Any]]] = {
    "scipy csr -> sl.csr": (lambda x: scipy.sparse.csr_array(x.numpy()), sl.csr),
    "scipy csc -> sl.csc": (lambda x: scipy.sparse.csc_array(x.numpy()), sl.csc),
    "scipy bsr -> sl.bsr": (lambda x: scipy_blocks(x), sl.bsr),
    "torch csr -> sl.csr": (Tensor.to_sparse_csr, sl.csr),
    "torch csc -> sl.csc": (Tensor.to_sparse_csc, sl.csc),
    "torch bsr -> sl.bsr": (lambda x: x.to_sparse_bsr((4, 8)), sl.bsr),
    "torch bsc -> sl.bsr": (lambda x: x.to_sparse_bsc((4, 8)), sl.bsr),
    "sl.csr -> scipy": (sl.csr, lambda w: w.to_scipy()),
    "sl.csc -> scipy": (sl.csc, lambda w: w.to_scipy()),
    "sl.bsr -> scipy": (lambda x: sl.bsr(x, (4, 8)), lambda w: w.to_scipy()),
    "sl.csr -> torch": (sl.csr, lambda w: w.to_torch_sparse()),
    "sl.csc -> torch": (sl.csc, lambda w: w.to_torch_sparse()),
    "sl.bsr -> torch": (lambda x: sl.bsr(x, (4, 8)), lambda w: w.to_torch_sparse()),
    "sl.csr -> mT": (sl.csr, lambda w: w.mT),
    "sl.csc -> mT": (sl.csc, lambda w: w.mT),
    "sl.bsr -> mT": (lambda x: sl.bsr(x, (4, 8)), lambda w: w.mT),
    "sl.nm -> mT": (lambda x: sl.nm(x, 2, 4), lambda w: w.mT),
    "sl.grouped_nm -> mT": (lambda x: sl.grouped_nm(x, 2, 4, 2), lambda w: w.mT),
}
COPY: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Any]]] = {
    "dense -> sl.csr": (lambda x: x, sl.csr),
    "dense -> sl.bsr": (lambda x: x, lambda x: sl.bsr(x, (24, 40))),
    "scipy csr -> sl.csc": (lambda x: scipy.sparse.csr_array(x.numpy()), sl.csc),
    "scipy csr -> sl.bsr": (
        lambda x: scipy.sparse.csr_array(x.numpy()),
        lambda x: sl.bsr(x, (4, 8)),
    ),
    "torch bsr -> sl.csr": (lambda x: x.to_sparse_bsr((4, 8)), sl.csr),
    "sl.csr -> sl.csc": (sl.csr, sl.csc),
    "sl.csr -> sl.bsr": (sl.csr, lambda w: sl.bsr(w, (4, 8))),
    "sl.bsr -> sl.csr": (lambda x: sl.bsr(x, (4, 8)), sl.csr),
    "sl.nm -> scipy": (lambda x: sl.nm(x, 2, 4), lambda w: w.to_scipy()),
    "sl.grouped_nm -> scipy": (lambda x: sl.grouped_nm(x, 2, 4, 2), lambda w: w.to_scipy()),
}


def values_at(x: Any) -> int:
    if isinstance(x, sl.LayoutTensor):
        return address(x.stored_values)
    if isinstance(x, Tensor):
        return address(x if x.layout == torch.strided else x.values())
    return address(x.data)


def as_dense(x: Any) -> Tensor:
    return x.to_dense() if isinstance(x, Tensor) else torch.from_numpy(x.toarray())


@pytest.mark.parametrize("name", NO_COPY)
def test_values_are_shared(name: str) -> None:
    start, convert = NO_COPY[name]
    source = start(random_matrix())
    made = convert(source)
    expected = as_dense(source).mT if name.endswith("mT") else as_dense(source)
    assert torch.equal(as_dense(made), expected)
    assert values_at(made) == values_at(source)
    if isinstance(made, sl.LayoutTensor):  # writing shows on the other side
        made.mul_(2)
        twice = as_dense(source).mT if name.endswith("mT") else as_dense(source)
        assert torch.equal(twice, 2 * expected)


@pytest.mark.parametrize("name", COPY)
def test_values_are_not_shared(name: str) -> None:
    start, convert = COPY[name]
    source = start(random_matrix())
    made = convert(source)
    before = as_dense(source).clone()
    assert torch.equal(as_dense(made), as_dense(source))
    assert values_at(made) != values_at(source)
    if isinstance(made, sl.LayoutTensor):
        made.mul_(2)
    else:
        made.data *= 2
    assert torch.equal(as_dense(source), before)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_lists_are_shared(index: torch.dtype) -> None:
    dense = random_matrix()
    source = sl.csr(dense)
    source = source.map_inner(lambda t: t.to(index), source.stored_values)
    for there in (source.to_scipy(), source.to_torch_sparse()):
        again = sl.csr(there)
        assert [t.data_ptr() for t in again.inner_tensors()] == [
            t.data_ptr() for t in source.inner_tensors()
        ]
    blocks = scipy_blocks(dense)
    made = sl.bsr(blocks)
    assert address(made.col_indices()) == address(blocks.indices)
    assert address(made.to_scipy().indices) == address(blocks.indices)


def test_blocks_in_another_order_are_copied_to_scipy() -> None:
    w = sl.bsr(random_matrix(), (4, 8)).mT
    assert values_at(w.to_scipy()) != values_at(w)
    assert np.array_equal(w.to_scipy().toarray(), w.to_dense().numpy())


@pytest.mark.parametrize("make", [sl.csr, sl.csc, sl.bsr], ids=["csr", "csc", "bsr"])
def test_read_only_values_are_copied(make: Any) -> None:
    form = make.__name__
    source = getattr(scipy.sparse, f"{form}_array")(random_matrix().numpy())
    before = source.toarray()
    source.data.flags.writeable = False
    made = make(source)
    made.mul_(2)
    assert np.array_equal(source.toarray(), before)


# --- nothing is made dense ------------------------------------------------------------------------


HUGE = """
    import resource, numpy as np, scipy.sparse, torch, sparse_layouts as sl

    size, block = 200_000, 32
    rng = np.random.default_rng(0)
    at = rng.integers(size, size=(2, 40))
    listed = scipy.sparse.coo_array((rng.random(40), tuple(at)), shape=(size, size))
    torch.ones(2, requires_grad=True).sum().backward()  # autograd's threads
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    # of a dense matrix not even its bits fit in
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))

    def check(found):
        found = scipy.sparse.csr_array(found)
        found.eliminate_zeros()
        assert found.shape == listed.shape
        assert abs(found - listed.tocsr()).max() == 0

    csr = sl.csr(listed)
    in_torch = csr.to_torch_sparse()
    sources = [csr, sl.csc(listed), sl.bsr(csr, block), csr.mT.mT, listed, csr.to_scipy(), in_torch]
    sources += [sl.csc(csr).to_scipy(), sl.bsr(csr, block).to_scipy(), in_torch.to_sparse()]
    sources += [sl.bsr(csr, block).to_torch_sparse()]
    for source in sources:
        for made in (sl.csr(source), sl.csc(source), sl.bsr(source, block), sl.bsr(source, 64)):
            check(made.to_scipy())
            torch_form = made.to_torch_sparse()
            assert torch_form.shape == made.shape
    w = csr.clone().requires_grad_()
    sl.bsr(sl.csc(w), block).values().sum().backward()
    assert w.grad.values().eq(1).all()
    for pattern in (csr.pattern, sl.csc(csr).pattern, sl.bsr(csr, 64).pattern):
        mask = sl.mask_from(pattern, block)
        assert mask.nnz == pattern.nnz
        assert sl.csr(mask).nnz == pattern.nnz
    assert sl.mask_from(listed.astype(bool), block).nnz == csr.nnz
    assert sl.mask_from(in_torch.to_sparse().bool(), block).nnz == csr.nnz
    try:
        csr.to_dense()
    except RuntimeError:
        print("ok")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc for its memory")
def test_a_matrix_that_would_not_fit_as_a_dense_one() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(HUGE)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "ok"


# --- what cannot be converted ---------------------------------------------------------------------


W = sl.csr(torch.eye(8))
WRONG: dict[str, tuple[Callable[[], Any], type, str]] = {
    "keep of a layout": (
        lambda: sl.bsr(W, 4, keep=sl.Magnitude(0.5)),
        ValueError,
        r"has chosen already: CSRTensor.*\(densify it first\)",
    ),
    "keep of scipy": (
        lambda: sl.bsr(scipy.sparse.eye_array(8), 4, keep=sl.Magnitude(0.5)),
        ValueError,
        r"has chosen already",
    ),
    "a mask layout as values": (lambda: sl.bsr(W.pattern, 4), TypeError, r"sl\.mask_from makes"),
    "a mask for n:m": (lambda: sl.nm(W.pattern, 2, 4), TypeError, r"got torch\.bool"),
    "a mask for n:m:g": (lambda: sl.grouped_nm(W.pattern, 2, 4, 1), TypeError, r"got torch\.bool"),
    "scipy bool as values": (
        lambda: sl.bsr(scipy.sparse.eye_array(8, dtype=bool), 4),
        TypeError,
        r"sl\.mask_from makes",
    ),
    "values as a mask": (
        lambda: sl.mask_from(W, 4),
        TypeError,
        r"expected a mask, got CSRTensor.*w\.pattern",
    ),
    "scipy values as a mask": (
        lambda: sl.mask_from(scipy.sparse.eye_array(8), 4),
        TypeError,
        r"got scipy's float64.*astype\(bool\)",
    ),
    "torch values as a mask": (
        lambda: sl.mask_from(torch.eye(8).to_sparse(), 4),
        TypeError,
        r"got torch\.float32 of torch\.sparse_coo.*sl\.csr\(x\)\.pattern",
    ),
    "a sparse batch as a mask": (
        lambda: sl.mask_from(torch.ones(2, 4, 4, dtype=torch.bool).to_sparse(), 4),
        ValueError,
        r"convert each sample for itself",
    ),
    "a scipy vector as a mask": (
        lambda: sl.mask_from(scipy.sparse.coo_array(np.ones(3, dtype=bool)), 4),
        ValueError,
        r"expected a matrix, got shape \(3,\)",
    ),
    "a scipy vector": (
        lambda: sl.bsr(scipy.sparse.coo_array(np.ones(3)), 1),
        ValueError,
        r"bsr: expected a matrix, got shape \(3,\)",
    ),
    "sizes that do not divide": (
        lambda: sl.bsr(W, 3),
        ValueError,
        r"does not divide the matrix \(8, 8\) of CSRTensor.*pad it to \(9, 9\).*resize\(\(9, 9\)\)",
    ),
    "sizes of scipy that do not divide": (
        lambda: sl.bsr(scipy.sparse.eye_array(8)),
        ValueError,
        r"\(32, 32\) does not divide the matrix \(8, 8\) of dia_array",
    ),
    "heads": (
        lambda: sl.csr(sl.nm(torch.randn(2, 4, 8), 2, 4)),
        ValueError,
        r"expected a matrix, got NMTensor.*convert each one for itself",
    ),
    "blocks of a layout": (
        lambda: sl.bsr_mask(W.pattern, 4),
        TypeError,
        r"got CSRTensor; sl\.mask_from takes a mask of entries",
    ),
    "blocks of torch": (
        lambda: sl.bsr_mask(torch.eye(4).bool().to_sparse(), 4),
        TypeError,
        r"a tensor of torch\.sparse_coo.*x\.to_dense\(\)",
    ),
    "a list for n:m:g": (lambda: sl.grouped_nm([[1.0]], 1, 2, 1), TypeError, r"got list"),
    "scipy numbers that torch lacks": (
        lambda: sl.bsr(scipy.sparse.csr_array(np.eye(4, dtype=np.longdouble)), 2),
        TypeError,
        r"bsr: expected an array of numbers, got numpy's",
    ),
    "torch gradient": (
        lambda: sl.bsr(torch.eye(4).to_sparse_csr().requires_grad_(), 2),
        ValueError,
        r"cannot be followed",
    ),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_what_cannot_be_converted(case: tuple[Callable[[], Any], type, str]) -> None:
    call, error, text = case
    with pytest.raises(error, match=f"(?s){text}"):
        call()


@pytest.mark.parametrize(
    ("crow", "col", "text"),
    [
        ([0, 2], [1, 0], r"expected ascending (columns|rows)"),
        ([0, 2], [0, 7], r"from 0 to 1"),
        ([0, 3], [0, 1], r"the last offset to be 2"),
        ([0, 2], [1, 1], r"once"),
    ],
)
@pytest.mark.parametrize("form", ["bsr", "bsc"])
def test_broken_lists_of_blocks(form: str, crow: Any, col: Any, text: str) -> None:
    make = torch.sparse_bsr_tensor if form == "bsr" else torch.sparse_bsc_tensor
    shape = (4, 8) if form == "bsr" else (8, 4)
    lists = (torch.tensor(crow), torch.tensor(col))
    broken = make(*lists, torch.ones(2, 4, 4), shape, check_invariants=False)
    with pytest.raises(ValueError, match=f"bsr: (col|crow|row|ccol)_indices: .*{text}"):
        sl.bsr(broken)


def test_a_device_is_where_the_result_goes() -> None:
    for source in (W, W.to_scipy(), W.to_torch_sparse()):
        assert sl.bsr(source, 4, device="meta").device.type == "meta"
    for source in (W.pattern, W.to_scipy().astype(bool)):
        assert sl.mask_from(source, 4, device="meta").device.type == "meta"
