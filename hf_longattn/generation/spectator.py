"""The host's look at the tokens of a program: it stops, pads and streams, while the device goes on."""

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from hf_longattn.devices import HostCopy

if TYPE_CHECKING:
    from hf_longattn.generation.blocks import BlockProgram

# Criteria that read the last token and the length: what they say of a copy on the CPU holds.
PLAIN_CRITERIA = (EosTokenCriteria, MaxLengthCriteria)


def criteria_on_host(criteria: StoppingCriteriaList, generation_config: Any) -> StoppingCriteriaList:
    """Plain criteria with a copy on the host of the tokens that end a row, where the call has them there.

    To fetch them from the device, which transformers' criterion does at its first look, is to wait for all
    that was launched before: the first token would come with the second program.

    Args:
        criteria: of this call.
        generation_config: of this call.
    """
    ends, own = generation_config.eos_token_id, generation_config._eos_token_tensor
    if own is None or isinstance(ends, Tensor) or not _are_plain(criteria):
        return criteria
    return StoppingCriteriaList(
        EosTokenCriteria(ends) if getattr(criterion, "eos_token_id", None) is own else criterion
        for criterion in criteria
    )


def _are_plain(criteria: StoppingCriteriaList) -> bool:
    return all(type(criterion) in PLAIN_CRITERIA for criterion in criteria)


class Spectator:
    """Looks at new tokens one by one, in order: stopping criteria, pads of rows that ended, the streamer.

    Args:
        program: makes the tokens.
        criteria: of this call.
        streamer: of this call, or None.
    """

    def __init__(self, program: "BlockProgram", criteria: StoppingCriteriaList, streamer: Any) -> None:
        self.program, self.criteria, self.streamer = program, criteria, streamer
        self.plain = _are_plain(criteria)
        # Their own copy, of the same shape, gets what is looked at: one transfer a program, in place of
        # several launches a token, and the prompt, which they do not read, is not waited for.
        shape, dtype = program.ids.shape, program.ids.dtype
        self.ids = torch.zeros(shape, dtype=dtype) if self.plain else program.ids
        self.length = self.prompt = self.shown = program.length - 1
        self.unfinished = torch.ones(self.ids.shape[0], dtype=torch.bool, device=self.ids.device)
        self.coming: HostCopy | None = None

    def look(self) -> None:
        """Notes the tokens that there are; their way to the host begins, and nothing waits for it."""
        first, self.shown = self.shown, self.program.length
        if self.plain:
            # Next to each other: rows that lie apart would be one copy each.
            self.coming = HostCopy(self.program.ids[:, first : self.shown].contiguous())

    def watch(self) -> bool:
        """Whether any row goes on behind the tokens that `look` has noted."""
        new = slice(self.length, self.shown)
        if self.coming is not None:
            self.ids[:, new] = self.coming.read()
        while self.length < new.stop:
            self.length += 1
            done = self.criteria(cast(Any, self.ids[:, : self.length]), self._scores())
            self.unfinished &= ~done.to(self.unfinished.device)
            if self.streamer is not None:
                self.streamer.put(self.ids[:, self.length - 1].cpu())
            if not bool(self.unfinished.any()):
                return False
            if not self.plain and self.program.choice.ends is not None:
                rest = self.ids[:, self.length : new.stop]
                rest.copy_(torch.where(self.unfinished[:, None], rest, self.program.choice.pad))
        if not self.plain and self.program.choice.ends is not None:
            self.program.end_rows(self.unfinished)
        return True

    def _scores(self) -> Any:
        scores = self.program.kept.get("scores")
        return None if scores is None else tuple(scores[: self.length - self.prompt])
