"""Greedy decoding and sampling with a program of several steps, at whose end the host looks at the tokens.

A model that can (the Block Transformer) hands out `decode_blocks`, whose steps are the same after every L
tokens: forward, processors, choice of the token and its embedding then follow one another on the device, in
a CUDA graph or, on a CPU and where a graph cannot be had, one after the other. Tokens, random numbers,
streamers and stopping criteria come in the order of transformers' own loop.
"""

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation import logits_process
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteriaList,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput

from hf_longattn.generation.capture import capture
from hf_longattn.generation.fusion import fused
from hf_longattn.generation.graph import GraphDecoder, obstacle, reason_of
from hf_longattn.generation.linear import Products
from hf_longattn.kernels.dispatch import warn_slow

if TYPE_CHECKING:
    from hf_longattn.generation.setup import GenerationSetup

# Processors that only read which tokens there were, or none at all: a graph may hold them.
_ON_DEVICE = (
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.MinPLogitsWarper,
    logits_process.TypicalLogitsWarper,
    logits_process.EpsilonLogitsWarper,
    logits_process.RepetitionPenaltyLogitsProcessor,
)
_GRAPH_DEVICES = ("cuda",)
# Criteria that read the last token and the length: what they say of a copy on the CPU holds.
_PLAIN_CRITERIA = (EosTokenCriteria, MaxLengthCriteria)


