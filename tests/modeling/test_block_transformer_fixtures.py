"""The Block Transformer against what the official code prints, and the converters of checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, Qwen3Config

from hf_longattn.modeling.block_transformer import BlockTransformerForCausalLM, register
from hf_longattn.modeling.block_transformer.convert import (
    config_from_shapes,
    config_from_vanilla,
    convert_checkpoint,
    convert_from_vanilla,
    convert_state_dict,
)

register()
FOLDER = Path(__file__).parents[1] / "fixtures" / "block_transformer"
NAMES = sorted(path.parent.name for path in FOLDER.glob("*/config.json"))
GENERATING = [name for name in NAMES if (FOLDER / name / "generation.safetensors").exists()]
FORWARD = [(path.parent.name, path.stem[8:]) for path in sorted(FOLDER.glob("*/forward_*.safetensors"))]
ALIGNED = [(*case, "columns") for case in FORWARD] + [
    (*case, "tokens") for case in FORWARD if case[1] == "full"
]
# The official layout is by column; where there are no pads both alignments are the same.
TIED = ("embed_tokens.weight", "lm_head.weight")
UNPADDED = ("multiple", "partial_last_block", "shorter_than_block")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Loads a fixture through its converted folder, once a module."""
    models = {}

    def load(name, alignment):
        if name not in models:
            folder = tmp_path_factory.mktemp(name)
            convert_checkpoint(FOLDER / name, folder, block_alignment=alignment)
            models[name] = AutoModelForCausalLM.from_pretrained(folder)
        models[name].config.block_alignment = alignment
        return models[name].eval()

    return load


def our_name(official, embedder_type):
    """The name that the converter gives a tensor; None if it drops it."""
    state = {} if embedder_type != "lookup" else {"embedder.embeddings.weight": torch.zeros(1)}
    renamed = convert_state_dict(state | {official: torch.zeros(1)})
    return None if len(renamed) < len(state | {official: None}) else list(renamed)[-1]


def description(name):
    return json.loads((FOLDER / name / "config.json").read_text())


@pytest.mark.parametrize(("name", "kind", "alignment"), ALIGNED, ids=lambda value: value)
def test_logits_and_loss(converted, name, kind, alignment):
    model, wanted = converted(name, alignment), load_file(FOLDER / name / f"forward_{kind}.safetensors")
    ids, mask, labels = (wanted[key].flatten(1) for key in ("input_ids", "attention_mask", "labels"))
    out = model(ids, attention_mask=mask, labels=labels)
    length, shape = model.config.block_length, wanted["logits_all"].shape
    logits = out.logits[:, length - 1 : -1].reshape(shape)
    compared = wanted["compare_mask"].bool()
    assert (logits - wanted["logits_all"])[compared].abs().max() < 1e-4
    assert abs(out.loss - wanted["loss"]) < 1e-5
    contexts = model.model(ids, attention_mask=mask).context_embeds
    torch.testing.assert_close(contexts, wanted["context_embeds"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "kind"), FORWARD, ids=lambda value: value)
def test_gradients(converted, name, kind):
    norms = description(name)["results"]["forward"][kind].get("grad_norms")
    if norms is None:
        pytest.skip("no gradients were printed")
    model, wanted = converted(name, "columns"), load_file(FOLDER / name / f"forward_{kind}.safetensors")
    ids, mask, labels = (wanted[key].flatten(1) for key in ("input_ids", "attention_mask", "labels"))
    model.zero_grad()
    model(ids, attention_mask=mask, labels=labels).loss.backward()
    ours = {key: float(weight.grad.norm()) for key, weight in model.named_parameters()}
    model.zero_grad()
    compared = 0
    for official, wanted_norm in norms.items():
        name = our_name(official, model.config.embedder_type)
        # A tied tensor has one gradient here and several, or none, under its official names.
        if name in ours and not (model.config.tie_word_embeddings and name.endswith(TIED)):
            assert ours[name] == pytest.approx(wanted_norm, rel=2e-3, abs=2e-5), official
            compared += 1
    assert compared >= len(ours) - 2


