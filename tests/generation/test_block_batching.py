"""`generate_batch` of prepared Block Transformers: many prompts on few rows, the tokens of each one alone."""

import logging

import pytest
import torch
import transformers as tf
from recorded import RecordedGraph
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import hf_longattn
from hf_longattn.generation import batching, blocks, generate_batch
from hf_longattn.kernels.dispatch import log_once
from hf_longattn.modeling.block_transformer import BlockTransformerConfig, BlockTransformerForCausalLM

PAD = 60
SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 48, "initializer_range": 0.3, "pad_token_id": PAD, "eos_token_id": None}
ROBERTA = {"embedder_type": "roberta", "embedder_num_attention_heads": 2, "embedder_num_hidden_layers": 1}
MODELS = {
    "prefix": {},
    "columns": {"block_alignment": "columns"},
    "three-a-block": {"block_length": 3, "projection_method": "projection_layer"},
    "roberta": {**ROBERTA, "projection_method": "projection_layer"},
    "summation": {"decoding_strategy": "summation", "expansion_ratio": None},
    "cross-attention": {"decoding_strategy": "cross_attention", "expansion_ratio": None},
    "two-vectors": {"n_embedding_tokens": 2},
    "llama": {"decoder_type": "llama", "num_key_value_heads": 1},
}
LENGTHS = (9, 2, 14, 7, 11, 30, 1, 4, 8)
GREEDY = {"do_sample": False, "max_new_tokens": 11}


def make(**fields):
    torch.manual_seed(0)
    model = BlockTransformerForCausalLM(BlockTransformerConfig(**(SMALL | fields))).eval()
    model.generation_config = tf.GenerationConfig(bos_token_id=0, pad_token_id=PAD)
    return model


def prompts(*lengths):
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 58, (length,), generator=generator).tolist() for length in lengths]


def alone(model, prompt, **options):
    ids = torch.tensor([prompt])
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


def answers(model, inputs, rows=None, **options):
    config = ContinuousBatchingConfig(max_requests_per_batch=rows)
    results = model.generate_batch(inputs, continuous_batching_config=config, **options)
    assert list(results) == [f"req_{number}" for number in range(len(inputs))]
    assert [result.prompt_ids for result in results.values()] == inputs
    assert all(result.is_finished() and result.error is None for result in results.values())
    return [result.generated_tokens for result in results.values()]


@pytest.fixture(autouse=True)
def warned_anew():
    log_once.cache_clear()


@pytest.fixture
def recorded(monkeypatch):
    """Steps are captured in recorded graphs, which it lists."""
    graphs = []

    def capture(rehearse, step, like=None):
        rehearse()
        graphs.append(RecordedGraph())
        state = torch.get_rng_state()
        with graphs[-1]:
            result = step()
        torch.set_rng_state(state)
        graphs[-1].undo()
        return graphs[-1], result

    monkeypatch.setattr(blocks, "_GRAPH_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(batching, "capture", capture)
    return graphs


@pytest.fixture
def late(monkeypatch):
    """The host reads the tokens of a block while the next one runs, as on a GPU."""

    class Late(batching.Rows):
        def __init__(self, *args):
            super().__init__(*args[:-1], 1)

    monkeypatch.setattr(generate_batch, "Rows", Late)


def cases():
    for name in MODELS:
        fast = name in ("prefix", "columns", "roberta", "two-vectors")
        yield pytest.param(name, True, marks=() if fast else pytest.mark.slow, id=f"{name}-graph")
        yield pytest.param(name, False, marks=pytest.mark.slow, id=f"{name}-eager")


@pytest.mark.parametrize(("name", "captured"), list(cases()))
def test_every_prompt_gets_the_tokens_it_gets_alone(name, captured, request):
    graphs = request.getfixturevalue("recorded") if captured else []
    model, inputs = make(**MODELS[name]), prompts(*LENGTHS)
    expected = [alone(model, prompt, **GREEDY) for prompt in inputs]
    assert len({tuple(answer) for answer in expected}) == len(inputs), "prompts that say the same"
    hf_longattn.prepare_generation(model)
    assert answers(model, inputs, 3, **GREEDY) == expected
    assert len(graphs) == captured
    # Nine answers on three rows, each of up to four blocks.
    assert not captured or 9 <= graphs[0].replays <= 14


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 2, None])
@pytest.mark.parametrize("read", ["at_once", "late"])
def test_rows_end_by_a_token_or_by_their_own_number_of_tokens(rows, read, request):
    if read == "late":
        request.getfixturevalue("late")
    model, inputs, limits = make(), prompts(*LENGTHS), [3, 17, 1, 8, 30, 5, 4, 11, 2]
    options = {"do_sample": False, "eos_token_id": [3, 17, 29, 44]}
    expected = [
        alone(model, prompt, max_new_tokens=limit, **options)
        for prompt, limit in zip(inputs, limits, strict=True)
    ]
    lengths = [len(answer) for answer in expected]
    assert any(map(int.__lt__, lengths, limits)) and any(map(int.__eq__, lengths, limits))
    hf_longattn.prepare_generation(model)
    assert answers(model, inputs, rows, max_new_tokens=limits, **options) == expected


