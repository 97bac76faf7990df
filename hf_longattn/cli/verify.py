"""`hf-longattn verify MODEL`: the model under our attention, held against transformers' own.

The yardstick is eager attention in fp64 (fp32 for a large model), on each text alone and without padding.
transformers' sdpa in the model's dtype lies some distance from it, which is rounding; ours may lie 1.5 times
as far (plus the unit of the dtype) and no farther. Leaks are looked for by changing one token and seeing what
moves.
"""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache

import hf_longattn
from hf_longattn.cache.quantized import read_cache_dtype
from hf_longattn.cli.cache_error import CacheError, measure_cache
from hf_longattn.cli.measure import (
    SIDES,
    Bench,
    Choice,
    Exact,
    Measured,
    Request,
    forward,
    forward_alone,
    greedy,
    measure,
    measure_exact,
)
from hf_longattn.instance import unwrap


@dataclass
class Check:
    """One measured value and its bound.

    Args:
        implementation: whose attention was measured.
        name: what was measured.
        measured: the value.
        bound: the largest value that passes.
        remark: what a reader should know beside it.
    """

    implementation: str
    name: str
    measured: float
    bound: float
    remark: str = ""

    @property
    def passed(self) -> bool:
        """Whether the value is within its bound; NaN is not."""
        return self.measured <= self.bound


@dataclass
class Report:
    """All checks of one model.

    Args:
        model: as it was asked for.
        device: where it ran.
        dtype: of the model.
        standard: transformers' implementation that sets the bounds.
        yardstick: what errors are measured against.
        checks: in the order they were made.
        cache: what a cache in 8 bits changes, if that was asked for.
    """

    model: str
    device: str
    dtype: str
    standard: str
    yardstick: str
    checks: list[Check]
    cache: CacheError | None = None

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


def _error(result: Tensor, exact: Tensor) -> float:
    exact = exact.double()
    return ((result.double() - exact).norm() / exact.norm()).item()


@dataclass
class _Standard:
    """transformers' results: the yardstick, and the implementation that sets the bounds.

    `forced` (2, N, vocabulary) are the yardstick's logits along the greedy tokens of the latter.
    """

    exact: Exact
    measured: Measured
    forced: Tensor
    eps: float

    def bound(self, measured: Tensor, exact: Tensor) -> float:
        """1.5 * (error of the standard implementation + eps)."""
        return 1.5 * (_error(measured, exact) + self.eps)

    def leak_bound(self, leak: float) -> float:
        """Nothing may move; only where rounding moves the standard too (experts do), as much as there."""
        return 1.5 * (leak + self.eps) if leak else 0.0


def _measure_standard(bench: Bench) -> _Standard:
    """Measures transformers' own attention; the better of sdpa and eager sets the bounds.

    sdpa silently drops softcaps and sinks: a bound from it would let anything pass.
    """
    results = [measure(bench.load(name), bench) for name in ("sdpa", "eager")]
    model = bench.load_yardstick()
    exact = measure_exact(model, bench)
    errors = [_error(result.logits["no"], exact.logits["no"]) for result in results]
    measured = results[1 if errors[0] > 10 * errors[1] + 1e-6 else 0]
    forced = []
    for text, tokens in zip(bench.texts("left"), measured.tokens, strict=True):
        logits = forward_alone(model, torch.cat([text, tokens[None]], dim=1))
        forced.append(logits[:, text.shape[1] - 1 : -1])
    return _Standard(exact, measured, torch.cat(forced), torch.finfo(bench.dtype).eps)


def _token_check(tokens: Tensor, standard: _Standard, implementation: str, name: str) -> Check:
    """Counts rows whose tokens differ, other than by a tie that rounding decides."""
    expected, remarks, wrong = standard.measured.tokens, [], 0
    if tokens.shape != expected.shape:
        return Check(
            implementation, name, math.inf, 0, f"{tuple(tokens.shape)} tokens for {tuple(expected.shape)}"
        )
    for row, differs in enumerate(tokens != expected):
        if not differs.any():
            continue
        step = int(differs.int().argmax())
        choices = [int(tokens[row, step]), int(expected[row, step])]
        choice = Choice.between(choices, standard.forced[row, step], standard.measured.scores[row, step])
        wrong += not choice.is_tie
        verdict = "tie" if choice.is_tie else "wrong"
        figures = f"margin {choice.margin:.1e}, rounding {choice.rounding:.1e}"
        remarks.append(f"row {row}, token {step}: {verdict}, {figures}")
    return Check(implementation, name, wrong, 0, "; ".join(remarks))


def _logit_checks(result: Measured, standard: _Standard, implementation: str) -> Iterator[Check]:
    exact, measured = standard.exact, standard.measured
    for side in SIDES:
        bound = standard.bound(measured.logits[side], exact.logits[side])
        error = _error(result.logits[side], exact.logits[side])
        yield Check(implementation, f"logits, {side} padding", error, bound)
    bound = standard.bound(measured.gradients, exact.gradients)
    yield Check(implementation, "gradients", _error(result.gradients, exact.gradients), bound)
    leaks = ("a later token moves nothing", result.future_leak, measured.future_leak), (
        "padding moves nothing", result.padding_leak, measured.padding_leak,
    )  # fmt: skip
    for name, leak, allowed in leaks:
        yield Check(implementation, name, leak, standard.leak_bound(allowed))
    yield _token_check(result.tokens, standard, implementation, "greedy tokens, plain")


