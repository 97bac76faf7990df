"""How prompts of whole rows are read: by a replay, or some rows at a time.

Reading a short prompt takes longer to launch than to run. A prompt of whole rows (no pads, nothing before it)
that is as long as an earlier one does the same on the same buffers, first token included. So the second call
with a prompt of some length captures that work, and later ones replay it: graphs that a kept program has
beside that of its steps. Where prompts are long together, some rows at a time are read from begin to end.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_longattn.fusion import fused_prompt
from hf_longattn.generation.capture import capture
from hf_longattn.generation.prefill import GPU_CHUNK_TOKENS
from hf_longattn.kernels.dispatch import has_triton
from hf_longattn.kernels.mask_runs import look_for_whole_rows

if TYPE_CHECKING:
    from hf_longattn.generation.blocks import BlockProgram, TokenChoice

# Lengths of prompts that have a graph, at most: a graph holds some MiB of host memory.
MOST_GRAPHS = 8
# What a prompt of whole rows may come with, and nothing else.
_KNOWN = ("past_key_values", "attention_mask", "position_ids", "logits_to_keep", "use_cache")


def is_whole(cache: Any, model_kwargs: dict[str, Any]) -> bool:
    """Whether a prompt is one document a row, without pads and on an empty cache.

    Args:
        cache: of the call; one that was made for it may know, else the device is waited for.
        model_kwargs: mask and positions, as `generate` made them.
    """
    given = {name for name, value in model_kwargs.items() if value is not None}
    mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    if not given.issubset(_KNOWN) or cache.get_seq_length() > 0 or mask is None or mask.ndim != 2:
        return False
    known = getattr(cache, "whole_prompt", None)
    return look_for_whole_rows(mask, positions) if known is None else known


class PromptGraphs:
    """The graphs of one kept program, by the length of the prompt that each reads."""

    def __init__(self) -> None:
        self._graphs: dict[int, tuple[Any, Tensor] | None] = {}

    def clear(self) -> None:
        """Lets go of all graphs, and of what was seen."""
        self._graphs.clear()

    def note(self, length: int) -> None:
        """Notes a prompt that was read without a graph: the next one of this length is worth a capture.

        Args:
            length: of the prompt, T.
        """
        if length not in self._graphs and len(self._graphs) >= MOST_GRAPHS:
            # The one that has waited longest for another call.
            self._graphs.pop(next(iter(self._graphs)))
        self._graphs.setdefault(length, None)

    def knows(self, length: int) -> bool:
        """Whether there was a prompt of this length.

        Args:
            length: of the prompt, T.
        """
        return length in self._graphs

    def read(
        self, program: "BlockProgram", input_ids: Tensor, choice: "TokenChoice", model: PreTrainedModel
    ) -> None:
        """Has a program read a prompt of a length that was seen, and choose the token behind it.

        Args:
            program: which can, see `BlockProgram.can_read`.
            input_ids: (B, T).
            choice: of this call; its constants are copied.
            model: whose layers may run as faster ones while the graph is captured.

        Raises:
            RuntimeError: the work cannot be captured.
        """
        length = input_ids.shape[1]
        found = self._graphs.pop(length)
        if found is None:
            found = self._capture(program, input_ids.clone(), model)
        # In the order of use, the last one last.
        self._graphs[length] = found
        graph, static = found
        static.copy_(input_ids)
        for own, its in zip(program.choice.constants(), choice.constants(), strict=True):
            own.copy_(its)
        graph.replay()
        program.stand_behind(length + 1)

    def _capture(self, program: "BlockProgram", static: Tensor, model: PreTrainedModel) -> tuple[Any, Tensor]:
        def rehearse() -> None:
            with torch.random.fork_rng(devices=[static.device] if static.is_cuda else []):
                program.read(static)

        # Nothing that one of these graphs makes is read by another: they share their memory.
        other = next((pair[0] for pair in self._graphs.values() if pair is not None), None)
        with fused_prompt(model), cast(Any, model).few_launches():
            graph, _ = capture(rehearse, lambda: program.read(static), like=other)
        return graph, static


def few_launches_of_prompt(model: Any) -> contextlib.AbstractContextManager[None]:
    """Inside, a prompt takes fewer launches, where that is faster.

    Args:
        model: with `decode_blocks`.
    """
    fast = has_triton() and model.device.type == "cuda" and not torch.is_autocast_enabled()
    return model.few_launches() if fast else contextlib.nullcontext()


@contextlib.contextmanager
def reading(model: Any) -> Iterator[None]:
    """Inside, prompts that pass the model's forward by are read with fused layers and few launches.

    Args:
        model: with `decode_blocks`.
    """
    with fused_prompt(model), few_launches_of_prompt(model):
        yield


def rows_at_once(input_ids: Tensor, span: int) -> int:
    """How many whole prompts make as many blocks as keep products at full rate; 0 where one has more.

    Dense attention over whole prompts is one call, on lengths that fill its tiles: chunks of many rows are
    short.

    Args:
        input_ids: (B, T).
        span: tokens of a block, L.
    """
    return GPU_CHUNK_TOKENS // max(input_ids.shape[1] // span, 1)


def fits_at_once(input_ids: Tensor, span: int, chunk: int | None) -> bool:
    """Whether a prompt is read in one piece, short enough for its launches to count.

    Args:
        input_ids: (B, T).
        span: tokens of a block, L.
        chunk: tokens of a chunk that somebody asks for, or None.
    """
    rows, length = input_ids.shape
    return rows * length <= GPU_CHUNK_TOKENS * span and (chunk is None or length <= chunk)
