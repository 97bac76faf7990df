"""`hf-longattn plan`: what a long prompt costs, before it runs."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, PreTrainedConfig

from hf_longattn import devices
from hf_longattn.cache.head_sizes import head_sizes
from hf_longattn.cache.quantized import read_cache_dtype
from hf_longattn.cli.measure import refuse_missing
from hf_longattn.generation.clock import Hardware, this_hardware
from hf_longattn.generation.offloading import OffloadPlan, PlanWithOffload, with_offload
from hf_longattn.generation.planning import Plan, plan_generation
from hf_longattn.generation.sizes import Ranks, on_meta
from hf_longattn.training.block_planning import plan_block_training
from hf_longattn.training.planning import TrainingPlan, TrainingRequest, plan_training
from hf_longattn.training.setup import prepare_training

_GIB, _MIB = 1024**3, 1024**2
# What is planned for where there is no GPU.
_ASSUMED = {
    "gpu_memory": "the memory of an H100",
    "bandwidth": "the bandwidth of an H100",
    "host_memory": "the memory of this host",
}


@dataclass(frozen=True)
class Request:
    """What `hf-longattn plan` is asked, by the names of its options.

    Args:
        model: folder, config.json or hub id; only the config is read.
        context: prompt and new tokens together.
        new_tokens: how many of them are the answer.
        batch: sequences.
        gpus: GPUs in all.
        tp: how many of them divide the weights; the others divide the sequence.
        dtype: name of a torch dtype.
        gpu_memory: GiB of a GPU; the one here, else an H100's.
        bandwidth: GB/s of a GPU; the one here, else an H100's.
        cache_dtype: "int8" or "fp8" for keys and values in 8 bits, else None.
        lora: of a training step, the rank of the adapters; 0 trains everything.
        host_memory: of a training step, GiB of the host that the layer inputs of one GPU may take; None for
            four fifths of the memory here.
    """

    model: str
    context: int
    new_tokens: int = 0
    batch: int = 1
    gpus: int = 1
    tp: int = 1
    dtype: str = "bfloat16"
    gpu_memory: float | None = None
    bandwidth: float | None = None
    cache_dtype: str | None = None
    lora: int = 0
    host_memory: float | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"`--dtype` must be bfloat16, float16 or float32, got {self.dtype!r}.")
        if self.gpus % self.tp:
            raise ValueError(f"`--tp` must divide `--gpus`, got {self.tp} and {self.gpus}.")
        read_cache_dtype(self.cache_dtype)
        for name in ("gpu_memory", "bandwidth", "host_memory"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{_option(name)} must be a positive number, got {value}.")
        if self.new_tokens >= self.context:
            raise ValueError(
                f"`--new-tokens` must leave room for a prompt in `--context`, got {self.new_tokens} of "
                f"{self.context}."
            )

    def hardware(self) -> Hardware:
        """The GPU to plan for."""
        there = torch.cuda.is_available()
        hardware = this_hardware(torch.device("cuda")) if there else Hardware()
        if self.gpu_memory is not None:
            hardware = dataclasses.replace(hardware, memory=int(self.gpu_memory * _GIB))
        if self.bandwidth is not None:
            hardware = dataclasses.replace(hardware, bandwidth=self.bandwidth * 1e9)
        return hardware


def read_config(model: str) -> PreTrainedConfig:
    """The config of a folder, a config.json or a hub id; what comes from the hub is said on stderr.

    Args:
        model: path or id.

    Raises:
        ValueError: there is no such folder or file.
        OSError: there is no such model on the hub, or no config in the folder.
    """
    refuse_missing(model)
    local = Path(model).expanduser().exists()
    if not local:
        Console(stderr=True).print(f"reading the config of {model} from the hub, or from its cache")
    return AutoConfig.from_pretrained(Path(model).expanduser() if local else model, local_files_only=local)


def _tell_what_is_assumed(request: Request, *names: str) -> None:
    """Says on stderr which of these sizes nobody gave, where no GPU is here that has them."""
    missing = [name for name in names if getattr(request, name) is None]
    if missing and not torch.cuda.is_available():
        assumed = " and ".join(_ASSUMED[name] for name in missing)
        options = " and ".join(_option(name) for name in missing)
        verb = "describe" if len(missing) > 1 else "describes"
        said = f"no GPU here: planned for {assumed}; {options} {verb} another machine"
        Console(stderr=True, soft_wrap=True).print(said)


def _option(name: str) -> str:
    return f"`--{name.replace('_', '-')}`"


def _warn_of_positions(config: PreTrainedConfig, context: int) -> None:
    """Says on stderr where a context is longer than what the model was made for."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and context > limit:
        Console(stderr=True).print(
            f"note: the config names {limit:,} positions; more need a model that was trained on more, or a "
            "scaled rotary embedding"
        )


