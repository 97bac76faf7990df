"""A prepared model against the same model unprepared: loss and every gradient, whatever the blocks."""

import copy
import functools
import weakref

import pytest
import tiny
import torch
import transformers as tf
from torch.utils.checkpoint import checkpoint

import hf_longattn
from hf_longattn.cache import LongContextCache
from hf_longattn.kernels.dispatch import log_once
from hf_longattn.training import layer

# fp32 sums in another order; the loss and the gradients of a whole model, relative.
BOUND = 2e-6
families = pytest.mark.parametrize("family", tiny.CAUSAL)


def build(family, **changes):
    """A tiny model to train, with changes of its config."""
    model = tiny.build_to_train(family)
    for name, value in changes.items():
        setattr(model.config, name, value)
    return model


def step(model, **inputs):
    """(loss, gradients) of one backward."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def flat(gradients):
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def assert_same(result, expected, bound=BOUND):
    assert tiny.relative_error(result[0], expected[0]) <= bound
    assert result[1].keys() == expected[1].keys() and expected[1]
    assert tiny.relative_error(flat(result[1]), flat(expected[1])) <= bound


def batch(layout):
    """Inputs of 43 tokens a row (no multiple of a block) in one of the layouts."""
    lengths = [43, 43] if layout == "full" else [43, 29]
    ids = tiny.tokens(2, 43)
    if layout == "packed":
        positions = torch.cat([torch.arange(n) for n in (20, 1, 22)])[None]
        labels = ids[:1].masked_fill(positions == 0, -100)
        return {"input_ids": ids[:1], "labels": labels, "position_ids": positions}
    mask = tiny.padding(lengths, 43, "left" if layout == "left" else "right")
    # A padding token sees nothing, and what it would predict is up to the implementation.
    labels = torch.where(mask.bool() & mask.roll(1, 1).bool(), ids, -100)
    return {"input_ids": ids, "labels": labels} | ({} if layout == "full" else {"attention_mask": mask})


@functools.cache
def plain(family, layout):
    model = build(family)
    if layout == "packed":
        # Eager attention forgets about packing in some families; tests/attention holds ours to it.
        model.set_attn_implementation("blockwise_attention")
    return step(model, **batch(layout), use_cache=False)


@families
@pytest.mark.parametrize("block_size", [16, 64])
def test_loss_and_gradients_equal_the_plain_model(family, block_size):
    model = hf_longattn.prepare_training(build(family), block_size=block_size, loss_chunk_size=13)
    assert_same(step(model, **batch("full")), plain(family, "full"))


@pytest.mark.parametrize("loss", ["chunked", "model"])
def test_a_compiler_of_the_whole_model_goes_round_what_is_prepared(loss):
    model = hf_longattn.prepare_training(build("llama"), block_size=16, loss=loss)
    compiled = torch.compile(model, backend="eager")
    try:
        result = compiled(**batch("left"), use_cache=False).loss
    finally:
        torch._dynamo.reset()
    result.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same((result.detach(), gradients), plain("llama", "left"))


@families
@pytest.mark.parametrize("layout", ["left", "right", "packed"])
def test_padding_and_packing(family, layout):
    if family == "gpt2" and layout == "packed":
        pytest.skip(
            "GPT-2 does not hand position ids to its attention: documents see one another in eager too"
        )
    model = hf_longattn.prepare_training(build(family), block_size=16)
    assert_same(step(model, **batch(layout)), plain(family, layout))


@pytest.mark.parametrize(
    ("family", "block_size"),
    [("llama", 1), *((family, size) for family in ("llama", "gemma2", "gpt-oss") for size in (5, 42, 43))],
)
def test_the_block_size_changes_nothing(family, block_size):
    model = hf_longattn.prepare_training(build(family), block_size=block_size, save_attention=False)
    assert_same(step(model, **batch("left")), plain(family, "left"))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-neox"])
def test_cumulative_lengths_keep_documents_apart(family):
    bounds = torch.tensor([0, 20, 21, 43], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 22, "max_length_k": 22}
    model = hf_longattn.prepare_training(build(family), block_size=16)
    assert_same(step(model, **batch("packed"), **lengths), plain(family, "packed"))


def test_cumulative_lengths_count_through_all_rows():
    ids, starts = tiny.tokens(2, 43), torch.zeros(2, 43, dtype=torch.long)
    starts[0, 20], starts[1, 9] = 20, 9
    inputs = {
        "input_ids": ids,
        "position_ids": torch.arange(43) - starts.cummax(1).values,
        "labels": torch.where(starts == 0, ids, -100),
    }
    bounds = torch.tensor([0, 20, 43, 52, 86], dtype=torch.int32)
    model = hf_longattn.prepare_training(build("llama"), block_size=16)
    expected = step(build("llama"), **inputs, use_cache=False)
    assert_same(step(model, **inputs, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds), expected)


def test_a_dense_mask_of_the_callers():
    visible = torch.ones(43, 43, dtype=torch.bool).tril() & (torch.rand(43, 43) > 0.3) | torch.eye(43).bool()
    additive = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None].expand(2, 1, 43, 43)
    inputs = {**batch("full"), "attention_mask": additive}
    expected = step(build("llama"), **inputs, use_cache=False)
    assert_same(step(hf_longattn.prepare_training(build("llama"), block_size=16), **inputs), expected)


@families
def test_evaluation_takes_the_same_path_without_logits(family):
    model = hf_longattn.prepare_training(build(family), block_size=16).eval()
    with torch.no_grad():
        output = model(**batch("left"))
    assert output.logits is None
    assert tiny.relative_error(output.loss, plain(family, "left")[0]) <= BOUND


@pytest.mark.parametrize("labels", [True, False], ids=["evaluation", "prediction"])
def test_outside_training_layers_run_by_blocks_too(labels):
    model, rows = hf_longattn.prepare_training(build("llama"), block_size=16).eval(), []
    for part in model.model.layers:
        part.mlp.register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    inputs = batch("full") if labels else {"input_ids": batch("full")["input_ids"]}
    with torch.no_grad():
        model(**inputs, use_cache=False)
    assert rows == [16, 16, 11] * len(model.model.layers)


def test_logits_and_hidden_states_without_labels():
    inputs = {"input_ids": tiny.tokens(2, 43), "output_hidden_states": True, "use_cache": False}
    expected = build("gemma2")(**inputs)
    result = hf_longattn.prepare_training(build("gemma2"), block_size=16)(**inputs)
    assert tiny.relative_error(result.logits, expected.logits) <= BOUND
    assert len(result.hidden_states) == len(expected.hidden_states)
    for ours, theirs in zip(result.hidden_states, expected.hidden_states, strict=True):
        assert tiny.relative_error(ours, theirs) <= BOUND


@pytest.mark.parametrize("family", ["llama", "gpt-oss"])
def test_frozen_layers(family):
    models = [build(family), hf_longattn.prepare_training(build(family), block_size=16)]
    for model in models:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers.1.mlp" in name or "layers.2.self_attn.q" in name)
    expected, result = (step(model, **batch("full")) for model in models)
    assert_same(result, expected)


def test_gradients_accumulate():
    models = [build("qwen3"), hf_longattn.prepare_training(build("qwen3"), block_size=16)]
    totals = []
    for model in models:
        for layout in ("left", "packed"):
            model(**batch(layout), num_items_in_batch=torch.tensor(91), use_cache=False).loss.backward()
        totals.append(flat({n: p.grad for n, p in model.named_parameters()}))
    assert tiny.relative_error(totals[1], totals[0]) <= BOUND


def test_a_second_backward_through_the_same_graph():
    model = hf_longattn.prepare_training(build("llama"), block_size=16)
    loss = model(**batch("full")).loss
    loss.backward(retain_graph=True)
    loss.backward()
    doubled = {n: p.grad / 2 for n, p in model.named_parameters()}
    assert tiny.relative_error(flat(doubled), flat(plain("llama", "full")[1])) <= BOUND


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("options", [{}, {"every_n_layers": 2}, {"offload": True}], ids=str)
def test_gradient_checkpointing_is_left_out(moment, options, caplog):
    model = build("llama")
    log_once.cache_clear()
    caplog.set_level("INFO", logger="hf_longattn")
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": False}, **options}
    if moment == "before":
        model.gradient_checkpointing_enable(**options)
    hf_longattn.prepare_training(model, block_size=16)
    if moment == "after":
        model.gradient_checkpointing_enable(**options)
        model.model.gradient_checkpointing_enable()
    calls, attention = [], model.model.layers[0].self_attn
    attention.register_forward_hook(lambda *args: calls.append(1))
    assert_same(step(model, **batch("full")), plain("llama", "full"))
    # Three blocks forward and three backward; two refills leave before the hook runs.
    assert len(calls) == 6
    assert "gradient checkpointing: left out" in caplog.text
    # What was offloaded before is not known any more.
    ignored = bool(options.keys() & {"every_n_layers", *(["offload"] if moment == "after" else [])})
    assert ("`every_n_layers` and `offload` have no effect" in caplog.text) == ignored
    hf_longattn.restore(model)
    assert model.is_gradient_checkpointing == (moment == "before")


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_inside_a_checkpoint_of_the_callers(reentrant):
    model = hf_longattn.prepare_training(build("llama"), block_size=16)
    first = model.model.layers[0]
    hidden = torch.randn(2, 43, 64, requires_grad=True)
    cos_sin = model.model.rotary_emb(hidden, torch.arange(43)[None])
    weights = torch.randn(2, 43, 64)
    call = functools.partial(first, position_embeddings=cos_sin)
    expected = torch.autograd.grad((call(hidden) * weights).sum(), [hidden, *first.parameters()])
    output = checkpoint(call, hidden, use_reentrant=reentrant)
    (output * weights).sum().backward()
    result = [hidden.grad, *(p.grad for p in first.parameters())]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(result, expected, strict=True))


def test_dropout_draws_the_same_numbers_again():
    """Central differences of the loss along a random direction of the weights, in fp64."""
    model = build("gpt2").double()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    hf_longattn.prepare_training(model, block_size=16)

    def loss():
        torch.manual_seed(5)
        return model(**batch("full")).loss

    assert loss().item() == loss().item()
    first = loss().item()
    torch.manual_seed(6)
    assert model(**batch("full")).loss.item() != first
    loss().backward()
    parameters = [p for p in model.parameters() if p.grad is not None]
    direction = [torch.randn_like(p) for p in parameters]
    slope = sum((p.grad * d).sum() for p, d in zip(parameters, direction, strict=True)).item()
    values = []
    for size in (1e-6, -2e-6):
        with torch.no_grad():
            for parameter, part in zip(parameters, direction, strict=True):
                parameter.add_(part, alpha=size)
            values.append(loss().item())
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize(
    ("moment", "error"),
    [
        ("forward", torch.OutOfMemoryError),
        ("loss", KeyboardInterrupt),
        ("backward", torch.OutOfMemoryError),
    ],
)
def test_a_step_that_was_interrupted_leaves_no_trace(moment, error):
    model = hf_longattn.prepare_training(build("gpt2"), block_size=16, keep_every=2, loss_chunk_size=9)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3

    def step():
        model.zero_grad()
        torch.manual_seed(5)
        loss = model(**batch("left")).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    expected, calls = step(), 0

    def interrupt(*found):
        nonlocal calls
        calls += 1
        if calls == {"forward": 2, "loss": 4, "backward": 5}[moment]:
            raise error("in the middle")

    where = model.lm_head if moment == "loss" else model.transformer.h[1].mlp
    hook = where.register_forward_hook(interrupt)
    with pytest.raises(error):
        step()
    hook.remove()
    assert all(map(torch.equal, step(), expected))


def test_autocast_computes_in_its_dtype():
    inputs = batch("left")
    model, prepared = build("llama"), hf_longattn.prepare_training(build("llama"), block_size=16)
    exact = plain("llama", "left")
    with torch.autocast("cpu", torch.bfloat16):
        model.zero_grad()
        expected_loss, result_loss = model(**inputs, use_cache=False).loss, prepared(**inputs).loss
    expected_loss.backward()
    result_loss.backward()
    expected, result = ({n: p.grad for n, p in m.named_parameters()} for m in (model, prepared))
    error = tiny.relative_error(flat(result), flat(exact[1]))
    assert error > 1e-4, "autocast was not in force"
    assert error <= 1.5 * tiny.relative_error(flat(expected), flat(exact[1]))


def saved_bytes(model, length):
    """Bytes that the graph of one forward keeps, parameters aside."""
    packs = weakref.WeakSet()

    class Pack:
        def __init__(self, tensor):
            self.tensor = tensor
            packs.add(self)

    ids = tiny.tokens(1, length)
    with torch.autograd.graph.saved_tensors_hooks(Pack, lambda pack: pack.tensor):
        loss = model(input_ids=ids, labels=ids).loss
    storages = (pack.tensor.untyped_storage() for pack in packs)
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    for parameter in model.parameters():
        sizes.pop(parameter.untyped_storage().data_ptr(), None)
    loss.backward()
    return sum(sizes.values())


@pytest.mark.parametrize("save_attention", [False, True])
def test_a_layer_keeps_its_input_alone(save_attention):
    settings = {"block_size": 64, "save_attention": save_attention, "loss_chunk_size": 64}
    model = hf_longattn.prepare_training(build("llama"), **settings)
    slope = (saved_bytes(model, 1024) - saved_bytes(model, 512)) / 512
    # The inputs of three layers and of the final norm, and the gradient that the loss found, 64 floats each.
    expected = 5 * 64 * 4 + (3 * (64 + 4) * 4 if save_attention else 0)
    assert slope <= expected + 16, "16 bytes: positions and the like"
    assert slope >= expected


def test_gradients_are_written_over_one_another(monkeypatch):
    found, place = [], layer._GradientSums._place

    def look(self, part):
        found.append(self.room is not None and place(self, part) is self.room)
        return place(self, part)

    monkeypatch.setattr(layer._GradientSums, "_place", look)
    model = hf_longattn.prepare_training(build("llama"), block_size=16)
    assert_same(step(model, **batch("full")), plain("llama", "full"))
    assert found == [True] * 4, "the final norm and three layers"
    found.clear()
    output = model.model(input_ids=tiny.tokens(2, 43), output_hidden_states=True, use_cache=False)
    states = output.hidden_states[1:3]
    for state in states:
        state.retain_grad()
    weights = torch.randn_like(states[0])
    (output.last_hidden_state * weights).sum().backward()
    assert all(state.grad.isfinite().all() for state in states)
    reference = build("llama").model
    expected = reference(input_ids=tiny.tokens(2, 43), output_hidden_states=True, use_cache=False)
    gradients = torch.autograd.grad(
        (expected.last_hidden_state * weights).sum(), list(expected.hidden_states[1:3])
    )
    for state, gradient in zip(states, gradients, strict=True):
        assert tiny.relative_error(state.grad, gradient) <= BOUND


def test_restore_gives_back_what_was_there():
    model = build("gemma2")
    before, state = plain("gemma2", "left"), copy.deepcopy(model.state_dict())
    config, attributes = model.config, {id(m): set(vars(m)) for m in model.modules()}
    hf_longattn.prepare_training(model, block_size=16)
    assert model.state_dict().keys() == state.keys()
    assert model.config.to_dict() == config.to_dict()
    step(model, **batch("left"))
    assert hf_longattn.restore(model) is model
    assert model.config is config and model.config._attn_implementation == "eager"
    assert {id(m): set(vars(m)) for m in model.modules()} == attributes
    result = step(model, **batch("left"), use_cache=False)
    assert torch.equal(result[0], before[0]) and torch.equal(flat(result[1]), flat(before[1]))


def test_prepared_again_the_new_settings_hold():
    model = hf_longattn.prepare_training(build("llama"), label_smoothing=0.5)
    hf_longattn.prepare_training(model, config=hf_longattn.TrainingSetup(block_size=7))
    assert_same(step(model, **batch("full")), plain("llama", "full"))


@pytest.mark.parametrize("order", ["training first", "generation first", "training again"])
def test_generation_inside_training(order):
    kinds = {"t": hf_longattn.prepare_training, "g": hf_longattn.prepare_generation}
    steps = {"training first": "tg", "generation first": "gt", "training again": "tgt"}[order]
    model, prompt = build("llama"), tiny.tokens(2, 21)
    attributes = {id(m): set(vars(m)) for m in model.modules()}
    expected = build("llama").eval().generate(prompt, max_new_tokens=5, do_sample=False)
    for kind in steps:
        kinds[kind](model)
    output = model.eval().generate(prompt, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(output.sequences, expected)
    assert isinstance(output.past_key_values, LongContextCache)
    assert_same(step(model.train(), **batch("full")), plain("llama", "full"))
    hf_longattn.restore(model)
    assert {id(m): set(vars(m)) for m in model.modules()} == attributes
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("family", ["llama", "gemma2", "model", "flag-hybrid"])
def test_generation_in_training_mode_reads_its_cache(family):
    model = build(family) if family in tiny.CONFIGS else tiny.build_lightning(family).train()
    prompt = tiny.tokens(2, 21)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompt, **options)
    hf_longattn.prepare_training(model, block_size=16)
    assert torch.equal(model.generate(prompt, **options), expected)


def test_a_filled_cache_is_refused_where_gradients_are_wanted():
    model, ids = hf_longattn.prepare_training(build("llama")), tiny.tokens(1, 9)
    with torch.no_grad():
        cache = model(ids[:, :8], use_cache=True).past_key_values
    for mask in (None, torch.ones(1, 9, dtype=torch.long)):
        with pytest.raises(ValueError, match="`past_key_values` holds 8 tokens"):
            model(ids[:, 8:], attention_mask=mask, past_key_values=cache)
    hf_longattn.restore(model)
    model(ids[:, 8:], past_key_values=cache).logits.sum().backward()


def test_lora():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    results = []
    for prepare in (lambda model: model, functools.partial(hf_longattn.prepare_training, block_size=16)):
        torch.manual_seed(3)
        results.append(step(prepare(peft.get_peft_model(build("llama"), config)), **batch("left")))
    assert_same(results[1], results[0])


REFUSED = {
    "router": (
        tf.MixtralConfig,
        {"output_router_logits": True, "num_local_experts": 2},
        "output_router_logits",
    ),
    "mixer": (tf.Lfm2Config, {"layer_types": ["conv", "full_attention", "conv"]}, "ShortConv"),
    "state": (tf.xLSTMConfig, {"num_heads": 4}, "xLSTMBlock"),
    "own attention": (tf.FalconConfig, {}, "own code"),
    "shared keys": (tf.Gemma3nTextConfig, {"num_kv_shared_layers": 1, "num_hidden_layers": 3}, "share keys"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(name):
    kind, changes, words = REFUSED[name]
    config = kind(**{**tiny._COMMON, **changes})
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(config)
    implementation = model.config._attn_implementation
    with pytest.raises(ValueError, match=words):
        hf_longattn.prepare_training(model)
    assert model.config._attn_implementation == implementation
    assert "forward" not in vars(model)


@pytest.mark.parametrize(
    "fields",
    [
        {"block_size": 0},
        {"offload": "cpu"},
        {"loss": "liger"},
        {"label_smoothing": 1.0},
        {"loss_chunk_size": -1},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_settings_are_checked(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        hf_longattn.prepare_training(build("llama"), **fields)


def test_attention_weights_are_refused():
    model = hf_longattn.prepare_training(build("llama"))
    with pytest.raises(ValueError, match="output_attentions"):
        model(**batch("full"), output_attentions=True)
