"""The training recipes: they train on what they read, losses fall, and a resumed run is the same."""

import functools
import hashlib
import json
import lzma
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, TrainerState

from hf_longattn.cli.cloze import Answers

RECIPES = Path(__file__).parents[2] / "recipes"
sys.path.insert(0, str(RECIPES))

import _common  # noqa: E402
import _options  # noqa: E402
import _tiny  # noqa: E402
import linearize  # noqa: E402
import pretrain_lightning  # noqa: E402
import uptrain_block_transformer  # noqa: E402


def held_out_story():
    """Sentences to ask questions of, in a text whose hash holds it out."""
    for title in map(str, range(100)):
        lines = (f"Sentence {i} of story {title} goes down along the road to the harbour." for i in range(48))
        story = "\n".join(lines)
        if int.from_bytes(hashlib.sha256(story.encode()).digest()[:8], "big") % 4 == 0:
            return story


LAUNCH = ["-m", "accelerate.commands.launch", "--mixed_precision", "no", "--main_process_port", "0"]
LAUNCH += ["--config_file", str(RECIPES / "accelerate" / "two_gpus_ddp.yaml")]


def run(recipe, folder, *options, launcher=()):
    """Runs a recipe in its smoke mode and returns the rows of its result file."""
    text = folder.parent / "text"
    if not text.exists():
        # A resumed run needs the text of the first one, whatever becomes of the pages meanwhile.
        shutil.copytree(RECIPES.parent / "docs", text, ignore=shutil.ignore_patterns("*.png"))
        (text / "story.txt").write_text(held_out_story())
    options = ["--smoke", "--text", str(text), "--output_dir", str(folder), *options]
    command = [sys.executable, *launcher, str(RECIPES / f"{recipe}.py"), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(folder.parent / "home")}
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads((folder / f"{recipe}.json").read_text())


def curve(folder):
    rows = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    return {(r["step"], k): r[k] for r in rows for k in ("loss", "eval_loss", "learning_rate") if k in r}


def go_back(folder):
    """Leaves only the first checkpoint, as a run that was stopped behind it would."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    assert len(checkpoints) == 2
    shutil.rmtree(checkpoints[1])


def results(rows):
    return [row for row in rows if row["section"] == "result"]


# ---- text


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A folder with one document a kind of file, twenty small ones, and copies of those."""
    monkeypatch.setattr(_common.datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "text"
    folder.mkdir()
    documents = ["long\nlines\n" * 40, "packed", "a record", "another", "café ☕"]
    (folder / "a.txt").write_text(documents[0])
    with lzma.open(folder / "b.txt.xz", "wt") as file:
        file.write(documents[1])
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents[2:4])
    (folder / "c.jsonl").write_text(lines)
    (folder / "d.md").write_text(documents[4])
    (folder / "e.bin").write_text("left out")
    for index in range(20):
        for copy in "xy":
            (folder / f"f{copy}{index}.py").write_text(f"pass  # {index}")
    return folder, documents + [f"pass  # {index}" for index in range(20)]


def split(tokens, tokenizer):
    """The documents of a run of tokens; the end token stands behind each."""
    ends = np.flatnonzero(tokens == tokenizer.eos_token_id)
    assert ends[-1] == len(tokens) - 1
    starts = [0, *(ends[:-1] + 1)]
    return [tokenizer.decode(tokens[a:b].tolist()) for a, b in zip(starts, ends, strict=True)]


def test_every_document_is_kept_whole_on_one_side(corpus, monkeypatch):
    folder, documents = corpus
    monkeypatch.setattr(_common, "PART", 50)
    assert len(list(_common.parts_of(documents[0]))) > 5
    tokenizer = _tiny.byte_tokenizer()
    text = _common.Text(text=[str(folder)], held_out=3)
    tokens = _common.tokens_of(text, tokenizer)
    kept, held_out = split(tokens[False], tokenizer), split(tokens[True], tokenizer)
    assert not set(kept) & set(held_out)
    assert set(kept) | set(held_out) == set(documents)
    assert sorted(kept + held_out) == sorted(documents + documents[5:])
    assert tokens[False].dtype == np.int32 and len(held_out) > 3


