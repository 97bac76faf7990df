"""Calls of several processes that read an answer's end late. Run as `python ahead_cases.py P,P... TOPIC...`.

Ranks must all run ahead or none, and one that leaves is named as ever.
"""

import contextlib
import functools
import itertools
import sys
import time
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import ranks
import recorded
import tiny
import torch
import torch.distributed as dist
import transformers as tf
from several import Uneven, assert_same, error_of, generate, mesh_of, prepare, result
from transformers.generation import utils
from transformers.generation.streamers import TextStreamer

from hf_longattn.generation import ahead as run_ahead


@contextlib.contextmanager
def running_ahead():
    """Lets calls on a CPU run ahead; the checks that were made one step late."""
    made, base = [], utils.DeferredStopCheck

    class Counted(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(run_ahead, "_DEVICES", ("cpu",)))
        stack.enter_context(patch.object(torch, "Event", recorded.NoEvent))
        stack.enter_context(patch.object(utils, "DeferredStopCheck", Counted))
        yield made


@functools.cache
def ending(family, rows):
    """Tokens that end each row at another step, and the answer that they leave."""
    ids, mask = tiny.tokens(rows, 23), tiny.padding([23, 10, 17][:rows], 23, "left")
    model = tiny.build(family)
    plain = generate(model, ids, mask, do_sample=False, max_new_tokens=24).sequences[:, 23:]
    call = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0}
    call["eos_token_id"] = sorted({int(row[5 + 4 * index]) for index, row in enumerate(plain)})
    return (ids, mask), call, result(generate(model, ids, mask, **call))


class _Quiet:
    """A tokenizer that has no words."""

    def decode(self, tokens, **kwargs):
        return ""


@functools.cache
def sampled():
    """What one process draws, and the numbers that come next."""
    inputs, call, _ = ending("llama", 1)
    return generate(tiny.build("llama"), *inputs, **{**call, "do_sample": True}).sequences, torch.rand(3)


def ahead(rank, size, mesh):
    """Calls that read the end of an answer one step late, on all ranks or on none."""
    for family, rows in itertools.product(("llama", "gemma2", "mistral-window"), (1, 3)):
        model, ((ids, mask), call, want) = prepare(family, mesh, prefill_chunk_size=16), ending(family, rows)
        with running_ahead() as made:
            output = generate(model, ids, mask, **call)
            assert_same(f"{family}-{rows}", output, want)
            assert len(made) == 1 and made[0].stop_reported
            assert output.past_key_values.get_seq_length() == output.sequences.shape[1] - 1
            # What was forgotten is forgotten everywhere: the conversation goes on as in one process.
            turn = torch.cat([output.sequences, tiny.tokens(rows, 13, seed=4)], 1)
            seen = torch.nn.functional.pad(mask, (0, turn.shape[1] - 23), value=1)
            again = generate(model, turn, seen, do_sample=False, past_key_values=output.past_key_values)
            fresh = generate(tiny.build(family), turn, seen, do_sample=False)
        assert len(made) == 2
        assert_same(f"{family}-{rows}, second turn", again, result(fresh))


def ahead_or_not(rank, size, mesh):
    """What one rank has alone, streamers and hooks and clocks, keeps all ranks at the same step."""
    model, (inputs, call, want) = prepare("llama", mesh), ending("llama", 1)
    plain = {**call, "return_dict_in_generate": False, "output_logits": False}
    with running_ahead() as made:
        for owner, returned in itertools.product(range(min(size, 2)), (True, False)):
            streamer = tiny.Collect()
            kwargs = {"streamer": streamer} if rank == owner else {}
            output = generate(model, *inputs, **(call if returned else plain), **kwargs)
            tokens = output.sequences if returned else output
            assert torch.equal(tokens, want[0]) and streamer.ended == (rank == owner == 0)
            if rank == owner == 0:
                assert sum(streamer.parts, []) == tokens[0].tolist()
            # A streamer may end the call, and a cache that is returned holds what it saw.
            assert len(made) == (not returned)
            made.clear()
        for streamed in (False, True):
            # The streamers of the other ranks are silent ones: they run ahead with the first.
            kwargs = {"streamer": TextStreamer(_Quiet())} if streamed else {}
            drawn = generate(model, *inputs, **(plain if streamed else call) | {"do_sample": True}, **kwargs)
            tokens = drawn if streamed else drawn.sequences
            assert torch.equal(tokens, sampled()[0]) and torch.equal(torch.rand(3), sampled()[1])
            assert len(made) == 1
            made.clear()
        handle = model.model.layers[0].register_forward_hook(lambda *args: None) if rank == size - 1 else None
        assert_same("hook", generate(model, *inputs, **call), want)
        assert not made
        if handle is not None:
            handle.remove()
        stop = tf.StoppingCriteriaList([Uneven(rank)])
        own = generate(model, *inputs, do_sample=False, max_new_tokens=40, stopping_criteria=stop)
        assert own.sequences.shape == (1, 30) and not made
        # A clock that runs on the first rank alone: the others go on with it, and end with it.
        late = patch.object(
            tf.MaxTimeCriteria, "__call__", lambda self, ids, scores: Uneven(rank)(ids, scores)
        )
        with late:
            timed = generate(model, *inputs, do_sample=False, max_new_tokens=40, max_time=9.0)
        assert timed.sequences.shape == (1, 30) and len(made) == 1
        assert_same("max_time", timed, (timed.sequences, torch.stack(timed.logits)))


def ends_ahead(rank, size, mesh):
    """An error on one rank that runs ahead, and a rank that goes without a word, are named as ever."""
    for timeout, leave, kind in ((10.0, _no_room, MemoryError), (8.0, lambda: ranks.os._exit(0), None)):
        model, ids = prepare("llama", mesh, timeout=timeout), tiny.tokens(1, 23)
        with running_ahead() as made:
            check, started = utils.DeferredStopCheck.__call__, time.time()

            def check_or_leave(self, *args, check=check, leave=leave):
                if rank == 1 and args[2] == 28:
                    leave()
                return check(self, *args)

            utils.DeferredStopCheck.__call__ = check_or_leave
            call = functools.partial(generate, model, ids, do_sample=False)
            message = error_of(kind if rank == 1 and kind else RuntimeError, call)
        assert len(made) == 1 and time.time() - started < 8.0 + 8.0
        assert ("no room for another token" if kind else "rank 1 is gone") in message, message
        if kind:
            dist.barrier()
    ranks.os._exit(0)


def _no_room():
    raise MemoryError("no room for another token")


def expect(topics):
    """Computes the expectations here, so that every rank inherits them."""
    if "ends_ahead" not in topics:
        for family, rows in itertools.product(("llama", "gemma2", "mistral-window"), (1, 3)):
            ending(family, rows)
        sampled()


if __name__ == "__main__":
    ranks.run_topics(globals(), expect, mesh_of)