def make_plan(request: Request) -> PlanWithOffload:
    """The plan of one generation, with layers in host memory where it does not fit one GPU otherwise.

    Args:
        request: the options.

    Raises:
        ValueError: an option, or an architecture that cannot be planned for.
        OSError: there is no such model.
    """
    _refuse_options(request, "plan a training step: give `--train` too", lora=0, host_memory=None)
    config, ranks = read_config(request.model), Ranks(request.gpus // request.tp, request.tp)
    _tell_what_is_assumed(request, "gpu_memory", "bandwidth")
    dtype, cache_dtype = getattr(torch, request.dtype), read_cache_dtype(request.cache_dtype)
    plan = plan_generation(
        config,
        request.context,
        new_tokens=request.new_tokens,
        batch_size=request.batch,
        dtype=dtype,
        cache_dtype=cache_dtype,
        ranks=ranks,
        hardware=request.hardware(),
    )
    text = config.get_text_config(decoder=True)
    _warn_of_positions(text, request.context)
    return with_offload(text, plan, ranks, request.batch, cache_dtype or dtype)


def _refuse_options(request: Request, words: str, **without: Any) -> None:
    """Refuses options of the other plan, given what each is where it was left out."""
    if any(getattr(request, name) != value for name, value in without.items()):
        *others, last = (_option(name) for name in without)
        raise ValueError(f"{', '.join(others)} and {last} {words}.")


def make_training_plan(request: Request) -> TrainingPlan:
    """The plan of one training step.

    Args:
        request: the options.

    Raises:
        ValueError: an option of generation alone, or a model that is not prepared or planned for training.
        OSError: there is no such model.
    """
    words = "plan a prompt: leave them out with `--train`"
    _refuse_options(request, words, tp=1, new_tokens=0, cache_dtype=None, bandwidth=None)
    config, dtype = read_config(request.model), getattr(torch, request.dtype)
    # What cannot be prepared is not planned; the model has no memory, and nobody else has it.
    model = prepare_training(on_meta(config, dtype))
    text = config.get_text_config(decoder=True)
    _warn_of_positions(text, request.context)
    _tell_what_is_assumed(request, "gpu_memory", "host_memory")
    host = request.host_memory
    bytes_of_host = devices.host_memory(torch.device("cuda")) if host is None else int(host * _GIB)
    sizes = TrainingRequest(
        batch_size=request.batch,
        lora=request.lora,
        ranks=request.gpus,
        memory=request.hardware().memory,
        host_memory=bytes_of_host,
        dtype=dtype,
    )
    if text.model_type == "block_transformer":
        return plan_block_training(text, model, request.context, sizes)
    return plan_training(text, model, head_sizes(text), request.context, sizes)


def show_training(plan: TrainingPlan, as_json: bool) -> None:
    """Prints the plan of a training step as a table, or as JSON."""
    if as_json:
        print_json({**dataclasses.asdict(plan), "peak": plan.peak, "fits": plan.fits})
        return
    top = max(plan.forward, plan.loss, plan.backward)
    names = {plan.forward: "forward", plan.loss: "loss", plan.backward: "backward"}
    rows = [
        ("weights", _readable(plan.weights)),
        ("gradients", _readable(plan.gradients)),
        ("AdamW", _readable(plan.optimizer)),
        ("layer inputs on the GPU", _readable(plan.inputs)),
        (f"on top, in the {names[top]}", _readable(top)),
        ("peak" if plan.ranks == 1 else "peak a GPU", f"{_readable(plan.peak)} of {_readable(plan.memory)}"),
        ("layer inputs on the host", f"{_readable(plan.host)} of {_readable(plan.host_memory)}"),
        (f"{plan.context:,} tokens", "fit" if plan.fits else "do not fit"),
        ("longest that fits", f"{plan.longest:,} tokens"),
    ]
    if plan.every > 1:
        rows.append(("layer inputs kept", f"1 in {plan.every}: the others come from a second forward"))
    print_table([*rows, *(("to make it fit", words) for words in plan.advice)])


def show(plan: PlanWithOffload, as_json: bool) -> None:
    """Prints the plan as a table, or as JSON."""
    if as_json:
        print_json({**dataclasses.asdict(plan), "peak": plan.peak, "fits": plan.fits})
        return
    gpus = plan.ranks.total
    rows = [
        ("weights", _readable(plan.weights)),
        *_kept_rows(plan),
        ("workspace", _readable(plan.workspace.total)),
        ("peak" if gpus == 1 else "peak a GPU", f"{_readable(plan.peak)} of {_readable(plan.memory)}"),
        (f"{plan.context:,} tokens", "fit" if plan.fits else "do not fit"),
        ("longest that fits", _longest(plan)),
        ("time to first token", f"{_bound(plan)} {_seconds(plan.expected_first_token)}"),
        ("time a token", _time_a_token(plan)),
    ]
    if plan.shortened:
        rows.insert(-3, ("chunks of the prompt", f"{plan.chunk:,} tokens, as memory is short"))
    if plan.new_tokens:
        answer = plan.expected_first_token + plan.new_tokens * plan.expected_a_token
        rows.append((f"answer of {plan.new_tokens:,}", f"{_bound(plan)} {_seconds(answer)} in all"))
    if plan.offload is not None:
        rows += _offload_rows(plan.offload)
    print_table(rows if gpus == 1 else [("GPUs", _division(plan.ranks)), *rows])


def _offload_rows(offload: OffloadPlan) -> list[tuple[str, str]]:
    """What `offload_layers="auto"` makes of a prompt that does not fit."""
    name = "layers in host memory"
    if offload.layers is None:
        return [(name, f"all {offload.number} that could wait there are not enough")]
    rate = f"{offload.rate / 1e9:.0f} GB/s of PCIe 5 x16, assumed"
    return [
        (
            name,
            f"{offload.layers} of {offload.number} make it fit, with {_readable(offload.host)} of the host",
        ),
        ("time a token then", f"at least {1e3 * offload.expected_a_token:.1f} ms, at {rate}"),
        ("the prompt read again", f"about {offload.expected_recomputing:.1f} s a token, in place of that"),
    ]


def _kept_rows(plan: Plan) -> list[tuple[str, str]]:
    """What is kept of the tokens: what grows with them, and what does not."""
    rows, growing = [], plan.cache - plan.states
    if plan.block_length > 1:
        rows.append((f"keys and values of blocks of {plan.block_length}", _readable(growing)))
    elif growing or not plan.states:
        rows.append(("keys and values", _readable(growing)))
    if plan.states:
        rows.append(("lightning states", f"{_readable(plan.states)}, whatever the length"))
    return rows


def _longest(plan: Plan) -> str:
    if not plan.grows:
        return "any: nothing that is kept grows"
    return f"{plan.longest:,} tokens, prompt and answer together" if plan.longest else "none"


def _bound(plan: Plan) -> str:
    """What is left out of the time to the first token of a Block Transformer makes it a bound."""
    return "at least" if plan.block_length > 1 else "about"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.0f} ms"


