"""Assisted and prompt-lookup decoding of a prepared model: the prompt comes in chunks, on a filled cache too.

transformers' loop sends the whole prompt and the first guesses through the model in one forward, whatever the
cache holds. Here all of the prompt but its last token is read before that forward, which is cut to what the
cache does not hold. Layers that record what they hold, so that guesses can be taken back, begin behind the
prompt, and end with the call.
"""

import contextlib
import functools
from collections.abc import Iterator
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel

from hf_longattn.cache import LongContextCache
from hf_longattn.generation.prefill import is_plain_prompt, read_before
from hf_longattn.instance import Setup

if TYPE_CHECKING:
    from hf_longattn.generation.graph import GraphDecoder
    from hf_longattn.generation.setup import GenerationSetup

_PREPARE = "prepare_inputs_for_generation"


def read_before_guessing(
    model: PreTrainedModel, setup: "GenerationSetup", decoder: "GraphDecoder", changes: Setup
) -> None:
    """Has the prompt read in chunks where tokens are guessed.

    Args:
        model: the transformers model.
        setup: the settings of `prepare_generation`.
        decoder: told that a new call begins.
        changes: where the changes are noted, to be undone.
    """
    original_generate: Any = model.generate
    original_generator: Any = model._get_candidate_generator
    prepare = MethodType(_cut_to_new(model.prepare_inputs_for_generation), model)

    @functools.wraps(original_generate)
    def generate(*args: Any, **kwargs: Any) -> Any:
        given, config = kwargs.get("past_key_values"), kwargs.get("generation_config")
        with _recording_as_before(given):
            output = original_generate(*args, **kwargs)
        # The cache of an assistant goes on to its next call, which takes guesses back.
        if given is None and not getattr(config, "is_assistant", False):
            for layer in _recording_layers(getattr(output, "past_key_values", None)):
                layer.record_past = False
        return output

    def get_candidate_generator(
        generation_config: Any, input_ids: Tensor, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> Any:
        found = original_generator(generation_config, input_ids, *args, model_kwargs=model_kwargs, **kwargs)
        if input_ids.shape[0] > 1:
            # The loop refuses it next, and the cache stays as it is.
            return found
        cache: Any = model_kwargs["past_key_values"]
        held, mask = int(cache.get_seq_length()), model_kwargs.get("attention_mask")
        # Some generators learn from the outputs of the first forward, which are those of the whole prompt.
        plain = (
            not found.requires_model_outputs
            and vars(model).get(_PREPARE) is prepare
            and is_plain_prompt(model, cache, generation_config, model_kwargs)
        )
        if held and not (plain and mask is not None and mask.shape[1] == input_ids.shape[1]):
            raise ValueError(_refusal(held, plain))
        if plain:
            with _not_recording(cache):
                read_before(model, setup, decoder, input_ids, generation_config, model_kwargs)
        if isinstance(cache, LongContextCache):
            cache.holds_guesses = True
        return found

    changes.set(model, "generate", generate)
    changes.set(model, "_get_candidate_generator", get_candidate_generator)
    changes.set(model, _PREPARE, prepare)


def _refusal(held: int, plain: bool) -> str:
    way = (
        "pass the ids of the whole sequence and a mask of all of them"
        if plain
        else "leave `assistant_model` and `prompt_lookup_num_tokens` out, or give an empty cache"
    )
    return (
        f"`past_key_values` holds {held} tokens, which assisted and prompt-lookup decoding of transformers "
        f"would read again; {way}."
    )


def _cut_to_new(original: Any) -> Any:
    """A method that prepares the inputs of a first forward as far as the cache does not hold them."""

    # Bound to the model, as the method is: of the class's function, whose first argument is the model too.
    @functools.wraps(getattr(original, "__func__", original))
    def prepare(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        is_cut = args or kwargs.get("next_sequence_length") is not None
        # The loops of transformers say how much is new, but for the first forward behind guesses. A mask as
        # wide as the ids says that these are the whole sequence.
        if kwargs.get("is_first_iteration") and not is_cut and mask is not None and cache is not None:
            held = int(cache.get_seq_length())
            if held and mask.ndim == 2 and mask.shape[1] == input_ids.shape[1]:
                kwargs["next_sequence_length"] = input_ids.shape[1] - held
        return original(input_ids, *args, **kwargs)

    return prepare


def _recording_layers(cache: Any) -> list[Any]:
    return [layer for layer in getattr(cache, "layers", ()) if getattr(layer, "record_past", False)]


@contextlib.contextmanager
def _not_recording(cache: Any) -> Iterator[None]:
    """Inside, what a cache takes in cannot be taken back, and needs no memory for that."""
    layers = _recording_layers(cache)
    if layers and cache.get_seq_length():
        # What was recorded before could only be taken back together with what comes now.
        cache.crop(0)
    for layer in layers:
        layer.record_past = False
    try:
        yield
    finally:
        for layer in layers:
            layer.record_past = True


@contextlib.contextmanager
def _recording_as_before(cache: Any) -> Iterator[None]:
    """Behind it, a caller's cache holds no guesses and records as before: a loop of guesses records all."""
    before = _recording_layers(cache)
    try:
        yield
    finally:
        if isinstance(cache, LongContextCache):
            cache.holds_guesses = False
        for layer in _recording_layers(cache):
            layer.record_past = any(layer is one for one in before)
