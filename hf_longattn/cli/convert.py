"""`hf-longattn convert`: official checkpoints, and vanilla models, into folders for `from_pretrained`."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from transformers import PreTrainedConfig

from hf_longattn.modeling.block_transformer.convert import convert_checkpoint, convert_from_vanilla
from hf_longattn.modeling.lightning.convert import convert_checkpoint as convert_lightning_checkpoint


def convert_block_transformer(
    src: str, dst: str, from_vanilla: bool, alignment: str, block_length: int
) -> PreTrainedConfig:
    """Converts with a progress bar on stderr.

    Args:
        src: an official checkpoint's folder or file, or a vanilla model.
        dst: the folder to write.
        from_vanilla: `src` is a vanilla language model to start from.
        alignment: "tokens" or "columns".
        block_length: tokens in a block, where the checkpoint does not say it.

    Returns:
        the configuration that was written.

    Raises:
        ValueError: the checkpoint does not hold such a model.
        OSError: there is nothing to read at `src`.
    """
    work = convert_from_vanilla if from_vanilla else convert_checkpoint
    with _bar() as progress:
        return work(src, dst, block_alignment=alignment, block_length=block_length, progress=progress)


def convert_lightning(src: str, dst: str) -> PreTrainedConfig:
    """Converts an official TransNormerLLM checkpoint, with a progress bar on stderr.

    Args:
        src: folder with `config.json` and safetensors.
        dst: the folder to write.

    Returns:
        the configuration that was written.

    Raises:
        ValueError: the checkpoint does not hold such a model.
        OSError: there is nothing to read at `src`.
    """
    with _bar() as progress:
        return convert_lightning_checkpoint(src, dst, progress=progress)


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[int, int, str], None]]:
    columns = (TextColumn("converting"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[name]}"))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("convert", total=None, name="")
        yield lambda done, total, name: progress.update(task, completed=done, total=total, name=name)
