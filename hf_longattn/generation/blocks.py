"""Greedy decoding and sampling with a program of several steps, at whose end the host looks at the tokens.

A model that can (the Block Transformer) hands out `decode_blocks`, whose steps are the same after every L
tokens: forward, processors, choice of the token and its embedding then follow one another on the device, in
a CUDA graph or, on a CPU and where a graph cannot be had, one after the other. Tokens, random numbers,
streamers and stopping criteria come in the order of transformers' own loop.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation.utils import GenerateDecoderOnlyOutput

from hf_longattn.fusion import fused
from hf_longattn.generation.capture import capture
from hf_longattn.generation.choice import TokenChoice
from hf_longattn.generation.draws import DrawnNumbers
from hf_longattn.generation.graph import GraphDecoder, obstacle, reason_of
from hf_longattn.generation.kept import KeptProgram, same_place
from hf_longattn.generation.linear import Products
from hf_longattn.generation.prefill import asked_chunk
from hf_longattn.generation.prompts import (
    few_launches_of_prompt,
    fits_at_once,
    is_whole,
    reading,
    rows_at_once,
)
from hf_longattn.generation.spectator import Spectator, criteria_on_host
from hf_longattn.kernels.dispatch import warn_slow

if TYPE_CHECKING:
    from hf_longattn.generation.setup import GenerationSetup

_GRAPH_DEVICES = ("cuda",)
# Those that know of keys whose number lies on the device.
IMPLEMENTATIONS = ("tree_attention", "blockwise_attention")


class BlockProgram:
    """The tokens of a batch, and the steps that add to them.

    Args:
        decoding: what `decode_blocks` returned; holds the prompt.
        choice: chooses tokens.
        input_ids: (B, T), the prompt.
        room: tokens to make room for behind it.
        kept: which of "scores" and "logits" to keep.
    """

    def __init__(
        self, decoding: Any, choice: TokenChoice, input_ids: Tensor, room: int, kept: tuple[str, ...] = ()
    ) -> None:
        self.decoding, self.choice, self.span = decoding, choice, decoding.block_length
        # What is not written yet repeats a token of the row, which a penalty on tokens seen does not notice.
        self.ids = torch.cat([input_ids, input_ids[:, :1].expand(-1, room)], dim=1)
        self.length = input_ids.shape[1]
        # (L,), of the tokens that come next.
        self.columns = torch.arange(self.length, self.length + self.span, device=input_ids.device)
        self.tokens = input_ids[:, -1].clone()
        self.kept: dict[str, list[Tensor]] = {name: [] for name in kept}
        self.graph: Any = None
        self.capturing = False
        self.place: Any = None  # of the decoding where the graph begins

    def choose(self, logits: Tensor) -> None:
        """Adds the token that follows from logits (B, V)."""
        self.tokens.copy_(self._add(logits, 0))
        self.columns.add_(1)

    def _add(self, logits: Tensor, step: int) -> Tensor:
        """The token (B,) that follows from logits (B, V), added to those there are in column `step`."""
        # A copy in fp32 of every logit costs more than the choice; in fp64 it could make two of them equal.
        as_they_are = not self.kept and self.choice.takes_largest() and logits.dtype != torch.float64
        if not as_they_are:
            logits = logits.to(torch.float32, copy=True)
        seen = self.ids if self.capturing else self.ids[:, : self.length]
        tokens, scores = self.choice(seen, logits)
        for name, values in self.kept.items():
            values.append(scores if name == "scores" else logits)
        self.ids.index_copy_(1, self.columns[step : step + 1], tokens[:, None])
        self.length += 1
        return tokens

    def _go_on(self, count: int, note: Callable[[int], None] | None = None) -> None:
        """Adds `count` tokens; only the last one has to stay where the next steps find it."""
        tokens = self.tokens
        for step in range(count):
            tokens = self._add(self.decoding.step(tokens), step)
            if note is not None:
                note(self.length)
        self.columns.add_(count)
        self.tokens.copy_(tokens)

    def run(self, count: int, note: Callable[[int], None] | None = None) -> None:
        """Adds `count` tokens, at most L; a graph always adds L, and the rest is for nothing.

        Args:
            count: tokens.
            note: gets the length wherever the host has just launched a token.
        """
        if self.graph is None:
            self._go_on(count, note)
            return
        self.graph.replay()
        self.length += self.span
        if note is not None:
            note(self.length)

    def end_rows(self, unfinished: Tensor) -> None:
        """Takes over which rows (B,) go on, and the last tokens, where the host has decided."""
        self.choice.finished.copy_(~unfinished)
        self.tokens.copy_(self.ids[:, self.length - 1])

    def record(self, model: PreTrainedModel, products: Products) -> None:
        """Captures the next L steps in a graph, which `run` replays from here on.

        Args:
            model: whose layers may run as faster ones.
            products: knows which linear layers.

        Raises:
            RuntimeError: a step cannot be captured; the program is as it was.
        """
        with fused(model, self.tokens.shape[0], products), cast(Any, model).few_launches():
            self.graph, _ = capture(self._rehearse, self._steps)
        self.place = self.decoding.place

    def can_read(self, input_ids: Tensor, choice: TokenChoice, room: int) -> bool:
        """Whether the program's own buffers and graph serve a call of its own from the prompt on.

        Args:
            input_ids: (B, T), a prompt of whole rows.
            choice: of that call.
            room: tokens to have room for behind the prompt.
        """
        rows, length = input_ids.shape
        same = choice.key() is not None and choice.key() == self.choice.key() and rows == len(self.tokens)
        fits = length + room <= self.ids.shape[1]
        return same and fits and self.decoding.can_read(length, self.place)

    def read(self, input_ids: Tensor) -> None:
        """Begins anew behind a prompt (B, T) of whole rows, with the token that follows it."""
        length = input_ids.shape[1]
        self.ids[:, length:] = input_ids[:, :1]
        self.ids[:, :length] = input_ids
        self.choice.finished.fill_(False)
        self.columns.copy_(torch.arange(length, length + self.span, device=self.columns.device))
        self.capturing = True
        try:
            self.choose(self.decoding.read(input_ids))
        finally:
            self.capturing = False

    def stand_behind(self, length: int) -> None:
        """Says that the device has gone on to `length` tokens, where the graph of the steps begins."""
        self.length, self.decoding.place = length, self.place

    def key(self) -> tuple[Any, ...] | None:
        """What two programs have in common where the graph of one serves both; None where it serves one."""
        choice = self.choice.key()
        return None if choice is None or self.kept else (choice, self.decoding.kind, self.tokens.shape)

    def steps_from(self, other: "BlockProgram") -> int | None:
        """Tokens after which the graph of this could go on in the place of `other`; None: it never could.

        Args:
            other: of a later call, whose keys and values lie in the buffers of this.
        """
        if other.key() is None or other.key() != self.key() or other.ids.shape[1] > self.ids.shape[1]:
            return None
        buffers = zip(self.decoding.buffers(), other.decoding.buffers(), strict=True)
        if not all(same_place(own, its) for own, its in buffers):
            return None
        steps = self.decoding.steps_from(other.decoding)
        return None if steps == 0 and other.decoding.place != self.place else steps

    def take_over(self, other: "BlockProgram") -> None:
        """Goes on in the place of `other`, of which `steps_from` has said 0.

        Args:
            other: its tensors are copied; it is not used any more.
        """
        width = other.ids.shape[1]
        self.ids[:, width:] = other.ids[:, :1]
        self.ids[:, :width] = other.ids
        for own, its in zip(self._tensors(), other._tensors(), strict=True):
            own.copy_(its)
        self.length, self.decoding.place = other.length, self.place
        self.decoding.cache = other.decoding.cache

    def _tensors(self) -> list[Tensor]:
        """All that the graph reads or writes, but for weights, ids and the keys and values of blocks."""
        return [*self._state(), *self.choice.constants(), *self.decoding.constants()]

    def _state(self) -> list[Tensor]:
        return [self.columns, self.tokens, self.choice.finished, *self.decoding.state()]

    def _steps(self) -> None:
        place, length = self.decoding.place, self.length
        self.capturing = True
        try:
            self._go_on(self.span)
        finally:
            # A capture that fails has run nothing: the host must not believe otherwise.
            self.capturing, self.length, self.decoding.place = False, length, place

    def _rehearse(self) -> None:
        """Runs the steps once and takes back what they did, random numbers included."""
        state = [self.ids, *self._state()]
        before = [tensor.clone() for tensor in state]
        devices = [self.ids.device] if self.ids.is_cuda else []
        try:
            with torch.random.fork_rng(devices=devices):
                self._steps()
        finally:
            # Steps that fail midway, say for memory, are gone on with eagerly from where they began.
            for tensor, copy in zip(state, before, strict=True):
                tensor.copy_(copy)


def sample(
    model: PreTrainedModel,
    setup: "GenerationSetup",
    decoder: GraphDecoder,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Stands in for `GenerationMixin._sample` of a model with `decode_blocks`; see there.

    Args:
        model: the model that generates.
        setup: the settings of `prepare_generation`.
        decoder: of this model; knows whether graphs can be captured.
        input_ids: (B, T).
        logits_processor: processors of this call.
        stopping_criteria: criteria of this call.
        generation_config: of this call.
        synced_gpus: whether ranks run as long as the last of them: token by token, by transformers' loop.
        streamer: gets every token as it is looked at, in order.
        **model_kwargs: cache, mask and what else the forward takes.

    Returns:
        (B, T + new tokens), or a `GenerateDecoderOnlyOutput`.
    """
    kept: KeptProgram = vars(model)["_kept_program"]
    call: dict[str, Any] = {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria}
    call |= {"generation_config": generation_config, "streamer": streamer}
    if not _fits(model, decoder, generation_config, model_kwargs, synced_gpus):
        with kept.serving() as own:
            own.clear()
        call["synced_gpus"] = synced_gpus
        return cast(Any, GenerationMixin)._sample(model, input_ids, **call, **model_kwargs)
    with kept.serving() as own:
        chunk = asked_chunk(setup.prefill_chunk_size, generation_config)
        chunk = chunk or getattr(model_kwargs["past_key_values"], "fitting_chunk", None)
        captures = _Captures(model, setup, decoder, own, chunk)
        return _sample(captures, input_ids, model_kwargs, **call)


