"""Prepared Block Transformers: several tokens a program, and all that plain `generate` gives."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from block_answers import DECODERS, DRAW, EMBEDDERS, GREEDY, both, generate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_blocks import make, prompts
from transformers.generation import logits_process

import hf_longattn
from hf_longattn.generation import blocks


def cases():
    for embedder in EMBEDDERS:
        for decoder in DECODERS:
            for length in (1, 2, 4):
                fast = embedder == "lookup" if length == 4 else (embedder, decoder) == ("lookup", "prefix")
                marks = () if fast else pytest.mark.slow
                yield pytest.param(
                    embedder, decoder, length, marks=marks, id=f"{embedder}-{decoder}-L{length}"
                )


@pytest.mark.usefixtures("never_token_by_token")
@pytest.mark.parametrize("options", [{**GREEDY, "repetition_penalty": 1.5}, DRAW], ids=["greedy", "sampling"])
@pytest.mark.parametrize(("embedder", "decoder", "length"), list(cases()))
def test_tokens_equal_those_of_the_plain_model(embedder, decoder, length, options, recorded):
    fields = {**EMBEDDERS[embedder], **DECODERS[decoder], "block_length": length}
    if decoder == "prefix":
        fields["expansion_ratio"] = 2
    plain, fast = both(make(**fields), *prompts(9, 9), **options)
    assert torch.equal(fast, plain)
    assert recorded and recorded[0].replays >= 2
    assert plain[:, 9:].unique().numel() > 6, "a model that repeats itself would hide an error"


@pytest.mark.usefixtures("never_token_by_token")
@pytest.mark.parametrize("options", [GREEDY, DRAW], ids=["greedy", "sampling"])
@pytest.mark.parametrize("length", [pytest.param(3, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("alignment", ["tokens", pytest.param("columns", marks=pytest.mark.slow)])
def test_rows_at_different_slots_decode_together(alignment, length, options, recorded):
    fields = {"projection_method": "projection_layer"} if length == 3 else {}
    model = make(block_alignment=alignment, block_length=length, **fields)
    plain, fast = both(model, *prompts(2, 9, 12, 7, 11), **options)
    assert torch.equal(fast, plain)
    assert len(recorded) == 1 and recorded[0].replays >= 2


@pytest.mark.usefixtures("never_token_by_token")
@pytest.mark.parametrize("captured", [True, False], ids=["captured", "eager"])
def test_any_number_of_new_tokens(captured, request):
    graphs = request.getfixturevalue("recorded") if captured else []
    model, (ids, mask) = make(), prompts(6, 9)
    for count in (1, 4, 5, 6, 10):
        plain, fast = both(model, ids, mask, **{**GREEDY, "max_new_tokens": count})
        assert torch.equal(fast, plain) and fast.shape[1] == 9 + count
    # A program that would be replayed once is not worth a capture.
    assert len(graphs) == (2 if captured else 0)


@pytest.mark.usefixtures("never_token_by_token")
@pytest.mark.parametrize("options", [GREEDY, DRAW], ids=["greedy", "sampling"])
def test_scores_and_logits_are_those_of_the_plain_model(options, recorded, caplog):
    kept = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    with caplog.at_level(logging.WARNING, logger="hf_longattn"):
        plain, fast = both(make(), *prompts(9, 6), **options, **kept)
    assert torch.equal(fast.sequences, plain.sequences)
    for name in ("scores", "logits"):
        assert len(fast[name]) == len(plain[name]) == 11
        for ours, theirs in zip(fast[name], plain[name], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-4)
    assert not recorded
    assert any("`output_scores` keeps" in record.message for record in caplog.records)


@pytest.mark.usefixtures("never_token_by_token", "recorded")
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        (GREEDY, torch.bfloat16),
        ({**GREEDY, "repetition_penalty": 1.3}, torch.float32),
        (DRAW, torch.float32),
        ({**GREEDY, "return_dict_in_generate": True, "output_logits": True}, torch.float32),
    ],
    ids=["greedy", "penalty", "sampling", "kept-logits"],
)
def test_the_largest_of_16_bit_logits_is_taken_as_it_is_and_the_first_of_equal_ones(
    options, dtype, monkeypatch
):
    model, seen = make().bfloat16(), set()
    with torch.no_grad():
        # Every even token has the logit of the odd one behind it.
        weight = model.lm_head.weight
        weight[0:60:2] = weight[1:60:2]
    choose = blocks.TokenChoice.__call__
    monkeypatch.setattr(
        blocks.TokenChoice, "__call__", lambda self, ids, x: (seen.add(x.dtype), choose(self, ids, x))[1]
    )
    ids, mask = prompts(9, 6)
    plain, fast = both(model, ids, mask, **options)
    assert seen == {dtype}
    if options is not GREEDY:
        return
    assert torch.equal(fast, plain)
    assert bool((fast[:, 9:] % 2 == 0).all())


class Forbid(logits_process.LogitsProcessor):
    """Forbids the token three places back; needs the exact tokens so far."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids[:, -3:-2], -torch.inf)


