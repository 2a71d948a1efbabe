"""Launching a compiled Triton kernel again without the work that a launch through Triton repeats.

Triton binds, specialises and checks every argument of every launch: 70 to 190 us of one server's
CPU for the kernels of attention (2026-11-26). A :class:`PackedLaunch` keeps the kernel's parameters
as the driver takes them, in one buffer, in which only addresses change: 6 us.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# how parameters of these kinds are packed, by Triton's names of types
_CODES = {"i32": "<i", "u32": "<I", "i64": "<q", "u64": "<Q", "fp32": "<f", "f32": "<f"}
_MAP_BYTES = 128
# names from the CUDA driver's header, cuda.h
_PARAMETER_BUFFER, _PARAMETER_BUFFER_SIZE, _PARAMETERS_END = 1, 2, 0
_MAP_DTYPES = {torch.int32: 3, torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}
_MAP_DTYPES[torch.float8_e4m3fn] = 0  # copied as bytes
_MAP_PROMOTION_128 = 2
_MAY_BEGIN_EARLY = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
# addresses that a described tensor may have before older ones are forgotten
_MAPS_KEPT = 64


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, of a kind whose value is a number."""

    _fields_ = (
        ("id", ctypes.c_int),
        ("padding", ctypes.c_char * 4),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    )


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("number", ctypes.c_uint),
    )


@functools.cache
def _driver() -> Any:
    """The CUDA driver's library, with the types of what is called here."""
    library = ctypes.CDLL("libcuda.so.1")
    pointer, unsigned = ctypes.c_void_p, ctypes.c_uint
    library.cuLaunchKernel.argtypes = [pointer, *[unsigned] * 7, *[pointer] * 3]
    library.cuLaunchKernelEx.argtypes = [ctypes.POINTER(_Config), *[pointer] * 3]
    library.cuTensorMapEncodeTiled.argtypes = [
        pointer,
        ctypes.c_int,
        unsigned,
        *[pointer] * 5,
        *[ctypes.c_int] * 4,
    ]
    return library


def _checked(what: str, status: int) -> None:
    if status != 0:
        raise RuntimeError(f"{what} failed with the CUDA driver's error {status}")


