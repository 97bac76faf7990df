"""The choice of the next token, as transformers' loop makes it, by work that a CUDA graph can hold."""

from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process

from hf_longattn.generation.kept import settings_of

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
        self.noise: tuple[torch.Size, torch.dtype] | None = None

    def __call__(self, seen: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens (B,), scores (B, V)) of logits (B, V) behind the tokens `seen` (B, >= 1).

        The logits are fp32, or of any dtype where `takes_largest`.
        """
        scores = self.processors(seen, logits)
        if self.do_sample:
            probabilities = scores.softmax(dim=-1)
            # What `torch.multinomial` computes for one draw, without its check, which stops for the device.
            noise = torch.empty_like(probabilities).exponential_()
            self.noise = noise.shape, noise.dtype
            tokens = (probabilities / noise).argmax(dim=-1)
        else:
            tokens = scores.argmax(dim=-1)
        if self.ends is not None:
            tokens = torch.where(self.finished, self.pad, tokens)
            # `torch.isin` sorts where the ends are many, which waits for the device.
            self.finished.logical_or_((tokens[:, None] == self.ends).any(dim=1))
        return tokens, scores

    def draw_again(self) -> None:
        """Draws the random numbers of one choice, like the last one, for nothing."""
        if self.noise is not None:
            shape, dtype = self.noise
            torch.empty(shape, dtype=dtype, device=self.finished.device).exponential_()

    def takes_largest(self) -> bool:
        """Whether the token is that of the largest logit, which the logits' own dtype shows as fp32 does."""
        return not self.processors and not self.do_sample

    def key(self) -> tuple[Any, ...] | None:
        """What two calls have in common where one graph serves both; None where that is not known."""
        settings = settings_of(self.processors)
        ends = None if self.ends is None else self.ends.numel()
        return None if settings is None else (settings, self.do_sample, ends)

    def constants(self) -> list[Tensor]:
        """Every tensor that a choice reads and never changes."""
        return [self.pad] if self.ends is None else [self.pad, self.ends]

    def obstacle(self) -> str | None:
        """Why a graph cannot hold it, or None."""
        for processor in self.processors:
            prompt = getattr(processor, "prompt_ignore_length", None)
            if type(processor) not in _ON_DEVICE or prompt:
                return f"`{type(processor).__name__}` may need the host to look at every token"
        return None