class TokenChoice:
    """Chooses the next token of each row, as transformers' loop does, without a look from the host.

    Args:
        processors: of this call.
        generation_config: of this call.
        criteria: of this call; rows that end by a token get pads on the device.
        rows: B.
        device: of the tokens.
    """

    def __init__(
        self, processors: Any, generation_config: Any, criteria: Any, rows: int, device: torch.device
    ) -> None:
        self.processors, self.do_sample = processors, generation_config.do_sample
        ends = [criterion.eos_token_id for criterion in criteria if hasattr(criterion, "eos_token_id")]
        self.ends = torch.cat([end.reshape(-1).to(device) for end in ends]) if ends else None
        pad = generation_config._pad_token_tensor
        self.pad = torch.zeros((), dtype=torch.long) if pad is None else pad
        self.pad = self.pad.to(device)
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)

    def __call__(self, seen: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens (B,), scores (B, V)) of logits (B, V) in fp32 behind the tokens `seen` (B, >= 1)."""
        scores = self.processors(seen, logits)
        if self.do_sample:
            probabilities = scores.softmax(dim=-1)
            # What `torch.multinomial` computes for one draw, without its check, which stops for the device.
            noise = torch.empty_like(probabilities).exponential_()
            tokens = (probabilities / noise).argmax(dim=-1)
        else:
            tokens = scores.argmax(dim=-1)
        if self.ends is not None:
            tokens = torch.where(self.finished, self.pad, tokens)
            self.finished.logical_or_(torch.isin(tokens, self.ends))
        return tokens, scores

    def obstacle(self) -> str | None:
        """Why a graph cannot hold it, or None."""
        for processor in self.processors:
            prompt = getattr(processor, "prompt_ignore_length", None)
            if type(processor) not in _ON_DEVICE or prompt:
                return f"`{type(processor).__name__}` may need the host to look at every token"
        return None


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
        self.column = torch.full((1,), self.length, device=input_ids.device)
        self.tokens = input_ids[:, -1].clone()
        self.kept: dict[str, list[Tensor]] = {name: [] for name in kept}
        self.graph: Any = None
        self.capturing = False

    def choose(self, logits: Tensor) -> None:
        """Adds the token that follows from logits (B, V)."""
        logits = logits.to(torch.float32, copy=True)
        seen = self.ids if self.capturing else self.ids[:, : self.length]
        tokens, scores = self.choice(seen, logits)
        for name, values in self.kept.items():
            values.append(scores if name == "scores" else logits)
        self.tokens.copy_(tokens)
        self.ids.index_copy_(1, self.column, tokens[:, None])
        self.column.add_(1)
        self.length += 1

    def run(self, count: int) -> None:
        """Adds `count` tokens, at most L; a graph always adds L, and the rest is for nothing."""
        if self.graph is not None:
            self.graph.replay()
            self.length += self.span
            return
        for _ in range(count):
            self.choose(self.decoding.step(self.tokens))

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
        with fused(model, self.tokens.shape[0], products), self.decoding.few_launches():
            self.graph, _ = capture(self._rehearse, self._steps)

    def _steps(self) -> None:
        place, length = self.decoding.place, self.length
        self.capturing = True
        try:
            for _ in range(self.span):
                self.choose(self.decoding.step(self.tokens))
        finally:
            # A capture that fails has run nothing: the host must not believe otherwise.
            self.capturing, self.length, self.decoding.place = False, length, place

    def _rehearse(self) -> None:
        """Runs the steps once and takes back what they did, random numbers included."""
        state = [self.ids, self.column, self.tokens, self.choice.finished, *self.decoding.state()]
        before = [tensor.clone() for tensor in state]
        devices = [self.ids.device] if self.ids.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            self._steps()
        for tensor, copy in zip(state, before, strict=True):
            tensor.copy_(copy)


class Spectator:
    """Looks at new tokens one by one, in order: stopping criteria, pads of rows that ended, the streamer.

    Args:
        program: makes the tokens.
        criteria: of this call.
        streamer: of this call, or None.
    """

    def __init__(self, program: BlockProgram, criteria: StoppingCriteriaList, streamer: Any) -> None:
        self.program, self.criteria, self.streamer = program, criteria, streamer
        self.plain = all(type(criterion) in _PLAIN_CRITERIA for criterion in criteria)
        # One copy a program, in place of several launches a token.
        self.ids = program.ids.cpu() if self.plain else program.ids
        self.length = self.prompt = program.length - 1
        self.unfinished = torch.ones(self.ids.shape[0], dtype=torch.bool, device=self.ids.device)

    def watch(self) -> bool:
        """Whether any row goes on behind the tokens that the program has made."""
        new = slice(self.length, self.program.length)
        if self.ids is not self.program.ids:
            self.ids[:, new].copy_(self.program.ids[:, new])
        while self.length < new.stop:
            self.length += 1
            done = self.criteria(cast(Any, self.ids[:, : self.length]), self._scores())
            self.unfinished &= ~done.to(self.unfinished.device)
            if self.streamer is not None:
                self.streamer.put(self.ids[:, self.length - 1].cpu())
            if not bool(self.unfinished.any()):
                return False
            if not self.plain and self.program.choice.ends is not None:
                rest = self.ids[:, self.length : new.stop]
                rest.copy_(torch.where(self.unfinished[:, None], rest, self.program.choice.pad))
        if not self.plain and self.program.choice.ends is not None:
            self.program.end_rows(self.unfinished)
        return True

    def _scores(self) -> Any:
        scores = self.program.kept.get("scores")
        return None if scores is None else tuple(scores[: self.length - self.prompt])


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
    call: dict[str, Any] = {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria}
    call |= {"generation_config": generation_config, "synced_gpus": synced_gpus, "streamer": streamer}
    if not _fits(model, decoder, generation_config, model_kwargs, synced_gpus):
        return cast(Any, GenerationMixin)._sample(model, input_ids, **call, **model_kwargs)
    outputs = cast(Any, model)._prefill(input_ids, generation_config, model_kwargs)
    cache, prompt = outputs.past_key_values, input_ids.shape[1]
    new = generation_config.max_length - prompt
    decoding = cast(Any, model).decode_blocks(cache, new)
    lasting = generation_config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)
    try:
        choice = TokenChoice(
            logits_processor, generation_config, stopping_criteria, input_ids.shape[0], input_ids.device
        )
        kept = _kept(generation_config)
        program = BlockProgram(decoding, choice, input_ids, new + decoding.block_length, kept)
        program.choose(outputs.logits[:, -1])
        del outputs
        spectator = Spectator(program, stopping_criteria, streamer)
        while spectator.watch():
            left = generation_config.max_length - program.length
            if program.graph is None and left > program.span and setup.cuda_graph:
                _record(program, model, decoder)
            program.run(min(left, program.span))
        if lasting:
            decoding.finish(program.ids[:, prompt : program.length - 1], program.length - spectator.length)
    finally:
        if lasting:
            decoding.close()
    if streamer is not None:
        streamer.end()
    sequences = program.ids[:, : spectator.length].clone()
    if not generation_config.return_dict_in_generate:
        return sequences
    lists = {name: tuple(values[: spectator.length - prompt]) for name, values in program.kept.items()}
    return GenerateDecoderOnlyOutput(sequences=sequences, past_key_values=cache, **lists)  # pyright: ignore[reportArgumentType]


def _kept(generation_config: Any) -> tuple[str, ...]:
    if not generation_config.return_dict_in_generate:
        return ()
    return tuple(name for name in ("scores", "logits") if getattr(generation_config, f"output_{name}"))


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
    if model.config._attn_implementation not in ("tree_attention", "blockwise_attention"):
        return False
    reason = obstacle(model)
    if reason is None and not decoder.owns_forward():
        reason = "the model's forward was replaced, say for mixed precision or training"
    if reason is not None and decoder.required:
        decoder.refuse(reason)
    if reason is not None:
        warn_slow("decoding", reason)
    return reason is None


def _record(program: BlockProgram, model: PreTrainedModel, decoder: GraphDecoder) -> None:
    """Captures the program's steps where a graph can hold them; says why where not."""
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
