"""The benchmark of one decoding step: the join that pushes, without a GPU, and the choice of forms."""

import importlib
import itertools
import multiprocessing
import random
import re
import threading
import time
from pathlib import Path

import pytest
import torch
from aot import compile_sm90

from hf_longattn.kernels.decode_attention import decode_attention
from hf_longattn.kernels.merge_partials.reference import merge_reference
from hf_longattn.parallel.group import SequenceGroup

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# (splits, B, H, T, V): the number of programs goes up and down from call to call, widths are odd and even.
SHAPES = [(1, 1, 3, 1, 16), (2, 2, 1, 1, 7), (1, 1, 5, 1, 16), (3, 1, 1, 1, 5)]


@pytest.fixture
def push(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("_push")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    # What the script sets when it is imported.
    for name in ("NCCL_NVLS_ENABLE", "TORCH_SYMM_MEM_DISABLE_MULTICAST"):
        monkeypatch.setenv(name, "")
    for way in ("MIN", "MAX"):
        monkeypatch.setenv(f"NCCL_{way}_P2P_NCHANNELS", "32")
    return importlib.import_module("bench_tree_decode")


def shared(tensor):
    return tensor.share_memory_()


def boards_of(push, size, rows=1):
    memory = [shared(torch.zeros(push.board_bytes(size, rows), dtype=torch.uint8)) for _ in range(size)]
    addresses = [board.data_ptr() for board in memory]
    return [push.PushBoards(board, addresses, rank, rows) for rank, board in enumerate(memory)]


def numbers(push, board):
    """The number of the last call of every program."""
    return board.board[128:][: 4 * push.PROGRAMS].view(torch.int32)


def words(push, board):
    """(2, ranks, lines, words) of the two buffers of a board."""
    return board.board[128 + 4 * push.PROGRAMS :].view(torch.int64).view(
        2, len(board.addresses), push.PROGRAMS * board.rows, 258
    )  # fmt: skip


def parts(size, shape, dtype=torch.float32):
    """Splits of all ranks, (P, N, B, H, T, V) and (P, N, B, H, T), some of them and a row of many empty."""
    outputs, lse = torch.randn(size, *shape).to(dtype), 3 * torch.randn(size, *shape[:-1])
    lse[0, ..., ::3, :] = -torch.inf
    lse[1, 1:] = -torch.inf
    if shape[2] > 2:
        lse[:, :, :, 1] = -torch.inf
    outputs[lse == -torch.inf] = torch.nan
    return shared(outputs), shared(lse)


def is_merge(found, given):
    """Whether all ranks have one result, and it is the merge of all splits."""
    flat = [part.flatten(0, 1) for part in given]
    exact = merge_reference(*(part.double() for part in flat))
    for got, plain, want in zip(found, merge_reference(*flat), exact, strict=True):
        assert torch.equal(got, got[:1].expand_as(got))
        live = want > -torch.inf
        assert torch.equal(got[0] > -torch.inf, live)
        error, least = (x.double()[live].sub(want[live]).norm() for x in (got[0], plain))
        assert error <= 1.5 * (least + torch.finfo(got.dtype).eps * want[live].norm())
    return True


def join(board, rank, calls, results):
    """What the process of one rank does: now this rank is late and then another."""
    torch.set_num_threads(1)
    pause = random.Random(rank)
    for (outputs, lse), result in zip(calls, results, strict=True):
        time.sleep(pause.choice((0, 0, 0, 0.02)))
        for place, part in zip(result, board.merge(outputs[rank], lse[rank], outputs.dtype), strict=True):
            place[rank] = part


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("size", "rows", "first", "rounds"),
    [(2, 2, 2**31 - 1 - 4, 2), pytest.param(3, 4, 0, 1, marks=pytest.mark.slow)],
    ids=str,
)
def test_ranks_that_are_late_in_turn_have_the_bits_of_the_merge(push, size, rows, first, rounds):
    boards = boards_of(push, size, rows)
    for board in boards:
        numbers(push, board).fill_(first)
    dtypes = itertools.cycle((torch.float32, torch.float16))
    calls = [parts(size, shape, dtype) for shape, dtype in zip(rounds * SHAPES, dtypes, strict=False)]
    results = [tuple(shared(part[:, 0].clone()) for part in call) for call in calls]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=join, args=(boards[r], r, calls, results)) for r in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * size
    assert all(is_merge(found, call) for found, call in zip(results, calls, strict=True))
    # A program counts the calls that had rows for it, and leaves out 0 and 1 after the last number.
    programs = [-(-call[1][0, 0].numel() // rows) for call in calls]
    ran = torch.tensor([sum(p < count for count in programs) for p in range(push.PROGRAMS)]) + first
    ran = torch.where(ran > 2**31 - 1, ran - (2**31 - 1) + 1, ran)
    assert all(torch.equal(numbers(push, board).long(), ran) for board in boards)


@pytest.mark.interpreted
@pytest.mark.parametrize(("size", "rows", "first"), [(2, 2, 0), (2, 1, 2**31 - 3), (8, 4, 2**31 - 2)])
def test_peers_may_be_one_call_ahead(push, size, rows, first):
    boards = boards_of(push, size, rows)
    for board in boards:
        numbers(push, board).fill_(first)
    calls = [parts(size, (2, 1, 3, 1, 16)) for _ in range(2)]
    for (outputs, lse), rank in itertools.product(calls, range(1, size)):
        # It sends, and waits for nobody.
        boards[rank].stop()
        boards[rank].merge(outputs[rank], lse[rank], outputs.dtype)
    patience = threading.Timer(20, boards[0].stop)
    patience.start()
    found = [boards[0].merge(outputs[0], lse[0], outputs.dtype) for outputs, lse in calls]
    patience.cancel()
    for call, result in zip(calls, found, strict=True):
        assert is_merge([part[None] for part in result], call)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("width", "dtype"),
    [(1, torch.bfloat16), (33, torch.float16), (128, torch.bfloat16), (256, torch.float32)],
    ids=str,
)
def test_every_number_arrives_as_it_was(push, width, dtype):
    boards = boards_of(push, 2, 2)
    outputs = torch.randn(2, 1, 1, 1, 3, width).to(dtype)
    lse = torch.randn(2, 1, 1, 1, 3)
    # Each row has keys on one rank, whose result is that of all.
    lse[0, ..., 1:] = lse[1, ..., :1] = -torch.inf
    boards[1].stop()
    boards[1].merge(outputs[1], lse[1], dtype)
    output, joined = boards[0].merge(outputs[0], lse[0], dtype)
    assert torch.equal(output[..., :1, :], outputs[0, 0, ..., :1, :])
    assert torch.equal(output[..., 1:, :], outputs[1, 0, ..., 1:, :])
    assert torch.equal(joined, lse.amax(0)[0])


@pytest.mark.interpreted
# A word of a row's lse, which comes twice, and the last of its output.
@pytest.mark.parametrize("word", [1, 2 + 15])
def test_one_word_that_is_missing_is_waited_for(push, word):
    boards, (outputs, lse) = boards_of(push, 2), parts(2, (1, 1, 3, 1, 16))
    boards[1].stop()
    boards[1].merge(outputs[1], lse[1], outputs.dtype)
    place = words(push, boards[0])[1, 1, 2]
    sent = place[word].clone()
    # What memory may hold before: the bits of a number like any, under the number of no call.
    place[word] = 0x3F800000
    late = threading.Timer(0.3, lambda: place[word].copy_(sent))
    start = time.monotonic()
    late.start()
    result = boards[0].merge(outputs[0], lse[0], outputs.dtype)
    assert sent >> 32 == 1 and time.monotonic() - start >= 0.3
    assert is_merge([part[None] for part in result], (outputs, lse))


@pytest.mark.interpreted
def test_a_wait_ends_when_it_is_stopped(push):
    boards, (outputs, lse) = boards_of(push, 2), parts(2, (1, 1, 3, 1, 16))
    stopping = threading.Timer(0.3, boards[0].stop)
    start = time.monotonic()
    stopping.start()
    boards[0].merge(outputs[0], lse[0], outputs.dtype)
    assert boards[0].stopped and time.monotonic() - start >= 0.3


@pytest.mark.interpreted
def test_what_is_pushed_is_the_attention_of_the_shards(push, bench):
    boards = boards_of(push, 2)
    query, states = torch.randn(1, 2, 1, 16), torch.randn(2, 2, 1, 1, 300, 16)
    want = decode_attention(query.double(), *torch.cat(list(states.double()), 3), impl="reference")
    plain = decode_attention(query, *torch.cat(list(states), 3))
    boards[1].stop()
    for form in ("push", "push-fused"):
        calls = [bench.forms(SequenceGroup(), query, states[r], [form], [boards[r]]) for r in range(2)]
        assert [list(call) for call in calls] == 2 * [[f"{form} r1 w1"]]
        _, found = (calls[rank][f"{form} r1 w1"]() for rank in (1, 0))
        for got, base, exact in zip(found, plain, want, strict=True):
            error, least = (x.double().sub(exact).norm() for x in (got, base))
            assert error <= 1.5 * (least + torch.finfo(torch.float32).eps * exact.norm())


def signature(push, ranks, width, dtype, rows, num_warps, splits, parts_dtype):
    """Arguments of the kernel for splits in fp32 or whole results."""
    words = width if dtype == "fp32" else -(-width // 2)
    block_w = 1 << (words - 1).bit_length()
    types = {
        "outputs_ptr": f"*{parts_dtype}:16", "lse_ptr": "*fp32:16", "board_ptr": "*u8:16",
        "addresses": ("i64:16",) * ranks, "merged_ptr": f"*{dtype}:16", "merged_lse_ptr": "*fp32:16",
        "rank": "i32", "num_parts": "i32", "num_rows": "i32",
    }  # fmt: skip
    block_n = max(1, min(splits, 32 * 32 * num_warps // (rows * block_w)))
    return types, {
        "V": width, "WORDS": words, "BLOCK_W": block_w, "BLOCK_N": block_n, "ROWS": rows,
        "PROGRAMS": push.PROGRAMS, "OVERLAP": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "width", "dtype", "rows", "num_warps", "splits", "parts_dtype"),
    [
        (2, 128, "bf16", 1, 1, 1, "bf16"),
        (2, 128, "bf16", 1, 4, 16, "fp32"),
        (4, 96, "fp16", 4, 2, 16, "fp32"),
        (8, 256, "fp32", 1, 1, 1, "fp32"),
    ],
    ids=str,
)
def test_words_travel_whole_and_without_fences(
    push, ranks, width, dtype, rows, num_warps, splits, parts_dtype
):
    case = signature(push, ranks, width, dtype, rows, num_warps, splits, parts_dtype)
    resources = compile_sm90(push._push_merge_kernel, *case, num_warps=num_warps)
    assert resources.spills <= 8
    assert not re.search(r"\b(membar|fence|atom|red)\.", resources.ptx)
    steps = r"(ld\.volatile\S+|st\.global\S+|bar\.sync|[ls][dt]\.shared\S*|\bbra\b.*|^\$L\S+:)"
    steps = [step.rstrip(";") for step in re.findall(steps, resources.ptx, re.MULTILINE)]
    polls = [i for i, step in enumerate(steps) if step.startswith("ld.volatile")]
    stores = [step for step in steps[: polls[0]] if step.startswith("st.global")]
    # The words of a row and its lse to every rank, none of them in halves.
    whole = {"st.global.b64", "st.global.v2.b64"}
    assert len(stores) >= 2 * ranks and set(stores) <= whole
    loads = [steps[i] for i in polls]
    assert set(loads[:-1]) <= {"ld.volatile.global.b64", "ld.volatile.global.v2.b64"}
    assert loads[-1] == "ld.volatile.global.b32", "the stop word comes last"
    # One loop around all loads, which are on their way together.
    between = steps[polls[0] : polls[-2]]
    assert len(loads) > 2 * ranks and all(step.startswith("ld.volatile") for step in between)
    label = next(step for step in reversed(steps[: polls[0]]) if step.startswith("$L"))
    assert any(re.fullmatch(rf"bra.*{re.escape(label[:-1])}", step) for step in steps[polls[-1] :])


def test_forms_are_chosen_by_name(bench, push):
    boards = boards_of(push, 1, 1) + boards_of(push, 1, 4)
    group, query, states = SequenceGroup(), torch.randn(1, 4, 1, 16), torch.randn(2, 1, 2, 30, 16)
    assert list(bench.forms(group, query, states)) == ["local", "ours", "all-gather", "paper", "ring"]
    assert list(bench.forms(group, query, states, ("ours", "push"), boards)) == [
        "ours", "push r1 w1", "push r4 w1",
    ]  # fmt: skip
