"""`GuardedStates`: keys that an attention function of ours alone can read.

Another one would take what it is given for all the keys there are, and answer wrongly where nothing of it
says otherwise.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


class GuardedStates(Tensor):
    """Keys or values of which our attention functions know more than their tensor says.

    It has shape, dtype and device, but no storage, and no operation of torch takes it: what would change or
    read a number raises. What changes nothing, as `to` its own device or `contiguous` does, gives it back.
    """

    # As a tensor's own: without a call of Python for a shape.
    __torch_function__: Any = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def empty(cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Any:
        """A tensor of this class, with nothing in it.

        Args:
            shape: that it says it has.
            dtype: the same.
            device: the same.
        """
        make: Any = Tensor._make_wrapper_subclass  # pyright: ignore[reportAttributeAccessIssue]
        return make(cls, shape, dtype=dtype, device=device)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuses every operation on numbers.

        Raises:
            ValueError: as `refuse` does.
        """
        kwargs = kwargs or {}
        # In inference mode an operation made of others comes whole, and may do nothing.
        if (result := func.decompose(*args, **kwargs)) is not NotImplemented:
            return result
        guarded = (states for states in tree_leaves((args, kwargs)) if isinstance(states, GuardedStates))
        next(guarded).refuse(f"a model that calls {func}")

    def __repr__(self) -> str:  # type: ignore[override]
        """What can be said without a number."""
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def refuse(self, caller: str) -> NoReturn:
        """Says why nothing else can read these states, and what to do.

        Args:
            caller: what was about to.

        Raises:
            ValueError: always.
        """
        raise NotImplementedError
