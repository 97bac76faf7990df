"""The test prompts of `verify`, and what one model under one implementation computes on them."""

import inspect
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from hf_longattn.masking import check_config
from hf_longattn.modeling.block_transformer import BlockTransformerConfig
from hf_longattn.registration import ATTENTION_FUNCTIONS

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIDES = ("no", "left", "right")
NEW_TOKENS = 8
# A yardstick in fp64 larger than this is made in fp32.
_MAX_YARDSTICK_BYTES = 4 * 2**30
# Logits are compared on evenly spaced columns: a vocabulary of 256K would fill the memory.
_MAX_COLUMNS = 4096


@dataclass(frozen=True)
class Request:
    """What to verify.

    Args:
        model: a folder that `save_pretrained` wrote, or an id on the hub.
        device: "auto" or a torch device.
        dtype: "auto" (that of the checkpoint), "float32", "bfloat16" or "float16".
        tokens: length of the test prompt.
        implementation: "tree_attention", "blockwise_attention" or "both".
        cache_dtype: "int8" or "fp8" measures what such a cache changes, too.
    """

    model: str
    device: str = "auto"
    dtype: str = "auto"
    tokens: int = 128
    implementation: str = "both"
    cache_dtype: str | None = None


@dataclass
class Exact:
    """What a model computes on the test prompts: logits of real tokens by side of padding, and gradients."""

    logits: dict[str, Tensor]
    gradients: Tensor


@dataclass
class Measured(Exact):
    """The same of one implementation on padded batches, and its leaks, greedy tokens and their logits."""

    implementation: str
    future_leak: float
    padding_leak: float
    tokens: Tensor
    scores: Tensor


def pick_device(name: str) -> torch.device:
    """The device that `--device` names, or the best there is for "auto"."""
    has_gpu = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if has_gpu else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"`--device` must be auto, cpu or cuda, got {name!r}.") from None
    if device.type == "cuda" and (not has_gpu or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(
            f"`--device` asks for {name!r}, but torch sees {torch.cuda.device_count()} GPU(s) here; use "
            "`--device cpu`, or see `hf-longattn doctor`."
        )
    return device


def pick_dtype(name: str) -> Any:
    """The dtype that `--dtype` names; "auto" is that of the checkpoint."""
    if name not in ("auto", *_DTYPES):
        raise ValueError(f"`--dtype` must be one of auto, {', '.join(_DTYPES)}, got {name!r}.")
    return _DTYPES.get(name, "auto")


def _pick_implementations(name: str) -> list[str]:
    if name == "both":
        return list(ATTENTION_FUNCTIONS)
    if name not in ATTENTION_FUNCTIONS:
        known = ", ".join([*ATTENTION_FUNCTIONS, "both"])
        raise ValueError(f"`--implementation` must be one of {known}, got {name!r}.")
    return [name]


@dataclass(frozen=True)
class Choice:
    """Two tokens that implementations have chosen behind the same text.

    Args:
        margin: by how much the worse of them lies below the best logit.
        rounding: by how much rounding moves a logit, at most.
    """

    margin: float
    rounding: float

    @classmethod
    def between(cls, tokens: list[int], exact: Tensor, rounded: Tensor) -> "Choice":
        """The choice between two tokens.

        Args:
            tokens: the two.
            exact: (V,) logits in a wider dtype.
            rounded: (V,) the same of the standard implementation in the dtype of the model.
        """
        exact = exact.double()
        rounding = (rounded.double() - exact).abs().max().item()
        return cls((exact.max() - exact[tokens].min()).item(), rounding)

    @property
    def is_tie(self) -> bool:
        """Whether both lie within rounding of the best one; either implementation rounds."""
        return self.margin <= 2 * self.rounding


def refuse_missing(name: str) -> None:
    """Refuses what reads as a path and leads nowhere, before the hub is asked for it.

    Args:
        name: of a model, as the caller gave it.

    Raises:
        ValueError: there is no such folder or file.
    """
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_local and not Path(name).expanduser().exists():
        raise ValueError(
            f"`MODEL`: there is no folder {name!r}; give a model folder, or an id such as org/name."
        )


def read_config(name: str) -> Any:
    """The configuration of a causal language model, read before any weight is."""
    refuse_missing(name)
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"`MODEL`: {name!r} cannot be loaded: {error}") from error
    if type(config) not in AutoModelForCausalLM._model_mapping.keys():
        raise ValueError(f"`MODEL` must be a causal language model, got {config.model_type!r} in {name!r}.")
    return config