def test_text_is_tokenised_once_and_again_when_a_file_changes(corpus, monkeypatch):
    folder, _ = corpus
    text, tokenizer = _common.Text(text=[str(folder)], held_out=3), _tiny.byte_tokenizer()
    first = _common.tokens_of(text, tokenizer)

    def fail(*args, **kwargs):
        raise AssertionError("tokenised again")

    with monkeypatch.context() as patch:
        patch.setattr(_common, "tokenise", fail)
        second = _common.tokens_of(text, _tiny.byte_tokenizer())
    assert all(np.array_equal(first[side], second[side]) for side in first)
    (folder / "a.txt").write_text("changed")
    assert sum(map(len, _common.tokens_of(text, tokenizer).values())) < sum(map(len, first.values()))


def test_rows_hold_every_token_once_in_one_order_for_a_seed(corpus):
    folder, _ = corpus
    text = _common.Text(text=[str(folder)], held_out=3, length=16, eval_rows=2)
    data, same, other = (
        _common.load_rows(text, _tiny.byte_tokenizer(), seed, unscored=2) for seed in (1, 1, 2)
    )
    assert np.array_equal(data.train.order, same.train.order)
    assert not np.array_equal(data.train.order, other.train.order)
    rows = [data.train[i] for i in range(len(data.train))]
    by_place = [rows[i] for i in np.argsort(data.train.order)]
    ids = torch.cat([row["input_ids"] for row in by_place])[: data.num_tokens]
    assert np.array_equal(ids.numpy(), data.train.tokens)
    tail = data.num_tokens % 16
    assert tail and (by_place[-1]["labels"][tail:] == -100).all()
    for row in by_place[:-1]:
        assert (row["labels"][:2] == -100).all() and torch.equal(row["labels"][2:], row["input_ids"][2:])
    later = data.after(3).train
    assert torch.equal(later[0]["input_ids"], rows[3]["input_ids"])
    assert torch.equal(later[len(rows) - 1]["input_ids"], rows[2]["input_ids"])


def test_too_little_text_is_told(corpus):
    folder, _ = corpus
    with pytest.raises(SystemExit, match="too little text"):
        _common.load_rows(_common.Text(text=[str(folder)], length=4096), _tiny.byte_tokenizer(), 0)
    with pytest.raises(SystemExit, match="names no file"):
        _common.find_files(_common.Text(text=[str(folder)], suffixes=[".none"]))


# ---- parts of the recipes


def llama(**changes):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(**{"vocab_size": 64, "num_key_value_heads": 2, **shape, **changes})
    return AutoModelForCausalLM.from_config(config)


def test_transfer_compares_with_softmax_on_the_same_states():
    teacher = llama()
    config = teacher.config
    config.lightning_layers = [0, 2]
    ids, own = torch.arange(40)[None] % 64, [*teacher.parameters()]
    expected = teacher(ids).logits
    module = linearize.AttentionTransfer(teacher, config)
    assert [*module.students] == ["0", "2"]
    assert {name.split(".")[1] for name in module.state_dict()} == {"0", "2"}
    before = module(ids)["loss"]
    module.match_norms(ids)
    after = module(ids)["loss"]
    assert after < before and after < 4
    after.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    assert all(p.grad is None for p in own)
    assert torch.equal(teacher(ids).logits, expected)
    # A copy that is still softmax has nothing to learn.
    fresh = linearize.AttentionTransfer(llama(), config)
    for student in fresh.students.values():
        student.config._attn_implementation = "sdpa"
    assert fresh(ids)["loss"] < 1e-10


def test_distillation_adds_nothing_where_the_teacher_is_the_model(tmp_path):
    model = llama()
    other = llama(initializer_range=0.3)
    ids = torch.arange(32).view(2, 16)
    inputs = {"input_ids": ids, "labels": ids}
    plain = model(**inputs).loss.detach()
    training = _common.Training(
        str(tmp_path), use_cpu=True, bf16=False, eval_strategy="no", eval_on_start=False
    )
    losses = []
    for teacher in (model, other):
        trainer = linearize.distilling(teacher.eval(), 2.0)(model, training)
        losses.append(trainer.compute_loss(model.train(), dict(inputs)).detach())
    with torch.no_grad():
        ours, theirs = (m(ids).logits.double().log_softmax(-1) for m in (model, other))
    expected = 2 * (theirs.exp() * (theirs - ours)).sum(-1).mean()
    torch.testing.assert_close(losses[0], plain)
    torch.testing.assert_close((losses[1] - plain).double(), expected, rtol=1e-5, atol=1e-5)


