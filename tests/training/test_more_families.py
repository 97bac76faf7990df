"""Families beyond the tiny ones: experts, latent attention, parallel residuals, more norms."""

import functools

import pytest
import tiny
import torch
import transformers as tf

import hf_longattn

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    **EXPERTS,
}
NO_DROPOUT = {"attention_dropout": 0.0, "residual_dropout": 0.0}
FAMILIES = {
    "mixtral": (tf.MixtralConfig, {"num_local_experts": 4, "sliding_window": None}),
    "qwen3-moe": (tf.Qwen3MoeConfig, {"num_experts": 4, "mlp_only_layers": [], **EXPERTS}),
    "qwen2-moe": (tf.Qwen2MoeConfig, {"num_experts": 4, "shared_expert_intermediate_size": 32, **EXPERTS}),
    "olmoe": (tf.OlmoeConfig, {"num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek-v2": (tf.DeepseekV2Config, LATENT),
    "deepseek-v3": (tf.DeepseekV3Config, {**LATENT, "n_group": 2}),
    "glm4-moe": (tf.Glm4MoeConfig, {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, **EXPERTS}),
    "mistral": (tf.MistralConfig, {"sliding_window": None}),
    "gemma": (tf.GemmaConfig, {"head_dim": 16}),
    "phi": (tf.PhiConfig, {"qk_layernorm": True}),
    "olmo": (tf.OlmoConfig, {}),
    "olmo3": (tf.Olmo3Config, {}),
    "granite": (
        tf.GraniteConfig,
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.5}
        | {"attention_multiplier": 0.25},
    ),
    "starcoder2": (tf.Starcoder2Config, {}),
    "smollm3": (tf.SmolLM3Config, {}),
    "glm": (tf.GlmConfig, {"head_dim": 16}),
    "glm4": (tf.Glm4Config, {"head_dim": 16}),
    "stablelm": (tf.StableLmConfig, {"use_parallel_residual": True, "qk_layernorm": True, **NO_DROPOUT}),
    "nemotron": (tf.NemotronConfig, {}),
    "exaone4": (tf.Exaone4Config, {}),
    "cohere2": (tf.Cohere2Config, {}),
    "persimmon": (tf.PersimmonConfig, {}),
    "seed-oss": (tf.SeedOssConfig, {"head_dim": 16, **NO_DROPOUT}),
    "arcee": (tf.ArceeConfig, {}),
    # Its layers return a tuple.
    "moshi": (tf.MoshiConfig, {"num_key_value_heads": 4, "ffn_dim": 96}),
    # Its embeddings have a norm in their name.
    "roberta-prelayernorm": (
        tf.RobertaPreLayerNormConfig,
        {"is_decoder": True, "num_key_value_heads": 4, "attention_probs_dropout_prob": 0.0},
    ),
    "opt": (tf.OPTConfig, {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0}),
}
IDS, MASK = tiny.tokens(2, 43), tiny.padding([43, 29], 43, "right")
INPUTS = {"input_ids": IDS, "attention_mask": MASK, "labels": torch.where(MASK.bool(), IDS, -100)}


def build(family, implementation="eager"):
    torch.manual_seed(0)
    kind, changes = FAMILIES[family]
    model = tf.AutoModelForCausalLM.from_config(
        kind(**{**tiny._COMMON, **changes}), attn_implementation=implementation, dtype=torch.float32
    )
    return tiny.without_dropout(tiny.scattered(model)).train()


def gradients(model):
    model(**INPUTS, use_cache=False).loss.backward()
    return torch.cat([p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_the_plain_model(family):
    # OPT's head reads its decoder directly.
    prepare = functools.partial(hf_longattn.prepare_training, loss="model" if family == "opt" else "chunked")
    expected = gradients(build(family))
    result = gradients(prepare(build(family), block_size=16))
    # Nemotron's sdpa is as far from eager as the bound.
    bound = max(2e-6, 1.5 * tiny.relative_error(gradients(build(family, "sdpa")), expected))
    assert tiny.relative_error(result, expected) <= bound


def test_a_head_that_skips_the_trunk_is_refused_by_name():
    with pytest.raises(ValueError, match=r"`loss='chunked'`.*OPTForCausalLM"):
        hf_longattn.prepare_training(build("opt"))(**INPUTS)