class Bench:
    """The model, loaded anew for each implementation, and the prompts that all of them get."""

    def __init__(self, request: Request) -> None:
        self.device = pick_device(request.device)
        self.implementations = _pick_implementations(request.implementation)
        self.dtype = pick_dtype(request.dtype)
        self.name = str(Path(request.model).expanduser()) if Path(request.model).is_dir() else request.model
        self.config = read_config(request.model).get_text_config()
        if isinstance(self.config, BlockTransformerConfig):
            raise ValueError(
                f"`MODEL` must be a model of transformers or a lightning model, got a Block Transformer in "
                f"{request.model!r}: its blocks have no standard implementation to be held against."
            )
        limit = getattr(self.config, "max_position_embeddings", None) or math.inf
        if not 8 <= request.tokens <= limit - NEW_TOKENS:
            raise ValueError(
                f"`--tokens` must be 8 to {limit - NEW_TOKENS:.0f} for this model, got {request.tokens}."
            )
        self.tokens, self.short = request.tokens, max(request.tokens * 2 // 3, 4)
        self.dtype, large = self._check_model()
        self.yardstick_dtype = torch.float32 if large else torch.float64

    def _check_model(self) -> tuple[torch.dtype, bool]:
        model = self.load("sdpa")
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                check_config(module.config)
        if {vars(module).get("is_causal") for module in model.modules()} - {None} == {False}:
            raise ValueError(
                f"`MODEL` must read from left to right, got {type(model).__name__} with attention in both "
                "directions; chunks and greedy tokens say nothing of it."
            )
        return model.dtype, model.num_parameters() * 8 > _MAX_YARDSTICK_BYTES

    def load(self, implementation: str, **options: Any) -> Any:
        """The model in evaluation mode.

        Args:
            implementation: of attention; eager where "sdpa" is asked for and the model does not know it.
            options: others of `from_pretrained`.
        """
        options |= {"dtype": self.dtype, "attn_implementation": implementation}
        try:
            model = AutoModelForCausalLM.from_pretrained(self.name, **options)
        except OSError as error:
            raise ValueError(f"`MODEL`: {self.name!r} cannot be loaded: {error}") from error
        except ValueError:
            if implementation != "sdpa":
                raise
            options["attn_implementation"] = "eager"
            model = AutoModelForCausalLM.from_pretrained(self.name, **options)
        return cast(Any, model).to(self.device).eval()

    def load_yardstick(self) -> Any:
        """The model under eager attention in the yardstick's dtype, with weights rounded to the model's."""
        # The grouped products that experts use by default know no fp64.
        return self.load("eager", experts_implementation="eager").to(self.yardstick_dtype)

    @cached_property
    def ids(self) -> Tensor:
        """(2, tokens) random ids."""
        generator = torch.Generator().manual_seed(0)
        shape = (2, self.tokens)
        return torch.randint(3, self.config.vocab_size, shape, generator=generator).to(self.device)

    def mask(self, side: str) -> Tensor:
        """(2, tokens): the first row whole, the second padded on a side."""
        mask = torch.ones_like(self.ids)
        hidden = self.tokens - self.short
        if side != "no":
            mask[1, slice(0, hidden) if side == "left" else slice(self.short, None)] = 0
        return mask

    def texts(self, side: str) -> list[Tensor]:
        """The two texts of a padded batch, (1, length) each, as they are without padding."""
        return [row[mask.bool()][None] for row, mask in zip(self.ids, self.mask(side), strict=True)]

    def columns(self, logits: Tensor) -> Tensor:
        """Some columns of the vocabulary."""
        return logits[..., :: math.ceil(logits.shape[-1] / _MAX_COLUMNS)]


def forward(model: Any, ids: Tensor, mask: Tensor, part: slice = slice(None), **inputs: Any) -> Tensor:
    """Logits of a part of the prompt, with positions that count real tokens."""
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, part]
    with torch.no_grad():
        return model(input_ids=ids[:, part], attention_mask=mask[:, : part.stop], **inputs).logits


