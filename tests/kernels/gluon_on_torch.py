"""Runs a Gluon kernel for Hopper in plain torch, with asynchronous operations as late or as early as may be.

With `late_reads`, what reads shared memory runs late and what writes it early: products are computed when
they are waited for, stores leave when `store_wait` asks, loads arrive when they are issued. Without, the
other way round: loads arrive when their barrier is waited for. A kernel that reads too soon, or writes over
what is still read, is wrong in one of the two; a barrier that never completes, or that counts other bytes
than its copies bring, fails. Shared memory starts as NaN. Layouts are ignored, and programs run one after the
other.

Usage:

    emulate(monkeypatch, [module, module_of_helpers], module, "_kernel", late_reads=True)
    module.launch(...)
"""

import math
from types import SimpleNamespace

import torch
import triton.language as tl
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.runtime.jit import JITFunction


class Shared:
    """Shared memory, or a view of it."""

    def __init__(self, data):
        self.data = data

    def index(self, i):
        return Shared(self.data[int(i)])

    def reshape(self, shape):
        return Shared(self.data.view(tuple(shape)))

    def permute(self, order):
        return Shared(self.data.permute(order))

    def slice(self, start, length, dim=0):
        return Shared(self.data.narrow(dim, start, length))

    def load(self, layout):
        return self.data.clone()

    def store(self, value):
        assert value.dtype == self.data.dtype and value.shape == self.data.shape
        self.data.copy_(value)


class Barrier:
    """One arrival a phase: the bytes expected."""

    def __init__(self):
        self.left, self.done, self.copies = None, 0, []

    def expect(self, number):
        assert self.left is None, "a second arrival in one phase"
        self.left = number

    def receive(self, copy):
        self.left -= copy()
        assert self.left >= 0, "more bytes than expected"
        if self.left == 0:
            self.left, self.done = None, self.done + 1


class Pending:
    """A product that is computed when it is waited for."""

    def __init__(self, left, right, acc):
        self.left, self.right, self.acc, self.value = left, right, acc, None

    def finish(self):
        left, right = (x.data if isinstance(x, Shared) else x for x in (self.left, self.right))
        assert left.dtype == right.dtype and left.shape[1] == right.shape[0]
        acc = self.acc.value if isinstance(self.acc, Pending) else self.acc
        self.value = left.float() @ right.float() + acc


class Pointer:
    """An address in the storage of a tensor."""

    def __init__(self, tensor, offset=None):
        self.tensor = tensor
        self.offset = torch.tensor(tensor.storage_offset()) if offset is None else offset

    def __add__(self, steps):
        return Pointer(self.tensor, self.offset + steps)

    def flat(self):
        size = self.tensor.untyped_storage().nbytes() // self.tensor.element_size()
        return self.tensor.as_strided((size,), (1,), 0)


class Descriptor:
    """A host descriptor as the kernel sees it."""

    def __init__(self, host):
        assert host.base.data_ptr() % 16 == 0 and host.strides[-1] == 1
        assert all(s > 0 and s * host.base.element_size() % 16 == 0 for s in host.strides[:-1])
        self.base, self.block_shape, self.layout = host.base, host.block_shape, host.layout
        self.view = host.base.as_strided(host.shape, host.strides, host.base.storage_offset())
        self.dtype = host.base.dtype
        nbytes = math.prod(host.block_shape) * host.base.element_size()
        self.block_type = SimpleNamespace(nbytes=nbytes)

    def window(self, coordinates):
        """What the tile at `coordinates` covers: slices of the tensor and of the tile."""
        pairs = list(zip(map(int, coordinates), self.block_shape, self.view.shape, strict=True))
        assert all(0 <= at < size for at, _, size in pairs), "a tile outside the tensor"
        sizes = [min(block, size - at) for at, block, size in pairs]
        there = tuple(slice(at, at + n) for (at, _, _), n in zip(pairs, sizes, strict=True))
        return there, tuple(slice(n) for n in sizes)