@pytest.mark.usefixtures("never_token_by_token")
def test_processors_of_others_run_one_by_one_with_a_warning(recorded, caplog):
    processors = logits_process.LogitsProcessorList([Forbid()])
    with caplog.at_level(logging.WARNING, logger="hf_longattn"):
        plain, fast = both(make(), *prompts(9, 6), logits_processor=processors, min_new_tokens=4, **GREEDY)
    assert torch.equal(fast, plain) and not recorded
    assert sum("`Forbid`" in record.message or "MinNew" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True},
        {"prompt_lookup_num_tokens": 3},
        {"use_cache": False},
    ],
    ids=str,
)
def test_what_has_no_program_gives_the_tokens_of_the_plain_model(options, recorded):
    rows = (9,) if "prompt_lookup_num_tokens" in options else (9, 6)
    plain, fast = both(make(), *prompts(*rows), **{**GREEDY, **options})
    assert torch.equal(fast, plain) and not recorded


@pytest.mark.parametrize("change", ["hook", "forward"])
def test_changed_models_decode_token_by_token_with_a_warning(change, caplog):
    model, (ids, mask), calls = make(), prompts(9, 6), []
    plain = generate(model, ids, mask, **GREEDY)
    if change == "forward":
        own = model.forward
        model.forward = lambda *args, **kwargs: (calls.append(1), own(*args, **kwargs))[1]
    hf_longattn.prepare_generation(model)
    if change == "hook":
        model.model.block_decoder.layers[0].register_forward_hook(lambda *args: calls.append(1))
    with caplog.at_level(logging.WARNING, logger="hf_longattn"):
        fast = [generate(model, ids, mask, **GREEDY) for _ in range(2)]
    assert all(torch.equal(tokens, plain) for tokens in fast) and len(calls) >= 3
    assert sum("slower path" in record.message for record in caplog.records) == 1


@pytest.mark.usefixtures("never_token_by_token")
def test_prepared_models_are_copied_plain_and_restored():
    import copy

    model, (ids, mask) = make(), prompts(9, 6)
    hf_longattn.prepare_generation(hf_longattn.prepare_generation(model))
    assert "_sample" in vars(model) and "_sample" not in vars(copy.deepcopy(model))
    fast = generate(model, ids, mask, **GREEDY)
    assert torch.equal(fast, generate(hf_longattn.restore(model), ids, mask, **GREEDY))
    assert "_sample" not in vars(model)


@pytest.mark.slow
@pytest.mark.usefixtures("never_token_by_token", "recorded")
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 5),
    st.lists(st.integers(1, 14), min_size=1, max_size=4),
    st.integers(1, 13),
    st.sampled_from(["tokens", "columns"]),
    st.sampled_from([None, [3, 17, 29, 44]]),
    st.booleans(),
)
def test_any_lengths(block_length, lengths, new, alignment, ends, draw):
    fields = {"block_length": block_length, "projection_method": "projection_layer", "num_hidden_layers": 1}
    model = make(block_alignment=alignment, **fields)
    options = {**(DRAW if draw else GREEDY), "max_new_tokens": new, "eos_token_id": ends}
    plain, fast = both(model, *prompts(*lengths), **options)
    assert torch.equal(fast, plain)


@pytest.mark.slow
def test_the_benchmark_compares_tokens_and_writes_its_rows(tmp_path):
    script = Path(__file__).parents[3] / "benchmarks" / "bench_block_transformer.py"
    variables = os.environ | {"OUT": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(script), "--check"], env=variables, check=True, timeout=300)
    rows = json.loads((tmp_path / "block_transformer.json").read_text())
    assert {row["peer"] for row in rows} >= {"block", "vanilla", "vanilla-prepared"}
    assert all(row["tokens_per_s"] > 0 for row in rows)
    queues = [row for row in rows if row["peer"] in ("block-queue", "block-batches")]
    assert len(queues) == 2 and all(row["new_tokens"] > 9 for row in queues)
    steps = [row for row in rows if row.get("section") == "training"]
    assert [row["peer"] for row in steps] == ["block", "block-compiled"]
    others = [row for row in rows if row not in queues + steps]
    assert all(row["floor_s"] > row["floor_prompt_s"] > 0 for row in others)
