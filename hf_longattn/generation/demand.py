"""What a prompt asks of the memory beside the weights: one count for `generate` and for `hf-longattn plan`.

    need(N)   rows * (keys and values of N tokens - those that are held) - room that the buffers have
              + a share of the activations of one chunk

`generate` refuses a call whose need is more than what is free, with half of the activations, for nothing
that fits may be refused; the plan takes the same sum for the longest prompt. Chunks are halved before that,
until all of the activations fit beside a reserve.
"""

from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from transformers import PreTrainedConfig

from hf_longattn.generation.sizes import (
    Ranks,
    activation_bytes,
    cache_bytes,
    fewest_layers,
    longest,
    number_of_layers,
    saved_bytes,
)

# What remains for the context of CUDA, and the rounding of the allocator.
RESERVE = 1 << 30
# Nothing that fits may be refused. What is counted, 4 F + 3 D elements a token, is for gate and up in one
# product; apart, 3 F + 4 D of them are alive together, and 2 F + 4 D where there is no gate: at least half.
CERTAIN = 0.5
AnyDemand = TypeVar("AnyDemand", bound="Demand")
# Chunks of fewer tokens, all rows of a rank together, read the weights more often than they compute.
_SMALLEST_CHUNK = 512


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What one call of `generate` asks of the memory of a rank.

    Args:
        config: the text config.
        rows: sequences, beams among them.
        prompt: tokens of the prompt, those in the cache included.
        total: tokens of prompt and answer that the cache will hold: all but the last.
        past: tokens that the cache holds.
        spare: bytes that the cache has room for beyond what it holds.
        dtype: of keys and values.
        activations: dtype of the activations.
        chunk: tokens of a chunk, all rows and ranks together.
        ranks: that share the prompt.
        offload: layers that wait in host memory.
    """

    config: PreTrainedConfig
    rows: int
    prompt: int
    total: int
    past: int = 0
    spare: int = 0
    dtype: torch.dtype
    activations: torch.dtype
    chunk: int
    ranks: Ranks
    offload: int = 0

    def need(self, total: int, certain: float = CERTAIN) -> int:
        """Bytes on this rank beyond what is held, once the cache holds so many tokens.

        Args:
            total: tokens.
            certain: the share of the activations that counts.
        """
        new = max(min(total, self.prompt) - self.past, 1) * self.rows
        added = self.kept(total) - self.kept(self.past) - self.spare
        return max(added, 0) + int(certain * self.work(new))

    def kept(self, tokens: int) -> int:
        """Bytes on this rank of what the cache keeps of so many tokens of every row.

        Args:
            tokens: of a row.
        """
        if not tokens:
            # States do not grow, but an empty cache has none yet.
            return 0
        a_row = cache_bytes(self.config, tokens, self.dtype, self.ranks)
        return self.rows * (a_row - saved_bytes(self.config, tokens, self.dtype, self.offload))

    def work(self, tokens: int) -> int:
        """Bytes on this rank of the activations of one chunk.

        Args:
            tokens: that are to be read, all rows and ranks together.
        """
        return activation_bytes(self.config, min(tokens, self.chunk), self.activations, self.ranks)

    @property
    def smallest_chunk(self) -> int:
        """Tokens below which no chunk is shortened, all rows and ranks together."""
        return max(_SMALLEST_CHUNK, 64 * self.rows) * self.ranks.sequence

    @property
    def has_smaller_cache(self) -> bool:
        """Whether the cache could be kept in fewer bits."""
        return self.dtype.itemsize > 1

    def shortened(self: AnyDemand, room: int) -> AnyDemand:
        """With chunks halved until it fits beside the reserve, or until they are the shortest.

        Args:
            room: bytes.
        """
        shorter = self
        while (
            shorter.need(self.total, certain=1.0) > room - RESERVE
            and shorter.chunk >= 2 * self.smallest_chunk
        ):
            shorter = replace(shorter, chunk=shorter.chunk // 2)
        return shorter

    def fewest_offloaded(self, room: int) -> int | None:
        """The fewest layers in host memory with which the call fits; None where none do.

        Args:
            room: bytes.
        """
        number = number_of_layers(self.config)
        # All activations count here: to offload one layer too many costs less than to run out of memory.
        return fewest_layers(
            lambda count: replace(self, offload=count).need(self.total, certain=1.0), room, number
        )

    def fitting(self, room: int) -> int:
        """Tokens of prompt and answer that fit in `room` bytes, the last of which is never cached.

        Args:
            room: bytes.
        """
        return max(longest(self.need, room), self.past) + 1