class Vocabulary:
    """Stands in for SmolLM2's tokenizer."""

    bos_token_id, eos_token_id = 1, 2

    def __len__(self):
        return 49152


@pytest.mark.parametrize("name", ["30M", "85M"])
def test_pairs_are_of_equal_size_or_compute(name):
    with torch.device("meta"):
        sizes = [
            pretrain_lightning.build(
                kind, pretrain_lightning.PRESETS[name], Vocabulary(), 2048
            ).num_parameters()
            for kind in ("lightning", "llama")
        ]
        work = []
        for keep in (True, False):
            recipe = uptrain_block_transformer.Recipe(preset=name, keep_vanilla=keep)
            model = uptrain_block_transformer.build(recipe, RECIPES, 49152, 2048)
            work.append(_common.flops_a_token(model, uptrain_block_transformer.shares(model.config)))
    assert abs(sizes[0] / sizes[1] - 1) < 0.001
    assert abs(sizes[0] / (1e6 * int(name[:-1])) - 1) < 0.03
    assert abs(work[1] / work[0] - 1) < 0.01


def test_held_out_documents_are_asked_apart(monkeypatch):
    tokenizer, seen = _tiny.byte_tokenizer(), []
    words = ["One document. It ends.", "Another one."]
    tokens = np.concatenate([tokenizer(text).input_ids + [tokenizer.eos_token_id] for text in words])
    rows = _common.Rows(tokens, 8)

    def answer(model, tokenizer, documents, questions):
        seen.extend(documents)
        return [Answers("last word", questions, 1, 0.0)]

    monkeypatch.setattr(_common, "answer_cloze", answer)
    data = _common.Data(rows, rows, len(tokens))
    assert _common.zero_shot(llama(), tokenizer, data, 4) == {"last_word": 0.25, "last_word_asked": 4}
    assert [text for text in seen if text] == words
    assert _common.zero_shot(llama(), tokenizer, data, 0) == {}


def test_autocast_ends_with_the_training():
    # The first of a process says for all of it in what dtype they compute.
    AcceleratorState._reset_state(reset_partial_state=True)
    model = llama()
    with _common.own_forward(model):
        Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
        rounded = model(torch.arange(8)[None]).logits
    AcceleratorState._reset_state(reset_partial_state=True)
    assert "forward" not in vars(model) and not torch.equal(model(torch.arange(8)[None]).logits, rounded)


def test_a_curve_goes_on_where_the_checkpoint_was(tmp_path):
    path, state = tmp_path / "curve.jsonl", TrainerState(is_world_process_zero=True)
    first = _common.Curve(path, 10, 5)
    first.on_train_begin(None, state, None)
    for state.global_step in (0, 1, 2):
        first.on_log(None, state, None, {"eval_loss": 3.0 - state.global_step})
    state.global_step = 1
    second = _common.Curve(path, 10, 5)
    second.on_train_begin(None, state, None)
    assert second.points() == {5: 3.0, 15: 2.0} and _common.read_curve(path) == second.rows
    # Another process keeps the lines and writes none.
    state.is_world_process_zero, state.global_step = False, 2
    second.on_log(None, state, None, {"eval_loss": 1.0})
    assert second.points()[25] == 1.0 and len(_common.read_curve(path)) == 2
    # Twice as many processes: the checkpoint's one step would count as two, and rows be left out.
    with pytest.raises(SystemExit, match="step 1 was at 15 tokens and would now be at 25; .* processes"):
        _common.Curve(path, 20, 5).on_train_begin(None, state, None)


def test_operations_a_token_of_a_llama_are_six_a_weight():
    model = llama(tie_word_embeddings=False)
    weights = sum(p.numel() for n, p in model.named_parameters() if "embed_tokens" not in n)
    assert _common.flops_a_token(model) == 6 * weights