def _time_a_token(plan: Plan) -> str:
    floor, expected = 1e3 * plan.floor_a_token, 1e3 * plan.expected_a_token
    kept = "cache" if plan.cache > plan.states else "states"
    once = f"weights and {kept} read once"
    if plan.states:
        once += ", states written" if kept == "cache" else " and written"
    mean = ", the mean of a block" if plan.block_length > 1 else ""
    # Ranks that share blocks run one forward a token, whose launches are not counted.
    bound = _bound(plan) if plan.ranks.total > 1 else "about"
    return f"{bound} {expected:.1f} ms{mean} (floor {floor:.1f}: {once})"


def _division(ranks: Ranks) -> str:
    parts = [f"sequence over {ranks.sequence}", f"weights over {ranks.tensor}"]
    used = [part for part, count in zip(parts, (ranks.sequence, ranks.tensor), strict=True) if count > 1]
    return f"{ranks.total}: {', '.join(used)}"


def _readable(size: float) -> str:
    # Of a tiny model two digits of GiB are zeros.
    return f"{size / _MIB:.2f} MiB" if 0 < size < 10 * _MIB else f"{size / _GIB:.2f} GiB"


def print_table(rows: list[tuple[str, str]]) -> None:
    """Prints names and values, side by side."""
    table = Table(show_header=False)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def print_json(fields: dict[str, Any]) -> None:
    """Prints one JSON object."""
    Console(soft_wrap=True).print(json.dumps(fields), highlight=False)
