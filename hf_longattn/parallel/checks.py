"""Before the first token: every rank must have been given the same thing."""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from hf_longattn.parallel.group import SequenceGroup

_ADVICE = {
    "seed": "call `accelerate.utils.set_seed(n)` with the same number on every process before sampling",
    "model config": "load the same checkpoint on every process",
    "model dtype": "load the model in the same dtype on every process",
    "past_key_values": "continue from caches that the same calls have filled",
    "answer": "weights, adapters or processors are not the same: load the same ones on every process",
    "random state": "call `accelerate.utils.set_seed(n)` with the same number on every process",
    **dict.fromkeys(
        ("prefill_chunk_size", "cache_dtype", "cuda_graph"),
        "pass the same settings to `prepare_generation` on every process",
    ),
}
# What the ranks share, and what all of them must do.
_PROMPT = ("one prompt", "pass the same arguments to `generate` on every process")


def digest(value: Any) -> int:
    """63 bits that equal values share and different ones do not.

    Args:
        value: a tensor, or anything that JSON or `repr` tells apart.
    """
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous()
        text = (
            f"{data.dtype} {tuple(data.shape)} ".encode() + data.view(-1).view(torch.uint8).numpy().tobytes()
        )
    else:
        text = json.dumps(value, sort_keys=True, default=repr).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def check_same(
    group: SequenceGroup, fields: dict[str, Any], device: torch.device, task: tuple[str, str] = _PROMPT
) -> None:
    """Compares what every rank was given.

    Args:
        group: the ranks.
        fields: name to value; the names must be the same on every rank, and which values are dicts. Of these
            the error names the entry that differs.
        device: for the message between the ranks.
        task: for the error: what the ranks share, and what to do where a field has no advice of its own.

    Raises:
        ValueError: on every rank, naming the first field that differs and the ranks that differ from rank 0.
    """
    digests = torch.tensor([digest(value) for value in fields.values()], device=device)
    everyone = group.gather(digests).tolist()
    for index, name in enumerate(fields):
        odd = [rank for rank, row in enumerate(everyone) if row[index] != everyone[0][index]]
        if odd:
            ranks = f"rank {odd[0]} differs" if len(odd) == 1 else f"ranks {odd} differ"
            advice, entry = _ADVICE.get(name, task[1]), ""
            if isinstance(fields[name], dict):
                entry = f" (`{_entry_that_differs(group, fields[name], device)}`)"
            raise ValueError(
                f"`{name}`{entry}: {ranks} from rank 0 in {task[0]} over several processes; {advice}."
            )


def _entry_that_differs(group: SequenceGroup, entries: dict[str, Any], device: torch.device) -> str:
    """The first name, in their order, under which not all ranks have the same."""
    own = json.dumps({name: digest(value) for name, value in entries.items()}).encode()
    length = int(group.gather(torch.tensor(len(own), device=device)).max())
    # JSON takes spaces at its end.
    sent = torch.tensor(list(own.ljust(length)), dtype=torch.uint8, device=device)
    first, *others = [json.loads(bytes(text)) for text in group.gather(sent).tolist()]
    names = sorted({name for entry in (first, *others) for name in entry})
    return next(name for name in names if any(name not in e or e[name] != first.get(name) for e in others))
