"""The commands of `hf-longattn`. What a command needs is imported inside it, so that `--help` stays quick."""

import sys
from typing import Annotated

import typer

app = typer.Typer(
    name="hf-longattn",
    help="Long context for Hugging Face Transformers: check this machine, check a model.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.callback()
def _root() -> None:
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
    json: Json = False,
) -> None:
    """Compare a model under our attention with the same model under sdpa, and look for leaks.

    Exit status 0: every check passed; 1: one failed; 2: the model could not be checked.
    """
    from transformers.utils import logging

    from hf_longattn.cli.measure import Request
    from hf_longattn.cli.verify import show, verify_model

    logging.disable_progress_bar()
    try:
        report = verify_model(Request(model, device, dtype, tokens, implementation))
    except (ValueError, TypeError, OSError) as error:
        typer.echo("error: " + " ".join(str(error).split()), err=True)
        raise typer.Exit(2) from None
    show(report, as_json=json)
    raise typer.Exit(0 if report.passed else 1)


def main() -> None:
    """Entry point of the console script."""
    sys.exit(app())


if __name__ == "__main__":
    main()