def until_stop(rows, start, stop):
    """Rows of ids up to the first stop id after the prompt."""
    rows = [row.tolist() for row in rows]
    ends = [
        next((i + 1 for i, token in enumerate(row) if i >= start and token == stop), len(row)) for row in rows
    ]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


@pytest.mark.parametrize("alignment", ["tokens", "columns"])
@pytest.mark.parametrize("name", GENERATING)
def test_greedy_tokens(converted, name, alignment):
    model, saved = converted(name, alignment), load_file(FOLDER / name / "generation.safetensors")
    results = description(name)["results"]["generation"]
    for case in sorted({key.split(".")[0] for key in saved}):
        plain, stop = case.removesuffix("_eos"), results[case]["stop_token_id"]
        if alignment == "tokens" and plain not in UNPADDED:
            continue
        ids, mask = saved[f"{case}.input_ids"], saved.get(f"{case}.attention_mask")
        options = {"max_length": results[case]["max_length"], "do_sample": False, "pad_token_id": 1}
        ours = model.generate(ids, attention_mask=mask, eos_token_id=stop, **options)
        wanted = saved.get(f"{case}.forward_greedy", saved.get(f"{case}.generate_posfix"))
        if stop is None:
            assert torch.equal(ours, wanted), case
        else:
            start = ids.shape[1]
            assert until_stop(ours, start, stop) == until_stop(wanted, start, stop), case


@pytest.mark.parametrize("path", sorted(FOLDER.glob("checkpoint_keys/*.json")), ids=lambda path: path.stem)
def test_released_checkpoints_fit(path, monkeypatch):
    """Every tensor of the released models has a place, and every place a tensor."""
    # Poisoned memory is real memory, which these models need not; torch remembers the patched constructors.
    monkeypatch.undo()
    torch.utils._device._device_constructors.cache_clear()
    listed = json.loads(path.read_text())
    shapes = {name: tuple(shape) for name, shape in listed["state_dict"].items()}
    config = config_from_shapes(shapes)
    assert (config.num_attention_heads, config.token_num_attention_heads) == (
        listed["block"]["heads"],
        listed["token"]["heads"],
    )
    with torch.device("meta"):
        model = BlockTransformerForCausalLM(config)
        converted = convert_state_dict({name: torch.empty(shape) for name, shape in shapes.items()})
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {name: tuple(tensor.shape) for name, tensor in converted.items()} == ours
    assert (
        sum(weight.numel() for weight in model.parameters()) == listed["params_without_unused_block_embed_in"]
    )


def vanilla_of_fixture(folder):
    fields = description("uptrain_b4_p2")["vanilla_config"]
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": fields["rotary_pct"]}
    config = GPTNeoXConfig(**{name: fields[name] for name in names}, rope_parameters=rope, eos_token_id=0)
    config.save_pretrained(folder)
    state = load_file(FOLDER / "uptrain_b4_p2" / "vanilla.safetensors")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return GPTNeoXForCausalLM.from_pretrained(folder)


def test_uptraining_starts_as_in_the_official_code(tmp_path):
    vanilla = vanilla_of_fixture(tmp_path / "vanilla")
    seen = []
    convert_from_vanilla(tmp_path / "vanilla", tmp_path / "block", progress=lambda *event: seen.append(event))
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "block").state_dict()
    state = load_file(FOLDER / "uptrain_b4_p2" / "model.safetensors")
    left = description("uptrain_b4_p2")["keys_left_at_random_or_default_init"]
    wanted = convert_state_dict({name: tensor for name, tensor in state.items() if name not in left})
    for name, tensor in wanted.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0, msg=name)
    # What the official code leaves at its first value starts as the vanilla model's norm, and as zeros.
    norm = vanilla.gpt_neox.final_layer_norm.weight
    assert torch.equal(ours["model.block_decoder.final_layer_norm.weight"], norm)
    assert not ours["model.token_decoder.expansion.bias"].any()
    assert seen[-1][0] == seen[-1][1] == len(seen)


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen3Config])
def test_uptraining_from_llama_types(tmp_path, config_class):
    torch.manual_seed(0)
    config = config_class(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        eos_token_id=3,
    )
    vanilla = AutoModelForCausalLM.from_config(config)
    vanilla.save_pretrained(tmp_path / "vanilla")
    ours = convert_from_vanilla(tmp_path / "vanilla", tmp_path / "block", block_length=4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "block")
    assert (ours.num_hidden_layers, ours.token_num_hidden_layers, ours.pad_token_id) == (2, 3, 3)
    assert model.lm_head.weight is model.model.token_decoder.embed_tokens.weight
    inner = vanilla.model.layers
    layers = [*model.model.block_decoder.layers, *model.model.token_decoder.decoder.layers]
    for own, old in zip(layers, inner, strict=True):
        for (name, ours_), theirs in zip(own.state_dict().items(), old.state_dict().values(), strict=True):
            assert torch.equal(ours_, theirs), name
    ids = torch.randint(0, 50, (2, 12))
    embeds = model.model.embedder(ids.view(2, 3, 4), None)[:, :, 0]
    torch.testing.assert_close(embeds, vanilla.model.embed_tokens(ids).view(2, 3, 4, 32).mean(dim=2))
    # Half of the layers on blocks, each prefix vector the context itself: the same layers, called by hand.
    contexts = model.model(ids).context_embeds[:, :, 0]
    assert torch.equal(model.model.token_decoder.expand(contexts[:, :1])[:, 0], contexts[:, 0])


