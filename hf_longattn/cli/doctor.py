"""`hf-longattn doctor`: what this machine can do, found out by running every operation on it once."""

import json
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata

import torch
from packaging.version import Version
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from hf_longattn.cli.doctor_probes import heads, small_probes
from hf_longattn.kernels import dispatch
from hf_longattn.kernels.blockwise_attention import blockwise_attention
from hf_longattn.kernels.decode_attention import decode_attention
from hf_longattn.kernels.key_range import KeyRange
from hf_longattn.kernels.lightning_attention import lightning_attention
from hf_longattn.kernels.merge_partials import merge_partials

_COLOURS = {"ok": "green", "note": "cyan", "warning": "yellow", "bad": "red"}


@dataclass
class Finding:
    """One line of the report.

    Args:
        section: "versions", "devices" or "operations".
        name: what was looked at.
        value: what was found.
        status: "ok", "note", "warning" or "bad".
        remark: why, and what to do about it.
    """

    section: str
    name: str
    value: str
    status: str = "ok"
    remark: str = ""


@dataclass
class Report:
    """All findings; `usable` unless one of them is bad."""

    findings: list[Finding]

    @property
    def usable(self) -> bool:
        """Whether nothing is bad."""
        return all(finding.status != "bad" for finding in self.findings)


def examine() -> Report:
    """Looks at versions and devices, and runs every operation once.

    Returns:
        the `Report`.
    """
    return Report([*_versions(), *_devices(), *_operations()])


def _version(package: str) -> Version | None:
    try:
        return Version(metadata.version(package))
    except metadata.PackageNotFoundError:
        return None


def _versions() -> Iterator[Finding]:
    yield Finding("versions", "python", platform.python_version(), *judge_python(sys.version_info[:2]))
    for package, judge in _JUDGES.items():
        version = _version(package)
        yield Finding("versions", package, str(version or "not installed"), *judge(version))


def judge_python(version: tuple[int, ...]) -> tuple[str, str]:
    """Status and remark for a Python version, (major, minor)."""
    return ("ok", "") if version >= (3, 10) else ("bad", "Python 3.10 or later is needed")


def judge_torch(version: Version | None) -> tuple[str, str]:
    """Status and remark for a version of torch."""
    if version is None or version < Version("2.9"):
        return "bad", "torch 2.9 or later is needed: pip install -U torch"
    return "ok", ""


def judge_transformers(version: Version | None) -> tuple[str, str]:
    """Status and remark for a version of transformers."""
    if version is None or not Version("5.17") <= version < Version("6"):
        return "bad", "transformers 5.17 or later, before 6, is needed: pip install 'transformers>=5.17,<6'"
    return "ok", ""


def judge_accelerate(version: Version | None) -> tuple[str, str]:
    """Status and remark for a version of accelerate."""
    if version is None or version < Version("1.10"):
        return "bad", "accelerate 1.10 or later is needed: pip install -U accelerate"
    return "ok", ""


def judge_triton(version: Version | None, numpy: Version | None = None) -> tuple[str, str]:
    """Status and remark for a version of Triton.

    Args:
        version: of Triton, or None where it is not installed.
        numpy: version of NumPy, which Triton's interpreter computes with; looked up if None.
    """
    if version is None:
        return "note", "operations run in plain torch"
    if version < Version("3.4"):
        return "bad", "triton 3.4 or later is needed: pip install -U triton"
    numpy = numpy or _version("numpy")
    if dispatch.interpreting():
        if version < Version("3.7") and numpy is not None and numpy >= Version("2.4"):
            return (
                "warning",
                f"its interpreter fails with numpy {numpy} on loops with run-time bounds; use numpy < 2.4",
            )
        return "note", "TRITON_INTERPRET=1: kernels run in Python, slowly, and bf16 products are wrong there"
    if version < Version("3.8"):
        return (
            "note",
            "on Hopper, 3.4 to 3.7 miscompile a transposed accumulator fed to a dot; our kernels avoid it",
        )
    return "ok", ""


_JUDGES: dict[str, Callable[[Version | None], tuple[str, str]]] = {
    "torch": judge_torch,
    "triton": judge_triton,
    "transformers": judge_transformers,
    "accelerate": judge_accelerate,
}


def _devices() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        built = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no GPU"
        yield Finding("devices", "cpu", f"{torch.get_num_threads()} threads", "note", built)
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        old = (properties.major, properties.minor) < (8, 0)
        remark = "bf16 and the Triton kernels want compute capability 8.0 or later" if old else ""
        capability = f"sm_{properties.major}{properties.minor}"
        value = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {capability}"
        yield Finding("devices", f"cuda:{index}", value, "warning" if old else "ok", remark)


@dataclass
class _Probe:
    """An operation on a small input of a dtype, with its implementations from the fastest on."""

    name: str
    run: Callable[[str, torch.dtype], list[Tensor]]
    implementations: tuple[str, ...] = ("triton", "reference")