# ---- options


def options(monkeypatch, folder, *given):
    monkeypatch.setattr(sys, "argv", ["recipe", "--output_dir", str(folder), *given])
    return _options.parse_training(pretrain_lightning.Recipe)


def test_a_smoke_run_is_on_the_cpu_before_trainer_looks_for_processes(tmp_path, monkeypatch):
    seen = []
    look = _options.Training._setup_devices.func

    def note(self):
        seen.append((self.use_cpu, self.bf16))
        return look(self)

    monkeypatch.setattr(_options.torch.cuda, "is_available", lambda: False)
    patched = functools.cached_property(note)
    patched.__set_name__(_options.Training, "_setup_devices")
    monkeypatch.setattr(_options.Training, "_setup_devices", patched)
    _, text, training = options(monkeypatch, tmp_path, "--smoke", "--bf16", "true")
    assert text.smoke and seen == [(True, False)] and training.mixed_precision == "no"


@pytest.mark.parametrize("given", [(), ("--bf16", "true"), ("--smoke",)], ids=str)
def test_the_precision_of_the_launcher_is_that_of_the_recipe(tmp_path, monkeypatch, given):
    # DeepSpeed refuses settings that differ, and the loss before training is taken by them.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setattr(_options.torch.cuda, "is_available", lambda: False)
    training = options(monkeypatch, tmp_path, "--use_cpu", *given)[2]
    assert training.mixed_precision == "bf16" and training.bf16


def test_a_given_learning_rate_is_told_from_none(tmp_path, monkeypatch):
    assert options(monkeypatch, tmp_path, "--use_cpu")[2].learning_rate is None
    assert options(monkeypatch, tmp_path, "--use_cpu", "--learning_rate", "3e-4")[2].learning_rate == 3e-4


def test_what_would_not_train_whole_models_in_step_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(_options.Training, "n_gpu", 2)
    with pytest.raises(SystemExit, match="CUDA_VISIBLE_DEVICES=0"):
        options(monkeypatch, tmp_path, "--use_cpu")
    monkeypatch.setattr(_options.Training, "n_gpu", 0)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(SystemExit, match="two_gpus_ddp.yaml"):
        options(monkeypatch, tmp_path, "--use_cpu")
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    # As a launcher leaves it where Trainer, on a machine without a GPU, does not look for the others.
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="would train apart"):
        options(monkeypatch, tmp_path)


# ---- the recipes


def gradients(model, ids):
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def hybrid(layers):
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = LlamaConfig(**shape, num_hidden_layers=layers, use_cache=False)
    config.lightning_layers = [i for i in range(layers) if i % 3]
    model = AutoModelForCausalLM.from_config(config, attn_implementation="lightning_attention")
    return model.train()


def test_compiled_layers_share_programs_and_leave_the_model_as_it_was():
    ids, programs = torch.randint(64, (2, 24)), []
    for layers in (3, 6):
        torch.compiler.reset()
        counters = torch._dynamo.utils.counters
        counters.clear()
        model = hybrid(layers)
        plain = gradients(model, ids)
        with _common.compiled_layers(model, backend="aot_eager"):
            compiled = gradients(model, ids)
        programs.append(counters["stats"]["unique_graphs"])
        # Sums of 1e3 fp32 terms in another order.
        assert (compiled - plain).norm() <= 1e3 * torch.finfo(torch.float32).eps * plain.norm()
        assert torch.equal(gradients(model, ids), plain)
        assert counters["stats"]["unique_graphs"] == programs[-1]
    # The parts of a layer around attention, and the loss.
    assert programs[0] == programs[1] <= 6


