"""Random numbers of tokens that nobody gets: drawn by steps beyond the end of an answer, and taken back.

A program makes several tokens before the host looks for the end among them, and its graph makes as many each
time. The generator stands behind the last of them then; transformers' loop leaves it behind the last token of
the answer, from where the next call draws.
"""

from collections import deque
from typing import TYPE_CHECKING

import torch

from hf_longattn.devices import default_generator

if TYPE_CHECKING:
    from hf_longattn.generation.blocks import BlockProgram


class DrawnNumbers:
    """Where the generator stood behind the last tokens of one call.

    Args:
        program: makes the tokens.
    """

    def __init__(self, program: "BlockProgram") -> None:
        draws = program.choice.do_sample
        self.generator = default_generator(program.ids.device) if draws else None
        # Two programs behind the last look, a token each where no graph runs.
        self.states: deque[tuple[int, torch.Tensor]] = deque(maxlen=2 * program.span + 1)
        self.note(program.length)

    def note(self, length: int) -> None:
        """Notes where the generator stands behind so many tokens."""
        if self.generator is not None:
            self.states.append((length, self.generator.get_state()))

    def take_back(self, program: "BlockProgram", length: int) -> None:
        """Puts the generator behind `length` tokens of a program that has made more.

        Args:
            program: whose steps have drawn; those of a graph draw nothing but the choice of a token.
            length: of prompt and answer.
        """
        if self.generator is None or program.length == length:
            return
        noted, state = next(pair for pair in reversed(self.states) if pair[0] <= length)
        self.generator.set_state(state)
        for _ in range(length - noted):
            program.choice.draw_again()
