"""The loss a chunk of tokens at a time, through the model's own head.

A chunk of final hidden states goes through the model's own forward with its trunk swapped for a stub, so that
scaling, soft caps and biases of the logits are the model's. The gradient of each chunk is taken at once,

    dlogits = softmax(logits) - (1 - e) onehot(target) - e / V        e: label smoothing

and written over the logits where nobody else holds them, so that the logits of one chunk are all that is ever
in memory; it is scaled once the gradient of the loss is known. Tokens whose label is ignored are never
projected.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from hf_longattn.devices import HostCopy
from hf_longattn.kernels.cross_entropy import cross_entropy
from hf_longattn.parallel.sequence import SequenceShare
from hf_longattn.training.arguments import named_arguments
from hf_longattn.training.captured import check_known
from hf_longattn.training.liger import fused_loss
from hf_longattn.training.ownership import is_held_once
from hf_longattn.training.randomness import BlockRandomness
from hf_longattn.training.sequence import SequenceParallel, drops_anything, taking_loss
from hf_longattn.training.shards import find_unit
from hf_longattn.training.sums import GradientSum, local_gradients
from hf_longattn.training.zero import in_one_call, is_cut

# Logits of a chunk: half a GiB in 16 bits on a GPU, where smaller products would run slower.
_GPU_LOGITS, _CPU_LOGITS = 1 << 28, 1 << 23


class _Stub:
    """Answers a call in place of a child of the model, and is that child for everything else."""

    def __init__(self, child: Any, answer: Callable[..., Any]) -> None:
        self._child, self._answer = child, answer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._answer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._child, name)


@dataclass
class Head:
    """What lies between the final hidden states and the logits.

    Args:
        model: whose head it is.
        trunk: the name of the child that makes the hidden states.
        forward: the model's own forward.
        output_type: what the trunk returns.
    """

    model: PreTrainedModel
    trunk: str
    forward: Callable[..., Any]
    output_type: Any = None

    @contextlib.contextmanager
    def _stubbed(self, name: str, answer: Callable[..., Any]) -> Iterator[None]:
        modules: dict[str, Any] = self.model._modules
        child = modules[name]
        modules[name] = _Stub(child, answer)
        try:
            yield
        finally:
            modules[name] = child

    def run_trunk(self, arguments: dict[str, Any]) -> tuple[Any, Any]:
        """The model's output but for its logits, and that of its trunk, with all hidden states (B, T, D)."""
        trunk: Any = self.model._modules[self.trunk]
        states: list[Any] = []

        def remember(*args: Any, **kwargs: Any) -> Any:
            # A trunk that is told of it would leave the other tokens out.
            kwargs.pop("logits_to_keep", None)
            states.append(trunk(*args, **kwargs))
            return states[-1]

        # The last token's logits go unused: the price of leaving the model's forward as it is.
        with self._stubbed(self.trunk, remember), self._without_unit():
            output = self.forward(**arguments, logits_to_keep=1, return_dict=True)
        if len(states) != 1:
            raise ValueError(
                f"`loss='chunked'` needs a model that calls its `{self.trunk}` once, got "
                f"{type(self.model).__name__}, which calls it {len(states)} times; use `loss='model'`."
            )
        self.output_type = type(states[0])
        # Set to None, an entry would still be handed on by everything that walks over the output's entries.
        others = {name: value for name, value in output.items() if name != "logits"}
        return type(output)(**others), states[0]

    @contextlib.contextmanager
    def _without_unit(self) -> Iterator[None]:
        """Inside, a head that FSDP2 cuts makes logits of zeros: it is gathered for one call a step."""
        unit = find_unit(self._named_children())
        if unit is None:
            yield
            return
        width = cast(Any, self.model.get_output_embeddings()).weight.shape[0]
        with self._stubbed(unit[0], lambda hidden: hidden.new_zeros(*hidden.shape[:-1], width)):
            yield

    def __call__(self, hidden: Tensor) -> Tensor:
        """The logits (1, n, V) of (1, n, D) hidden states."""
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        output = self.output_type(last_hidden_state=hidden)
        with self._stubbed(self.trunk, lambda *args, **kwargs: output):
            return self.forward(input_ids=ids, use_cache=False, return_dict=True).logits

    def while_whole(self, compute: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """`compute(hidden)`, during which FSDP2 and ZeRO stage 3 leave the head's parameters whole."""
        cut = [(name, child) for name, child in self._named_children() if is_cut(child)]
        if len(cut) > 1:
            raise ValueError(
                f"`loss='chunked'` under DeepSpeed's ZeRO stage 3 knows heads that are one module, got "
                f"{', '.join(name for name, _ in cut)}; use `loss='model'`."
            )
        unit = cut[0] if cut else find_unit(self._named_children())
        if unit is None:
            return compute(hidden)
        name, child = unit
        own, results = child.forward, list[Tensor]()

        def without_hooks(hidden: Tensor) -> Tensor:
            with self._stubbed(name, own):
                results.append(compute(hidden))
            # FSDP2 rounds what is returned to the dtype in which it hands on logits. It gathers again in the
            # backward of that: a norm in the same unit is next there.
            return results[0] if cut else hidden

        output = in_one_call(child, without_hooks, hidden)
        return output if cut else results[0]

    def _named_children(self) -> list[tuple[str, nn.Module]]:
        return [(name, child) for name, child in self.model.named_children() if name != self.trunk]

    def _children(self) -> list[nn.Module]:
        return [child for _, child in self._named_children()]

    def seed(self) -> int | None:
        """A number that what the head draws may follow from; None where it draws nothing."""
        drops = any(drops_anything(part) for child in self._children() for part in child.modules())
        return int(torch.randint(2**62, ()).item()) if self.model.training and drops else None

    def parameters(self) -> list[Tensor]:
        """Those that want a gradient, each once."""
        heads = self._children()
        found = [*self.model._parameters.values(), *(p for child in heads for p in child.parameters())]
        unique = {id(parameter): parameter for parameter in found if parameter is not None}
        return [parameter for parameter in unique.values() if parameter.requires_grad]


@dataclass
class LossOptions:
    """How the loss is taken.

    Args:
        chunk_size: tokens a chunk, or None.
        smoothing: of the labels.
        ignore_index: label of tokens that do not count.
        share: the tokens behind the hidden states, where each of several ranks has its own.
        count: the number of tokens that count, where the host was told of it before the layers ran.
    """

    chunk_size: int | None
    smoothing: float
    ignore_index: int = -100
    share: SequenceShare | None = None
    count: HostCopy | None = None

    def chunk(self, hidden: Tensor, vocab_size: int) -> int:
        """Tokens that go through the head at a time."""
        budget = _CPU_LOGITS if hidden.device.type == "cpu" else _GPU_LOGITS
        return self.chunk_size or max(budget // vocab_size, 64)


class _ChunkedLoss(torch.autograd.Function):
    """Sum of the cross-entropy over all tokens that count."""

    @staticmethod
    def forward(
        ctx: Any,
        head: Head,
        targets: Tensor,
        counted: Tensor,
        options: LossOptions,
        hidden: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        needs_grad = any(ctx.needs_input_grad)
        flat = hidden.reshape(-1, hidden.shape[-1])
        grad_hidden = torch.zeros_like(flat) if needs_grad else None
        sums = [GradientSum() for _ in parameters]
        total = torch.zeros((), dtype=torch.promote_types(flat.dtype, torch.float32), device=flat.device)
        size = options.chunk(flat, head.model.config.get_text_config().vocab_size)
        fused = fused_loss(head, head.model.get_output_embeddings(), flat, size)
        for tokens in counted.split(size if fused is None else fused.tokens):
            block = flat[tokens][None].detach().requires_grad_(needs_grad)
            loss, parts = _chunk_loss(head, fused, block, targets[tokens], options.smoothing, parameters)
            total += loss
            if grad_hidden is not None:
                # Taken out: the gradient of a head must not wait beside that of the next chunk.
                grad_hidden[tokens] = parts.pop(0)[0]  # pyright: ignore[reportOptionalSubscript]
                for into in sums:
                    into.add(parts.pop(0))
        ctx.dtypes, ctx.share = [parameter.dtype for parameter in parameters], options.share
        if grad_hidden is not None:
            # A parameter that the head does not use has no gradient: an optimizer leaves it alone. Ranks must
            # add up the same ones, and without tokens it is not known which those are.
            known = len(counted) and options.share is None
            pairs = zip(sums, parameters, strict=True)
            found = [into.wide() if known else into.wide_like(p) for into, p in pairs]
            ctx.save_for_backward(grad_hidden.view_as(hidden), *found)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *sums = ctx.saved_tensors
        sums = [None if part is None else part * grad for part in sums]
        if ctx.share is not None:
            sums = [ctx.share.group.add_up(part.contiguous()) for part in sums if part is not None]
        pairs = zip(sums, ctx.dtypes, strict=True)
        grads = (None if part is None else part.to(dtype) for part, dtype in pairs)
        return None, None, None, None, hidden * grad.to(hidden.dtype), *grads


def _chunk_loss(
    head: Head,
    fused: Callable[[Tensor, Tensor, float], Tensor] | None,
    block: Tensor,
    targets: Tensor,
    smoothing: float,
    parameters: tuple[Tensor, ...],
) -> tuple[Tensor, list[Tensor | None]]:
    """The summed loss of one chunk (1, n, D), and its gradients of the chunk and of the parameters."""
    needs_grad = block.requires_grad
    with torch.set_grad_enabled(needs_grad), _uncached_autocast(block.device):
        output = head(block) if fused is None else fused(block[0], targets, smoothing)
    if fused is None:
        alone = needs_grad and is_held_once(output)
        losses, grad = cross_entropy(
            output[0], targets, label_smoothing=smoothing, gradient=needs_grad, overwrite=alone
        )
        loss, grad = losses.sum(), None if grad is None else grad[None]
    else:
        loss, grad = output.detach(), None
    if not needs_grad:
        return loss, []
    check_known([output], [block, *parameters], head.model)
    return loss, local_gradients([output], [block, *parameters], None if grad is None else [grad])


def _uncached_autocast(device: torch.device) -> torch.autocast:
    kind = device.type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False)


def chunked_loss(
    head: Head, hidden: Tensor, shifted: Tensor, num_items: Tensor | int | None, options: LossOptions
) -> Tensor:
    """The loss of transformers' causal language models.

    Args:
        head: from hidden states to logits.
        hidden: (B, T, D) after the final norm, or a rank's share of it.
        shifted: (B, T), the token that follows each token.
        num_items: what the sum is divided by; the number of tokens that count if None.
        options: chunk size, label smoothing, ignored label, share.

    Returns:
        a scalar in fp32, the same on every rank.
    """
    share, targets = options.share, shifted.to(hidden.device)
    targets = (targets if share is None else share.take(targets, 1, options.ignore_index)).reshape(-1)
    counted = _places(targets != options.ignore_index, options.count if share is None else None)

    def sum_over_chunks(hidden: Tensor) -> Tensor:
        trains = torch.is_grad_enabled()
        # Of a head that FSDP2 cuts, these are whole in here alone.
        parameters = head.parameters() if trains else []
        # What a function's inputs want, it is told whether or not there is a graph.
        hidden = hidden if trains else hidden.detach()
        return _ChunkedLoss.apply(head, targets, counted, options, hidden, *parameters)

    # Ranks have other numbers of chunks: their generators must go on alike all the same.
    numbers = BlockRandomness(None if share is None else head.seed(), hidden.device, draws=True)
    place = 0 if share is None else share.group.rank
    total = numbers.run(place, lambda: head.while_whole(sum_over_chunks, hidden))
    if isinstance(num_items, Tensor):
        num_items = num_items.to(total.device)
    count: Any = len(counted)
    if share is not None:
        total, count = share.add_up(total), share.group.add_up(counted.new_tensor(count))
    # Without a token that counts the mean is NaN, as in transformers.
    return total / (count if num_items is None else num_items)


def _places(counts: Tensor, count: HostCopy | None) -> Tensor:
    """Where a (n,) mask is true.

    Args:
        counts: the mask.
        count: how often it is; None asks the device, and waits until the layers are done.
    """
    if count is None:
        return counts.nonzero()[:, 0]
    return counts.byte().argsort(descending=True, stable=True)[: int(count.read())]


def loss_forward(
    model: PreTrainedModel,
    trunk: str,
    is_active: Callable[[], bool],
    chunk_size: int | None,
    smoothing: float,
    parallel: SequenceParallel | None = None,
) -> Callable[..., Any]:
    """What stands in for the forward of a causal language model.

    Args:
        model: the model, its forward still its own.
        trunk: the name of its child that makes the hidden states.
        is_active: whether the set-up still holds.
        chunk_size: tokens a chunk, or None.
        smoothing: of the labels.
        parallel: the ranks that share a sequence, or None.

    Returns:
        a function with the same signature; with labels it returns the loss and no logits.
    """
    original = model.forward
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        arguments = named_arguments(signature, args, kwargs)
        asks_for_logits = isinstance(kept := arguments.get("logits_to_keep", 0), Tensor) or kept != 0
        if not is_active() or arguments.get("labels") is None or asks_for_logits:
            return original(*args, **kwargs)
        given = dict(arguments)
        labels = arguments.pop("labels")
        shifted, num_items = arguments.pop("shift_labels", None), arguments.pop("num_items_in_batch", None)
        ignore_index = arguments.pop("ignore_index", -100)
        returns_dict = arguments.pop("return_dict", None)
        if arguments.get("use_cache") is None:
            arguments["use_cache"] = False
        if shifted is None:
            shifted = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        # On its way while the host is busy with the layers, which the device works on long after.
        count = HostCopy((shifted != ignore_index).sum()) if shifted.is_cuda else None
        head = Head(model, trunk, original)
        with taking_loss(parallel, given) as call:
            output, states = head.run_trunk(arguments)
        options, added = LossOptions(chunk_size, smoothing, ignore_index, call.share, count), 0.0
        if hasattr(model, "loss_terms"):
            # A Block Transformer does not score every label.
            options.count = None
            terms = cast(Any, model).loss_terms(states, shifted, num_items, ignore_index)
            shifted, num_items, added = terms
        output.loss = chunked_loss(head, states.last_hidden_state, shifted, num_items, options) + added
        is_dict = model.config.return_dict if returns_dict is None else returns_dict
        return output if is_dict else output.to_tuple()

    return forward
