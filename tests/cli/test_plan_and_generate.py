"""`hf-longattn plan` and `generate`, from the command line down."""

import json
import os
import re
from pathlib import Path

import pytest
import tiny
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from hf_longattn import BlockTransformerConfig
from hf_longattn.cache import LongContextCache
from hf_longattn.cli.main import app
from hf_longattn.generation.clock import Hardware
from hf_longattn.generation.planning import plan_generation
from hf_longattn.generation.sizes import cache_bytes


@pytest.fixture
def folder(tmp_path):
    words = {"<unk>": 0, **{f"w{i}": i for i in range(1, 97)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<unk>").save_pretrained(tmp_path)
    tiny.build("llama").save_pretrained(tmp_path)
    return tmp_path


def run(*arguments, **kwargs):
    return CliRunner().invoke(app, [str(a) for a in arguments], **kwargs)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral-window"])
@pytest.mark.parametrize("tokens", [5, 40, 300])
def test_cache_bytes_are_those_of_the_cache(family, tokens):
    model = tiny.build(family, "tree_attention")
    cache = LongContextCache(model.config, capacity=tokens)
    with torch.no_grad():
        model(input_ids=tiny.tokens(1, min(tokens, 4)), past_key_values=cache)
    held = sum(b.numel() * b.element_size() for layer in cache.layers for b in (layer._keys, layer._values))
    assert held == cache_bytes(model.config, tokens, torch.float32)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_cache_bytes_count_the_scales_of_8_bits(family, dtype):
    model = tiny.build(family, "tree_attention")
    cache = LongContextCache(model.config, 300, dtype)
    with torch.no_grad():
        model(input_ids=tiny.tokens(1, 4), past_key_values=cache)
    buffers = [(layer._keys, layer._values, layer.scales._keys) for layer in cache.layers]
    held = sum(buffer.numel() * buffer.element_size() for layer in buffers for buffer in layer)
    assert held == cache_bytes(model.config, 300, cache.cache_dtype)
    config, tokens = model.config, 4096
    plans = [plan_generation(config, tokens, cache_dtype=kind) for kind in (None, cache.cache_dtype)]
    assert plans[1].cache == cache_bytes(config, tokens, cache.cache_dtype) < plans[0].cache
    assert plans[1].floor_a_token < plans[0].floor_a_token and plans[1].longest > plans[0].longest


def test_the_longest_context_just_fits():
    config = tiny.CONFIGS["llama"]()
    hardware = Hardware(memory=(1 << 30) + (1 << 25))
    longest = plan_generation(config, 4096, hardware=hardware, chunk=4096).longest
    assert plan_generation(config, longest, hardware=hardware, chunk=4096).fits
    assert not plan_generation(config, longest + 1, hardware=hardware, chunk=4096).fits


def test_weights_are_counted():
    model = tiny.build("llama")
    plan = plan_generation(model.config, 128, dtype=torch.float32)
    assert plan.weights == sum(p.numel() * 4 for p in model.parameters())


def test_plan_prints_and_tells_by_its_status(folder):
    assert run("plan", folder, "--context", 1000).exit_code == 0
    assert run("plan", folder / "config.json", "--context", 1000, "--new-tokens", 10).exit_code == 0
    result = run("plan", folder, "--context", 10**9, "--json")
    assert result.exit_code == 1
    fields = json.loads(result.stdout)
    assert fields["fits"] is False and 0 < fields["longest"] < 10**9
    assert run("plan", folder, "--context", 10, "--dtype", "int8").exit_code == 2
    assert run("plan", folder, "--context", 10, "--cache-dtype", "int4").exit_code == 2
    for option, value in (("--bandwidth", 0), ("--gpu-memory", -3), ("--gpu-memory", "nan")):
        refused = run("plan", folder, "--context", 10, option, value)
        assert refused.exit_code == 2 and f"`{option}` must be a positive number" in refused.stderr
    shared = [
        json.loads(run("plan", folder, "--context", 10**5, "--gpus", 2, "--json", *kind).stdout)["cache"]
        for kind in ((), ("--cache-dtype", "int8"))
    ]
    assert shared[1] < shared[0]
    eight = json.loads(run("plan", folder, "--context", 10**9, "--cache-dtype", "int8", "--json").stdout)
    assert eight["longest"] > fields["longest"]
    assert fields["offload"]["layers"] is None
    assert run("plan", folder / "nothing", "--context", 10).exit_code == 2


def test_plan_says_how_many_layers_must_wait_in_host_memory(tmp_path):
    tiny.CONFIGS["llama"](num_hidden_layers=12).save_pretrained(tmp_path)
    size = ["--context", 10**6, "--memory", 2]
    result = run("plan", tmp_path, *size)
    fields = json.loads(run("plan", tmp_path, *size, "--json").stdout)
    offload = fields["offload"]
    a_layer = fields["cache"] // 12
    # A reserve of 1 GiB, and two buffers on the GPU.
    over = fields["peak"] + (1 << 30) - (2 << 30)
    assert not fields["fits"] and offload["layers"] == -(-over // a_layer) + 2
    assert offload["host"] == offload["layers"] * a_layer
    assert f"{offload['layers']} of 12 make it fit" in " ".join(result.stdout.split())
    assert "50 GB/s of PCIe 5 x16, assumed" in " ".join(result.stdout.split())
    assert json.loads(run("plan", tmp_path, "--context", 1000, "--json").stdout)["offload"] is None


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (tf.PhimoeConfig(num_hidden_layers=1, num_local_experts=2), "cannot be prepared for training"),
        (BlockTransformerConfig(decoding_strategy="cross_attention"), "token decoder attends to vectors"),
        (BlockTransformerConfig(embedder_type="roberta"), "`embedder_type` must be 'lookup'"),
    ],
    ids=["phimoe", "block", "encoder"],
)
def test_what_is_not_trained_is_not_planned(tmp_path, config, words):
    config.save_pretrained(tmp_path)
    result = run("plan", tmp_path, "--train", "--context", 4000)
    assert result.exit_code == 2 and words in result.stderr


def test_plan_of_a_block_transformer(tmp_path):
    BlockTransformerConfig().save_pretrained(tmp_path)
    result = run("plan", tmp_path, "--context", 2048, "--new-tokens", 128)
    text = " ".join(result.stdout.split())
    assert result.exit_code == 0 and "values of blocks of 4" in text, text
    assert "at least" in text and "the mean of a block" in text
    fields = [
        json.loads(run("plan", tmp_path, "--context", 10**6, "--gpus", gpus, "--json").stdout)
        for gpus in (1, 2)
    ]
    assert fields[0]["cache"] > 1.7 * fields[1]["cache"] and fields[0]["block_length"] == 4
    assert fields[0]["offload"] is None and fields[0]["weights"] == fields[1]["weights"]
    beyond = json.loads(run("plan", tmp_path, "--context", 10**9, "--json").stdout)
    assert (beyond["fits"], beyond["offload"]) == (False, None)
    for options in (("--cache-dtype", "int8"), ("--gpus", 2, "--tp", 2)):
        result = run("plan", tmp_path, "--context", 2048, *options)
        assert result.exit_code == 2 and "Block Transformer" in " ".join(result.stderr.split())


def test_plan_says_what_does_not_grow_and_which_chunks_are_short(tmp_path, folder):
    tiny.build_lightning("model").config.save_pretrained(tmp_path / "states")
    text = " ".join(run("plan", tmp_path / "states", "--context", 4096).stdout.split())
    assert "lightning states" in text and "keys and values" not in text
    assert "any: nothing that is kept grows" in text and "written)" in text
    assert "lightning" not in run("plan", folder, "--context", 4096).stdout
    longest = json.loads(run("plan", folder, "--context", 4096, "--gpu-memory", 2, "--json").stdout)[
        "longest"
    ]
    text = " ".join(run("plan", folder, "--context", longest, "--gpu-memory", 2).stdout.split())
    assert "512 tokens, as memory is short" in text and " fit " in text
    assert "chunks" not in run("plan", folder, "--context", 4096).stdout
    assert "none" in run("plan", folder, "--context", 4096, "--gpu-memory", 1).stdout


def test_plan_of_a_training_step(folder, tmp_path):
    call = ("plan", folder, "--train", "--context", 4000, "--lora", 4)
    result = run(*call, "--json")
    fields = json.loads(result.stdout)
    assert result.exit_code == 0 and fields["fits"] and fields["optimizer"] == 2 * fields["gradients"]
    result = run(*call, "--gpu-memory", 0.5)
    assert result.exit_code == 1 and "to make it fit" in result.stdout
    # 136 numbers of 2 bytes a token and layer, all of them on the host; two of three layers keep them.
    small = ("plan", folder, "--train", "--context", 1_000_000, "--gpu-memory", 4, "--host-memory")
    fields = [json.loads(run(*small, host, "--json").stdout) for host in (0.77, 0.75, 0.5)]
    assert [(found["every"], found["fits"]) for found in fields] == [(1, True), (2, True), (2, False)]
    assert [found["host"] for found in fields] == [816_000_000, 544_000_000, 544_000_000]
    result = run(*small, 0.75)
    assert result.exit_code == 0 and "1 in 2" in result.stdout
    BlockTransformerConfig().save_pretrained(tmp_path)
    fields = json.loads(run("plan", tmp_path, "--train", "--context", 4000, "--json").stdout)
    assert fields["fits"] and fields["longest"] > 10_000 and fields["inputs"] > 0
    for option in (("--tp", 2, "--gpus", 2), ("--new-tokens", 3), ("--cache-dtype", "int8")):
        result = run(*call, *option)
        assert result.exit_code == 2 and "`--tp`" in result.stderr, option


@pytest.mark.parametrize(
    "options",
    [("--lora", 4), ("--host-memory", 9), ("--train", "--bandwidth", 9)],
    ids=lambda given: given[-2],
)
def test_options_of_the_other_plan_are_refused(folder, options):
    result = run("plan", folder, "--context", 1000, *options)
    assert result.exit_code == 2 and f"`{options[-2]}`" in result.stderr and "`--train`" in result.stderr


def test_plan_of_a_training_step_says_which_memory_it_takes(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = {"--gpu-memory": 40, "--host-memory": 9}
    for left_out in ((), ("--gpu-memory",), ("--host-memory",), tuple(given)):
        options = [word for name, size in given.items() if name not in left_out for word in (name, size)]
        said = run("plan", folder, "--train", "--context", 4000, *options).stderr
        assert tuple(name for name in given if name in said) == left_out
        assert "--bandwidth" not in said


def test_sizes_of_a_small_model_are_no_zeros(folder):
    for kind in ((), ("--train",)):
        table = run("plan", folder, "--context", 1000, *kind).stdout
        assert re.search(r"weights +│ 0\.\d*[1-9]\d* MiB", table), table


def test_generate_streams_the_answer_and_counts(folder):
    prompt = " ".join(f"w{i}" for i in tiny.tokens(1, 30)[0].tolist())
    (folder / "prompt.txt").write_text(prompt)
    result = run(
        "generate", folder, "--prompt-file", folder / "prompt.txt", "--new-tokens", 7, "--no-progress"
    )
    assert result.exit_code == 0, result.output
    model = tiny.build("llama")
    ids = torch.tensor([[int(word[1:]) for word in prompt.split()]])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=7, do_sample=False)
    assert result.stdout.split() == [f"w{i}" if i else "<unk>" for i in expected[0, 30:].tolist()]
    assert "30 tokens" in result.stderr and "7 tokens" in result.stderr
    for source in ((), ("--prompt-file", "-")):
        piped = run("generate", folder, *source, "--new-tokens", 7, "--no-progress", input=prompt)
        assert (piped.exit_code, piped.stdout) == (0, result.stdout)


def test_generate_on_a_cache_in_8_bits(folder, monkeypatch):
    made, real = [], LongContextCache.__init__
    monkeypatch.setattr(LongContextCache, "__init__", lambda self, *a: (real(self, *a), made.append(self))[0])
    arguments = ("generate", folder, "--new-tokens", 2, "--no-progress", "--cache-dtype")
    assert run(*arguments, "fp8", input="w1 w2 w3").exit_code == 0
    assert made[-1].cache_dtype == torch.float8_e4m3fn
    result = run(*arguments, "bf16", input="w1 w2 w3")
    assert result.exit_code == 2 and "`cache_dtype` must be" in result.stderr


def test_generate_refuses_in_one_line(folder):
    for arguments in (["--prompt-file", folder / "missing.txt"], []):
        result = run("generate", folder, *arguments, input="")
        assert result.exit_code == 2
        assert "`--prompt-file`" in result.stderr and len(result.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="pipes have no path here")
def test_generate_reads_a_pipe(folder):
    read, write = os.pipe()
    os.write(write, b"w1 w2 w3")
    os.close(write)
    result = run("generate", folder, "--prompt-file", f"/dev/fd/{read}", "--new-tokens", 2, "--no-progress")
    os.close(read)
    assert result.exit_code == 0 and "3 tokens" in result.stderr, result.stderr


def test_generate_puts_a_question_behind_the_text(folder):
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "w90 {{ messages[0]['content'] }} w91"
    arguments = ("generate", folder, "--new-tokens", 3, "--no-progress", "--offload-layers", 0)
    plain = run(*arguments, input="w1 w2 w3 w4")
    asked = run(*arguments, "--question", "w3 w4", input="w1 w2")
    assert plain.exit_code == 0 and (asked.stdout, "4 tokens" in asked.stderr) == (plain.stdout, True)
    refused = run(*arguments, "--chat", input="w1")
    assert refused.exit_code == 2 and "`--chat`" in refused.stderr
    tokenizer.save_pretrained(folder)
    framed = run(*arguments, "--no-chat", input="w90 w1 w2 w3 w4 w91")
    asked = run(*arguments, "--question", "w3 w4", input="w1 w2")
    assert (asked.stdout, "6 tokens" in asked.stderr) == (framed.stdout, True)
    assert "4 tokens" in run(*arguments, "--question", "w3 w4", "--no-chat", input="w1 w2").stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--offload-layers", "all"], "`offload_layers` must be"),
        (["--cache-dtype", "4"], "`cache_dtype` must be"),
    ],
)
def test_generate_refuses_an_option_before_it_loads(folder, options, words):
    result = run("generate", folder, "--no-progress", *options, input="w1")
    assert result.exit_code == 2 and words in result.stderr, result.stderr
    result = run("generate", folder / "gone", "--no-progress", input="w1")
    assert result.exit_code == 2 and "there is no folder" in result.stderr, result.stderr


