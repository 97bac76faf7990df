"""Zero-shot questions: they are made of the text, and a model whose answers are known gets what it earns."""

import json
from types import SimpleNamespace

import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from hf_longattn import BlockTransformerConfig
from hf_longattn.cli import cloze
from hf_longattn.cli.main import app


def document(count=48, last="harbour"):
    """Sentences that all differ; every passage of four is followed by one that ends in `last`."""
    lines = [
        f"Mr. Grey {i} sees how w{i} of St. Ives goes along the road to the old {last}." for i in range(count)
    ]
    return "\n".join(lines)


def words_tokenizer(texts):
    """A token a word or a mark; the space before a word is part of none."""
    plain = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    found = sorted({word for text in texts for word, _ in plain.pre_tokenizer.pre_tokenize_str(text)})
    plain.model = models.WordLevel({word: i for i, word in enumerate(["?", *found])}, unk_token="?")
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="?")


class Bigrams(torch.nn.Module):
    """Logits that depend on the last token alone, from a table."""

    device = torch.device("cpu")

    def __init__(self, size):
        super().__init__()
        self.table = torch.zeros(size, size)
        self.batches = []

    def forward(self, input_ids, attention_mask, use_cache):
        self.batches.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=self.table[input_ids])


def test_sentences_end_where_they_end():
    text = 'Mr. A. Bennet came.  "Is it so?" she said to\nDr. Who. It was 3.5 miles! He left (at last.) Then'
    expected = ["Mr. A. Bennet came.", '"Is it so?"', "she said to Dr. Who.", "It was 3.5 miles!"]
    found = cloze.sentences(text.replace("she", "She"))
    assert found == [*expected[:2], "She said to Dr. Who.", expected[3], "He left (at last.)"]


def test_passages_do_not_overlap_and_stand_in_the_text():
    text = " ".join(document().split())
    pairs = list(cloze.passages(document()))
    assert len(pairs) >= 8
    at = 0
    for passage, sentence in pairs:
        assert len(passage.split()) >= 50 and f"{passage} {sentence}" in text[at:]
        at = text.index(f"{passage} {sentence}") + len(passage) + len(sentence)


def test_wrong_sentences_are_right_elsewhere():
    texts = [document(), document(last="garden"), "Too short. For any question."]
    questions = cloze.ask_next_sentences(texts)
    offered = [choice for question in questions for choice in question.choices]
    for question in questions:
        assert len(set(question.choices)) == 4
        home = next(text for text in texts if question.context in " ".join(text.split()))
        assert all(choice.strip() in home for choice in question.choices)
    # No sentence is more often right than another that is offered as often.
    assert {offered.count(choice) for choice in offered} == {4}
    assert sorted(question.choices[0] for question in questions) == sorted(set(offered))


def test_a_last_word_stood_in_the_passage_and_is_cut_off():
    questions = cloze.ask_last_words([document()])
    assert len(questions) == len(list(cloze.passages(document())))
    for question in questions:
        assert question.choices == (" harbour",) and question.context.endswith("the old")
        assert "harbour" in question.context
    alone = document().split("\n")
    alone[-1] = alone[-1].replace("harbour", "zeppelin")
    words = cloze.ask_last_words([" ".join(alone)])
    assert all(question.choices != (" zeppelin",) for question in words)
    assert cloze.ask_last_words([document(last="sea")]) == []


def test_questions_are_spread_over_the_text():
    questions = [cloze.Question(str(i), ()) for i in range(100)]
    assert [q.context for q in cloze.spread(questions, 4)] == ["0", "25", "50", "75"]
    assert cloze.spread(questions, 1000) == questions and cloze.spread([], 5) == []


@pytest.fixture
def text_and_tokenizer():
    text = document()
    return text, words_tokenizer([text])


def test_a_table_of_bigrams_gets_what_it_knows(text_and_tokenizer):
    text, tokenizer = text_and_tokenizer
    model = Bigrams(len(tokenizer))
    old, harbour, road = (tokenizer.convert_tokens_to_ids(word) for word in ("old", "harbour", "road"))
    asked = len(cloze.ask_last_words([text]))
    model.table[old, harbour] = 1.0
    words, _ = cloze.answer_cloze(model, tokenizer, [text])
    assert words == cloze.Answers("last word", asked, asked, 0.0) and words.accuracy == 1.0
    # Something else is likelier by a hair.
    model.table[old, road] = 1.001
    assert cloze.answer_cloze(model, tokenizer, [text])[0].right == 0


class Counting(Bigrams):
    """Expects the number behind a name to be that of the last sentence and `step`."""

    def __init__(self, tokenizer, step):
        super().__init__(len(tokenizer))
        self.words, self.step = tokenizer.convert_ids_to_tokens(range(len(tokenizer))), step
        self.ids = {word: index for index, word in enumerate(self.words)}

    def forward(self, input_ids, attention_mask, use_cache):
        logits = super().forward(input_ids, attention_mask, use_cache).logits
        for row, ids in zip(logits, input_ids.tolist(), strict=True):
            last = None
            for at, word in enumerate(self.words[token] for token in ids):
                last = int(word) if word.isdecimal() else last
                if word == "Grey" and last is not None:
                    row[at, self.ids.get(str((last + self.step) % 48), 0)] = 9.0
        return SimpleNamespace(logits=logits)


