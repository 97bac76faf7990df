"""Prepared models under DeepSpeed: ZeRO stage 2 trains as ever, stage 3 is refused by name."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

import hf_longattn

missing = importlib.util.find_spec("deepspeed") is None


@pytest.mark.slow
@pytest.mark.skipif(missing, reason="deepspeed is not installed")
@pytest.mark.parametrize("stage", ["2", "3"])
def test_two_processes(stage):
    script = Path(__file__).with_name("deepspeed_case.py")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, str(script), stage]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.count("done") == 2


def test_parameters_that_are_cut_are_refused():
    model = hf_longattn.prepare_training(tiny.build("llama").train(), block_size=16)
    ids = tiny.tokens(1, 20)
    # What ZeRO stage 3 puts on a parameter.
    model.model.layers[1].mlp.up_proj.weight.ds_id = 7
    with pytest.raises(ValueError, match="ZeRO stage 3.*FSDP2"):
        model(input_ids=ids, labels=ids)
