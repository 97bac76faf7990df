"""The documentation against the code: snippets run, links lead somewhere, tables name what is refused."""

import ast
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import hf_longattn

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
CHECKPOINT = "HuggingFaceTB/SmolLM2-135M-Instruct"
REFUSING = ["attention", "masking.py", "generation", "cache", "instance.py"]
FACTS = {
    "gpu": "A GPU", "cuda": "12.8", "torch": "2.11.0", "triton": "3.6.0", "python": "3.12.0",
    "commit": "abc1234", "date": "2026-01-02T03:04:05+00:00",
}  # fmt: skip


def page_name(path):
    return str(path.relative_to(ROOT))


def blocks(path, heading=""):
    """The Python blocks of a page, from a heading on to the next of its rank."""
    text = path.read_text()
    if heading:
        text = text.split(f"\n{heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


pages = pytest.mark.parametrize("path", PAGES, ids=page_name)


@pages
def test_python_blocks_compile(path):
    for block in blocks(path):
        # A line of doctest is read as its source.
        compile(re.sub(r"^(>>>|\.\.\.) ?", "", block, flags=re.MULTILINE), page_name(path), "exec")


@pages
def test_links_to_files_resolve(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://", "#")):
            assert (path.parent / target.split("#")[0]).exists(), target


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a tiny random Llama and a tokenizer, to stand in for the real checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = ["The grass is green. The pass key is 71432. the sky is blue."]
    special = ["<pad>", "<end>"]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(words, trainer)
    fast = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    fast.save_pretrained(folder)
    config = tf.LlamaConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8192, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    tf.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def run_blocks(found, checkpoint, names):
    for block in found:
        exec(compile(block.replace(CHECKPOINT, str(checkpoint)), "snippet", "exec"), names)
    return names


def test_quick_start_is_short_and_runs(checkpoint, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    quick, kept = blocks(ROOT / "README.md", "## Quick start"), blocks(ROOT / "README.md", "## Long prompts")
    assert len(quick) == 1 and len(quick[0].splitlines()) <= 12
    assert CHECKPOINT in quick[0]
    names = run_blocks(quick, checkpoint, {})
    assert names["model"].config._attn_implementation == "tree_attention"
    assert names["output"].shape[1] == names["inputs"].input_ids.shape[1] + 8
    assert capsys.readouterr().out.strip()
    names = run_blocks(kept, checkpoint, names)
    assert names["three"].layers[0].batch_size == 3
    assert names["three"].get_seq_length() == names["inputs"].input_ids.shape[1]


def test_fine_tuning_runs_and_moves_the_weights(checkpoint, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = run_blocks(blocks(ROOT / "README.md", "## Fine-tuning"), checkpoint, {})
    assert names["model"].config._attn_implementation == "blockwise_attention"
    before = tf.AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    assert any(not torch.equal(before[name], tensor) for name, tensor in names["model"].state_dict().items())


def test_guide_to_long_prompts_runs(checkpoint, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = run_blocks(blocks(ROOT / "docs/guides/long_prompts.md"), checkpoint, {})
    # Every token but the last of the conversation has been through the model.
    assert names["cache"].get_seq_length() == names["conversation"].shape[1] - 1
    prompt = names["inputs"].input_ids
    assert names["document"].get_seq_length() == prompt.shape[1] and len(names["answers"]) == 3
    assert names["model"].config._attn_implementation.endswith("tree_attention")
    assert len(capsys.readouterr().out.splitlines()) >= 5


def refusals():
    """(exception, first name in backticks of its message) of every error that a user can cause."""
    files = [p for name in REFUSING for p in sorted((ROOT / "hf_longattn").glob(f"{name}/*.py"))]
    files += [ROOT / "hf_longattn" / name for name in REFUSING if name.endswith(".py")]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                parts = [n.value for n in ast.walk(node.exc) if isinstance(n, ast.Constant)]
                message = " ".join(part for part in parts if isinstance(part, str))
                name = re.search(r"`(\w+)", message)
                yield node.exc.func.id, name[1] if name else "", path.name


def test_every_refusal_is_documented():
    found = set(refusals())
    assert len(found) >= 15
    lines = (ROOT / "docs/reference/refused.md").read_text().splitlines()
    for error, name, file in sorted(found):
        assert any(error in line and name in line for line in lines), f"{file}: {error} about {name!r}"


def test_support_table_names_every_family_of_the_tests():
    text = (ROOT / "docs/reference/support.md").read_text()
    rows = re.findall(
        r"^\| ([^|]+) \|(?: [^|]+ \|){7}$", text.split("## `prepare_generation`")[0], re.MULTILINE
    )
    families = {
        re.sub(r"[^a-z0-9]", "", row.split("(")[0].lower().replace("windows", "window").replace("with", ""))
        for row in rows[1:]
    }
    assert {family.replace("-", "") for family in tiny.CAUSAL} == families - {""}


def test_every_operator_has_an_entry_in_the_reference():
    page = (ROOT / "docs/reference/operators.md").read_text()
    entries = set(re.findall(r"^::: [\w.]+\.(\w+)$", page, re.MULTILINE))
    operators = {path.parent.name for path in (ROOT / "hf_longattn/kernels").glob("*/api.py")}
    assert operators <= entries, f"add `::: kernels.NAME.api.NAME` for {sorted(operators - entries)}"


def test_every_public_name_has_an_entry_in_the_reference():
    pages = (ROOT / "docs/reference").glob("*.md")
    entries = {n for p in pages for n in re.findall(r"^::: [\w.]+\.(\w+)$", p.read_text(), re.MULTILINE)}
    assert set(hf_longattn.__all__) <= entries


def plot(root, *arguments):
    script = ROOT / "benchmarks" / "plot.py"
    command = [sys.executable, str(script), "--root", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_tables_and_figures_are_up_to_date():
    result = plot(ROOT, "--check")
    assert result.returncode == 0, result.stderr


def test_every_row_is_traced_to_its_run(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    tables = importlib.import_module("_tables")
    for path in (ROOT / "benchmarks/results").glob("*.json"):
        page = (ROOT / f"docs/benchmarks/{path.stem}.md").read_text()
        runs = dict.fromkeys(page.split("## How it was measured")[1].split("\n# commit ")[1:])
        for row in tables.load(path).rows:
            run, command = f"{row['commit']}, {row['date'][:10]}\n", tables.command_line(row["command"])
            assert any(text.startswith(run) and f"\n{command}\n" in text for text in runs), row
            assert tables.versions([row]) in page


def test_lengths_that_the_readme_calls_measured_were(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    load = importlib.import_module("_tables").load
    rows = [row for path in (ROOT / "benchmarks/results").glob("*.json") for row in load(path).rows]
    known = {row.get(field) for row in rows if "error" not in row for field in ("prompt", "tokens")}
    lengths = re.findall(r"\b\d{3},\d{3}\b", (ROOT / "README.md").read_text())
    assert len(lengths) >= 6 and {int(length.replace(",", "")) for length in lengths} <= known


def write_results(root):
    results = root / "benchmarks" / "results"
    results.mkdir(parents=True)
    shape = {"prompt": 8192, "batch": 1, "pad": 0, "layers": 32, "floor_ms": 5.0}
    rows = [
        {"peer": "prepared", **shape, "first_token_s": 0.25, "token_ms": 6.5, "peak_gib": 17.125},
        {"peer": "sdpa", **shape, "error": "CUDA out of memory"},
        {"peer": "prepared-fp8", **shape, "first_token_s": 0.5, "token_ms": 6.0, "peak_gib": 16.5},
        {
            "peer": "prepared",
            **shape,
            "prompt": 32768,
            "first_token_s": 1.5,
            "token_ms": 7.5,
            "peak_gib": 20.5,
        },
    ]
    rows[0]["same_tokens_as_first_peer"] = True
    facts = {**FACTS, "command": "bench_generation.py --lengths 8192"}
    (results / "generation.json").write_text(json.dumps([{**row, **facts} for row in rows]))
    other = {"machine": facts, "rows": [{"section": "forward", "case": "T8", "ms": 1.25}]}
    (results / "other.json").write_text(json.dumps(other))
    shutil.copy(ROOT / "README.md", root)


def test_plot_sets_the_ring_beside_ours(tmp_path):
    write_results(tmp_path)
    facts = {**FACTS, "command": "torchrun --nproc-per-node 2 bench_tree_prefill.py"}
    shape = {"prompt": 65536, "ranks": 2, "layers": 32, "new_tokens": 10, "tflop_a_rank": 700.0}
    measured = {"first_token_s": 2.0, "token_ms": 9.5, "peak_gib": 21.5, "extra_gib": 0.75}
    measured |= {"prompt_received_mib": 2048.0, "token_received_kib": 260.0}
    rows = [
        {"peer": "tree", **shape, **measured, "total_s": 2.5},
        {"peer": "tree", **shape, **measured, "prompt": 262144, "total_s": 9.5},
        {"peer": "ring", **shape, **measured, "total_s": 5.0},
        {"peer": "ring", **shape, "prompt": 131072, "error": "CUDA out of memory"},
    ]
    results = tmp_path / "benchmarks/results"
    (results / "tree_prefill.json").write_text(json.dumps([{**row, **facts} for row in rows]))
    generation = {"peer": "sdpa-tp", "prompt": 8192, "batch": 1, "layers": 32, "ranks": 2, "floor_ms": 5.0}
    generation |= {"first_token_s": 0.25, "token_ms": 6.5, "peak_gib": 9.5, **facts}
    (results / "two_gpus_tp.json").write_text(json.dumps([generation]))
    result = plot(tmp_path)
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "docs/benchmarks/tree_prefill.md").read_text()
    assert "| 64K | 2 | `prepare_generation` | 2 | 9.5 | 2.5 | 2 |" in page
    assert "| 64K | 2 | `prepare_generation` | 21.5 | 0.75 | 2,048 | 260 | 700 |  |" in page
    assert "| 128K | 2 | ring attention | out of memory |" in page
    assert "\ntorchrun --nproc-per-node 2 benchmarks/bench_tree_prefill.py\n" in page
    assert (tmp_path / "docs/images/tree_prefill.png").exists()
    page = (tmp_path / "docs/benchmarks/two_gpus_tp.md").read_text()
    cells = '| 8K | 1 | 0 | 2 | transformers, `sdpa`, `tp_plan="auto"` | 0.25 | 6.5 | 5 | 9.5 |'
    assert f"{cells} abc1234, 2026-01-02 |" in page
    assert plot(tmp_path, "--check").returncode == 0


def test_plot_makes_pages_and_tells_stale_ones(tmp_path):
    write_results(tmp_path)
    assert plot(tmp_path, "--check").returncode == 1
    result = plot(tmp_path)
    assert result.returncode == 0, result.stderr
    assert plot(tmp_path, "--check").returncode == 0
    page = (tmp_path / "docs/benchmarks/generation.md").read_text()
    assert "| 8K | 1 | 0 | `prepare_generation` | 0.25 | 6.5 | 5 | 17.1 |" in page
    assert "| 8K | 1 | 0 | transformers, `sdpa` | out of memory |  | 5 |  |" in page
    assert '| 8K | 1 | 0 | `prepare_generation(cache_dtype="fp8")` | 0.5 | 6 | 5 | 16.5 |' in page
    readme = (tmp_path / "README.md").read_text()
    for fact in ("A GPU", "torch 2.11.0", "Triton 3.6.0", "CUDA 12.8", "Python 3.12.0", "2026-01-02"):
        assert fact in page and fact in readme
    assert "](docs/benchmarks/generation.md#how-it-was-measured)" in readme
    command = "python benchmarks/bench_generation.py --lengths 8192"
    assert page.split("## How it was measured")[1].splitlines()[4:] == [
        "```bash", "# commit abc1234, 2026-01-02", command, "```"
    ]  # fmt: skip
    assert (
        "| tokens | ms |\n| --- | --- |\n| 8 | 1.25 |" in (tmp_path / "docs/benchmarks/other.md").read_text()
    )
    assert "- [Other](other.md)" in (tmp_path / "docs/benchmarks/index.md").read_text()
    rows = json.loads((tmp_path / "benchmarks/results/generation.json").read_text())
    rows[0]["token_ms"] = 7.0
    (tmp_path / "benchmarks/results/generation.json").write_text(json.dumps(rows))
    (tmp_path / "benchmarks/results/other.json").unlink()
    stale = plot(tmp_path, "--check")
    assert stale.returncode == 1
    for name in ("docs/benchmarks/generation.md", "docs/images/headline.png", "docs/benchmarks/other.md"):
        assert f"stale: {name}" in stale.stderr
    assert plot(tmp_path).returncode == 0
    assert plot(tmp_path, "--check").returncode == 0
    assert not (tmp_path / "docs/benchmarks/other.md").exists()


def test_what_is_said_of_tokens_is_what_the_rows_hold(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    generation, tables = importlib.import_module("_generation"), importlib.import_module("_tables")
    row = {"prompt": 8192, "batch": 1, "date": FACTS["date"], "first_token_s": 1.0}
    first, other = row | {"same_tokens_as_first_peer": True}, row | {"same_tokens_as_first_peer": False}
    later = {"date": "2026-01-03T03:04:05+00:00"}
    # A first row equals itself; of another run its first may not be there, and a row that differs tells.
    assert generation.agreement([first]) == generation.agreement([first, first | later]) == ""
    assert "in 1 of 1 comparisons" in generation.agreement([first, first])
    assert "random weights" not in generation.agreement([first, first])
    text = generation.agreement([first, other, other | later], "docs/benchmarks/")
    assert "in 0 of 2 comparisons" in text and "random weights" in text
    # With trained weights the tokens are equal, says that sentence.
    assert "tokens are equal: [the demo](docs/benchmarks/demo.md)" in text
    demo = tables.load(ROOT / "benchmarks/results/demo.json")
    assert len(demo.rows) > 1 and all(row["agree"] for row in demo.rows)
    for row in demo.rows:
        assert row["verdict"] == "greedy tokens equal those of sdpa"


@pytest.fixture
def made(monkeypatch, tmp_path):
    """The module that makes pages, and what it reads of some results."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    write_results(tmp_path)
    module = importlib.import_module("plot")
    return module, module.load(tmp_path / "benchmarks/results/generation.json")


def test_the_readme_has_the_rows_of_its_figure_alone(made, tmp_path):
    plot, result = made
    rows = [{**result.rows[0], "batch": 8, "token_ms": 77.5}, {**result.rows[0], "pad": 1, "token_ms": 88.5}]
    wanted = plot.texts(tmp_path, {"generation": plot.Result("generation", result.rows + rows)})
    page, readme = wanted[tmp_path / "docs/benchmarks/generation.md"], wanted[tmp_path / "README.md"]
    assert "| 8K | `prepare_generation` | 0.25 | 6.5 | 5 | 17.1 |" in readme
    for cell in ("| 77.5 |", "| 88.5 |"):
        assert cell in page and cell not in readme


def test_lone_points_are_no_figure(made, tmp_path):
    plot, result = made
    page = tmp_path / "docs/benchmarks/generation.md"
    line = {"generation": result}
    assert [figure.name for figure in plot.figures(line)] == ["headline", "generation"]
    assert "![Generation](../images/generation.png)" in plot.texts(tmp_path, line)[page]
    points = {"generation": result.where(prompt=8192)}
    assert not plot.figures(points) and "![" not in plot.texts(tmp_path, points)[page]
    assert (
        "| 8K | 1 | 0 | `prepare_generation` | 0.25 | 6.5 | 5 | 17.1 |" in plot.texts(tmp_path, points)[page]
    )


def test_rows_shown_as_they_are_speak_in_words(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    plain, tables = importlib.import_module("_plain"), importlib.import_module("_tables")
    other = {**FACTS, "commit": "def5678"}
    rows = [
        {
            "peer": "block",
            "prompt": 2048,
            "new": 128,
            "batch": 512,
            "prompt_s": 0.5,
            "capture_s": 3.0,
            **FACTS,
        },
        {
            "peer": "block",
            "prompt": 2048,
            "new": 128,
            "batch": 1,
            "error": "CUDA out of memory. 4 GiB",
            **other,
        },
        {"peer": "block", "prompt": 128, "new": 2048, "batch": 512, "prompt_s": 0.25, **FACTS},
    ]
    text = plain.plain_text(tables.Result("block_transformer", rows))
    run = "abc1234, 2026-01-02"
    assert text.split("\n\n")[-1].splitlines() == [
        "| set up by | prompt | new tokens | batch | prompt, s | run |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| `prepare_generation` | 128 | 2K | 512 | 0.25 | {run} |",
        "| `prepare_generation` | 2K | 128 | 1 | out of memory | def5678, 2026-01-02 |",
        f"| `prepare_generation` | 2K | 128 | 512 | 0.5 | {run} |",
    ]
    rows = [
        {"section": "check", "case": "B2-T64-D128", "dtype": "torch.bfloat16", "options": "['causal']"},
        {"section": "forward", "case": "B2-T16384-D64", "error": 0.25, "ms": 1.5},
        {"section": "forward", "case": "D64-forward", "ms": 2.5},
    ]
    text = plain.plain_text(tables.Result("lightning_attention", [row | FACTS for row in rows]))
    assert text.index("## Forward") < text.index("## Check")
    assert "| batch | tokens | head dim | dtype | set to False |" in text
    assert "| 2 | 64 | 128 | bf16 | causal |" in text
    assert "| 2 | 16K | 64 | 0.25 | 1.5 |  |" in text and "|  |  |  |  | 2.5 | D64-forward |" in text


def test_names_of_lengths_do_not_overlap(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    named = importlib.import_module("_figures").named
    lengths = [1024 * n for n in (2, 4, 16, 32, 64, 128, 400, 704, 2048)]
    assert named(lengths) == [length for length in lengths if length != 400 * 1024]
    assert named([4096]) == [4096]
    for first in (1, 3, 10):
        found = named(list(range(first, 100)))
        assert found[-1] == 99 and 5 <= len(found) <= 11
