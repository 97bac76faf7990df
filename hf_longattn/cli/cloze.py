"""Zero-shot questions that a plain text answers: the last word of a passage, and the sentence after it.

    passage         whole sentences of at least 50 words together, and the sentence that follows them
    last word       as LAMBADA asks: right where the greedy tokens after all but the last word are that word,
                    which has four letters or more and stood in the passage before
    next sentence   the true one against three that follow other passages of the same document: right where it
                    has the highest log-likelihood a byte. In all questions of a document every sentence is
                    offered once as the true one and three times as a wrong one, so that a model which does
                    not read the passage is right in 25 %

Nothing is drawn at random: equal texts give equal questions, whatever the tokenizer.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Words of a passage at least, and of the sentences that it is made of.
_PASSAGE_WORDS, _SENTENCE_WORDS = 50, (4, 60)
_CHOICES = 4
_CLOSING = "\"'”’)"
# A stop that is not the end of a title or of an initial, with what closes behind it.
_END = re.compile(
    rf"(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)(?<!\b[A-Z])[.!?]+[{_CLOSING}]*(?=\s+[\"'“‘(]?[A-Z0-9]|\s*$)"
)
_LAST_WORD = re.compile(rf"\s([A-Za-z]{{4,}})[.!?]+[{_CLOSING}]*$")


@dataclass(frozen=True)
class Question:
    """A context, and the continuations to choose from; the first is the true one."""

    context: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Answers:
    """How often a model was right, and how often a guess would be."""

    task: str
    asked: int
    right: int
    chance: float

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right / self.asked


def sentences(document: str) -> list[str]:
    """The sentences of a document, each on one line, with the marks that end it."""
    text, start, found = " ".join(document.split()), 0, []
    for end in _END.finditer(text):
        found.append(text[start : end.end()].strip())
        start = end.end()
    return found


def passages(document: str) -> Iterator[tuple[str, str]]:
    """(passage, sentence that follows), one behind the other without overlap."""
    low, high = _SENTENCE_WORDS
    held: list[str] = []
    words = 0
    for sentence in sentences(document):
        count = len(sentence.split())
        if not low <= count <= high:
            held, words = [], 0
        elif words < _PASSAGE_WORDS:
            held.append(sentence)
            words += count
        else:
            yield " ".join(held), sentence
            held, words = [], 0


def ask_last_words(documents: Iterable[str]) -> list[Question]:
    """Questions for the last word of a passage, which stood in it before."""
    found = []
    for document in documents:
        for passage, sentence in passages(document):
            text = f"{passage} {sentence}"
            last = _LAST_WORD.search(text)
            if last and re.search(rf"\b{last[1]}\b", text[: last.start()]):
                found.append(Question(text[: last.start()], (f" {last[1]}",)))
    return found


def ask_next_sentences(documents: Iterable[str]) -> list[Question]:
    """Questions for the sentence behind a passage, beside three from elsewhere in the document."""
    found = []
    for document in documents:
        # A sentence that comes twice would be right and wrong at once.
        pairs = list({sentence: (passage, sentence) for passage, sentence in passages(document)}.values())
        if len(pairs) < _CHOICES:
            continue
        for index, (passage, _) in enumerate(pairs):
            others = [(index + turn * len(pairs) // _CHOICES) % len(pairs) for turn in range(_CHOICES)]
            found.append(Question(passage, tuple(f" {pairs[other][1]}" for other in others)))
    return found


def spread(questions: list[Question], most: int) -> list[Question]:
    """At most so many of the questions, evenly from the first to the last."""
    count = min(most, len(questions))
    return [questions[index * len(questions) // count] for index in range(count)]


def encode(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], int]:
    """(tokens of both, how many of them are the continuation's), behind the start token if there is one."""
    start = tokenizer("").input_ids[:1]
    start = start if start == [tokenizer.bos_token_id] else []
    both, before = (
        tokenizer(text, add_special_tokens=False).input_ids for text in (context + continuation, context)
    )
    return [*start, *both], len(both) - len(before)


@torch.no_grad()
def score(
    model: Any, rows: list[tuple[list[int], int]], batch_size: int = 8
) -> tuple[list[float], list[bool]]:
    """Log-likelihoods of the ends of some rows, and whether each is what greedy decoding would say.

    Args:
        model: a causal language model, on its device.
        rows: tokens, and how many of the last ones are scored; fewer than all.
        batch_size: rows at a time, padded on the right: what follows a token changes nothing of it.

    Returns:
        (nats, sums over the scored tokens; True where each of them is the likeliest), in the order of `rows`.
    """
    likelihoods, greedy = [0.0] * len(rows), [False] * len(rows)
    # Rows of like lengths together, the longest first: what does not fit fails at once.
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index][0]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        logits = _logits(model, [rows[index][0] for index in batch])
        for row, index in zip(logits, batch, strict=True):
            ids, count = rows[index]
            targets = torch.tensor(ids[-count:], device=row.device)
            scores = row[len(ids) - count - 1 : len(ids) - 1].float().log_softmax(-1)
            likelihoods[index] = scores.gather(1, targets[:, None]).double().sum().item()
            greedy[index] = bool((scores.argmax(-1) == targets).all())
    return likelihoods, greedy


def _logits(model: Any, rows: list[list[int]]) -> Tensor:
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def answer_cloze(
    model: Any, tokenizer: Any, documents: Iterable[str], questions: int = 200, batch_size: int = 8
) -> list[Answers]:
    """Asks a model, which has seen no example, both kinds of questions.

    Args:
        model: a causal language model, on its device; a Block Transformer and a lightning model too.
        tokenizer: its tokenizer.
        documents: texts that it was not trained on; wrong sentences are of the same one.
        questions: of each kind at most, evenly from all documents.
        batch_size: rows of a forward pass.

    Returns:
        the answers to each kind; a kind that the documents hold no questions for is left out.
    """
    documents, found = list(documents), []
    words = spread(ask_last_words(documents), questions)
    if words:
        rows = [encode(tokenizer, question.context, question.choices[0]) for question in words]
        found.append(Answers("last word", len(words), sum(score(model, rows, batch_size)[1]), 0.0))
    following = spread(ask_next_sentences(documents), questions)
    if following:
        right = _count_right(model, tokenizer, following, batch_size)
        found.append(Answers("next sentence", len(following), right, 1 / _CHOICES))
    return found


def _count_right(model: Any, tokenizer: Any, questions: list[Question], batch_size: int) -> int:
    choices = [(question.context, choice) for question in questions for choice in question.choices]
    likelihoods, _ = score(model, [encode(tokenizer, *choice) for choice in choices], batch_size)
    a_byte = [nats / len(text.encode()) for nats, (_, text) in zip(likelihoods, choices, strict=True)]
    offers = torch.tensor(a_byte, dtype=torch.float64).view(-1, _CHOICES)
    # A tie is not an answer.
    return int((offers[:, 0] > offers[:, 1:].amax(1)).sum())