def test_generate_says_in_one_line_that_memory_is_short(folder, monkeypatch):
    def short(*_, **__):
        raise torch.OutOfMemoryError("4 tokens do not fit.")

    monkeypatch.setattr(tf.LlamaForCausalLM, "generate", short)
    result = run("generate", folder, "--no-progress", input="w1")
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == 2 and len(lines) == 1, result.stderr
    assert lines[0].startswith("error: memory ran out") and "4 tokens do not fit" in lines[0]


def test_plan_says_what_the_model_was_made_for(folder):
    limit = tf.AutoConfig.from_pretrained(folder).max_position_embeddings
    assert f"{limit:,} positions" in run("plan", folder, "--context", limit + 1).stderr
    assert "positions" not in run("plan", folder, "--context", limit).stderr
    result = run("plan", folder / "gone", "--context", 8)
    assert result.exit_code == 2 and "there is no folder" in result.stderr, result.stderr


def test_generate_refuses_a_prompt_of_no_tokens(folder):
    Tokenizer(models.BPE()).save(str(folder / "tokenizer.json"))
    result = run("generate", folder, "--no-progress", input="hello")
    assert result.exit_code == 2 and "no tokens" in result.stderr, result.stderr


def test_convert_writes_a_model_that_loads_and_refuses_what_is_none(tmp_path):
    fixture = Path(__file__).parents[1] / "fixtures" / "block_transformer" / "main_b4_p2"
    result = run("convert", "block-transformer", fixture, tmp_path / "converted")
    assert result.exit_code == 0, result.output
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    assert model.config.model_type == "block_transformer" and model.config.block_length == 4
    assert run("convert", "block-transformer", tmp_path / "nothing", tmp_path / "again").exit_code == 2


def test_convert_lightning_refuses_what_is_none(tmp_path):
    result = run("convert", "lightning", tmp_path, tmp_path / "dst")
    assert result.exit_code == 2 and "`src`" in result.stderr


def test_convert_from_vanilla(folder, tmp_path):
    result = run("convert", "block-transformer", "--from-vanilla", folder, tmp_path / "started")
    assert result.exit_code == 0, result.output
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "started")
    assert model(input_ids=tiny.tokens(1, 9)).logits.shape == (1, 9, 97)
