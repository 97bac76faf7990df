"""A GPT-NeoX layer with parallel branches on one row or two: two launches and those of its attention.

    qkv = W_qkv norm_1(x)        h = gelu(W_up norm_2(x))        one launch
    o = attention(qkv)                                           the module's own
    y = x + W_out o + W_down h                                   one launch

At one row a layer is the time to read its weights, and whatever passes between launches. The layer's modules,
fused as far as they go one by one, take two norms, four products and a sum beside attention.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from hf_longattn.instance import Setup
from hf_longattn.kernels.normed_linears import normed_linears, residual_linears
from hf_longattn.kernels.normed_linears.api import MAX_ROWS
from hf_longattn.kernels.residual_norms import residual_norms


class FewRowLayer:
    """Stands in for the forward of a layer while a step is captured, in which nothing writes to parameters.

    Args:
        layer: a `GPTNeoXLayer` with parallel branches, whose parts are ordinary ones.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        # What runs more rows than the operators take; whoever knows a faster way may set it.
        self.many_rows: Callable[..., Tensor] = layer.forward

    def __call__(self, hidden_states: Tensor, **keywords: Any) -> Tensor:
        """The layer's output (B, T, D); arguments as its own forward takes them."""
        layer, attention, mlp = self.layer, self.layer.attention, self.layer.mlp
        few = hidden_states.numel() <= MAX_ROWS * hidden_states.shape[-1]
        if not few or hidden_states.dtype != mlp.dense_4h_to_h.weight.dtype:
            return self.many_rows(hidden_states, **keywords)
        first, second = (
            (norm.weight, norm.bias, linear.weight, linear.bias)
            for norm, linear in (
                (layer.input_layernorm, attention.query_key_value),
                (layer.post_attention_layernorm, mlp.dense_h_to_4h),
            )
        )
        options: dict[str, Any] = {"eps": layer.input_layernorm.eps, "activation": "gelu"}
        states, inner = normed_linears(hidden_states, first, second, **options, settled_weights=True)
        attended = _attended(attention, states, hidden_states, keywords)
        first, second = (
            (inputs, linear.weight, linear.bias)
            for inputs, linear in ((inner, mlp.dense_4h_to_h), (attended, attention.dense))
        )
        return residual_linears(hidden_states, first, second, settled_weights=True)


def _attended(attention: Any, states: Tensor, hidden_states: Tensor, keywords: dict[str, Any]) -> Tensor:
    """What attention makes of query, key and value, without the products in front of it and behind."""
    changes = Setup(attention)
    changes.set(attention.query_key_value, "forward", lambda hidden_states: states)
    changes.set(attention.dense, "forward", lambda attended: attended)
    try:
        return attention(hidden_states, **keywords)[0]
    finally:
        changes.undo()


@contextlib.contextmanager
def without_attention(modules: list[Any]) -> Iterator[None]:
    """Inside, the attention of layers hands a part of its first product on: they run without keys.

    Args:
        modules: layers; others are left alone.
    """
    changes = Setup(modules[0])
    for attention in (getattr(module, "attention", None) for module in modules):
        if attention is not None:
            changes.set(attention, "forward", functools.partial(_pass_on, attention))
    try:
        yield
    finally:
        changes.undo()


def _pass_on(attention: Any, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
    states = attention.query_key_value(hidden_states)
    return attention.dense(states[..., : hidden_states.shape[-1]].contiguous()), None


def in_five_launches(layer: Any) -> Callable[[Tensor], Tensor]:
    """The least that a layer costs by its modules: four products, and one launch for its sum and the norms.

    Args:
        layer: as for `FewRowLayer`, `without_attention`.

    Returns:
        a function of states, of which the norms come late: it is there to be timed.
    """
    norms = layer.input_layernorm, layer.post_attention_layernorm
    first, second = ((norm.weight, norm.bias) for norm in norms)

    def run(hidden_states: Tensor) -> Tensor:
        branches = layer.mlp(hidden_states), layer.attention(hidden_states)[0]
        return residual_norms(hidden_states, branches, first, second, eps=norms[0].eps)[0]

    return run
