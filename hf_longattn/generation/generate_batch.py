"""The public `generate_batch` of a prepared Block Transformer: what a call may ask, and what it gets.

Arguments and results are those of transformers' continuous batching, whose pages of tokens cannot hold the
keys and values of blocks. What a call asks beyond what rows of blocks can do is refused, by name, before any
work.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.generation.configuration_utils import (
    ContinuousBatchingConfig,
    GenerationConfig,
    GenerationMode,
)
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState
from transformers.generation.stopping_criteria import StoppingCriteriaList

from hf_longattn.devices import free_memory
from hf_longattn.generation.batching import RowProgram, Rows
from hf_longattn.generation.blocks import (
    IMPLEMENTATIONS,
    record_steps,
    why_not_past,
)
from hf_longattn.generation.choice import TokenChoice
from hf_longattn.generation.graph import GraphDecoder
from hf_longattn.generation.prefill import GPU_CHUNK_TOKENS
from hf_longattn.generation.prompts import reading
from hf_longattn.generation.spectator import PLAIN_CRITERIA

if TYPE_CHECKING:
    from hf_longattn.generation.setup import GenerationSetup

# Blocks that are read at a time on a CPU, all prompts together; on a GPU, as many as keep products at full
# rate.
_CPU_BLOCKS = 512
# Rows, where nobody asks for a number: the logits of more take memory, and weights are read for enough.
_MOST_ROWS = 512
# The share of the free memory that keys and values may take, where nobody asks for another.
_SHARE = 0.8
# Fields of `ContinuousBatchingConfig` that mean something here.
_HONOURED = ("max_requests_per_batch", "max_memory_percent")
# Fields of `GenerationConfig` that ask for what the rows do not keep or do.
_REFUSED = {
    "num_return_sequences": (None, 1),
    "use_cache": (None, True),
    "cache_implementation": (None, "dynamic"),
    "output_scores": (None, False),
    "output_logits": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "token_healing": (None, False),
    "stop_strings": (None, []),
}


class BatchGeneration:
    """Answers batches of prompts with one prepared model.

    Args:
        model: that generates, with `decode_rows`.
        setup: the settings of `prepare_generation`.
        decoder: of this model; knows whether graphs can be captured.
    """

    def __init__(self, model: PreTrainedModel, setup: "GenerationSetup", decoder: GraphDecoder) -> None:
        self.model, self.setup, self.decoder = model, setup, decoder

    @torch.no_grad()
    def generate_batch(
        self,
        inputs: list[list[int]],
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        record_timestamps: bool = False,
        progress_bar: bool = False,
        persistent_manager: bool = False,
        warmup: bool = True,
        **kwargs: Any,
    ) -> dict[str, GenerationOutput]:
        """Answers many prompts of different lengths on a fixed number of rows.

        A row that has ended takes the next prompt where the next block begins. Prompts begin in the order of
        their lengths, the longest first. Greedy tokens are those of each prompt alone, but for rounding;
        sampled ones are the same for the same seed, prompts and number of rows.

        Args:
            inputs: token ids of each prompt.
            generation_config: as in `generate`; the model's own if left out.
            continuous_batching_config: of which `max_requests_per_batch` bounds the number of rows, and
                `max_memory_percent` the share of the free memory that keys and values take.
            record_timestamps: whether to note when each token was read by the host.
            progress_bar: whether to show how many prompts are answered; `prepare_generation(progress=True)`
                shows it, too.
            persistent_manager: must be False: rows live as long as the call.
            warmup: has no effect; what can be captured is captured before the first block.
            **kwargs: fields of `GenerationConfig`, given straight; `max_new_tokens` may be a list, with a
                number for each prompt.

        Returns:
            For every prompt, in order, "req_<n>" and its `GenerationOutput`, `generated_tokens` with the
            token that ended it.

        Raises:
            ValueError: what the rows cannot do, by name.
            TypeError: arguments that are not known, or prompts that are no lists of ids.
        """
        self._check(continuous_batching_config, persistent_manager)
        prompts = _read_prompts(inputs, self.model.config.vocab_size)
        if not prompts:
            return {}
        limits = kwargs.pop("max_new_tokens", None)
        config = self._read_config(generation_config, kwargs)
        limits = _read_limits(config.max_new_tokens if limits is None else limits, len(prompts))
        requests = _make_requests(prompts, limits, config, record_timestamps)
        # Memory that a kept program holds is worth more as rows; a call beside this one keeps its own.
        with vars(self.model)["_kept_program"].serving() as own:
            own.clear()
            self._run(requests, config, continuous_batching_config, progress_bar or self.setup.progress)
        return {request.request_id: request.to_generation_output() for request in requests}

    def _run(
        self, requests: list[RequestState], config: Any, batching: ContinuousBatchingConfig | None, show: bool
    ) -> None:
        model = cast(Any, self.model)
        span, device = model.config.block_length, model.device
        width = max(len(each.initial_tokens) + cast(int, each.max_new_tokens) for each in requests)
        # A prompt may get up to L pads in its first block.
        tokens = width + span
        rows = min(self._fitting(tokens, batching), len(requests))
        choice = self._choice(config, rows)
        program = RowProgram(model.decode_rows(rows, tokens), choice, width + 1)
        if self.setup.cuda_graph:
            record_steps(program, model, self.decoder)
        positions = _CPU_BLOCKS if device.type == "cpu" else GPU_CHUNK_TOKENS
        chunk = self.setup.prefill_chunk_size or config.prefill_chunk_size
        longest_first = sorted(requests, key=lambda request: -len(request.initial_tokens))
        with _progress(show, len(requests)) as ended:
            read = functools.partial(reading, model)
            blocks = positions if chunk is None else max(chunk // span, 1)
            behind = int(device.type == "cuda")
            Rows(program, longest_first, positions, blocks, read, ended, behind).run()

    def _check(self, batching: ContinuousBatchingConfig | None, persistent: bool) -> None:
        """Refuses what the model, its set-up or the settings of the batch ask in vain."""
        if persistent:
            raise ValueError("`persistent_manager` must be False: rows of blocks live as long as the call.")
        if self.model.training:
            raise ValueError("`generate_batch` needs a model in evaluation mode; call `model.eval()`.")
        implementation = self.model.config._attn_implementation
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"`attn_implementation` of `generate_batch` must be one of {', '.join(IMPLEMENTATIONS)}, got "
                f"{implementation!r}."
            )
        reason = why_not_past(self.model, self.decoder)
        if reason is not None:
            raise ValueError(f"`generate_batch` does not call the model's forward, and {reason}.")
        if torch.is_autocast_enabled(self.model.device.type):
            raise ValueError(
                "`generate_batch` keeps keys and values in the dtype of the model, and `torch.autocast` has "
                "them made in another; call it outside, with the model in that dtype."
            )
        for name in ("cache_dtype", "offload_layers"):
            value = getattr(self.setup, name)
            if value not in (None, 0, "auto"):
                raise ValueError(
                    f"`{name}`={value!r} cannot be honoured by `generate_batch`: rows of blocks keep keys "
                    "and values on the device in the dtype of the model; leave it out."
                )
        plain = ContinuousBatchingConfig()
        for field in fields(plain) if batching is not None else ():
            value = getattr(batching, field.name)
            if field.name not in _HONOURED and value != getattr(plain, field.name):
                raise ValueError(
                    f"`continuous_batching_config.{field.name}` must be left out for a Block Transformer, "
                    f"got {value!r}; {' and '.join(f'`{name}`' for name in _HONOURED)} can be set."
                )
        _check_bounds(batching)

    def _read_config(self, given: GenerationConfig | None, kwargs: dict[str, Any]) -> Any:
        """The configuration as `generate` completes it, refused where rows cannot honour it."""
        model = cast(Any, self.model)
        config, unknown = model._prepare_generation_config(given, **kwargs)
        if unknown:
            raise TypeError(f"`generate_batch` does not take {', '.join(f'`{name}`' for name in unknown)}.")
        mode = config.get_generation_mode()
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise ValueError(
                f"`generate_batch` decodes greedily or by sampling, and `generation_config` asks for "
                f"{mode.value!r}; use `generate`."
            )
        for name, allowed in _REFUSED.items():
            if getattr(config, name, None) not in allowed:
                raise ValueError(
                    f"`{name}`={getattr(config, name)!r} cannot be honoured by `generate_batch`; leave it "
                    "out, or use `generate`."
                )
        model._prepare_special_tokens(config, True, device=model.device, batch_size=1)
        for criterion in model._get_stopping_criteria(config, StoppingCriteriaList()):
            if type(criterion) not in PLAIN_CRITERIA:
                raise ValueError(
                    f"`generate_batch` ends rows by `eos_token_id` and `max_new_tokens` alone, got "
                    f"`{type(criterion).__name__}`; use `generate`."
                )
        return config

    def _choice(self, config: Any, rows: int) -> TokenChoice:
        device = self.model.device
        processors = cast(Any, self.model)._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=1,
            encoder_input_ids=torch.zeros(1, 1, dtype=torch.long, device=device),
            logits_processor=LogitsProcessorList(),
            device=device,
            model_kwargs={},
        )
        # The host sees where a row ends: pads behind it would be for nobody.
        choice = TokenChoice(processors, config, StoppingCriteriaList(), rows, device)
        if (reason := choice.obstacle()) is not None:
            raise ValueError(
                f"`generate_batch` cannot honour `generation_config`: {reason}; leave it out, or use "
                "`generate`."
            )
        return choice

    def _fitting(self, tokens: int, batching: ContinuousBatchingConfig | None) -> int:
        """How many rows of so many tokens there may be."""
        most, share = _MOST_ROWS, _SHARE
        if batching is not None:
            most, share = batching.max_requests_per_batch or most, batching.max_memory_percent or share
        free = free_memory(self.model.device)
        if free is None:
            return most
        size = cast(Any, self.model).bytes_of_row(tokens)
        if size > share * free:
            raise ValueError(
                f"`inputs` and `max_new_tokens` need {size / 2**30:.2f} GiB of keys and values for one row, "
                f"and {share * free / 2**30:.2f} GiB may be taken on {self.model.device}; ask "
                "for fewer tokens."
            )
        return min(most, int(share * free // size))


@contextlib.contextmanager
def _progress(show: bool, total: int) -> Iterator[Callable[[], None]]:
    """Inside, a bar of answered prompts, which the function that it gives moves on."""
    if not show:
        yield lambda: None
        return
    columns = (TextColumn("answering prompts"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("prompts", total=total)
        yield lambda: progress.advance(task)


def _check_bounds(batching: ContinuousBatchingConfig | None) -> None:
    """Refuses a number of rows, or a share of the memory, that cannot be."""
    if batching is None:
        return
    rows, share = batching.max_requests_per_batch, batching.max_memory_percent
    if rows is not None and (type(rows) is not int or rows < 1):
        raise ValueError(
            "`continuous_batching_config.max_requests_per_batch` must be a positive number or None, got "
            f"{rows!r}."
        )
    if share is not None and not (isinstance(share, (int, float)) and 0 < share <= 1):
        raise ValueError(
            "`continuous_batching_config.max_memory_percent` must lie above 0 and be at most 1, got "
            f"{share!r}."
        )


def _read_prompts(inputs: Any, vocab_size: int) -> list[list[int]]:
    """Every prompt as a list of ids."""
    if not isinstance(inputs, (list, tuple)):
        # The rows of a tensor are of one length: who knows which of their tokens are pads.
        raise TypeError(
            f"`inputs` must be a list with the token ids of each prompt, got {type(inputs).__name__}; pass "
            "`tokenizer(texts)['input_ids']`, without padding."
        )
    return [_read_prompt(prompt, vocab_size) for prompt in inputs]


def _read_prompt(prompt: Any, vocab_size: int) -> list[int]:
    """A prompt as a list of ids."""
    ids = prompt.tolist() if isinstance(prompt, Tensor) else prompt
    if not isinstance(ids, (list, tuple)) or not all(isinstance(each, int) for each in ids):
        raise TypeError(
            f"`inputs` must be lists of token ids, one a prompt, got {type(prompt).__name__} in it; pass "
            "`tokenizer(texts)['input_ids']`."
        )
    if not ids:
        raise ValueError("`inputs` must hold at least one token a prompt, got an empty one.")
    if min(ids) < 0 or max(ids) >= vocab_size:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise ValueError(
            f"`inputs` must hold ids from 0 to {vocab_size - 1}, the model's vocabulary, got {wrong}."
        )
    return list(ids)


def _make_requests(
    prompts: list[list[int]], limits: list[int], config: Any, record_timestamps: bool
) -> list[RequestState]:
    ends = [] if config._eos_token_tensor is None else config._eos_token_tensor.tolist()
    return [
        RequestState(
            request_id=f"req_{number}",
            initial_tokens=prompt,
            max_new_tokens=limit,
            eos_token_id=ends,
            record_timestamps=record_timestamps,
        )
        for number, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    ]


def _read_limits(limits: Any, count: int) -> list[int]:
    """New tokens of each prompt."""
    given = limits if isinstance(limits, (list, tuple)) else [limits] * count
    if len(given) != count or not all(type(each) is int and each > 0 for each in given):
        raise ValueError(
            f"`max_new_tokens` must be a positive number, or a list of {count} of them, one a prompt, got "
            f"{limits!r}; rows are made for it."
        )
    return list(given)