def _gradients(model: Any, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Gradients of the mean loss in the embeddings of real tokens and in every vector parameter.

    Those (norms, biases, sinks) are reached through query, key and value of every layer, and fit beside any
    model.
    """
    vectors = [parameter for parameter in model.requires_grad_(False).parameters() if parameter.ndim <= 1]
    embedded, loss = [], torch.zeros((), dtype=torch.float64, device=model.device)
    targets = sum(int(mask[:, 1:].sum()) for _, mask in batches)
    for vector in vectors:
        vector.requires_grad_()
    for ids, mask in batches:
        embedded.append(model.get_input_embeddings()(ids).detach().requires_grad_())
        labels = ids.masked_fill(mask == 0, -100)
        inputs = {"inputs_embeds": embedded[-1], "attention_mask": mask, "labels": labels, "use_cache": False}
        loss = loss + model(**inputs).loss.double() * (int(mask[:, 1:].sum()) / targets)
    gradients = torch.autograd.grad(loss, [*embedded, *vectors], allow_unused=True)
    model.requires_grad_(False)
    tokens = torch.cat(
        [g[mask.bool()] for g, (_, mask) in zip(gradients, batches, strict=False) if g is not None]
    )
    return torch.cat([tokens.flatten(), *(g.flatten() for g in gradients[len(batches) :] if g is not None)])


def greedy(model: Any, bench: Bench) -> tuple[Tensor, Tensor]:
    """Greedy continuation of the left-padded prompts: tokens (2, N) and logits (2, N, vocabulary)."""
    mask = bench.mask("left")
    pad = model.generation_config.pad_token_id
    settings = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=NEW_TOKENS, repetition_penalty=1.0,
        pad_token_id=0 if pad is None else pad, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    result = model.generate(input_ids=bench.ids, attention_mask=mask, generation_config=settings)
    return result.sequences[:, bench.tokens :], torch.stack(result.logits, dim=1)


def _moved(before: Tensor, after: Tensor) -> float:
    return ((after - before).double().norm() / before.double().norm()).item()


def _future_leak(model: Any, bench: Bench) -> float:
    """How far the logits before a token move when it changes: causal attention lets nothing through."""
    place, mask = bench.tokens // 2, bench.mask("no")
    changed = bench.ids.clone()
    changed[:, place] = changed[:, place] % (bench.config.vocab_size - 4) + 3
    before, after = (forward(model, ids, mask)[:, :place] for ids in (bench.ids, changed))
    return _moved(before, after)


def _padding_leak(model: Any, bench: Bench) -> float:
    """How far the logits of real tokens move when the padding holds other tokens."""
    worst = 0.0
    for side in ("left", "right"):
        mask = bench.mask(side)
        changed = torch.where(mask == 0, bench.ids % (bench.config.vocab_size - 4) + 3, bench.ids)
        before, after = (forward(model, ids, mask)[mask.bool()] for ids in (bench.ids, changed))
        # `max` would drop a NaN.
        worst = float(torch.tensor([worst, _moved(before, after)]).amax())
    return worst


def measure(model: Any, bench: Bench) -> Measured:
    """Runs everything once: forwards, a backward, a greedy continuation and the probes for leaks."""
    masks = {side: bench.mask(side) for side in SIDES}
    logits = {
        side: bench.columns(forward(model, bench.ids, mask)[mask.bool()]) for side, mask in masks.items()
    }
    tokens, scores = greedy(model, bench)
    leaks = _future_leak(model, bench), _padding_leak(model, bench)
    gradients = _gradients(model, [(bench.ids, bench.mask("right"))])
    return Measured(logits, gradients, model.config._attn_implementation, *leaks, tokens, scores)


def forward_alone(model: Any, text: Tensor) -> Tensor:
    """Logits (1, N, vocabulary) of one text, (1, N), without padding."""
    return forward(model, text, torch.ones_like(text))


def measure_exact(model: Any, bench: Bench) -> Exact:
    """Without padding: eager attention gives a row that sees nothing NaN in fp64, and that spreads."""
    texts = {side: bench.texts(side) for side in SIDES}
    logits = {
        side: torch.cat([bench.columns(forward_alone(model, text)[0]) for text in rows])
        for side, rows in texts.items()
    }
    return Exact(logits, _gradients(model, [(text, torch.ones_like(text)) for text in texts["right"]]))