class _Map:
    """A tensor map's parameter: how the copy engine reads a tensor, but for its address. `compiled`
    is what Triton says of it: the box that is moved at once, and its swizzle.
    """

    def __init__(self, descriptor: Any, offset: int, compiled: Mapping[str, Any]) -> None:
        rank, size = len(descriptor.shape), descriptor.base.element_size()
        self.offset = offset
        self.rank = rank
        self.dtype = _MAP_DTYPES[descriptor.base.dtype]
        self.swizzle = compiled["swizzle"]
        inner_first = [values[::-1] for values in (descriptor.shape, compiled["block_size"])]
        self.sizes = (ctypes.c_uint64 * rank)(*inner_first[0])
        self.box = (ctypes.c_uint32 * rank)(*inner_first[1])
        steps = [step * size for step in descriptor.strides[:-1]][::-1]
        self.strides = (ctypes.c_uint64 * (rank - 1))(*steps)
        self.element_strides = (ctypes.c_uint32 * rank)(*[1] * rank)
        self.known: dict[int, bytes] = {}

    def encode(self, address: int) -> bytes:
        """The map of a tensor that begins at `address`."""
        room = ctypes.create_string_buffer(2 * _MAP_BYTES)
        start = -(-ctypes.addressof(room) // 64) * 64  # the driver wants 64-byte boundaries
        status = _driver().cuTensorMapEncodeTiled(
            start,
            self.dtype,
            self.rank,
            address,
            self.sizes,
            self.strides,
            self.box,
            self.element_strides,
            0,
            self.swizzle,
            _MAP_PROMOTION_128,
            0,
        )
        _checked("cuTensorMapEncodeTiled", status)
        if len(self.known) >= _MAPS_KEPT:
            self.known.clear()
        self.known[address] = ctypes.string_at(start, _MAP_BYTES)
        return self.known[address]


class PackedLaunch:
    """A kernel, compiled for the current device, with its parameters packed.

    `arguments` and `options` are what a launch through Triton takes by name: tensors, numbers,
    tensor descriptors, None; constants, `num_warps`. Tensors are kept, but for those named in
    `moving` and the described ones: :meth:`point` and :meth:`describe` replace these before every
    launch, by others of the same shape, strides, dtype and alignment. A launch is safe from several
    threads if each sets its addresses and launches under :attr:`lock`.

    Triton's launch hooks are not called.
    """

    def __init__(
        self,
        kernel: Any,
        arguments: Mapping[str, Any],
        options: Mapping[str, Any],
        moving: Collection[str],
    ) -> None:
        compiled = kernel.warmup(**arguments, **options, grid=(1,))
        assert compiled.run is not None  # loads it
        self.lock = threading.Lock()
        self._kept = [
            a for name, a in arguments.items() if isinstance(a, Tensor) and name not in moving
        ]
        for scratch in ("global_scratch_size", "profile_scratch_size"):
            if getattr(compiled.metadata, scratch, 0):
                raise RuntimeError(
                    f"expected a kernel without scratch memory, got one with {scratch}"
                )
        self._function = ctypes.c_void_p(compiled.function)
        self._shared = compiled.metadata.shared
        self._threads = 32 * compiled.metadata.num_warps
        # launched so, a kernel may begin while the one before it ends
        self._early = _Attribute(_MAY_BEGIN_EARLY, b"", 1) if options.get("launch_pdl") else None
        places = self._places()
        size = places[-1][0] + places[-1][1]
        self._buffer = ctypes.create_string_buffer(size)
        self._bytes = memoryview(self._buffer).cast("B")
        self._size = ctypes.c_size_t(size)
        self._extra = (ctypes.c_void_p * 5)(
            _PARAMETER_BUFFER,
            ctypes.addressof(self._buffer),
            _PARAMETER_BUFFER_SIZE,
            ctypes.addressof(self._size),
            _PARAMETERS_END,
        )
        self._pointers: dict[str, int] = {}
        self._numbers: dict[str, tuple[str, int]] = {}
        self._maps: dict[str, _Map] = {}
        given = {**arguments, **options}
        in_order = {name: given[name] for name in kernel.arg_names}
        maps = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
        self._pack_all(compiled.src.signature, in_order, iter(places), maps)
        self._launch = _driver().cuLaunchKernel

    def _places(self) -> list[tuple[int, int]]:
        """(offset, size) of every parameter, as the driver has them."""
        offset, size = ctypes.c_size_t(), ctypes.c_size_t()
        found: list[tuple[int, int]] = []
        query = _driver().cuFuncGetParamInfo
        while (
            query(
                self._function,
                ctypes.c_size_t(len(found)),
                ctypes.byref(offset),
                ctypes.byref(size),
            )
            == 0
        ):
            found.append((offset.value, size.value))
        return found

    def _pack_all(
        self,
        signature: Mapping[str, str],
        arguments: Mapping[str, Any],
        at: Iterator[tuple[int, int]],
        maps: Iterator[Mapping[str, Any]],
    ) -> None:
        for name, value in arguments.items():
            kind = signature[name]
            if kind == "constexpr":
                continue
            if kind.startswith("tensordesc"):
                # a descriptor is its map, then sizes and strides, which compiled code may read
                self._maps[name] = _Map(value, next(at)[0], next(maps))
                self.describe(name, value.base.data_ptr())
                for size in value.shape:
                    struct.pack_into("<i", self._buffer, next(at)[0], size)
                for step in value.strides:
                    struct.pack_into("<q", self._buffer, next(at)[0], step)
                continue
            offset, _ = next(at)
            if kind.startswith("*"):
                self._pointers[name] = offset
                self.point(name, value.data_ptr())
            else:
                self._numbers[name] = (_CODES[kind], offset)
                self.number(name, value)
        rest = list(at)  # two pointers to scratch memory, which these kernels do not take
        if len(rest) != 2:
            raise RuntimeError(f"{len(rest)} parameters are left over, expected two pointers")

    def point(self, name: str, address: int) -> None:
        """Sets a pointer."""
        struct.pack_into("<Q", self._buffer, self._pointers[name], address)

    def number(self, name: str, value: float) -> None:
        """Sets a number."""
        code, offset = self._numbers[name]
        struct.pack_into(code, self._buffer, offset, value)

    def describe(self, name: str, address: int) -> None:
        """Sets the address of a described tensor, which 16 divides."""
        which = self._maps[name]
        blob = which.known.get(address) or which.encode(address)
        self._bytes[which.offset : which.offset + _MAP_BYTES] = blob

    def move(self, name: str, address: int) -> None:
        """Sets the address of a tensor, whether it is described or not."""
        if name in self._maps:
            self.describe(name, address)
        else:
            self.point(name, address)

    def launch(self, programs: int, stream: int) -> None:
        """Launches on a CUDA stream of the current device."""
        if self._early is not None:
            self._launch_early(self._early, programs, stream)
            return
        status = self._launch(
            self._function,
            programs,
            1,
            1,
            self._threads,
            1,
            1,
            self._shared,
            stream,
            None,
            self._extra,
        )
        if status != 0:
            _checked("cuLaunchKernel", status)

    def _launch_early(self, early: _Attribute, programs: int, stream: int) -> None:
        grid, block, attributes = (programs, 1, 1), (self._threads, 1, 1), ctypes.pointer(early)
        config = _Config(grid, block, self._shared, stream, attributes, 1)
        status = _driver().cuLaunchKernelEx(ctypes.byref(config), self._function, None, self._extra)
        if status != 0:
            _checked("cuLaunchKernelEx", status)


class PassLaunch(NamedTuple):
    """A launch of a pass: how many programs, the arguments by name, constants and options."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    options: dict[str, Any]

    def run(self) -> None:
        """Launches through Triton, on the current device."""
        self.kernel[(self.programs,)](**self.arguments, **self.options)

    def pack(self, *moving: str) -> PackedLaunch:
        """What launches it again; of the pointers those named have other addresses then."""
        return PackedLaunch(self.kernel, self.arguments, self.options, moving)


class PreparedLaunches:
    """Launches, one after another, that differ from earlier ones in the addresses of tensors.

    `moving` are the tensors' names: those of the kernels' parameters, without `_ptr` or `_desc`
    behind them.
    """

    def __init__(self, launches: Iterable[PassLaunch], moving: Sequence[str]) -> None:
        self._steps: list[tuple[PackedLaunch, int, list[tuple[str, int]]]] = []
        for launch in launches:
            taken = [
                (name, place)
                for place, tensor in enumerate(moving)
                for name in (tensor, f"{tensor}_ptr", f"{tensor}_desc")
                if launch.arguments.get(name) is not None
            ]
            packed = launch.pack(*(name for name, _ in taken))
            self._steps.append((packed, launch.programs, taken))

    def launch(self, tensors: Sequence[Tensor], stream: int) -> None:
        """With the tensors in the order of their names, on a CUDA stream of the current device."""
        addresses = [tensor.data_ptr() for tensor in tensors]
        for packed, programs, taken in self._steps:
            with packed.lock:
                for name, place in taken:
                    packed.move(name, addresses[place])
                packed.launch(programs, stream)


# launches that are remembered before all are forgotten
_MOST_LAUNCHES = 512
_launches: dict[Any, PackedLaunch] = {}


class Launch(NamedTuple):
    """A launch of `programs` of a kernel.

    `described` are the tensors behind tensor descriptors, `pointed` those behind pointers (None: a
    constant), by the names of the kernel's parameters; `arguments` makes all others, descriptors
    and numbers. Launches with these of the same shapes, strides and dtypes, an equal `key` and
    equal `options` differ in addresses alone.
    """

    kernel: Any
    key: Any
    described: Mapping[str, Tensor]
    pointed: Mapping[str, Tensor | None]
    arguments: Callable[[], Mapping[str, Any]]
    options: Mapping[str, Any]
    programs: int

    def pack(self, moving: Collection[str]) -> PackedLaunch:
        """What launches it again, with other addresses of what is described and of `moving`."""
        given = {**self.arguments(), **self.pointed}
        return PackedLaunch(self.kernel, given, self.options, moving)

    def run(self, stream: int) -> None:
        """Launches on the current device, as an equal launch before it where there was one,
        without Triton's work of every launch; nothing that is given is kept.
        """
        everything = (
            self.kernel,
            torch._C._cuda_getDevice(),
            self.key,
            *((x.shape, x.stride(), x.dtype) for x in self.described.values()),
            *(None if x is None else (x.dtype, x.data_ptr() % 16) for x in self.pointed.values()),
            *self.options.values(),
        )
        packed = _launches.get(everything)
        if packed is None:
            if not can_pack():
                given = {**self.arguments(), **self.pointed}
                self.kernel[(self.programs,)](**given, **self.options)
                return
            if len(_launches) >= _MOST_LAUNCHES:
                _launches.clear()
            packed = _launches[everything] = self.pack(self.pointed)
        with packed.lock:
            for name, x in self.described.items():
                packed.describe(name, x.data_ptr())
            for name, y in self.pointed.items():
                if y is not None:
                    packed.point(name, y.data_ptr())
            packed.launch(self.programs, stream)


@functools.cache
def can_pack() -> bool:
    """Whether a CUDA driver tells where a kernel's parameters lie, as those from 12.4 on do."""
    try:
        return hasattr(_driver(), "cuFuncGetParamInfo")
    except OSError:
        return False
