"""Stand-ins for a CUDA graph and its events on a CPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class RecordedGraph(TorchDispatchMode):
    """A CUDA graph on a CPU: replays operators on the tensors and numbers that it was recorded with.

    What waits for the device raises, as it does while a graph is captured.
    """

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "multinomial")

    def __init__(self):
        super().__init__()
        self.calls, self.replays, self.before = [], 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket._qualified_op_name.split("::")[1] in self.WAITING:
            raise RuntimeError(f"{func} waits for the device")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.is_write:
                storage = value.untyped_storage()
                self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def undo(self):
        """Takes back what recording did: a capture runs nothing."""
        for storage, copy in self.before.values():
            storage.copy_(copy)

    def replay(self):
        self.replays += 1
        for func, args, kwargs, result in self.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class NoEvent:
    """The CPU has nothing to wait for."""

    def __init__(self, **kwargs):
        pass

    def record(self):
        pass

    def synchronize(self):
        pass
