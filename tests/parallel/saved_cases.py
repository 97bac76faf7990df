"""What the ranks of `test_saved_caches.py` do. Run as `python saved_cases.py P,P... TOPIC...`.

Each group of ranks saves what it holds, and reads what it and all groups before it have saved.
"""

import functools
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import ranks
import tiny
import torch
import torch.distributed as dist
from several import TIMEOUT, assert_same, build, error_of, generate, mesh_of, result
from torch.distributed.device_mesh import init_device_mesh

import hf_longattn
from hf_longattn import LongContextCache
from hf_longattn.cache import files
from hf_longattn.cache.sharded import ShardedCache

# In fp64 what is kept in 8 bits, where no rounding moves a number to the next one.
CASES = {
    "llama": (None, torch.float32),
    "gemma2": (None, torch.float32),
    "gemma2-int8": ("int8", torch.float64),
    "llama-fp8": ("fp8", torch.float64),
    "flag-hybrid": (None, torch.float32),
    "minimax": (None, torch.float32),
}
FEW = ("gemma2-int8", "flag-hybrid")
FOLDER = Path(tempfile.gettempdir())


def make(case):
    name, dtype = case.split("-int8")[0].split("-fp8")[0], CASES[case][1]
    if name in ("flag-hybrid", "minimax"):
        return tiny.build_lightning(name)
    return build(name, dtype, "tree_attention")


def prepare(case, mesh=None, **fields):
    fields = {"timeout": TIMEOUT, "prefill_chunk_size": 24, **fields}
    return hf_longattn.prepare_generation(make(case), device_mesh=mesh, cache_dtype=CASES[case][0], **fields)


def first_turn():
    return tiny.tokens(2, 60), tiny.padding([60, 37], 60, "left")


def next_turn(tokens):
    turn = torch.cat([tokens, tiny.tokens(2, 29, seed=3)], 1)
    mask = first_turn()[1]
    return turn, torch.nn.functional.pad(mask, (0, turn.shape[1] - mask.shape[1]), value=1)


@functools.cache
def expected(case):
    """Both turns of a conversation in one process."""
    model = prepare(case)
    first = generate(model, *first_turn(), do_sample=False)
    turn = next_turn(first.sequences)
    second = generate(model, *turn, do_sample=False, past_key_values=first.past_key_values)
    return first.sequences, result(second)


def saved(rank, size, mesh):
    """What any number of processes has saved, any number goes on with, each with its share."""
    save_and_load(size, mesh, FEW)


def more_saved(rank, size, mesh):
    """The same with other models."""
    save_and_load(size, mesh, [case for case in CASES if case not in FEW])


def save_and_load(size, mesh, cases):
    for case in cases:
        tokens, want = expected(case)
        model, path = prepare(case, mesh), FOLDER / f"{case}-by-{size}.safetensors"
        output = generate(model, *first_turn(), do_sample=False)
        assert torch.equal(output.sequences, tokens), case
        cache = output.past_key_values
        # Also of a model that is restored.
        hf_longattn.restore(model)
        cache.save(path)
        hf_longattn.prepare_generation(model, device_mesh=mesh, cache_dtype=CASES[case][0], timeout=TIMEOUT)
        call = functools.partial(generate, model, *next_turn(tokens), do_sample=False)
        uninterrupted = call(past_key_values=cache)
        assert_same(f"{case}, uninterrupted", uninterrupted, want)
        for other in sorted(FOLDER.glob(f"{case}-by-?.safetensors")):
            again = LongContextCache.load(other, model, capacity=160, cache_dtype=CASES[case][0])
            assert isinstance(again, ShardedCache) == (size > 1) and type(again) is type(cache)
            answer = call(past_key_values=again)
            assert_same(f"{other.stem}, read by {size}", answer, want)
            if other == path:
                assert all(map(torch.equal, result(answer), result(uninterrupted))), case


def whole(rank, size, mesh):
    """Each process reads all of a set where it is not told of the others."""
    case = FEW[0]
    tokens, want = expected(case)
    model = prepare(case)
    for path in sorted(FOLDER.glob(f"{case}-by-?.safetensors")):
        cache = LongContextCache.load(path, model.config, cache_dtype=CASES[case][0])
        answer = generate(model, *next_turn(tokens), do_sample=False, past_key_values=cache)
        assert_same(path.stem, answer, want)


def faults(rank, size, mesh):
    """A disk that is slow, errors that nobody expected, and heads that lie elsewhere."""
    model, path = prepare("llama", mesh, timeout=2.0), FOLDER / "faults.safetensors"
    cache = generate(model, *first_turn(), do_sample=False, max_new_tokens=2).past_key_values
    write = files.save_file

    def slow(*args, **kwargs):
        time.sleep(2.5 * (rank == 1))
        write(*args, **kwargs)

    def broken(*args, **kwargs):
        if rank == 1:
            raise KeyError("nobody expected this")
        write(*args, **kwargs)

    with patch.object(files, "save_file", slow):
        cache.save(path)
    length = cache.get_seq_length()
    assert LongContextCache.load(path, model).get_seq_length() == length
    with patch.object(files, "save_file", broken):
        message = error_of(KeyError if rank == 1 else RuntimeError, lambda: cache.save(path))
    assert "nobody expected this" in message, message
    dist.barrier()
    assert not list(FOLDER.glob("*.new"))
    assert LongContextCache.load(path, model).get_seq_length() == length
    where = path if rank == 0 else FOLDER / "nowhere"
    message = error_of(OSError, lambda: LongContextCache.load(where, model))
    assert "nowhere" in message and ("rank 1 of 2: " in message) == (rank == 0), message
    heads = init_device_mesh("cpu", (1, size), mesh_dim_names=("cp", "tp"))
    model = prepare("llama", heads)
    cache = generate(model, *first_turn(), do_sample=False, max_new_tokens=2).past_key_values
    for name, refused in {
        "save": lambda: cache.save(path),
        "load": lambda: LongContextCache.load(path, model),
    }.items():
        message = error_of(ValueError, refused)
        assert f"`{name}`: the heads of this cache lie on other processes too (2 in all, 1 of" in message


def expect(topics):
    """Computes the expectations here, so that every rank inherits them."""
    global FOLDER
    FOLDER = Path(tempfile.mkdtemp())
    for case in CASES if "more_saved" in topics else FEW if "saved" in topics else ():
        expected(case)


if __name__ == "__main__":
    ranks.run_topics(globals(), expect, mesh_of)
