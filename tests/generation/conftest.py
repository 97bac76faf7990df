"""Fixtures of generation."""

import pytest

from hf_longattn.generation import room


@pytest.fixture
def free(monkeypatch):
    """Sets the bytes that are free."""
    return lambda size: monkeypatch.setattr(room, "free_memory", lambda device: size)