def test_the_likeliest_sentence_is_taken(text_and_tokenizer):
    text, tokenizer = text_and_tokenizer
    asked = len(cloze.ask_next_sentences([text]))
    assert asked >= 8
    model = Counting(tokenizer, 1)
    assert cloze.answer_cloze(model, tokenizer, [text])[1] == cloze.Answers(
        "next sentence", asked, asked, 0.25
    )
    assert cloze.answer_cloze(model, tokenizer, [text], questions=5, batch_size=3)[1].right == 5
    # The sentence behind the next passage is expected: it is offered as a wrong one.
    wrong = Counting(tokenizer, 1 + 48 // asked * (asked // 4))
    assert cloze.answer_cloze(wrong, tokenizer, [text])[1].right == 0


def test_likelihoods_are_held_against_bytes_and_ties_are_wrong():
    text = document()
    for number in range(0, 48, 3):
        text = text.replace(f"w{number} ", f"w{number} " + "immeasurably " * (number % 7))
    tokenizer = words_tokenizer([text])
    model = Bigrams(len(tokenizer))
    questions = cloze.ask_next_sentences([text])
    # A token costs the same everywhere: nats a byte are tokens a byte.
    found = cloze.answer_cloze(model, tokenizer, [text])[1]
    expected = 0
    for question in questions:
        costs = [cloze.encode(tokenizer, question.context, c)[1] / len(c.encode()) for c in question.choices]
        expected += costs[0] < min(costs[1:])
    assert found.right == expected and 0 < expected < len(questions)


def small(name):
    if name != "block":
        return tiny.build_lightning(name) if name == "model" else tiny.build(name)
    config = BlockTransformerConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, decoder_type="llama"
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@pytest.mark.parametrize("name", ["llama", "gpt2", "model", "block"])
def test_a_batch_scores_as_each_row_alone(name):
    """Absolute positions, states and blocks would all move with padding on the left."""
    model = small(name)
    lengths, ends = (31, 12, 40, 23, 17), (3, 1, 9, 2, 5)
    rows = [(tiny.tokens(1, n, seed=n)[0].tolist(), end) for n, end in zip(lengths, ends, strict=True)]
    likelihoods, greedy = cloze.score(model, rows, batch_size=3)
    for (ids, count), found in zip(rows, likelihoods, strict=True):
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
        expected = scores.gather(1, torch.tensor(ids[1:])[:, None])[-count:].sum().item()
        assert found == pytest.approx(expected, rel=1e-5)
        likeliest = scores[-1].argmax().item()
        row = [([*ids[:-1], token], 1) for token in (likeliest, (likeliest + 1) % 97)]
        assert cloze.score(model, row)[1] == [True, False]
    assert greedy == cloze.score(model, rows, batch_size=1)[1]


def test_the_start_token_is_given_where_the_tokenizer_gives_it(text_and_tokenizer):
    _, tokenizer = text_and_tokenizer
    plain = cloze.encode(tokenizer, "the old", " harbour")
    assert plain[1] == 1 and len(plain[0]) == 3

    class Starting:
        bos_token_id = 7

        def __call__(self, text, add_special_tokens=True):
            return SimpleNamespace(input_ids=[7] * add_special_tokens + tokenizer(text).input_ids)

    assert cloze.encode(Starting(), "the old", " harbour") == ([7, *plain[0]], 1)


def test_eval_answers_in_json_and_refuses_what_asks_nothing(tmp_path):
    words_tokenizer([document()]).save_pretrained(tmp_path)
    config = tiny.CONFIGS["llama"](vocab_size=len(words_tokenizer([document()])))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    (tmp_path / "book.txt").write_text(document())
    (tmp_path / "list.txt").write_text("one\ntwo\nthree")

    def run(name, *more):
        arguments = ["eval", str(tmp_path), "--cloze", str(tmp_path / name), "--device", "cpu", *more]
        return CliRunner().invoke(app, arguments)

    first, again = (run("book.txt", "--questions", "3", "--json") for _ in range(2))
    assert first.exit_code == 0 and first.stdout == again.stdout, first.output
    rows = json.loads(first.stdout)["cloze"]
    assert [(row["task"], row["asked"]) for row in rows] == [("last word", 3), ("next sentence", 3)]
    shown = run("book.txt", "--questions", "3").stdout
    assert "next sentence" in shown and f"{rows[1]['right']} of 3" in shown
    for name, words in (("list.txt", "four passages of 50 words"), ("none.txt", "must be a text file")):
        result = run(name)
        assert result.exit_code == 2 and words in result.stderr