def _sample(
    captures: "_Captures",
    input_ids: Tensor,
    model_kwargs: dict[str, Any],
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any,
) -> Any:
    model: Any = captures.model
    cache, prompt = model_kwargs["past_key_values"], input_ids.shape[1]
    lasting = generation_config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)
    captures.kept.lend(None if lasting else cache, input_ids.shape[0], model)
    choice = TokenChoice(
        logits_processor, generation_config, stopping_criteria, input_ids.shape[0], input_ids.device
    )
    whole = is_whole(cache, model_kwargs)
    with contextlib.ExitStack() as undo:
        program = captures.read_again(input_ids, choice, generation_config) if whole else None
        if program is None:
            rows = captures.rows_at_once(input_ids) if whole and not lasting else 0
            decoding = _read(model, input_ids, generation_config, model_kwargs, whole, rows)
            if lasting:
                undo.callback(decoding.close)
            room = generation_config.max_length - prompt + decoding.block_length
            program = BlockProgram(decoding, choice, input_ids, room, _kept(generation_config))
            program.choose(decoding.first())
        criteria = criteria_on_host(stopping_criteria, generation_config)
        spectator, drawn = Spectator(program, criteria, streamer), DrawnNumbers(program)
        _decode(spectator, drawn, generation_config.max_length, captures, not lasting)
        program = spectator.program
        drawn.take_back(program, spectator.length)
        if lasting:
            taken = program.ids[:, prompt : program.length - 1]
            program.decoding.finish(taken, program.length - spectator.length)
        else:
            captures.kept.keep(program, model, prompt if whole else None)
    if streamer is not None:
        streamer.end()
    sequences = program.ids[:, : spectator.length].clone()
    if not generation_config.return_dict_in_generate:
        return sequences
    lists = {name: tuple(values[: spectator.length - prompt]) for name, values in program.kept.items()}
    return GenerateDecoderOnlyOutput(sequences=sequences, past_key_values=cache, **lists)  # pyright: ignore[reportArgumentType]