@pytest.mark.usefixtures("recorded")
def test_processors_see_the_tokens_of_their_row_alone():
    model, inputs = make(), prompts(*LENGTHS)
    options = {**GREEDY, "repetition_penalty": 1.6}
    expected = [alone(model, prompt, **options) for prompt in inputs]
    assert expected != [alone(model, prompt, **GREEDY) for prompt in inputs]
    hf_longattn.prepare_generation(model)
    assert answers(model, inputs, 3, **options) == expected


@pytest.mark.usefixtures("recorded")
def test_sampling_is_repeated_by_a_seed_and_one_row_draws_as_generate_does():
    model, inputs = make(), prompts(*LENGTHS)
    options = {"do_sample": True, "top_k": 20, "temperature": 0.9, "max_new_tokens": 11}
    torch.manual_seed(3)
    expected = alone(model, inputs[-1], **options)
    hf_longattn.prepare_generation(model)
    drawn = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        drawn.append(answers(model, inputs, 3, **options))
    assert drawn[0] == drawn[1] != drawn[2]
    torch.manual_seed(3)
    # Of whole blocks: no token of the prompt is said again, for which a number would be drawn.
    assert len(inputs[-1]) % 4 == 0 and answers(model, inputs[-1:], **options) == [expected]


@pytest.mark.parametrize("name", ["prefix", "two-vectors"])
def test_prompts_are_read_in_batches_and_in_chunks(name, monkeypatch):
    model, inputs = make(**MODELS[name]), prompts(30, 27, 30, 22, 25, 9, 6, 10)
    expected = [alone(model, prompt, **GREEDY) for prompt in inputs]
    calls, real = [], batching.RowProgram.admit
    monkeypatch.setattr(
        batching.RowProgram,
        "admit",
        lambda self, rows, *args: (calls.append(len(rows)), real(self, rows, *args))[1],
    )
    monkeypatch.setattr(generate_batch, "_CPU_BLOCKS", 14)
    for chunk in (None, 8):
        hf_longattn.prepare_generation(model, prefill_chunk_size=chunk)
        assert answers(model, inputs, **GREEDY) == expected
        # 7 7 | 6 6 | 5 and the short ones.
        assert calls == [2, 2, 2, 2]
        calls.clear()


def test_prompts_wait_until_an_eighth_of_the_rows_is_free(monkeypatch):
    model, inputs = make(), prompts(*[8] * 24)
    limits = [4 * (1 + number % 16) for number in range(24)]
    expected = [
        alone(model, prompt, max_new_tokens=limit, do_sample=False)
        for prompt, limit in zip(inputs, limits, strict=True)
    ]
    calls, real = [], batching.RowProgram.admit
    monkeypatch.setattr(
        batching.RowProgram,
        "admit",
        lambda self, rows, *args: (calls.append(len(rows)), real(self, rows, *args))[1],
    )
    hf_longattn.prepare_generation(model)
    assert answers(model, inputs, 16, max_new_tokens=limits, do_sample=False) == expected
    # One row ends with every block: two wait for each other.
    assert calls[0] == 16 and set(calls[1:]) <= {2, 3} and sum(calls) == 24


