"""Fixtures of prepared Block Transformers on a CPU."""

import functools

import pytest
import torch
from recorded import RecordedGraph
from transformers.generation import GenerationMixin

from hf_longattn.generation import blocks
from hf_longattn.generation import prompts as prompt_graphs
from hf_longattn.kernels.dispatch import log_once


@pytest.fixture(autouse=True)
def warned_anew():
    log_once.cache_clear()


class Graphs(list):
    """Recorded graphs: those of steps, and those that read a prompt."""

    def __init__(self):
        super().__init__()
        self.prompts = []


@pytest.fixture
def recorded(monkeypatch):
    """Programs are captured in recorded graphs, which it lists."""
    graphs = Graphs()

    def capture(kind, rehearse, step, like=None):
        rehearse()
        kind.append(RecordedGraph())
        state = torch.get_rng_state()
        with kind[-1]:
            result = step()
        torch.set_rng_state(state)
        kind[-1].undo()
        return kind[-1], result

    monkeypatch.setattr(blocks, "_GRAPH_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(blocks, "capture", functools.partial(capture, graphs))
    monkeypatch.setattr(prompt_graphs, "capture", functools.partial(capture, graphs.prompts))
    return graphs


@pytest.fixture
def never_token_by_token(monkeypatch):
    """The prepared model may not use transformers' loop; the plain one may."""
    real = GenerationMixin._sample

    def _sample(self, *args, **kwargs):
        assert "_sample" not in vars(self), "fell back to the loop of transformers"
        return real(self, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "_sample", _sample)