def _in_chunks(model: Any, bench: Bench, size: int) -> Tensor:
    mask, cache = bench.mask("left"), DynamicCache(config=model.config)
    starts = range(0, bench.tokens, size)
    parts = [slice(start, min(start + size, bench.tokens)) for start in starts]
    logits = [forward(model, bench.ids, mask, part, past_key_values=cache, use_cache=True) for part in parts]
    return bench.columns(torch.cat(logits, dim=1)[mask.bool()])


def _chunk_checks(model: Any, bench: Bench, standard: _Standard, implementation: str) -> Iterator[Check]:
    exact, measured = standard.exact.logits["left"], standard.measured.logits["left"]
    size = bench.tokens // 3 + 1
    error = _error(_in_chunks(model, bench, size), exact)
    yield Check(implementation, f"logits, chunks of {size}", error, standard.bound(measured, exact))
    first, first_exact = standard.measured.scores[:, 0], standard.forced[:, 0]
    # One position a row is a small sample: the error over the whole prompt counts too.
    bound = max(standard.bound(first, first_exact), standard.bound(measured, exact))
    for size in (7, bench.tokens // 2, 2 * bench.tokens):
        hf_longattn.prepare_generation(model, prefill_chunk_size=size)
        tokens, scores = greedy(model, bench)
        hf_longattn.restore(model)
        error = _error(scores[:, 0], first_exact)
        yield Check(implementation, f"prefill, prepared, chunks of {size}", error, bound)
        yield _token_check(tokens, standard, implementation, f"greedy tokens, prepared, chunks of {size}")


def _restore_check(bench: Bench) -> Check:
    """Counts what `restore` leaves different on a model loaded with transformers' own attention."""

    def state(model: Any) -> list[Any]:
        inner = unwrap(model)
        modules = list(inner.modules())
        attributes = [sorted(vars(module)) for module in modules]
        configs = [(id(vars(module).get("config")), getattr(module, "training", None)) for module in modules]
        saved = inner.config.to_json_string(), inner.generation_config.to_json_string()
        return [inner.config._attn_implementation, attributes, configs, saved]

    model = bench.load("sdpa")
    # A first forward may cache something of its own on the model.
    logits = forward(model, bench.ids, bench.mask("left"))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = state(model)
    hf_longattn.prepare_generation(model)
    greedy(model, bench)
    hf_longattn.restore(model)
    changed = sum(old != new for old, new in zip(before, state(model), strict=True))
    changed += sum(not torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    changed += not torch.equal(logits, forward(model, bench.ids, bench.mask("left")))
    return Check("", "prepare and restore change nothing", changed, 0)


def _remark_window(bench: Bench) -> str:
    window = getattr(bench.config, "sliding_window", None)
    if not window or window < bench.tokens:
        return ""
    return f"the window of {window} is not reached: use --tokens {window + 64}"


def verify_model(request: Request) -> Report:
    """Loads a model under each implementation and compares.

    Args:
        request: what to verify.

    Returns:
        the `Report`.

    Raises:
        ValueError: the model cannot be loaded or bypasses the attention interface, or an option does not fit.
    """
    read_cache_dtype(request.cache_dtype)
    bench = Bench(request)
    cache = None if request.cache_dtype is None else measure_cache(bench, request.cache_dtype)
    standard = _measure_standard(bench)
    checks = []
    for implementation in bench.implementations:
        model = bench.load(implementation)
        checks += _logit_checks(measure(model, bench), standard, implementation)
        checks += _chunk_checks(model, bench, standard, implementation)
        checks[-1].remark = checks[-1].remark or _remark_window(bench)
    checks.append(_restore_check(bench))
    dtype, yardstick = (str(d).removeprefix("torch.") for d in (bench.dtype, bench.yardstick_dtype))
    against = standard.measured.implementation, f"eager in {yardstick}"
    return Report(request.model, str(bench.device), dtype, *against, checks, cache)


def show(report: Report, *, as_json: bool) -> None:
    """Prints a report on standard output.

    Args:
        report: from `verify_model`.
        as_json: print one JSON object instead of a table.
    """
    console = Console(width=None if sys.stdout.isatty() else 160)
    if as_json:
        # JSON has no word for infinity or NaN.
        checks = [asdict(check) | {"passed": check.passed} for check in report.checks]
        for check in checks:
            check["measured"] = check["measured"] if math.isfinite(check["measured"]) else None
        console.print_json(json.dumps(asdict(report) | {"passed": report.passed, "checks": checks}))
        return
    console.print(f"{escape(report.model)}: {report.dtype} on {report.device}")
    console.print(f"errors are against {report.yardstick}, bounds 1.5 times the error of {report.standard}")
    table = Table("implementation", "check", "measured", "bound", "", "remark")
    for check in report.checks:
        verdict = "[green]pass[/green]" if check.passed else "[red]FAIL[/red]"
        numbers = f"{check.measured:.3g}", f"{check.bound:.3g}"
        table.add_row(check.implementation, check.name, *numbers, verdict, escape(check.remark))
    console.print(table)
    if report.cache is not None:
        console.print(report.cache.sentence())
    console.print("every check passed" if report.passed else "at least one check failed")