def test_a_full_row_that_waits_for_a_prompt_stays_at_its_last_place():
    model, inputs = make(), prompts(80, *[4] * 15, 3, 2)
    limits = [1, *[60] * 15, 3, 9]
    expected = [
        alone(model, prompt, max_new_tokens=limit, do_sample=False)
        for prompt, limit in zip(inputs, limits, strict=True)
    ]
    hf_longattn.prepare_generation(model)
    seen, real = [], model.decode_rows
    model.decode_rows = lambda *args: seen.append(real(*args)) or seen[-1]
    assert answers(model, inputs, 16, max_new_tokens=limits, do_sample=False) == expected
    held = seen[0].group.held
    assert int(held.start.max()) < held.room


def test_rows_that_nobody_uses_read_few_keys():
    model = hf_longattn.prepare_generation(make())
    seen, real = [], model.decode_rows
    model.decode_rows = lambda *args: seen.append(real(*args)) or seen[-1]
    answers(model, prompts(40, 40, 4), max_new_tokens=[1, 1, 40], do_sample=False)
    start = seen[0].group.held.start[:, 0].tolist()
    # Parked after their only block, nine more follow; the third row holds its prompt and ten.
    assert start == [9, 9, 11]


@pytest.mark.slow
@pytest.mark.usefixtures("recorded", "late")
def test_a_full_row_stays_in_its_place():
    # The longest answer fills its row to the last block, and the others run beside it.
    model, inputs = make(), prompts(8, 9, 10, 11)
    limits = [40, 1, 39, 38]
    expected = [
        alone(model, prompt, max_new_tokens=limit, do_sample=False)
        for prompt, limit in zip(inputs, limits, strict=True)
    ]
    hf_longattn.prepare_generation(model)
    assert answers(model, inputs, 4, max_new_tokens=limits, do_sample=False) == expected


def test_times_progress_and_empty_batches(capsys):
    model, inputs = hf_longattn.prepare_generation(make()), prompts(9, 5)
    assert model.generate_batch([]) == {}
    results = model.generate_batch(inputs, record_timestamps=True, progress_bar=True, **GREEDY)
    assert [len(result.timestamps) for result in results.values()] == [11, 11]
    assert "answering prompts" in capsys.readouterr().err
    tensors = [torch.tensor(prompt) for prompt in inputs]
    assert answers(model, inputs, **GREEDY) == [
        result.generated_tokens for result in model.generate_batch(tensors, **GREEDY).values()
    ]


@pytest.mark.parametrize("slot", [0, 2])
def test_a_step_that_cannot_be_captured_changes_no_token(slot, recorded, monkeypatch, caplog):
    def fail(rehearse, step):
        heads = [model.lm_head.forward] * slot
        with monkeypatch.context() as patch:
            # Where there is no head left, the block is left as it is.
            patch.setattr(model.lm_head, "forward", lambda states: heads.pop()(states))
            with pytest.raises(IndexError):
                step()
        raise RuntimeError("operation not permitted when stream is capturing")

    model, inputs = make(), prompts(*LENGTHS)
    expected = [alone(model, prompt, **GREEDY) for prompt in inputs]
    hf_longattn.prepare_generation(model)
    monkeypatch.setattr(batching, "capture", fail)
    with caplog.at_level(logging.WARNING, logger="hf_longattn"):
        assert answers(model, inputs, 3, **GREEDY) == expected
    assert sum("not permitted" in record.message for record in caplog.records) == 1