def test_uptraining_refuses(tmp_path):
    from transformers import GPT2Config

    with pytest.raises(ValueError, match="must be one of gpt_neox"):
        config_from_vanilla(GPT2Config())
    with pytest.raises(ValueError, match="`block_layers`"):
        config_from_vanilla(LlamaConfig(num_hidden_layers=2), block_layers=2)
    # Old configurations of Llama have no pads, and say so with -1.
    assert config_from_vanilla(LlamaConfig(pad_token_id=-1, eos_token_id=[7, 2])).pad_token_id == 7
    windows = Qwen3Config(use_sliding_window=True, sliding_window=8, max_window_layers=0)
    with pytest.raises(ValueError, match="sliding-window"):
        config_from_vanilla(windows)


def test_conversion_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match="safetensors"):
        convert_checkpoint(tmp_path, tmp_path / "out")
    state = load_file(FOLDER / "main_b4_p2" / "model.safetensors")
    (tmp_path / "config.json").write_text((FOLDER / "main_b4_p2" / "config.json").read_text())
    lost = {name: tensor for name, tensor in state.items() if name != "token_decoder.embed_out.weight"}
    save_file(lost, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight: needs \(256, 64\), got None"):
        convert_checkpoint(tmp_path, tmp_path / "out")
    save_file(state | {"classifier.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"'classifier\.weight'"):
        convert_checkpoint(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("token_decoder", "config", "vocab_size", None), "without 'vocab_size'"),
        (("embedder", "cls", "bert"), "got 'bert'"),
        (("token_decoder", "config", "model_type", "llama"), "token decoder of type gpt_neox or t5"),
        (("block_decoder", "config", "model_type", "llama"), "block decoder of type gpt_neox"),
        (("block_decoder", "config", "rope_scaling", {"type": "linear", "factor": 2.0}), "`rope_scaling`"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_conversion_refuses_descriptions(tmp_path, changed, message):
    *path, name, value = changed
    described = part = description("main_b4_p2")
    for step in path:
        part = part[step]
    part[name] = value
    if value is None:
        del part[name]
    (tmp_path / "config.json").write_text(json.dumps(described))
    state = load_file(FOLDER / "main_b4_p2" / "model.safetensors")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path, tmp_path / "out")


def test_conversion_without_a_config(tmp_path):
    """Only the tensors, as the released checkpoints are: shapes and one argument say the rest."""
    save_file(load_file(FOLDER / "main_b4_p2" / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="`num_attention_heads`"):
        convert_checkpoint(tmp_path, tmp_path / "out")
    convert_checkpoint(tmp_path, tmp_path / "out", num_attention_heads=2, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    wanted = load_file(FOLDER / "main_b4_p2" / "forward_full.safetensors")
    logits = model.float()(wanted["input_ids"].flatten(1)).logits[:, 3:-1].reshape(wanted["logits_all"].shape)
    # The weights were rounded to 8 bits.
    assert (logits - wanted["logits_all"]).abs().mean() < 0.05
