"""`hf-longattn eval`: losses of one pass, the number found by a model that copies, errors by name."""

import json

import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from hf_longattn import BlockTransformerConfig, LightningConfig
from hf_longattn.cli import evaluate
from hf_longattn.cli.main import app


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with a tokenizer of characters, and a text."""
    root = tmp_path_factory.mktemp("model")
    letters = {chr(code): code - 31 for code in range(32, 127)} | {"?": 0, "\n": 96}
    plain = Tokenizer(models.WordLevel(letters, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="?").save_pretrained(root)
    tiny.build("llama").save_pretrained(root)
    (root / "book.txt").write_text("In the beginning was the word. " * 60)
    return root


def run(folder, *arguments):
    return CliRunner().invoke(app, ["eval", str(folder), *map(str, arguments)])


def test_losses_are_those_of_one_pass(folder):
    text = folder / "book.txt"
    result = run(folder, "--text", text, "--context", 200, "--windows", 2, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    tokens = torch.tensor(AutoTokenizer.from_pretrained(folder)(text.read_text()).input_ids)[:400]
    ids = tokens.view(2, 200)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1].double()
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    edges = [(row["start"], row["stop"]) for row in report["losses"]]
    assert edges == [(0, 16), (16, 32), (32, 64), (64, 128), (128, 199)] and report["windows"] == 2
    for row in report["losses"]:
        assert row["loss"] == pytest.approx(expected[:, row["start"] : row["stop"]].mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        LightningConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2),
        BlockTransformerConfig(
            vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, decoder_type="llama"
        ),
        tiny.CONFIGS["mistral-window"](),
    ],
    ids=lambda config: config.model_type,
)
def test_losses_do_not_depend_on_the_chunk(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="tree_attention").eval()
    ids = tiny.tokens(1, 61)
    whole = evaluate.token_losses(model, ids)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1]
    assert torch.allclose(
        whole, torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"), atol=2e-5
    )
    assert torch.allclose(evaluate.token_losses(model, ids, chunk_size=7), whole, atol=2e-5)


def test_the_number_stands_in_the_prompt_and_an_answer_counts(folder, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = torch.tensor(tokenizer((folder / "book.txt").read_text()).input_ids)
    for depth in (0.0, 0.5, 1.0):
        ids = evaluate.needle_prompt(tokenizer, text, 600, depth, 4213377)
        words = "".join(tokenizer.convert_ids_to_tokens(ids[0].tolist()))
        assert ids.shape == (1, 600) and words.count("4213377") == 1
        assert words.startswith(evaluate.TASK) and words.endswith(evaluate.QUESTION)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert evaluate.find_numbers(model, tokenizer, text, 600, 3) == evaluate.Retrieval(600, 0, 3)

    asked = []

    def copies(input_ids, **kwargs):
        asked.append(len(input_ids))
        rows = ["".join(tokenizer.convert_ids_to_tokens(row.tolist())) for row in input_ids]
        numbers = [words.split("long-context is: ")[1][:7] for words in rows]
        return torch.cat(
            [input_ids, torch.tensor([tokenizer(number).input_ids for number in numbers])], dim=1
        )

    monkeypatch.setattr(model, "generate", copies)
    monkeypatch.setattr(
        type(tokenizer), "decode", lambda self, ids: "".join(self.convert_ids_to_tokens(ids.tolist()))
    )
    assert evaluate.find_numbers(model, tokenizer, text, 600, 3) == evaluate.Retrieval(600, 3, 3)
    found = evaluate.find_numbers(model, tokenizer, text, 600, 5, batch_size=3)
    assert found == evaluate.Retrieval(600, 5, 5) and asked == [1, 1, 1, 3, 2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give `--context`, `--passkey`, `--cloze` or `--tasks`"),
        (["--context", 100], "`--text` must be a text file"),
        (["--context", 100000, "--text", "book.txt"], "`--context` must be at most the 1860 tokens"),
        (["--passkey", "10", "--text", "book.txt"], "`--passkey` must be"),
        (["--passkey", "1K"], "`--passkey` must be numbers of tokens"),
        (
            ["--context", 10, "--text", "book.txt", "--implementation", "flash"],
            "`--implementation` must be one of",
        ),
        (["--context", 10, "--text", "book.txt", "--dtype", "int8"], "`--dtype` must be one of"),
        (["--tasks", "arc_easy"], "pip install 'lm_eval>=0.4.9'"),
    ],
)
def test_what_cannot_be_done_is_named(folder, arguments, words, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    result = run(folder, *arguments)
    assert result.exit_code == 2 and words in result.stderr
