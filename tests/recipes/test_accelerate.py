"""The settings of accelerate beside the recipes: each is read, and the recipes run under its launcher."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env

RECIPES = Path(__file__).parents[2] / "recipes"
FILES = sorted((RECIPES / "accelerate").glob("*.yaml"))
# (kind, processes)
EXPECTED = {
    "one_gpu": (DistributedType.NO, 1),
    "two_gpus_ddp": (DistributedType.MULTI_GPU, 2),
    "two_gpus_fsdp2": (DistributedType.FSDP, 2),
    "two_gpus_generate": (DistributedType.MULTI_GPU, 2),
    "two_gpus_zero3": (DistributedType.DEEPSPEED, 2),
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_the_file(path):
    # An unknown key is refused here.
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert (config.distributed_type, config.num_processes) == EXPECTED[path.stem]
    if config.distributed_type == DistributedType.FSDP:
        assert config.fsdp_config["fsdp_version"] == 2
        assert not config.fsdp_config["fsdp_activation_checkpointing"]
    if config.distributed_type == DistributedType.DEEPSPEED:
        assert config.deepspeed_config["zero_stage"] == 3
        assert config.deepspeed_config["zero3_save_16bit_model"]
    command = re.search(r"^# accelerate launch --config_file (\S+) (\S+)", path.read_text(), re.MULTILINE)
    assert command and all((RECIPES.parent / name).is_file() for name in command.groups())
    assert (RECIPES.parent / command[1]) == path


def test_the_launcher_hands_deepspeed_what_the_file_says():
    """And leaves to Trainer what it says itself: a number here would have to be equal to its argument."""
    path = RECIPES / "accelerate" / "two_gpus_zero3.yaml"
    arguments = ["--config_file", str(path), "recipe.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    # `launch_command` notes it on the way.
    args.deepspeed_fields_from_accelerate_config = ""
    _, environment = prepare_deepspeed_cmd_env(args)
    found = {
        name.removeprefix("ACCELERATE_").removeprefix("DEEPSPEED_"): value
        for name, value in environment.items()
        if name.startswith("ACCELERATE_")
    }
    expected = {
        "MIXED_PRECISION": "bf16", "USE_DEEPSPEED": "true", "ZERO_STAGE": "3", "ZERO3_INIT": "true",
        "GRADIENT_ACCUMULATION_STEPS": "auto", "GRADIENT_CLIPPING": "auto",
        "ZERO3_SAVE_16BIT_MODEL": "true", "OFFLOAD_OPTIMIZER_DEVICE": "none", "OFFLOAD_PARAM_DEVICE": "none",
    }  # fmt: skip
    assert {name: found.get(name) for name in expected} == expected


def launch(folder, settings, script, *arguments):
    """What a recipe in its smoke mode prints: without a GPU the processes compute on the CPU."""
    config = RECIPES / "accelerate" / settings
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    # A port of its own, for other tests may launch at the same time.
    command += ["--main_process_port", "0", str(RECIPES / script), "--smoke", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=200)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.mark.slow
def test_generate_long(tmp_path):
    printed = launch(tmp_path, "two_gpus_generate.yaml", "generate_long.py")
    assert "on 2 processes" in printed
    alone = subprocess.run(
        [sys.executable, str(RECIPES / "generate_long.py"), "--smoke"], capture_output=True, text=True
    )
    answers = [re.search(r"^tokens .*$", text, re.MULTILINE)[0] for text in (printed, alone.stdout)]
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_finetune_long(tmp_path):
    options = ["--report_to", "none", "--learning_rate", "1e-2", "--seed", "1"]
    printed = launch(
        tmp_path, "two_gpus_ddp.yaml", "finetune_long.py", "--output_dir", str(tmp_path), *options
    )
    rows = re.findall(r"^ *\d+-\d+ +(\S+) +(\S+)$", printed, re.MULTILINE)
    # One table: a process that trains apart prints its own.
    assert len(rows) == 6
    values = torch.tensor([[float(value) for value in row] for row in rows])
    assert values.isfinite().all() and (values[:, 0] != values[:, 1]).any()
    assert (tmp_path / "model.safetensors").exists()
