"""The Block Transformer on a GPU: as exact as eager attention, the same tokens with and without a cache."""

import gc

import pytest
import torch

import hf_longattn  # noqa: F401  registers the attention implementations
from hf_longattn.modeling.block_transformer import (
    BlockTransformerCache,
    BlockTransformerConfig,
    BlockTransformerForCausalLM,
)

pytestmark = pytest.mark.gpu
IMPLEMENTATIONS = ["eager", "sdpa", "tree_attention", "blockwise_attention"]


def make(implementation, dtype=torch.float32, **fields):
    torch.manual_seed(0)
    sizes = {"vocab_size": 500, "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = BlockTransformerConfig(**(sizes | {"initializer_range": 0.1, "eos_token_id": None} | fields))
    model = BlockTransformerForCausalLM(config).eval().to(dtype)
    model.set_attn_implementation(implementation)
    return model


def ragged():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 500, (4, 203), generator=generator)
    mask = torch.ones_like(ids)
    for row, pads in enumerate((0, 1, 66, 201)):
        mask[row, :pads] = 0
    return ids, mask


@pytest.mark.parametrize("decoder_type", ["gpt_neox", "llama"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_logits_are_as_exact_as_eager(implementation, decoder_type):
    model, (ids, mask) = make("eager", decoder_type=decoder_type), ragged()
    exact = model.double()(ids, attention_mask=mask).logits
    model, attended = model.float().cuda(), mask.bool()
    errors = []
    for name in ("eager", implementation):
        model.set_attn_implementation(name)
        logits = model(ids.cuda(), attention_mask=mask.cuda(), use_cache=False).logits.cpu().double()
        errors.append((logits - exact)[attended].abs().mean())
    assert errors[1] <= 1.5 * (errors[0] + torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_bf16_steps_as_one_pass(implementation):
    model, (ids, mask) = make(implementation, torch.bfloat16).cuda(), ragged()
    ids, mask = ids.cuda(), mask.cuda()
    exact = make("sdpa").double().cuda()(ids, attention_mask=mask).logits
    whole = model(ids, attention_mask=mask, use_cache=False).logits.double()
    cache, parts = BlockTransformerCache(model.config), []
    for start, end in ((0, 150), (150, 190), *((at, at + 1) for at in range(190, 203))):
        out = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
        parts.append(out.logits)
    steps = torch.cat(parts, dim=1).double()
    attended = mask.bool()
    error = (whole - exact)[attended].abs().mean()
    assert (steps - exact)[attended].abs().mean() <= 1.5 * error


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_generation_with_cache_equals_without(implementation):
    model, (ids, mask) = make(implementation).cuda(), ragged()
    options = {"attention_mask": mask.cuda(), "max_new_tokens": 24, "do_sample": False, "pad_token_id": 1}
    cached = model.generate(ids.cuda(), **options)
    assert torch.equal(cached, model.generate(ids.cuda(), use_cache=False, **options))


def test_training_step_compiles():
    model, (ids, _) = make("sdpa", torch.bfloat16).cuda().train(), ragged()
    ids = ids.cuda()
    plain = model(ids, labels=ids).loss
    torch._dynamo.reset()
    loss = torch.compile(lambda ids: model(ids, labels=ids).loss)(ids)
    torch.testing.assert_close(loss, plain, rtol=2e-2, atol=2e-2)
    loss.backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())


def prepared_and_plain(options, rows=slice(None), **fields):
    """Tokens of the plain model and of the prepared one, from the same random numbers."""
    model, (ids, mask) = make("sdpa", **fields).cuda(), ragged()
    ids, mask, results = ids[rows], mask[rows], []
    for prepare in (False, True):
        if prepare:
            hf_longattn.prepare_generation(model, cuda_graph=True)
        torch.manual_seed(3)
        tokens = model.generate(ids.cuda(), attention_mask=mask.cuda(), pad_token_id=1, **options)
        results.append(tokens[:, ids.shape[1] :])
    return results


SAMPLED = {"do_sample": True, "top_k": 40, "top_p": 0.9, "temperature": 0.8, "repetition_penalty": 1.2}


@pytest.mark.parametrize("alignment", ["tokens", "columns"])
@pytest.mark.parametrize("options", [{"do_sample": False}, SAMPLED], ids=["greedy", "sampling"])
@pytest.mark.parametrize("decoding_strategy", ["prefix", "summation"])
def test_captured_blocks_give_the_tokens_of_the_plain_model(decoding_strategy, options, alignment):
    fields = {"decoding_strategy": decoding_strategy, "block_alignment": alignment}
    if decoding_strategy == "summation":
        fields["expansion_ratio"] = None
    plain, fast = prepared_and_plain({**options, "max_new_tokens": 23}, **fields)
    assert torch.equal(plain, fast)


@pytest.mark.parametrize("decoder_type", ["gpt_neox", "llama"])
def test_a_batch_of_equal_prompts_is_one_graph_a_call(decoder_type, monkeypatch):
    from hf_longattn.generation import blocks

    captures, real = [], blocks.capture
    monkeypatch.setattr(blocks, "capture", lambda *args: (captures.append(1), real(*args))[1])
    options = {**SAMPLED, "max_new_tokens": 61, "eos_token_id": [3, 77, 401]}
    plain, fast = prepared_and_plain(options, rows=[0, 0, 0], decoder_type=decoder_type)
    assert torch.equal(plain, fast) and len(captures) == 1


def test_blocks_in_bf16_follow_the_logits_of_one_pass():
    model, (ids, _) = make("tree_attention", torch.bfloat16).cuda(), ragged()
    ids = ids.cuda()
    hf_longattn.prepare_generation(model, cuda_graph=True)
    tokens = model.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=1)
    with torch.no_grad():
        logits = hf_longattn.restore(model)(tokens[:, :-1], use_cache=False).logits.double()
        exact = make("sdpa").double().cuda()(tokens[:, :-1], use_cache=False).logits
    logits, exact = logits[:, ids.shape[1] - 1 :], exact[:, ids.shape[1] - 1 :]
    chosen = exact.gather(2, tokens[:, ids.shape[1] :, None])[..., 0]
    # Steps err by 1.5 times what one pass does, at the token chosen and at the best one.
    error = (logits - exact).abs().amax() + torch.finfo(torch.bfloat16).eps
    assert (chosen >= exact.amax(dim=-1) - 2 * 1.5 * error).all()


@pytest.mark.parametrize("options", [{"do_sample": False}, SAMPLED], ids=["greedy", "sampling"])
def test_later_calls_go_on_with_the_graph_of_the_first(options, monkeypatch):
    from hf_longattn.generation import blocks

    captures, real = [], blocks.capture
    monkeypatch.setattr(blocks, "capture", lambda *args: (captures.append(1), real(*args))[1])
    plain, fast = make("sdpa").cuda(), hf_longattn.prepare_generation(make("sdpa").cuda(), cuda_graph=True)
    ids = ragged()[0].cuda()
    # The end of an answer is read while the next block runs: some calls end early.
    calls = [(203, 61, None), (180, 50, [7, 19]), (201, 33, None), (203, 61, [3, 77, 401])]
    for seed, (length, new, end) in enumerate(calls):
        results = []
        for model in (plain, fast):
            torch.manual_seed(seed)
            given = (ids[:, :length] + 17 * seed) % 498 + 2
            results.append(
                model.generate(given, max_new_tokens=new, eos_token_id=end, pad_token_id=1, **options)
            )
        assert torch.equal(*results)
    # Ends are a part of the graph, and their number is that of a tensor.
    assert len(captures) == 4


def test_a_call_like_the_last_captures_nothing(monkeypatch):
    from hf_longattn.generation import blocks

    captures, real = [], blocks.capture
    monkeypatch.setattr(blocks, "capture", lambda *args: (captures.append(1), real(*args))[1])
    plain, fast = make("sdpa").cuda(), hf_longattn.prepare_generation(make("sdpa").cuda(), cuda_graph=True)
    ids = ragged()[0].cuda()
    for seed, (length, new) in enumerate([(203, 61), (180, 50), (201, 33), (198, 64), (203, 61)]):
        results = []
        for model in (plain, fast):
            torch.manual_seed(seed)
            given = (ids[:, :length] + 17 * seed) % 498 + 2
            results.append(model.generate(given, max_new_tokens=new, pad_token_id=1, **SAMPLED))
        assert torch.equal(*results)
    assert len(captures) == 1
    held = torch.cuda.memory_allocated()
    hf_longattn.restore(fast)
    gc.collect()
    assert torch.cuda.memory_allocated() < held


def test_joined_launches_in_bf16_are_as_exact_as_the_layers_own():
    from hf_longattn.modeling.block_transformer.steps import few_launches

    model = make("sdpa", torch.bfloat16).cuda()
    decoder = model.model.token_decoder
    prefix, ids = (
        torch.randn(64, 2, 256, device="cuda").bfloat16(),
        torch.randint(0, 500, (64, 3), device="cuda"),
    )

    def steps(decoder, prefix):
        cache = decoder.make_cache()
        decoder.step(prefix, ids[:, :0], cache)
        cache.reset()
        parts = [decoder.step(prefix, ids[:, :0], cache)]
        parts += [decoder.step(prefix, ids[:, t : t + 1], cache) for t in range(3)]
        return torch.stack(parts).double()

    with torch.no_grad():
        plain = steps(decoder, prefix)
        with few_launches(model):
            fast = steps(decoder, prefix)
        exact = steps(decoder.double(), prefix.double())
    errors = [(result - exact).norm() for result in (plain, fast)]
    assert errors[1] <= 1.5 * (errors[0] + torch.finfo(torch.bfloat16).eps * exact.norm())


@pytest.mark.parametrize("options", [{"do_sample": False}, SAMPLED], ids=["greedy", "sampling"])
@pytest.mark.parametrize("decoder_type", ["gpt_neox", "llama"])
def test_prompts_as_long_as_earlier_ones_are_read_by_replays(decoder_type, options, monkeypatch):
    from hf_longattn.generation import prompts

    captures, real = [], prompts.capture
    monkeypatch.setattr(
        prompts, "capture", lambda *args, **k: (captures.append(k["like"]), real(*args, **k))[1]
    )
    plain, fast = (make("sdpa", decoder_type=decoder_type).cuda() for _ in range(2))
    hf_longattn.prepare_generation(fast, cuda_graph=True)
    ids = ragged()[0].cuda()
    # Two lengths that stand at one slot share the program, and the memory of their graphs.
    for seed, (length, new) in enumerate([(203, 61), (203, 61), (203, 50), (103, 60), (103, 60), (203, 1)]):
        results = []
        for model in (plain, fast):
            torch.manual_seed(seed)
            given = (ids[:, :length] + 17 * seed) % 498 + 2
            results.append(model.generate(given, max_new_tokens=new, pad_token_id=1, **options))
        assert torch.equal(*results)
    assert len(captures) == 2 and captures[0] is None and captures[1] is not None


def test_a_prompt_read_by_a_replay_in_bf16_is_as_exact_as_one_pass():
    model, (ids, _) = make("tree_attention", torch.bfloat16).cuda(), ragged()
    ids = ids.cuda()
    hf_longattn.prepare_generation(model, cuda_graph=True)
    answers = [model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=1) for _ in range(3)]
    graphs = vars(model)["_kept_program"].prompts
    assert graphs.knows(ids.shape[1]) and torch.equal(answers[1], answers[2])
    with torch.no_grad():
        held = vars(model)["_kept_program"].program.decoding.cache.layers[-1]._keys[:, :, :50].clone()
        plain, right = BlockTransformerCache(model.config), BlockTransformerCache(model.config)
        hf_longattn.restore(model)(ids, past_key_values=plain)
        make("sdpa").double().cuda()(ids, past_key_values=right)
    exact = right.layers[-1].keys[:, :, :50]
    error = (plain.layers[-1].keys[:, :, :50].double() - exact).norm()
    assert (held.double() - exact).norm() <= 1.5 * error


