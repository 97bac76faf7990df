"""One prompt over several processes: tokens and logits of one, shares of the cache, faults by name."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import preloaded
import pytest
import torch
import transformers as tf

from hf_longattn.cache.placement import Placement, Slices
from hf_longattn.cache.shares import share_capacity

CASES = Path(__file__).parent / "cases.py"
RUN_CASES = CASES.with_name("run_cases.py")
AHEAD_CASES = CASES.with_name("ahead_cases.py")
FAST = [
    "models",
    "lengths",
    "last_tokens",
    "turns",
    "volume",
    "memory",
    "operations",
    "eight_bits",
    "control",
    "embeddings",
    "clocks",
    "refusals",
    "strangers",
    "reductions",
    "wrapped",
    "connections",
    "several_models",
]


def run(sizes, *topics, cases=CASES):
    preloaded.run(cases, sizes, *topics)


# What more ranks do otherwise than three: rounds of the tree, and shares of a prompt.
FOUR = ["models", "lengths", "turns", "control", "refusals", "reductions"]
MORE = [("3", FAST), ("4", FOUR)]


@pytest.mark.parametrize(
    ("sizes", "topics"),
    [("1,2", FAST), *(pytest.param(*more, marks=pytest.mark.slow) for more in MORE)],
    ids=["P1-P2", "P3", "P4"],
)
def test_every_topic(sizes, topics):
    run(sizes, *topics)


@pytest.mark.parametrize("sizes", ["2", pytest.param("1,3,4", marks=pytest.mark.slow)], ids="P{}".format)
def test_ranks_run_ahead_together(sizes):
    run(sizes, "ahead", "ahead_or_not", cases=AHEAD_CASES)


@pytest.mark.slow
def test_a_rank_that_leaves_while_all_run_ahead_is_named():
    run("3", "ends_ahead", cases=AHEAD_CASES)


@pytest.mark.slow
def test_every_model_and_mode_in_8_bits():
    run("2", "more_eight_bits")


@pytest.mark.slow
def test_meshes_of_two_dimensions():
    run("4", "nodes", "tensor_parallel")
    run("2", "tensor_parallel_alone")


@pytest.mark.parametrize("sizes", ["2,3", pytest.param("1,4", marks=pytest.mark.slow)], ids="P{}".format)
def test_attention_on_a_run(sizes):
    run(sizes, "runs", "overlap", "calls", cases=RUN_CASES)


@pytest.mark.slow
def test_an_operation_that_was_begun_names_the_rank_that_is_late():
    run("3", "late", cases=RUN_CASES)


SLOW = [pytest.param(fault, marks=pytest.mark.slow) for fault in ("hangs", "fails", "stays_away", "runs_out")]


@pytest.mark.parametrize("fault", ["dies", *SLOW])
def test_the_other_ranks_name_the_one_that(fault):
    run("3", fault)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_token_is_held_once_and_counted(size):
    ranks = [Placement(rank, size) for rank in range(size)]
    steps = torch.randint(1, 90, (40,), generator=torch.Generator().manual_seed(size)).tolist()
    for index, count in enumerate(steps):
        for rank, placement in enumerate(ranks):
            if index % 3 == 1:
                placement.truncate(max(placement.length - count // 2, 0))
            if shared := count // (2 * size) * 2 * size * (index % 2):
                placement.place_slices(Slices(placement.length, shared, rank, size))
            placement.place(count - shared)
        held = [p.positions(p.held, torch.device("cpu")) for p in ranks]
        assert all(torch.equal(positions, positions.sort().values) for positions in held)
        assert torch.equal(torch.cat(held).sort().values, torch.arange(ranks[0].length))
        for length in (0, 1, ranks[0].length // 2, ranks[0].length):
            assert [p.count(length) for p in ranks] == [int((h < length).sum()) for h in held]


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_are_even_behind_runs_that_were_cut_alone(size):
    ranks = [Placement(rank, size) for rank in range(size)]
    # Two runs, a crop inside the second, back to the end of the first, one token, and back again.
    for step, even in (("run", 1), ("run", 1), (9 * size, 0), (8 * size, 1), ("token", 0), (8 * size, 1)):
        for placement in ranks:
            if step == "run":
                placement.place_slices(Slices(placement.length, 8 * size, placement.rank, size))
            elif step == "token":
                placement.place(1)
            else:
                placement.truncate(step)
        assert all(placement.is_even == bool(even) for placement in ranks), step
        assert not even or len({placement.held for placement in ranks}) == 1


@pytest.mark.parametrize("size", [2, 8])
def test_caches_of_nearly_equal_room_have_the_same_strides(size):
    for tokens in (32768, 131072, 262144):
        rooms = {share_capacity(tokens + new, size) for new in (1, 9)}
        assert len(rooms) == 1
        needed = -(-tokens // size) + -(-tokens // size) // 128 + 128
        assert needed <= rooms.pop() <= (needed + 9) * 129 / 128


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_run_goes_to_the_ranks_and_back(size):
    tensor = torch.randn(2, 3, 12 * size, 5)
    slices = [Slices(7, 12 * size, rank, size) for rank in range(size)]
    parts = torch.stack([own.take(tensor, 2) for own in slices])
    assert torch.equal(slices[0].in_order(parts), tensor)
    assert torch.equal(slices[0].by_rank(tensor), parts)
    work = [
        sum(part.stop * (part.stop + 1) - part.start * (part.start + 1) for part in own.own) for own in slices
    ]
    assert len(set(work)) == 1, "causal work differs between ranks"


def launch(size, script, *arguments):
    """Runs a script of the project under torch's launcher and returns what it printed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    command = [sys.executable, *launcher, str(CASES.parents[2] / script), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.mark.slow