def _read(
    model: Any,
    input_ids: Tensor,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    whole: bool,
    at_once: int,
) -> Any:
    """Reads a prompt, `at_once` rows at a time where that is not 0; returns what decodes behind it."""
    steps = generation_config.max_length - input_ids.shape[1]
    cache = model_kwargs["past_key_values"]
    if at_once:
        with reading(model):
            decoding = model.decode_prompts(cache, input_ids, steps, at_once)
        if decoding is not None:
            return decoding
    # The state that predicts the first token is that of the open block, which `decode_blocks` makes anew.
    model_kwargs = {**model_kwargs, "logits_to_keep": input_ids.new_empty(0)}
    if whole:
        # Nobody has to look again, which would wait for the device.
        model_kwargs |= {"attention_mask": None, "position_ids": None}
    with few_launches_of_prompt(model):
        model._prefill(input_ids, generation_config, model_kwargs)
        return model.decode_blocks(cache, steps)


@dataclass
class _Captures:
    """Where the graphs of one call come from.

    Args:
        model: that generates.
        setup: the settings of `prepare_generation`.
        decoder: of this model; knows whether graphs can be captured.
        kept: what earlier calls have left.
        chunk: tokens of each row in a chunk of the prompt, where it may not be read in one piece.
    """

    model: PreTrainedModel
    setup: "GenerationSetup"
    decoder: GraphDecoder
    kept: KeptProgram
    chunk: int | None

    def read_again(
        self, input_ids: Tensor, choice: TokenChoice, generation_config: Any
    ) -> BlockProgram | None:
        """The kept program behind a prompt as long as an earlier one, or None where it does not read it."""
        program, length = self.kept.program, input_ids.shape[1]
        if program is None or self.decoder.given_up or not self.kept.prompts.knows(length):
            return None
        room = generation_config.max_length - length + program.span
        at_once = fits_at_once(input_ids, program.span, self.chunk)
        if (
            not at_once
            or self.setup.progress
            or _kept(generation_config)
            or not program.can_read(input_ids, choice, room)
        ):
            return None
        try:
            self.kept.prompts.read(program, input_ids, choice, self.model)
        except RuntimeError as error:
            self.decoder.give_up(reason_of(self.model, error))
            return None
        return program

    def rows_at_once(self, input_ids: Tensor) -> int:
        """Rows of prompts that are read together, each of them whole; 0 where they are read in chunks."""
        span, chunk = self.model.config.block_length, self.chunk
        device = input_ids.device.type
        plain = device in _GRAPH_DEVICES and chunk is None and not self.setup.progress
        # Which dtypes keys and values have under autocast, the forward alone finds out.
        plain = plain and not torch.is_autocast_enabled(device)
        return rows_at_once(input_ids, span) if plain and not fits_at_once(input_ids, span, chunk) else 0

    def find(self, program: BlockProgram, left: int) -> tuple[BlockProgram, int]:
        """The program to go on with, and how many of the `left` tokens it makes next."""
        count = min(left, program.span)
        if program.graph is not None or left <= program.span or not self.setup.cuda_graph:
            return program, count
        steps = self.kept.steps_to(program)
        if steps is None:
            record_steps(program, self.model, self.decoder)
        elif steps == 0:
            self.kept.program.take_over(program)
            program = self.kept.program
        return program, steps or count


