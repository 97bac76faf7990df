"""`hf-longattn doctor`: versions are judged rightly, and what fails is reported and sets the exit status."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from typer.testing import CliRunner

from hf_longattn.cli import doctor, doctor_probes
from hf_longattn.cli.main import app
from hf_longattn.kernels import dispatch


def run(*arguments):
    return CliRunner().invoke(app, ["doctor", *arguments])


@pytest.mark.parametrize(
    ("judge", "version", "status"),
    [
        (doctor.judge_torch, "2.8.1", "bad"),
        (doctor.judge_torch, "2.9.0", "ok"),
        (doctor.judge_transformers, "5.16.3", "bad"),
        (doctor.judge_transformers, "5.17.0", "ok"),
        (doctor.judge_transformers, "6.0.0", "bad"),
        (doctor.judge_accelerate, "1.9.0", "bad"),
        (doctor.judge_accelerate, None, "bad"),
        (doctor.judge_triton, "3.3.1", "bad"),
        (doctor.judge_triton, "3.6.0", "note"),
        (doctor.judge_triton, None, "note"),
    ],
)
def test_versions(judge, version, status, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert judge(version and Version(version))[0] == status


@pytest.mark.parametrize(("triton", "numpy", "status"), [("3.6", "2.4.1", "warning"), ("3.6", "2.3", "note")])
def test_the_interpreter_that_fails_with_a_new_numpy(triton, numpy, status, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert doctor.judge_triton(Version(triton), Version(numpy))[0] == status


def test_this_machine_is_usable_and_every_operation_was_run():
    result = run("--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["usable"]
    operations = {f["name"]: f for f in report["findings"] if f["section"] == "operations"}
    assert {"split-KV decode", "merge of partial results", "lightning"} <= operations.keys()
    # Each folder of an operator is run by one of them; the energy is blockwise attention's.
    folders = {path.parent.name for path in Path(dispatch.__file__).parent.glob("*/api.py")}
    sources = "".join(Path(module.__file__).read_text() for module in (doctor, doctor_probes))
    assert {name for name in folders if f"hf_longattn.kernels.{name} import" not in sources} == {
        "attention_energy"
    }
    if not torch.cuda.is_available():
        assert operations["blockwise backward, window"]["value"] == "sdpa"
        assert "cpu tensors" in operations["split-KV decode"]["remark"]


def test_an_operation_that_computes_wrongly_is_bad(monkeypatch):
    right = doctor.merge_partials

    def wrong(outputs, lse, impl):
        output, total = right(outputs, lse, impl=impl)
        return output * (1 if outputs.dtype == torch.float64 or impl == "reference" else 1.01), total

    monkeypatch.setattr(doctor, "merge_partials", wrong)
    probe = doctor._Probe("merge", partial(doctor._merge, device=torch.device("cpu")), ("auto",))
    monkeypatch.setattr(doctor, "_probes", lambda device: [probe])
    result = run()
    assert result.exit_code == 1 and "not usable" in result.stdout


def test_an_operation_that_fails_is_bad_and_named(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(doctor, "decode_attention", broken)
    result = run()
    assert result.exit_code == 1 and "no such instruction" in result.stdout


@pytest.mark.interpreted
@pytest.mark.parametrize(("name", "run"), list(doctor_probes.small_probes()))
def test_probes_of_small_operators_run_their_kernels(name, run):
    finding = doctor._try(doctor._Probe(name, partial(run, device=torch.device("cpu"))), torch.float32)
    assert (finding.status, finding.value) == ("ok", "triton")


def test_a_probe_feels_a_wrong_result(monkeypatch):
    right = doctor_probes.cache_write

    def wrong(keys, values, index, key, value, impl):
        right(keys, values, index if impl == "reference" else index.flip(0), key, value, impl=impl)

    monkeypatch.setattr(doctor_probes, "cache_write", wrong)
    run = dict(doctor_probes.small_probes())["cache write"]
    probe = doctor._Probe("cache write", partial(run, device=torch.device("cpu")), ("auto",))
    assert doctor._try(probe, torch.float32).status == "bad"