class Machine:
    """The operations that a kernel calls, for one run."""

    def __init__(self, late_reads):
        self.late_reads, self.products, self.stores, self.program = late_reads, [], [], 0

    def load_tile(self, desc, coordinates, barrier, tile, pred=True):
        if not pred:
            return

        def copy():
            there, here = desc.window(coordinates)
            tile.data.zero_()
            tile.data[here] = desc.view[there]
            return desc.block_type.nbytes

        barrier.copies.append(copy)
        if self.late_reads:
            barrier.receive(barrier.copies.pop())

    def wait(self, barrier, phase):
        for copy in barrier.copies:
            barrier.receive(copy)
        barrier.copies = []
        assert barrier.done % 2 != phase, "waits forever"

    def store_tile(self, desc, coordinates, tile):
        def copy():
            there, here = desc.window(coordinates)
            desc.view[there] = tile.data[here]

        self.stores.append(copy)
        if not self.late_reads:
            self.store_wait(0)

    def store_wait(self, pendings):
        while len(self.stores) > pendings:
            self.stores.pop(0)()

    def product(self, left, right, acc, use_acc=True, is_async=False):
        assert is_async
        self.products.append(Pending(left, right, acc if use_acc else torch.zeros(())))
        result = self.products[-1]
        if not self.late_reads:
            result.finish()
        return result

    def product_wait(self, outstanding, deps):
        while len(self.products) > outstanding:
            done = self.products.pop(0)
            if self.late_reads:
                done.finish()
        (result,) = deps
        assert result not in self.products, "read before it is finished"
        return result.value

    def allocate(self, dtype, shape, layout):
        if dtype == torch.int64:
            bars = [Barrier() for _ in range(shape[0])]
            return SimpleNamespace(index=lambda i: bars[int(i)])
        return Shared(torch.full(shape, float("nan"), dtype=dtype))

    def language(self):
        """What stands for `gl` and `tl`."""

        def pair(function):
            return lambda a, b: function(torch.as_tensor(a), torch.as_tensor(b))

        def load(pointer, mask=True, other=0.0):
            kept = torch.where(torch.as_tensor(mask), pointer.offset, 0)
            return torch.where(torch.as_tensor(mask), pointer.flat()[kept], other)

        return SimpleNamespace(
            int32=torch.int32, int64=torch.int64, float32=torch.float32, float16=torch.float16,
            NVMMADistributedLayout=lambda *_: None, NVMMASharedLayout=NVMMASharedLayout,
            DotOperandLayout=lambda *_: None, SliceLayout=lambda *_: None, constexpr=tl.constexpr,
            allocate_shared_memory=self.allocate, convert_layout=lambda x, _: x, to_tensor=torch.tensor,
            arange=lambda a, b, layout: torch.arange(a, b), load=load, where=torch.where,
            store=lambda pointer, value: pointer.flat().__setitem__(pointer.offset, value),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            split=lambda x: x.unbind(-1), static_range=range, exp2=torch.exp2, minimum=pair(torch.minimum),
            maximum=pair(torch.maximum), cdiv=pair(lambda a, b: -(-a // b)),
            cast=lambda x, dtype: torch.as_tensor(x).to(dtype),
            program_id=lambda _: torch.tensor(self.program),
        )  # fmt: skip

    def launch(self, kernel, grid, arguments):
        """Every program of a kernel, one after the other."""
        ready = {}
        for name, value in arguments.items():
            if hasattr(value, "block_shape"):
                value = Descriptor(value)
            ready[name] = Pointer(value) if isinstance(value, torch.Tensor) else value
        for self.program in range(grid[0]):
            kernel.fn(**ready)
            self.store_wait(0)
            assert not self.products


def emulate(monkeypatch, modules, module, name, late_reads):
    """Launches of the kernel `name` of `module` run here; `modules` hold it and the helpers that it calls."""
    machine, kernel = Machine(late_reads), getattr(module, name)
    language = machine.language()
    for one in modules:
        for alias in {"gl", "tl"} & vars(one).keys():
            monkeypatch.setattr(one, alias, language)
        for key, value in list(vars(one).items()):
            if isinstance(value, tl.constexpr):
                monkeypatch.setattr(one, key, value.value)
    operations = {
        "copy_in": machine.load_tile, "copy_out": machine.store_tile, "warpgroup_mma": machine.product,
        "warpgroup_mma_wait": machine.product_wait, "fence_async_shared": lambda: None,
        "tma": SimpleNamespace(store_wait=machine.store_wait),
        "mbarrier": SimpleNamespace(
            init=lambda bar, count: None, wait=machine.wait, MBarrierLayout=lambda: None,
            expect=lambda bar, number, pred: bar.expect(number) if pred else None,
        ),
    }  # fmt: skip
    for key, value in operations.items():
        monkeypatch.setattr(module, key, value)
    monkeypatch.setattr(JITFunction, "__call__", lambda self, *args, **kwargs: self.fn(*args, **kwargs))
    launch = SimpleNamespace(fn=kernel.fn)
    runner = type(
        "Runner", (), {"__getitem__": lambda _, grid: lambda **a: machine.launch(launch, grid, a)}
    )()
    monkeypatch.setattr(module, name, runner)
