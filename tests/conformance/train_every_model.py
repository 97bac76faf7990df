"""Trains every causal language model of transformers, tiny, with and without `prepare_training`.

    python tests/conformance/train_every_model.py [--model llama ...] [--write FILE]

Loss and gradients of both must be equal in fp32, or the model must be refused by name. Prints a line a model,
and writes the page that lists them; exits with 1 if a model differs, or fails with an error that refuses
nothing.
"""

import argparse
import collections
import contextlib
import logging
import multiprocessing
import sys
import warnings
from pathlib import Path

import torch
import transformers as tf
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import hf_longattn

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import tiny

LAYERS, HEADS = 3, 4
# Tiny values of a config's fields, where its own are not smaller.
SIZES = {
    97: "vocab_size n_words vocab_size_per_layer_input pronunciation_vocab_size shape_vocab_size",
    64: "hidden_size d_model n_embd dim_model embedding_size word_embed_proj_dim emb_dim",
    96: "intermediate_size ffn_dim n_inner d_ff dim_ff dff ffn_hidden_size encoder_ffn_dim decoder_ffn_dim "
        "intermediate_size_mlp shared_expert_intermediate_size shared_intermediate_size",
    LAYERS: "num_hidden_layers num_layers n_layer n_layers decoder_layers encoder_layers num_decoder_layers "
        "num_encoder_layers",
    HEADS: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
        "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads "
        "num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num "
        "linear_num_value_heads linear_num_heads",
    2: "num_experts_per_tok num_experts_per_token moe_k moe_topk top_k_experts linear_num_key_heads "
        "swa_num_key_value_heads",
    1: "n_group topk_group num_expert_group first_k_dense_replace n_shared_experts mamba_n_groups "
        "mamba_ngroups",
    32: "moe_intermediate_size expert_ffn_hidden_size rel_extent router_hidden_size",
    16: "head_dim attention_head_dim swa_head_dim q_lora_rank kv_lora_rank qk_nope_head_dim v_head_dim "
        "linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_head mamba_head_dim mamba_headdim "
        "mamba_chunk_size hidden_size_per_layer_input",
    8: "qk_rope_head_dim rotary_dim mamba_d_state ssm_state_size mamba_n_heads mamba_num_heads",
    24: "qk_head_dim",
    128: "mamba_d_ssm",
    512: "max_position_embeddings n_positions n_ctx max_seq_len seq_length",
    7: "sliding_window window_size attention_chunk_size sliding_window_size",
}  # fmt: skip
TINY = {name: size for size, names in SIZES.items() for name in names.split()}
# Fields that say nothing of a size, and those that are None where the model needs a number.
FIXED = {"is_decoder": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
NEEDED = {
    "num_key_value_heads": HEADS,
    "n_routed_experts": HEADS,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": HEADS,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
EXTRA = {
    "cohere_compass_text": {
        "head_dim": 128,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    },
    "falcon_h1": {"mamba_d_head": 16},
    "gemma3n_text": {"num_kv_shared_layers": 1, "intermediate_size": 96},
    "gpt_neo": {
        "num_layers": 4,
        "attention_layers": ["global", "local"] * 2,
        "attention_types": [[["global", "local"], 2]],
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
}
# Configs inside those of models that are more than a decoder of text.
PARTS = {"text_config", "vision_config", "audio_config", "decoder", "patcher_config"}
MOST_PARAMETERS, SECONDS = 10_000_000, 90
IDS, MASK = tiny.tokens(2, 43), tiny.padding([43, 29], 43, "right")
INPUTS = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.masked_fill(MASK == 0, -100)}
HEADINGS = {
    "exact": "Exact",
    "model": 'Exact with `loss="model"`',
    "refused": "Refused",
    "untried": "Not tried",
}


def model_names():
    """The types of all causal language models of transformers: ours are in the mapping too."""
    theirs = set(dir(tf))
    return [name for name, kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if kind in theirs]


def tiny_config(name):
    """A config of the type `name` with the fields of its default made small."""
    kind = CONFIG_MAPPING[name]
    fields = kind().to_dict()
    changes = {field: value for field, value in FIXED.items() if field in fields}
    layers = next((fields[field] for field in ("num_hidden_layers", "num_layers") if field in fields), None)
    for field, value in fields.items():
        if value is None and field in NEEDED:
            changes[field] = NEEDED[field]
        elif isinstance(value, int) and not isinstance(value, bool) and field in TINY:
            changes[field] = min(value, TINY[field])
        elif isinstance(value, list) and len(value) == layers:
            kinds = list(dict.fromkeys(value))
            changes[field] = [kinds[min(index, len(kinds) - 1)] for index in range(LAYERS)]
        elif "dropout" in field or field.endswith(("pdrop", "layerdrop")):
            changes[field] = 0.0
    if (groups := fields.get("num_key_value_heads")) is not None:
        whole = groups == fields.get("num_attention_heads")
        changes["num_key_value_heads"] = HEADS if whole else min(groups, HEADS // 2)
    if "qk_rope_head_dim" in fields:
        changes |= {"head_dim": TINY["qk_rope_head_dim"]} if "head_dim" in fields else {}
    return kind(**{**changes, **EXTRA.get(name, {})})


def build(name, implementation="eager", dtype=torch.float32):
    """The tiny model, without dropout, the same random weights each time."""
    config, kind = tiny_config(name), getattr(tf, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])
    with torch.device("meta"):
        count = sum(p.numel() for p in kind._from_config(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"its smallest form has {count / 1e6:.0f}M parameters")
    torch.manual_seed(0)
    model = kind._from_config(config, attn_implementation=implementation, dtype=torch.float32)
    return tiny.without_dropout(tiny.scattered(model)).to(dtype).train()


def gradients(model):
    """The loss, then every gradient, in one vector."""
    torch.manual_seed(0)
    loss = model(**INPUTS, use_cache=False).loss
    loss.backward()
    grads = [p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None]
    return torch.cat([loss.detach()[None].to(grads[0].dtype), *grads])


def errors(result, expected):
    """Those of the loss and of the gradients."""
    return tuple(tiny.relative_error(result[part], expected[part]) for part in (slice(1), slice(1, None)))


def bounds(name, expected):
    """2e-6, or half as much again as sdpa is off, and as the plain model itself is from fp64."""
    found = [(0.0, 0.0)]
    for options in ({"implementation": "sdpa"}, {"dtype": torch.float64}):
        # Not every model has both.
        with contextlib.suppress(RuntimeError, TypeError, ValueError, ImportError):
            found.append(errors(gradients(build(name, **options)), expected))
    return tuple(max(2e-6, 1.5 * max(parts)) for parts in zip(*found, strict=True))


def first_words(error):
    """The error in one line, without the name of the model that it may begin with."""
    words = " ".join(str(error).split("\n")[0].split())
    return words.rpartition("cannot be prepared for training: ")[2] or type(error).__name__


def judge(name):
    """(exact, model, refused, untried, differs or fails; why).

    Args:
        name: the `model_type`.
    """
    if PARTS & set(getattr(CONFIG_MAPPING[name], "sub_configs", None) or ()):
        return "untried", "it holds several models; where its text model can stand alone, that has a line"
    try:
        expected = gradients(build(name))
    except Exception as error:
        return "untried", f"the plain model: {first_words(error)}"
    refusals = []
    for loss in ("chunked", "model"):
        try:
            result = gradients(hf_longattn.prepare_training(build(name), block_size=16, loss=loss))
        except (ValueError, TypeError) as error:
            refusals.append(error)
            continue
        except Exception as error:
            return "fails", f"{type(error).__name__}: {first_words(error)}"
        found, most = errors(result, expected), bounds(name, expected)
        if not all(error <= bound for error, bound in zip(found, most, strict=True)):
            return "differs", f"loss and gradients by {found[0]:.1e} and {found[1]:.1e}"
        return ("exact" if loss == "chunked" else "model"), ""
    # A refusal names what it is about in backticks.
    kind = "refused" if "`" in str(refusals[0]) or "attn_implementation" in str(refusals[0]) else "fails"
    return kind, first_words(refusals[0])


def judge_apart(name):
    """`judge` in a process of its own: some plain models take for ever, or die."""
    pool = multiprocessing.get_context("fork").Pool(1)
    try:
        return pool.apply_async(judge, (name,)).get(SECONDS)
    except multiprocessing.TimeoutError:
        return "untried", "the plain model takes too long"
    finally:
        pool.terminate()


def page(results):
    """The page for the documentation.

    Args:
        results: name to (kind, why).
    """
    groups = collections.defaultdict(dict)
    for name, (kind, why) in sorted(results.items()):
        groups[kind][name] = why
    release = ".".join(tf.__version__.split(".")[:2])
    lines = [
        "# Architectures in `prepare_training`",
        "",
        f"Every causal language model of transformers {release}, tiny, with random weights and a batch that",
        "is padded on the right: loss and gradients with `prepare_training(model, block_size=16)` against",
        "those of the model without it, with eager attention. Equal means to 2e-6 in fp32, or to one and a",
        "half times what sdpa is off from eager, or eager in fp32 from fp64.",
        "",
        "`python tests/conformance/train_every_model.py --write docs/reference/architectures.md` writes this",
        "page, in about five minutes on one core.",
    ]
    for kind, heading in HEADINGS.items():
        lines += ["", f"## {heading} ({len(groups[kind])})", ""]
        if kind in ("exact", "model"):
            lines.append(", ".join(f"`{name}`" for name in groups[kind]))
            continue
        lines += ["| model | why |", "| --- | --- |"]
        lines += [f"| `{name}` | {why.replace('|', chr(92) + '|')} |" for name, why in groups[kind].items()]
    return "\n".join(lines) + "\n"


def main():
    """Judges the models that are asked for, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = model_names()
    parser.add_argument("--model", nargs="+", choices=names, default=names, metavar="MODEL")
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    results = {}
    for name in arguments.model:
        results[name] = kind, why = judge_apart(name)
        print(f"{name:28}{kind:10}{why}", flush=True)
    if arguments.write is not None:
        arguments.write.write_text(page(results))
    return int(any(kind in ("differs", "fails") for kind, _ in results.values()))


if __name__ == "__main__":
    sys.exit(main())