def test_the_recipe_answers_alike_on_one_and_two_processes():
    options = ("--smoke", "--cache-dtype", "int8")
    answers = [launch(size, "recipes/generate_long.py", *options).splitlines()[-1] for size in (1, 2)]
    assert answers[0] == answers[1] and answers[0].startswith("tokens ")


@pytest.mark.slow
def test_every_form_that_the_benchmark_times_is_exact():
    assert launch(3, "benchmarks/bench_tree_decode.py", "--check").startswith("errors")


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3], ids="P{}".format)
def test_the_ring_that_prompts_are_timed_against_gives_the_tokens_of_one_process(size):
    assert launch(size, "benchmarks/bench_tree_prefill.py", "--check").startswith("errors")


@pytest.mark.slow
def test_the_benchmark_walks_through_tensor_parallelism_with_the_same_tokens(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    options = ["--tiny", "--tp", "2", "--lengths", "300", "--peers", "sdpa,prepared", "--new-tokens", "6"]
    launch(2, "benchmarks/bench_generation.py", *options, "--name", "walk")
    rows = json.loads((tmp_path / "walk.json").read_text())
    assert [row["peer"] for row in rows] == ["sdpa-tp", "prepared-tp"]
    assert all(row["same_tokens_as_first_peer"] and row["ranks"] == row["tp"] == 2 for row in rows)
    assert rows[0]["command"].startswith("torchrun --standalone --nproc-per-node 2 bench_generation.py")


def test_a_device_map_divides_the_layers_in_halves(monkeypatch):
    monkeypatch.syspath_prepend(str(CASES.parents[2] / "benchmarks"))
    bench = importlib.import_module("bench_generation")
    # accelerate leaves out devices that are not there.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**bench.SHAPE))
    places = bench.balanced_map(model, {0: 80 << 30, 1: 80 << 30})
    layers = [places[f"model.layers.{index}"] for index in range(32)]
    assert layers == sorted(layers) and 12 < layers.count(0) < 18
    assert places["model.embed_tokens"] == 0 and places["lm_head"] == 1
