"""What a cache in 8 bits changes about a model: the part of `verify` that `--cache-dtype` asks for."""

from dataclasses import dataclass

import hf_longattn
from hf_longattn.cache import LongContextCache
from hf_longattn.cli.measure import NEW_TOKENS, Bench, forward, greedy


@dataclass
class CacheError:
    """How far a model on a cache in 8 bits lies from itself on a plain one. It is a price, not a check.

    Args:
        cache_dtype: "int8" or "fp8".
        logits: relative error of the logits of real tokens.
        divergence: KL divergence of the predicted distribution from the plain one, nats a token.
        first_difference: the first greedy token of any row that differs, counted from 0, or None.
    """

    cache_dtype: str
    logits: float
    divergence: float
    first_difference: int | None

    def sentence(self) -> str:
        """The numbers in words."""
        tokens = f"first of {NEW_TOKENS} greedy tokens that differs: {self.first_difference}"
        if self.first_difference is None:
            tokens = f"{NEW_TOKENS} greedy tokens are equal"
        return (
            f"{self.cache_dtype} cache: relative error of the logits {self.logits:.3g}, KL divergence "
            f"{self.divergence:.3g} nats a token, {tokens}"
        )


def measure_cache(bench: Bench, cache_dtype: str) -> CacheError:
    """Runs a model on both caches.

    Args:
        bench: model and prompts; the first of its implementations is used.
        cache_dtype: "int8" or "fp8".

    Raises:
        ValueError: the model or the device cannot have such a cache.
    """
    model = bench.load(bench.implementations[0])
    mask, tokens = bench.mask("left"), []
    for dtype in (cache_dtype, None):
        hf_longattn.prepare_generation(model, cache_dtype=dtype)
        tokens.append(greedy(model, bench)[0])
        hf_longattn.restore(model)
    differs = (tokens[0] != tokens[1]).any(0)
    eight, plain = (
        forward(
            model,
            bench.ids,
            mask,
            past_key_values=LongContextCache(model.config, cache_dtype=dtype),
            use_cache=True,
        )[mask.bool()].float()
        for dtype in (cache_dtype, None)
    )
    logs, eight_logs = plain.log_softmax(-1), eight.log_softmax(-1)
    return CacheError(
        cache_dtype=cache_dtype,
        logits=((eight - plain).norm() / plain.norm()).item(),
        divergence=(logs.exp() * (logs - eight_logs)).sum(-1).mean().item(),
        first_difference=int(differs.int().argmax()) if differs.any() else None,
    )
