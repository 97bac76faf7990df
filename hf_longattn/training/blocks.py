"""How many tokens go through a layer at a time, and which."""

from typing import Any

import torch

# Tokens of a block, D and F of the model whose block is the measure of what one may take.
_TOKENS, _WIDTH, _INNER = 16384, 2048, 8192
_MOST = 4 * _TOKENS
_FEWEST = 256
# What layers with states take of that measure in 16 bits: softmax layers hold keys and values of the whole
# sequence beside a block, with fp32 sums, and what is left free for those is there for larger blocks.
_STATE_SHARE = 2
# Blocks begin where vector loads do.
_STEP = 128


def token_numbers(width: int, inner: int) -> int:
    """Numbers that the activations and gradients of one token of a block take: 7.5 D + 5 F.

    Args:
        width: D, of the hidden states.
        inner: F, of the feed-forward layer.
    """
    return (15 * width + 10 * inner) // 2


def numbers_at_once(config: Any) -> int:
    """Numbers of one position in the backward of the token decoder's layers, which get all rows at once.

    5 D, keys and values, and 3 F, or 5 F where there is a gate.

    Args:
        config: a `BlockTransformerConfig`.
    """
    states = 5 * config.token_hidden_size + 2 * config.token_num_key_value_heads * config.token_head_dim
    return states + (3 if config.decoder_type == "gpt_neox" else 5) * config.token_intermediate_size


def times_at_once(config: Any) -> int:
    """How many times its input the backward of a layer takes that gets all tokens at once; 0 of others.

    Args:
        config: of a model.
    """
    if config.model_type != "block_transformer":
        return 0
    # The input's own place, and what is made of it.
    return 1 + -(-numbers_at_once(config) // config.token_hidden_size)


def block_tokens(device: torch.device, rows: int, numbers: int, dtype: torch.dtype | None = None) -> int:
    """Most tokens of each row in a block, where nobody asks for a number.

    Args:
        device: of the hidden states.
        rows: of the batch.
        numbers: that one token takes, `token_numbers`.
        dtype: of the hidden states of a layer that hands on states; None for one that keeps keys and values.
    """
    if device.type == "cpu":
        return max(1024 // max(rows, 1), _FEWEST)
    # Large enough that products run at full rate and launches are few, small enough that a block is little
    # beside the sequence: narrow models take more tokens in the same bytes.
    share = _STATE_SHARE if dtype is not None and dtype.itemsize <= 2 else 1
    tokens = share * _TOKENS * token_numbers(_WIDTH, _INNER) // max(numbers, 1)
    return max(min(max(tokens, _TOKENS), _MOST) // max(rows, 1), _FEWEST)


def even_size(length: int, most: int) -> int:
    """Tokens of a block that cuts a sequence evenly: a last block of a few tokens costs as many launches.

    Args:
        length: T.
        most: tokens of a block.
    """
    blocks = max(-(-length // most), 1)
    return min(-(-length // blocks // _STEP) * _STEP, most)