REFUSED = {
    "persistent_manager": {"persistent_manager": True},
    "continuous_batching_config.num_blocks": {
        "continuous_batching_config": ContinuousBatchingConfig(num_blocks=9)
    },
    "beam_search": {"num_beams": 2},
    "num_return_sequences": {"num_return_sequences": 2, "do_sample": True},
    "output_scores": {"output_scores": True},
    "MinNewTokensLengthLogitsProcessor": {"min_new_tokens": 3, "eos_token_id": 5},
    "MaxTimeCriteria": {"max_time": 1.0},
    "must be a positive number": {"max_new_tokens": None},
    "a list of 2 of them": {"max_new_tokens": [3]},
    "stop_strings": {"stop_strings": "a"},
    "max_requests_per_batch": {
        "continuous_batching_config": ContinuousBatchingConfig(max_requests_per_batch=-1)
    },
    "max_memory_percent": {"continuous_batching_config": ContinuousBatchingConfig(max_memory_percent=1.5)},
}


@pytest.mark.parametrize("word", REFUSED)
def test_what_rows_cannot_do_is_refused_by_name(word):
    model = hf_longattn.prepare_generation(make())
    with pytest.raises(ValueError, match=word):
        model.generate_batch(prompts(5, 9), **{**GREEDY, **REFUSED[word]})


def test_models_and_prompts_that_do_not_fit_are_refused_by_name(monkeypatch):
    model, inputs = make(), prompts(5, 9)
    with pytest.raises(ValueError, match="prepare_generation"):
        model.generate_batch(inputs, **GREEDY)
    hf_longattn.prepare_generation(model)
    for wrong, error in (
        ([[]], ValueError),
        (["text"], TypeError),
        ([[0.5]], TypeError),
        # Nobody knows which tokens of equal rows are pads.
        (torch.tensor([[3, 5], [4, PAD]]), TypeError),
        # Behind whole blocks, -1 would say that the model chooses.
        ([[1, 2, 3, 4, -1]], ValueError),
        ([[1, 2, 3, 61]], ValueError),
    ):
        with pytest.raises(error, match="`inputs`"):
            model.generate_batch(wrong, **GREEDY)
    with pytest.raises(TypeError, match="`attention_mask`"):
        model.generate_batch(inputs, attention_mask=None, **GREEDY)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="autocast"):
        model.generate_batch(inputs, **GREEDY)
    monkeypatch.setattr(generate_batch, "free_memory", lambda device: 1000)
    with pytest.raises(ValueError, match="fewer tokens"):
        model.generate_batch(inputs, **GREEDY)
    with pytest.raises(ValueError, match="evaluation mode"):
        model.train().generate_batch(inputs, **GREEDY)
    handle = model.eval().lm_head.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="forward hooks"):
        model.generate_batch(inputs, **GREEDY)
    handle.remove()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        with pytest.raises(ValueError, match="forward hooks for all modules"):
            model.generate_batch(inputs, **GREEDY)
    finally:
        handle.remove()
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attn_implementation"):
        model.generate_batch(inputs, **GREEDY)
    hf_longattn.prepare_generation(hf_longattn.restore(model), cache_dtype="int8")
    with pytest.raises(ValueError, match="cache_dtype"):
        model.generate_batch(inputs, **GREEDY)


def test_rows_are_as_many_as_fit(monkeypatch):
    model, inputs = make(), prompts(*LENGTHS)
    expected = [alone(model, prompt, **GREEDY) for prompt in inputs]
    hf_longattn.prepare_generation(model)
    made, real = [], model.decode_rows
    model.decode_rows = lambda rows, tokens: made.append((rows, tokens)) or real(rows, tokens)
    row = model.bytes_of_row(30 + 11 + 4)
    # Two layers, keys and values of 32 numbers in 4 bytes.
    assert row == 2 * 2 * 32 * 4 * (45 // 4 + 1)
    monkeypatch.setattr(generate_batch, "free_memory", lambda device: 5 * row)
    assert answers(model, inputs, **GREEDY) == expected
    assert answers(model, inputs, 2, **GREEDY) == expected
    assert made == [(4, 45), (2, 45)]
    held = real(4, 45).group.held.buffers
    assert sum(buffer[0].numel() * 4 for pair in held for buffer in pair) == row