def test_attention_transfer_runs_in_compiled_layers(monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    ids, model = torch.randint(64, (2, 24)), hybrid(6)
    model.set_attn_implementation("sdpa")
    module = linearize.AttentionTransfer(model, model.config)

    def step():
        module.zero_grad()
        loss = module(ids)["loss"]
        loss.backward()
        return torch.cat([loss.detach()[None], *(p.grad.flatten() for p in module.parameters())])

    plain = step()
    with _common.compiled_layers(model, backend="aot_eager"):
        compiled = step()
        # Of four layers with a copy, cut around lightning attention, and of two without.
        assert 0 < counters["stats"]["unique_graphs"] <= 8
        with torch.no_grad():
            module(ids[:1])
    assert (compiled - plain).norm() <= 1e3 * torch.finfo(torch.float32).eps * plain.norm()
    # The second stage makes programs of the same code anew.
    model = hybrid(3)
    with _common.compiled_layers(model, backend="aot_eager"):
        gradients(model, ids)


@pytest.mark.slow
def test_linearize_falls_reloads_resumes_bit_by_bit_and_trains_alike_on_two_processes(tmp_path):
    whole, again, shared = (tmp_path / name for name in ("whole", "again", "shared"))
    common = ("--softmax_every", "4", "--distill", "0.5", "--save_total_limit", "2")
    (row,) = results(run("linearize", whole, *common))
    assert row["run"] == "hybrid, softmax every 4" and row["processes"] == 1
    assert row["transfer_after"] < 0.8 * row["transfer_before"]
    assert row["loss"] < row["loss_before"] - 1
    assert row["tokens"] == 40 * 8 * 64 and row["transfer_tokens"] == row["tokens"] // 2
    config = json.loads((whole / "config.json").read_text())
    assert config["lightning_layers"] == [0, 1, 2]
    assert (whole / "model" / "curve.png").exists() or not _common.importlib.util.find_spec("matplotlib")
    shutil.copytree(whole, again)
    go_back(again / "model")
    (again / "model.safetensors").unlink()
    run("linearize", again, *common, "--resume")
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, again))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert curve(whole / "model") == curve(again / "model")
    rows = run("linearize", shared, *common, "--per_device_train_batch_size", "4", launcher=LAUNCH)
    assert results(rows)[0]["processes"] == 2 and results(rows)[0]["tokens"] == row["tokens"]
    for stage in ("transfer", "model"):
        expected, found = curve(whole / stage), curve(shared / stage)
        # Sums in another order, through twenty steps of AdamW.
        assert found == pytest.approx(expected, rel=1e-4) and len(expected) > 8


@pytest.mark.slow
def test_linearize_baseline_trains_on_the_same_tokens(tmp_path):
    (row,) = results(run("linearize", tmp_path / "out", "--keep_softmax", "--from_scratch"))
    assert row["run"] == "softmax, from scratch"
    assert row["tokens"] == 40 * 8 * 64 and "transfer_tokens" not in row
    assert row["loss"] < row["loss_before"] - 1


@pytest.mark.slow
def test_pretraining_falls_for_both_models(tmp_path):
    rows = results(run("pretrain_lightning", tmp_path / "out"))
    assert [row["run"] for row in rows] == ["lightning, smoke", "llama, smoke"]
    for row in rows:
        assert row["loss"] < row["loss_before"] - 1
        assert row["next_sentence_asked"] == 4 and 0 <= row["next_sentence"] <= 1
    assert abs(rows[0]["parameters"] / rows[1]["parameters"] - 1) < 0.01
    assert rows[0]["tokens"] == rows[1]["tokens"]


@pytest.mark.slow
def test_uptraining_falls_and_resumes_bit_by_bit(tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    (row,) = results(run("uptrain_block_transformer", whole, "--save_total_limit", "2"))
    assert row["run"] == "block, from vanilla" and row["generated_per_s"] > 0
    assert row["next_sentence_asked"] == 4 and 0 <= row["next_sentence"] <= 1
    assert row["loss"] < row["loss_before"] - 1
    shutil.copytree(whole, again)
    go_back(again / "model")
    (again / "model.safetensors").unlink()
    run("uptrain_block_transformer", again, "--save_total_limit", "2", "--resume")
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, again))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert curve(whole / "model") == curve(again / "model")


@pytest.mark.slow
def test_block_presets_fall(tmp_path):
    (row,) = results(run("uptrain_block_transformer", tmp_path / "out", "--preset", "smoke"))
    assert row["run"] == "block, smoke from scratch" and "untrained_vanilla_loss" not in row
    assert row["loss"] < row["loss_before"] - 1