def _decode(impl: str, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    inputs = [heads(length, device, dtype) for length in (1, 96, 97)]
    return [decode_attention(inputs[0], inputs[1], inputs[2][:, :, :96], impl=impl)[0]]


def _blockwise(
    impl: str, dtype: torch.dtype, device: torch.device, window: bool, backward: bool
) -> list[Tensor]:
    inputs = [heads(length, device, dtype)[:, :, :96].requires_grad_(backward) for length in (96, 97, 98)]
    first = torch.arange(96, dtype=torch.int32, device=device)[None].sub(32).clamp(min=0)
    mask = KeyRange(causal=True, lower=first if window else None)
    output, _ = blockwise_attention(*inputs, mask=mask, impl=impl)
    return list(torch.autograd.grad(output, inputs, output.detach())) if backward else [output]


def _merge(impl: str, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    outputs = torch.stack([heads(4, device, dtype), heads(5, device, dtype)[:, :, :4]])
    lse = outputs[..., 0].to(torch.promote_types(dtype, torch.float32))
    return [merge_partials(outputs, lse, impl=impl)[0]]


def _lightning(impl: str, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    inputs = [heads(length, device, dtype)[:, :, :96] for length in (96, 97, 98)]
    slopes = torch.tensor([0.1, 0.5], device=device, dtype=torch.promote_types(dtype, torch.float32))
    result = lightning_attention(inputs[0], inputs[1], inputs[2], slopes, impl=impl)
    return [result] if isinstance(result, Tensor) else list(result)


def _probes(device: torch.device) -> Iterator[_Probe]:
    # On the CPU torch's kernels come first; interpreted Triton runs there only where it is asked for.
    fastest = ("sdpa", "reference") if device.type == "cpu" else ("sdpa", "triton", "reference")
    yield _Probe("split-KV decode", partial(_decode, device=device))
    for window, backward in ((False, False), (False, True), (True, False), (True, True)):
        name = f"blockwise {'backward' if backward else 'forward'}, {'window' if window else 'causal'}"
        run = partial(_blockwise, device=device, window=window, backward=backward)
        yield _Probe(name, run, fastest)
    yield _Probe("merge of partial results", partial(_merge, device=device))
    yield _Probe("lightning", partial(_lightning, device=device))
    for name, run in small_probes():
        yield _Probe(name, partial(run, device=device))


def _operations() -> Iterator[Finding]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for probe in _probes(device):
        yield _try(probe, dtype)


def _failures() -> tuple[type[Exception], ...]:
    """What a kernel that does not compile or run raises."""
    if not dispatch.has_triton():
        return (RuntimeError,)
    from triton.runtime.errors import TritonError

    return RuntimeError, TritonError


def _try(probe: _Probe, dtype: torch.dtype) -> Finding:
    """Runs the first implementation that takes the input, and says why those before it did not."""
    refused = []
    for impl in probe.implementations:
        try:
            result = probe.run(impl, dtype)
        except ValueError as refusal:
            refused.append(_cause(refusal))
            continue
        except _failures() as failure:
            return Finding("operations", probe.name, impl, "bad", f"fails: {str(failure).splitlines()[0]}")
        return _judge(probe, impl, result, dtype, refused)
    return Finding("operations", probe.name, "none", "bad", "; ".join(refused))


def _cause(refusal: ValueError) -> str:
    """The part of "`impl='triton'` of x cannot run on 'cpu' tensors; move ..." that is new in a table."""
    words = " ".join(str(refusal).split()).partition(";")[0]
    return words.replace("`", "").replace("impl=", "").replace("'", "")


def _judge(probe: _Probe, impl: str, result: list[Tensor], dtype: torch.dtype, refused: list[str]) -> Finding:
    """Holds a result against fp64: at most 1.5 times the error of plain torch in the same dtype."""
    exact = torch.cat([x.flatten() for x in probe.run("reference", torch.float64)])

    def error(tensors: list[Tensor]) -> float:
        flat = torch.cat([x.flatten() for x in tensors]).double()
        return ((flat - exact).norm() / exact.norm()).item()

    got, bound = error(result), 1.5 * (error(probe.run("reference", dtype)) + torch.finfo(dtype).eps)
    remark = f"error {got:.1e}, at most {bound:.1e}"
    # NaN fails too.
    status = "ok" if got <= bound else "bad"
    return Finding("operations", probe.name, impl, status, "; ".join([remark, *refused]))


def show(report: Report, *, as_json: bool) -> None:
    """Prints a report on standard output.

    Args:
        report: from `examine`.
        as_json: print one JSON object instead of tables.
    """
    console = Console(width=None if sys.stdout.isatty() else 160)
    if as_json:
        findings = [asdict(finding) for finding in report.findings]
        console.print_json(json.dumps({"usable": report.usable, "findings": findings}))
        return
    for section in ("versions", "devices", "operations"):
        table = Table("", "", "", "", title=section, title_justify="left", show_header=False)
        for finding in report.findings:
            if finding.section == section:
                colour = _COLOURS[finding.status]
                status = f"[{colour}]{finding.status}[/{colour}]"
                table.add_row(finding.name, escape(finding.value), status, escape(finding.remark))
        console.print(table)
    console.print("usable" if report.usable else "not usable: see what is marked bad")