def _decode(
    spectator: Spectator, drawn: DrawnNumbers, max_length: int, captures: _Captures, ahead: bool
) -> None:
    """Adds tokens until every row has ended.

    `ahead` says that tokens behind the end do no harm: the next program is then queued before the host has
    read the last one, where nothing that it finds changes what the device does.
    """
    ahead = ahead and spectator.plain
    while True:
        spectator.look()
        program = spectator.program
        left = max_length - program.length
        queued = ahead and program.graph is not None and left > 0
        if queued:
            program.run(program.span, drawn.note)
        if not spectator.watch():
            return
        if not queued:
            spectator.program, count = captures.find(program, left)
            spectator.program.run(count, drawn.note)


def _kept(generation_config: Any) -> tuple[str, ...]:
    if not generation_config.return_dict_in_generate:
        return ()
    return tuple(name for name in ("scores", "logits") if getattr(generation_config, f"output_{name}"))


def why_not_past(model: PreTrainedModel, decoder: GraphDecoder) -> str | None:
    """Why steps may not pass the model's forward by, or None.

    Args:
        model: whose hooks and placement are looked at.
        decoder: of this model; knows its forward.
    """
    reason = obstacle(model)
    if reason is None and not decoder.owns_forward():
        reason = "the model's forward was replaced, say for mixed precision or training"
    return reason


def _fits(
    model: PreTrainedModel,
    decoder: GraphDecoder,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    synced_gpus: bool,
) -> bool:
    """Whether the steps may pass the model's forward by; says why not where that costs speed unexpectedly."""
    inside = generation_config.output_attentions or generation_config.output_hidden_states
    if synced_gpus or model.training or generation_config.is_assistant or not model_kwargs["use_cache"]:
        return False
    if generation_config.return_dict_in_generate and inside:
        return False
    if model.config._attn_implementation not in IMPLEMENTATIONS:
        return False
    reason = why_not_past(model, decoder)
    if reason is not None and decoder.required:
        decoder.refuse(reason)
    if reason is not None:
        warn_slow("decoding", reason)
    return reason is None


def record_steps(program: Any, model: PreTrainedModel, decoder: GraphDecoder) -> None:
    """Captures a program's steps where a graph can hold them; says why where not.

    Args:
        program: a `BlockProgram` or a `RowProgram`.
        model: whose steps they are.
        decoder: of this model; knows whether graphs can be captured.
    """
    if program.ids.device.type not in _GRAPH_DEVICES or decoder.given_up:
        return
    reason = program.choice.obstacle()
    if reason is None and program.kept:
        reason = f"`output_{next(iter(program.kept))}` keeps a tensor of every token"
    if reason is not None:
        decoder.refuse(reason)
        return
    try:
        program.record(model, decoder.products)
    except RuntimeError as error:
        decoder.give_up(reason_of(model, error))
