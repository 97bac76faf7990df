"""Few queries on many keys: the keys in parts, so that every multiprocessor has work.

A kernel gives a tile of queries of one head to one program, which walks along all keys. Few queries make
fewer tiles than there are multiprocessors, or a last wave that leaves most of them idle. Then the keys are
cut in parts, which stand as rows of a batch, in place; the results merge by their log-sum-exp, exactly.
Source: Shyam et al., Tree Attention, arXiv 2408.04093.
"""

import functools

from torch import Tensor

# Times are in keys: a multiprocessor of an H100 does the products of 128 queries with one key in some 15 ns.
# A program starts and ends in the time of some 256 keys. The result of a part is written and read once more,
# 64 KiB at a multiprocessor's share of the memory's bandwidth: some 200 keys.
_START_KEYS, _MERGE_KEYS = 256, 200
# Shorter parts gain nothing, and neither do queries that fill so many waves; more parts take two merges.
_LEAST_KEYS, _MOST_WAVES, _MOST_PARTS = 1024, 4, 16


@functools.lru_cache(maxsize=4096)
def pick_parts(num_tiles: int, num_keys: int, num_processors: int) -> int:
    """Parts that the keys of one sequence are cut in: the fewest within a tenth of the least time.

        time(parts) = ceil(tiles parts / processors) (keys / parts + start) + tiles parts / processors merge

    Args:
        num_tiles: programs that the queries make, all heads together.
        num_keys: keys that each of them reads; between two powers of two the parts stay as many.
        num_processors: programs that run at once.
    """
    num_keys = 1 << max(num_keys - 1, 0).bit_length()
    if num_tiles >= _MOST_WAVES * num_processors:
        return 1

    def time(parts: int) -> float:
        waves = -(-num_tiles * parts // num_processors)
        merge = num_tiles * parts / num_processors * _MERGE_KEYS if parts > 1 else 0
        return waves * (num_keys / parts + _START_KEYS) + merge

    choices = range(1, min(_MOST_PARTS, max(1, num_keys // _LEAST_KEYS)) + 1)
    enough = 1.1 * min(map(time, choices))
    return next(parts for parts in choices if time(parts) <= enough)


def cut_keys(states: Tensor, parts: int, length: int) -> Tensor:
    """The first keys or values of one sequence as parts, in place: (1, G, S, K) -> (parts, G, length, K)."""
    return states[0, :, : parts * length].unflatten(1, (parts, length)).transpose(0, 1)