def batch_and_alone(rows, **options):
    """Answers of `generate_batch` on `rows` rows, and those of each prompt alone."""
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    model, (ids, _) = hf_longattn.prepare_generation(make("sdpa").cuda(), cuda_graph=True), ragged()
    lengths = [203, 60, 7, 130, 1, 64, 99, 12, 180, 33, 5, 150]
    inputs = [((ids[place % 4, :length] + place) % 500).tolist() for place, length in enumerate(lengths)]
    limits = [8 + 5 * (place % 4) for place in range(12)]
    config = ContinuousBatchingConfig(max_requests_per_batch=rows)
    torch.manual_seed(3)
    results = model.generate_batch(
        inputs, continuous_batching_config=config, max_new_tokens=limits, **options
    )
    alone = []
    for prompt, limit in zip(inputs, limits, strict=True):
        row = torch.tensor([prompt]).cuda()
        mask = torch.ones_like(row)
        tokens = model.generate(row, attention_mask=mask, pad_token_id=1, max_new_tokens=limit, **options)
        alone.append(tokens[0, len(prompt) :].tolist())
    return [result.generated_tokens for result in results.values()], alone


@pytest.mark.parametrize("rows", [1, 5, None])
@pytest.mark.parametrize("ends", [None, list(range(0, 500, 25))], ids=["full", "ends"])
def test_rows_of_a_captured_batch_get_the_tokens_of_each_prompt_alone(rows, ends):
    options = {"do_sample": False, "eos_token_id": ends, "repetition_penalty": 1.2}
    batch, alone = batch_and_alone(rows, **options)
    assert batch == alone
    assert ends is None or any(len(answer) not in (8, 13, 18, 23) for answer in alone)


