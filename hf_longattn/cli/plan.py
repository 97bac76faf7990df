"""`hf-longattn plan`: what a long prompt costs, before it runs."""

import dataclasses
import json

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from hf_longattn.generation.planning import Hardware, Plan, plan_generation, this_hardware

_GIB = 1024**3


def make_plan(
    model: str, context: int, batch: int, dtype: str, memory_gib: float | None, bandwidth: float | None
) -> Plan:
    """The plan for a model folder or hub id.

    Args:
        model: folder or id; only its config is read.
        context: prompt and new tokens together.
        batch: sequences.
        dtype: name of a torch dtype.
        memory_gib: of the GPU; the one here, else an H100's.
        bandwidth: GB/s of the GPU; the one here, else an H100's.

    Raises:
        ValueError: `dtype` is unknown, or the architecture cannot be planned for.
        OSError: there is no such model.
    """
    if dtype not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"`--dtype` must be bfloat16, float16 or float32, got {dtype!r}.")
    hardware = this_hardware(torch.device("cuda")) if torch.cuda.is_available() else Hardware()
    if memory_gib is not None:
        hardware = dataclasses.replace(hardware, memory=int(memory_gib * _GIB))
    if bandwidth is not None:
        hardware = dataclasses.replace(hardware, bandwidth=bandwidth * 1e9)
    config = AutoConfig.from_pretrained(model)
    return plan_generation(config, context, batch_size=batch, dtype=getattr(torch, dtype), hardware=hardware)


def show(plan: Plan, as_json: bool) -> None:
    """Prints the plan as a table, or as JSON."""
    if as_json:
        fields = {**dataclasses.asdict(plan), "peak": plan.peak, "fits": plan.fits}
        Console(soft_wrap=True).print(json.dumps(fields), highlight=False)
        return
    table = Table(show_header=False)
    for name, size in (
        ("weights", plan.weights),
        ("keys and values", plan.cache),
        ("workspace", plan.workspace),
    ):
        table.add_row(name, f"{size / _GIB:.2f} GiB")
    table.add_row("peak", f"{plan.peak / _GIB:.2f} of {plan.memory / _GIB:.2f} GiB")
    table.add_row(f"{plan.context:,} tokens", "fit" if plan.fits else "do not fit")
    table.add_row("longest that fits", f"{plan.longest:,} tokens, prompt and answer together")
    table.add_row("time to first token", f"about {plan.expected_first_token:.1f} s")
    floor, expected = 1e3 * plan.floor_a_token, 1e3 * plan.expected_a_token
    table.add_row(
        "time a token", f"about {expected:.1f} ms (at least {floor:.1f}: weights and cache read once)"
    )
    Console().print(table)
