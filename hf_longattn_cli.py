"""The commands of `hf-longattn`. What a command needs is imported inside it.

They stand beside the package, since importing anything of it registers it with transformers: `--help`,
`--version` and what the parser refuses need neither of them, nor torch.
"""

import importlib.metadata
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="hf-longattn",
    help="Long context for Hugging Face Transformers: check this machine and a model, plan, generate.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

convert = typer.Typer(help="Convert checkpoints into folders for from_pretrained.", no_args_is_help=True)
app.add_typer(convert, name="convert")

CacheDtype = Annotated[
    str | None, typer.Option(help="int8 or fp8: keys and values in 8 bits; the model's dtype if left out.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hf-longattn {_version()}")
        raise typer.Exit()


def _version() -> str:
    try:
        return importlib.metadata.version("hf_longattn")
    except importlib.metadata.PackageNotFoundError:
        # A source tree that is on the path but not installed.
        from hf_longattn import __version__

        return __version__


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Keeps the commands named, however many there are."""


@app.command()
def doctor(json: Json = False) -> None:
    """Show what this machine can do: versions, devices, and the backend of every operation.

    Exit status 0: usable; 1: something is bad.
    """
    from hf_longattn.cli.doctor import examine, show

    report = examine()
    show(report, as_json=json)
    raise typer.Exit(0 if report.usable else 1)


@app.command()
def verify(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, or an id on the hub.")],
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    tokens: Annotated[int, typer.Option(min=8, help="Length of the test prompt.")] = 128,
    implementation: Annotated[
        str, typer.Option(help="tree_attention, blockwise_attention or both.")
    ] = "both",
    cache_dtype: CacheDtype = None,
    json: Json = False,
) -> None:
    """Compare a model under our attention with the same model under sdpa, and look for leaks.

    Exit status 0: every check passed; 1: one failed; 2: the model could not be checked.
    """
    from transformers.utils import logging

    from hf_longattn.cli.measure import Request
    from hf_longattn.cli.verify import show, verify_model

    logging.disable_progress_bar()
    report = _or_exit(
        lambda: verify_model(Request(model, device, dtype, tokens, implementation, cache_dtype))
    )
    show(report, as_json=json)
    raise typer.Exit(0 if report.passed else 1)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a config.json, or a hub id.")],
    context: Annotated[int, typer.Option(min=1, help="Tokens of prompt and answer together.")],
    new_tokens: Annotated[int, typer.Option(min=0, help="How many of them are the answer.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 1,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that share one prompt.")] = 1,
    tp: Annotated[int, typer.Option(min=1, help="GPUs of these that divide the weights.")] = 1,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    gpu_memory: Annotated[
        float | None, typer.Option("--gpu-memory", "--memory", help="GiB of a GPU; the one here, or an H100.")
    ] = None,
    bandwidth: Annotated[float | None, typer.Option(help="GB/s; measured here, or an H100's.")] = None,
    cache_dtype: CacheDtype = None,
    train: Annotated[
        bool, typer.Option("--train", help="Plan a training step in place of a prompt.")
    ] = False,
    lora: Annotated[int, typer.Option(min=0, help="With --train: rank of adapters; 0 trains all.")] = 0,
    host_memory: Annotated[
        float | None, typer.Option(help="With --train: GiB of the host for layer inputs of one GPU.")
    ] = None,
    json: Json = False,
) -> None:
    """Show what a long prompt, or a training step, will cost: memory of each GPU and the longest that fits.

    Exit status 0: it fits; 1: it does not; 2: the model could not be planned for.
    """
    from hf_longattn.cli import plan as planning

    sizes = (new_tokens, batch, gpus, tp, dtype, gpu_memory, bandwidth, cache_dtype, lora, host_memory)
    make, show = (planning.make_plan, planning.show)
    if train:
        make, show = planning.make_training_plan, planning.show_training
    result = _or_exit(lambda: make(planning.Request(model, context, *sizes)))
    show(result, as_json=json)
    raise typer.Exit(0 if result.fits else 1)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, or an id on the hub.")],
    prompt_file: Annotated[str, typer.Option(help="A text file, or - for stdin.")] = "-",
    new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer at most.")] = 256,
    question: Annotated[str | None, typer.Option(help="Put behind the text.")] = None,
    chat: Annotated[
        bool | None,
        typer.Option(help="Use the chat template; so by default where there are a question and a template."),
    ] = None,
    sample: Annotated[bool, typer.Option(help="Draw tokens in place of taking the likeliest.")] = False,
    progress: Annotated[bool, typer.Option(help="Show a bar while the prompt is read.")] = True,
    cache_dtype: CacheDtype = None,
    offload_layers: Annotated[
        str, typer.Option(help="Layers whose keys and values wait in host memory: a number, or auto.")
    ] = "0",
) -> None:
    """Answer one long prompt: the text goes to stdout as it comes, statistics to stderr."""
    from transformers.utils import logging

    from hf_longattn.cli import generate as generation

    logging.disable_progress_bar()
    text = _or_exit(lambda: generation.read_prompt(prompt_file))
    waiting = int(offload_layers) if offload_layers.isdecimal() else offload_layers
    options = (question, chat, sample, progress, cache_dtype, waiting)
    request = generation.Request(model, text, new_tokens, *options)
    statistics = _or_exit(lambda: generation.generate(request))
    for line in statistics.lines():
        typer.echo(line, err=True)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, or an id on the hub.")],
    text: Annotated[str | None, typer.Option(help="A long text, for --context and --passkey.")] = None,
    context: Annotated[int, typer.Option(min=0, help="Show the loss by position over so many tokens.")] = 0,
    windows: Annotated[int, typer.Option(min=1, help="Windows of the text, at most.")] = 4,
    passkey: Annotated[str, typer.Option(help="Lengths of prompts that hide a number: 1024,4096.")] = "",
    cloze: Annotated[str | None, typer.Option(help="A text to ask last words and next sentences of.")] = None,
    questions: Annotated[int, typer.Option(min=1, help="With --cloze: of each kind, at most.")] = 200,
    tasks: Annotated[str, typer.Option(help="Names of lm_eval tasks, with commas.")] = "",
    implementation: Annotated[str, typer.Option(help="The attention implementation.")] = "tree_attention",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    json: Json = False,
) -> None:
    """Measure a model: loss by position, a hidden number, zero-shot questions on a text, lm_eval's tasks."""
    from hf_longattn.cli import evaluate as evaluation

    lengths = _or_exit(lambda: evaluation.read_lengths(passkey))
    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    place = (implementation, device, dtype)
    request = evaluation.Request(model, text, context, windows, lengths, names, *place, cloze, questions)
    evaluation.show(_or_exit(lambda: evaluation.evaluate(request)), as_json=json)


@app.command()
def bench(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    json: Json = False,
) -> None:
    """Time the operators on this machine, beside torch's attention and what the hardware allows."""
    from hf_longattn.cli import bench as benchmark

    benchmark.show(_or_exit(lambda: benchmark.bench(device)), as_json=json)


@convert.command("block-transformer")
def convert_block_transformer(
    src: Annotated[str, typer.Argument(metavar="SRC", help="Official checkpoint, or a vanilla model.")],
    dst: Annotated[str, typer.Argument(metavar="DST", help="Folder to write.")],
    from_vanilla: Annotated[
        bool, typer.Option(help="Start a Block Transformer from a vanilla model.")
    ] = False,
    alignment: Annotated[str, typer.Option(help="tokens, or columns as the official code cuts.")] = "tokens",
    block_length: Annotated[int, typer.Option(min=1, help="Where the checkpoint does not say it.")] = 4,
) -> None:
    """Convert an official Block Transformer checkpoint, or start one from a vanilla model."""
    from hf_longattn.cli import convert as conversion

    call = (src, dst, from_vanilla, alignment, block_length)
    config = _or_exit(lambda: conversion.convert_block_transformer(*call))
    typer.echo(f"{dst}: {config.model_type}, blocks of {config.block_length} tokens")


@convert.command("lightning")
def convert_lightning(
    src: Annotated[str, typer.Argument(metavar="SRC", help="Official TransNormerLLM checkpoint.")],
    dst: Annotated[str, typer.Argument(metavar="DST", help="Folder to write.")],
) -> None:
    """Convert an official TransNormerLLM checkpoint."""
    from hf_longattn.cli import convert as conversion

    config = _or_exit(lambda: conversion.convert_lightning(src, dst))
    typer.echo(f"{dst}: {config.model_type}, {config.num_hidden_layers} layers")


def _or_exit(work: Callable[[], Any]) -> Any:
    """The result of `work`, or one line on stderr and exit status 2 for what a caller can cause."""
    try:
        return work()
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        # Out of memory is a RuntimeError whose class only torch knows, which is loaded by now or never.
        if isinstance(error, RuntimeError) and type(error).__name__ != "OutOfMemoryError":
            raise
        typer.echo("error: " + " ".join(str(error).split()), err=True)
        raise typer.Exit(2) from None


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except ImportError as error:
        # A transformers that is missing or too old; what else cannot be imported is shown in full.
        if error.name != "transformers":
            raise
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