def test_sampling_of_a_captured_batch_is_repeated_by_its_seed():
    first, alone = batch_and_alone(5, **SAMPLED)
    assert first == batch_and_alone(5, **SAMPLED)[0] != alone


def test_captured_rows_draw_new_numbers_at_every_block():
    answers, _ = batch_and_alone(5, **{**SAMPLED, "temperature": 100.0, "top_k": 0, "top_p": 1.0})
    blocks = [
        tuple(answer[place : place + 4]) for answer in answers for place in range(0, len(answer) - 3, 4)
    ]
    assert len(set(blocks)) == len(blocks)


def test_prompts_that_are_read_some_rows_at_a_time_get_the_tokens_of_the_plain_model(monkeypatch):
    from hf_longattn.generation import prompts

    calls, real = [], BlockTransformerForCausalLM.decode_prompts
    monkeypatch.setattr(
        BlockTransformerForCausalLM,
        "decode_prompts",
        lambda self, *args: (calls.append(args[-1]), real(self, *args))[1],
    )
    # 25 blocks a row: four rows are too many, two are read together.
    monkeypatch.setattr(prompts, "GPU_CHUNK_TOKENS", 60)
    model, generator = make("sdpa").cuda(), torch.Generator().manual_seed(5)
    ids, results = torch.randint(2, 500, (4, 102), generator=generator).cuda(), []
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 1}
    for prepare in (False, True, True):
        if prepare and not calls:
            hf_longattn.prepare_generation(model, cuda_graph=True)
        results.append(model.generate(ids, max_new_tokens=23, **options))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert calls == [2, 2]
