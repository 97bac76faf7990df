"""Adapters of PEFT on a prepared model: loss and gradients of plain PEFT, saved and merged as ever."""

import pytest
import tiny
import torch

import hf_longattn

peft = pytest.importorskip("peft", reason="peft is not installed")
# fp32 sums in another order; the gradients of all adapters of a model, relative.
BOUND = 5e-6
IDS = tiny.tokens(2, 43)
CAUSAL = {"task_type": "CAUSAL_LM"}


def lora(**changes):
    fields = {"r": 8, "target_modules": "all-linear", "init_lora_weights": False, **CAUSAL}
    return peft.LoraConfig(**{**fields, **changes})


KINDS = {
    "lora": lora(),
    "dora": lora(use_dora=True),
    "whole-modules": lora(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens", "norm"]),
    "rows-of-the-embedding": lora(trainable_token_indices=[3, 5]),
    "parameters": lora(target_modules=[], target_parameters=["q_proj.weight", "down_proj.weight"]),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False,
        **CAUSAL,
    ),
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm", "norm"], **CAUSAL),
    "prompt-tuning": peft.PromptTuningConfig(num_virtual_tokens=5, **CAUSAL),
    "p-tuning": peft.PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=16, **CAUSAL),
}  # fmt: skip


def prepare(model):
    return hf_longattn.prepare_training(model, block_size=16, loss_chunk_size=9)


def build(config, order):
    """A tiny Llama with an adapter, prepared "before" or "after" it got the adapter, or never."""
    model = tiny.build("llama").train()
    if order == "before":
        prepare(model)
    torch.manual_seed(3)
    model = peft.get_peft_model(model, config)
    return prepare(model) if order == "after" else model


def step(model):
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_plain_peft(kind):
    expected_loss, expected = step(build(KINDS[kind], "never"))
    assert expected
    for order in ("before", "after"):
        loss, gradients = step(build(KINDS[kind], order))
        assert tiny.relative_error(loss, expected_loss) <= BOUND
        assert gradients.keys() == expected.keys()
        result, reference = (torch.cat([g[n].flatten() for n in expected]) for g in (gradients, expected))
        assert tiny.relative_error(result, reference) <= BOUND, order


@pytest.mark.parametrize("order", ["before", "after"])
def test_trained_adapters_are_saved_reloaded_and_merged(order, tmp_path):
    model = build(lora(), order)
    step(model)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    model.save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(tiny.build("llama"), tmp_path).eval()
    expected = reloaded(input_ids=IDS, use_cache=False).logits
    base = tiny.build("llama")(input_ids=IDS, use_cache=False).logits
    assert tiny.relative_error(base, expected) > 0.1, "the adapter does nothing"
    assert tiny.relative_error(model.eval()(input_ids=IDS, use_cache=False).logits, expected) <= BOUND
    hf_longattn.restore(model)
    assert torch.equal(model(input_ids=IDS, use_cache=False).logits, expected)
    merged = model.merge_and_unload()
    assert tiny.relative_error(merged(input_ids=IDS, use_cache=False).logits, expected) <= BOUND
    assert "forward" not in vars(merged)


def test_lora_dropout_draws_the_same_numbers_in_the_backward():
    # Llama's norms round to fp32, whatever the model's dtype.
    model = prepare(peft.get_peft_model(tiny.build("gpt-neox").train(), lora(lora_dropout=0.3)).double())

    def loss():
        torch.manual_seed(5)
        return model(input_ids=IDS, labels=IDS).loss

    assert loss().item() != model(input_ids=IDS, labels=IDS).loss.item()
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


REFUSED = {
    "prefix-tuning": (
        peft.PrefixTuningConfig(num_virtual_tokens=5, **CAUSAL), "prefix-tuning", "past_key_values",
    ),
    "activated-lora": (
        lora(target_modules=["q_proj"], alora_invocation_tokens=IDS[0, -4:-2].tolist()),
        "needs all tokens", "needs all tokens",
    ),
    "lily": (
        peft.LilyConfig(target_modules=["q_proj"], **CAUSAL), "q_proj.*needs all tokens", "needs all tokens",
    ),
    "velora": (
        lora(target_modules=["q_proj"], velora_config=peft.VeloraConfig(num_groups=8)),
        "needs all tokens", "needs all tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("order", ["before", "after"])
def test_adapters_that_need_the_whole_sequence_are_refused(kind, order):
    config, words, words_at_the_step = REFUSED[kind]
    with pytest.raises(ValueError, match=words if order == "after" else words_at_the_step):
        step(build(config, order))


def test_x_lora_is_refused(tmp_path):
    build(lora(target_modules=["q_proj"]), "never").save_pretrained(tmp_path)
    base = tiny.build("llama").train()
    # Its classifier calls the model a second time.
    base.config.use_cache = False
    config = peft.XLoraConfig(hidden_size=64, adapters={"0": str(tmp_path), "1": str(tmp_path)}, **CAUSAL)
    with pytest.raises(ValueError, match="needs all tokens"):
        step(prepare(peft.get_peft_model(base, config)))


def test_replicated_layers():
    config = lora(target_modules=["q_proj", "down_proj"], layer_replication=[[0, 2], [1, 3]])
    found = []
    for order in ("never", "after"):
        # The copies of a layer hold configs of their own, which a later switch does not reach.
        torch.manual_seed(3)
        model = peft.get_peft_model(tiny.build("llama", "blockwise_attention").train(), config)
        found.append(step(model if order == "never" else prepare(model)))
    assert tiny.relative_error(found[1][0], found[0][0]) <= BOUND
    for name, expected in found[0][1].items():
        assert tiny.relative_error(found[1][1][name], expected) <= 10 * BOUND, name
    with pytest.raises(ValueError, match="attn_implementation='blockwise_attention'"):
        prepare(peft.get_peft_model(tiny.build("llama").train(), config))


def test_velora_along_a_fixed_direction():
    config = lora(
        target_modules=["q_proj"], velora_config=peft.VeloraConfig(num_groups=8, init_type="random")
    )
    (loss, gradients), (expected_loss, expected) = (
        step(build(config, order)) for order in ("after", "never")
    )
    assert tiny.relative_error(loss, expected_loss) <= BOUND
    for name in expected:
        assert tiny.relative_error(gradients[name], expected[name]) <= 10 * BOUND, name


def test_cpt_needs_the_logits():
    tokens = {"cpt_token_ids": [1, 2, 3], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3]}
    model = peft.get_peft_model(tiny.build("llama"), peft.CPTConfig(**tokens, **CAUSAL))
    with pytest.raises(ValueError, match="CPT adapter.*loss='model'"):
        prepare(model)


def test_an_adapter_for_each_row_is_gone_in_the_backward_and_refused():
    model = build(lora(), "after")
    model.add_adapter("other", lora())
    model.eval()
    loss = model(input_ids=IDS, labels=IDS, adapter_names=["default", "other"]).loss
    with pytest.raises(ValueError, match="adapter_names"):
        loss.backward()
