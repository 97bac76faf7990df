"""The arguments of a model's and a layer's forward: by name, and cut along the sequence."""

import inspect
from typing import Any

from torch import Tensor

from hf_longattn.training.visibility import PACKING

# Arguments that run along the sequence, and the dimension in which they do.
_ALONG = {"position_embeddings": 1, "position_ids": -1, "cache_position": 0, "token_type_ids": 1}
# Arguments of the length of the sequence that layers receive and hand on, without a use for them.
UNUSED = frozenset(("attention_mask", "labels", "shift_labels", *PACKING))


def named_arguments(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by name, those of `**kwargs` among them.

    Args:
        signature: of the function.
        args: positional arguments.
        kwargs: keyword arguments.
    """
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    rest = next((name for name, p in signature.parameters.items() if p.kind == p.VAR_KEYWORD), None)
    more = arguments.pop(rest, {}) if rest else {}
    return {**arguments, **more}


def cut(name: str, value: Any, rows: slice, length: int) -> Any:
    """The part of a layer's argument that belongs to some tokens.

    Args:
        name: of the argument.
        value: tensors, perhaps in tuples; anything else is the same for every token.
        rows: the tokens.
        length: T.

    Returns:
        the part.

    Raises:
        ValueError: a tensor runs along the sequence in a way that is not known here.
    """
    if isinstance(value, tuple | list):
        return type(value)(cut(name, part, rows, length) for part in value)
    if not isinstance(value, Tensor) or name in UNUSED:
        return value
    dim = _ALONG.get(name)
    if dim == 1 and value.ndim == 2 and name == "position_embeddings":
        dim = 0
    if dim is not None and value.shape[dim] == length:
        index = (slice(None),) * (dim % value.ndim)
        return value[(*index, rows)]
    if length > 1 and length in value.shape or value.requires_grad:
        raise ValueError(
            f"`{name}` of shape {tuple(value.shape)} reaches the layers, and `prepare_training` does not "
            f"know how it runs along the {length} tokens; train this model unprepared, with gradient "
            "checkpointing."
        )
    return value
