"""Tensors that want a gradient and that a layer reads from outside: not its input, none of its parameters.

A layer that runs by blocks is one node of the graph, whose inputs are named before it runs. What a hook or an
adapter reads beside them would be left without its gradient.
"""

from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge


def check_known(outputs: list[Tensor], known: list[Tensor], module: nn.Module) -> None:
    """Refuses a graph with leaves that nobody asks the gradient of.

    Args:
        outputs: of a block, with their graph.
        known: the tensors whose gradients are asked for.
        module: what made it, for the message.

    Raises:
        ValueError: gives the shape of the tensor.
    """
    # Not compared as tensors: autograd hands out others of the same node where hooks look at what it saves.
    # What FSDP makes of its flat parameters are no leaves.
    seen = {get_gradient_edge(tensor).node for tensor in known if tensor.requires_grad} | {None}
    ahead: list[Any] = [output.grad_fn for output in outputs if output.grad_fn not in seen]
    while ahead:
        node = ahead.pop()
        if node.name().endswith("AccumulateGrad"):
            raise ValueError(
                f"`model`: {type(module).__name__} reads a tensor of shape {tuple(node.variable.shape)} that "
                "wants a gradient, and that was none of its parameters in the forward; its gradient would be "
                "lost. Make it a parameter of a module inside, from where a hook may read it, or train this "
                "model unprepared."
            )
        found = [before for before, _ in node.next_functions if before not in seen]
        seen.update(found)
        ahead += found


class CapturedTensors:
    """Looks for them in a layer, once for each set of parameters and hooks.

    Args:
        layer: the layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self._passed: Any = None

    def check(self, outputs: list[Tensor], known: list[Tensor], now: Any) -> None:
        """`check_known` of a block, unless the last one was under the same circumstances.

        Args:
            outputs: of the block.
            known: its input, the parameters, and what came from the block before.
            now: the circumstances: equal where parameters and hooks are the same.
        """
        if now != self._passed:
            check_known(outputs, known, self.layer)
            self._passed = now
