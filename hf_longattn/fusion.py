"""Fewer launches: norms, gates and rotary embeddings in one kernel each, and faster products.

A decoding step of a large model is some 1500 launches, most of them elementwise on one token; a chunk of a
prompt, or a block of a layer that trains, moves every intermediate result through memory several times. While
a step is being captured, a prompt being read or a layer being run, modules and functions that are proven, by
running them, to be plain norms, gates or rotary embeddings are replaced by single kernels, and put back
afterwards. What is run is their code, on parameters of our own: those of the model may be ones or zeros today
and others after a step of training, or lie elsewhere.
"""

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_longattn.instance import Setup, every_module, is_compiled, is_watched, plain_settings
from hf_longattn.kernels.dispatch import has_triton
from hf_longattn.kernels.gated_activation import gated_activation
from hf_longattn.kernels.rotary_embedding import rotary_embedding
from hf_longattn.kernels.row_norm import row_norm

_ROTARY = "apply_rotary_pos_emb"
_ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
_PROJECTIONS = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")
# From a module, the forward that stands in for its own.
_Maker = Callable[[Any], Callable[[Tensor], Tensor]]
# What a module of another structure raises at a probe.
_OTHER = (TypeError, RuntimeError, ValueError, IndexError, AttributeError)

# What running the code of a class with some settings has shown, so that it is run once.
_FOUND: dict[Any, Any] = {}
_UNSEEN = object()
# Two threads that replace the same function at once would put back each other's.
_LOCK = threading.RLock()


class _Products(Protocol):
    def replace(
        self, changes: Setup, model: Any, rows: int, agree: Callable[[Tensor, Tensor], bool]
    ) -> None: ...


@contextlib.contextmanager
def fused(model: Any, rows: int = 0, products: _Products | None = None) -> Iterator[None]:
    """Inside, the model's norms, gates and rotary embeddings are single kernels, products the faster ones.

    A model that is compiled, or of which a part with parts of its own is, stays as it is.

    Args:
        model: a transformers model on a CUDA device.
        rows: tokens of the step, all sequences together.
        products: which linear layers to replace; `None` leaves them alone.
    """
    changes = Setup(model)
    # A probe may fail, say for memory: what was replaced before it is put back, too.
    try:
        with _LOCK:
            _replace(changes, model, rows, products)
        yield
    finally:
        with _LOCK:
            changes.undo()


def fused_prompt(model: Any) -> contextlib.AbstractContextManager[None]:
    """`fused` for the chunks of a prompt, where the model is on a GPU, evaluates, and asks for no gradient.

    Args:
        model: a transformers model.
    """
    spread = len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1
    plain = model.device.type == "cuda" and not spread and not model.training
    asked = torch.is_grad_enabled() or torch.is_autocast_enabled()
    return fused(model) if plain and not asked else contextlib.nullcontext()


@contextlib.contextmanager
def fused_layer(layer: Any, hidden: Tensor) -> Iterator[None]:
    """Inside, the norms, gates and rotary embeddings of a layer are single kernels, with their gradients.

    Args:
        layer: a decoder layer; where it is not on a GPU, nothing happens.
        hidden: what it is given.
    """
    if not runs_on(hidden.device):
        yield
        return
    changes = Setup(layer)
    try:
        with _LOCK:
            modules = every_module(layer)
            _replace_modules(changes, modules, _norm_key, _fused_norm)
            _replace_modules(changes, modules, _gated_key, _fused_gate)
            _replace_rotations(changes, modules, hidden)
        yield
    finally:
        with _LOCK:
            changes.undo()


def fused_norm(module: nn.Module, forward: Callable[..., Any], hidden: Tensor) -> Callable[..., Any]:
    """The forward of a module, as one kernel if it is a norm on a GPU.

    Args:
        module: any module.
        forward: its own forward, or what somebody put in its place.
        hidden: what it is given.
    """
    is_own = getattr(forward, "__func__", None) is type(module).forward
    if not is_own or not runs_on(hidden.device) or (key := _norm_key(module)) is None:
        return forward
    with _LOCK:
        replacement = _maker(key, module, _fused_norm)
    return forward if replacement is None else functools.partial(_run, replacement(module), forward)


def is_fused(module: nn.Module) -> bool:
    """Whether the forward of a module is one of our kernels for now.

    Args:
        module: any module.
    """
    return getattr(vars(module).get("forward"), "func", None) is _run


def runs_on(device: torch.device) -> bool:
    """Whether our kernels run where a layer is.

    Args:
        device: of its states.
    """
    # Triton launches on the current device, which is not that of every layer of a model spread over several.
    return device.type == "cuda" and has_triton() and device.index in (None, torch.cuda.current_device())


def _replace(changes: Setup, model: Any, rows: int, products: _Products | None) -> None:
    # A prompt waits for this: the modules are walked through once.
    modules = every_module(model)
    if is_compiled(modules):
        return
    _replace_modules(changes, modules, _norm_key, _fused_norm)
    _replace_rotations(changes, modules, next(model.parameters()))
    if products is not None:
        products.replace(changes, model, rows, _close)
    _replace_modules(changes, modules, _gated_key, _fused_gate)


def _replace_modules(
    changes: Setup,
    modules: list[nn.Module],
    key_of: Callable[[Any], Any],
    make: Callable[[Any], _Maker | None],
) -> None:
    """Replaces every module with a key, by what `make` finds for the first of each key."""
    for module in modules:
        # Asked first: most modules have none.
        if (key := key_of(module)) is None:
            continue
        # A forward that somebody else put there does more than the class says; one that is compiled is fused.
        is_own = "forward" not in vars(module) and module._compiled_call_impl is None
        if is_own and not module._forward_hooks and (replacement := _maker(key, module, make)) is not None:
            changes.set(module, "forward", functools.partial(_run, replacement(module), module.forward))


def _maker(key: Any, module: Any, make: Callable[[Any], _Maker | None]) -> _Maker | None:
    if (found := _FOUND.get(key, _UNSEEN)) is _UNSEEN:
        with _as_it_is(key[0]):
            found = _FOUND[key] = make(module)
    return found


@contextlib.contextmanager
def _as_it_is(device: torch.device) -> Iterator[None]:
    """Inside, modules compute in the dtype they are given, without gradient."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _run(
    replacement: Callable[[Tensor], Tensor], original: Callable[..., Any], *args: Any, **keywords: Any
) -> Any:
    """Calls the replacement with the states; what else a module takes, only its own forward knows."""
    return replacement(*args) if len(args) == 1 and not keywords else original(*args, **keywords)


def _norm_key(module: Any) -> Any:
    if not _is_norm(type(module)):
        return None
    weight = module._parameters.get("weight")
    if weight is None or not _is_whole(weight) or weight.ndim != 1:
        return None
    if not isinstance(_eps(module), float) or module._modules:
        return None
    return weight.device, weight.shape, weight.dtype, *_code(module)


@functools.cache
def _is_norm(kind: type) -> bool:
    return kind.__name__.endswith(("RMSNorm", "LayerNorm"))


def _code(module: Any) -> tuple[Any, ...]:
    """What a module computes but for its parameters."""
    return type(module), type(module).forward, plain_settings(module)


def _is_whole(weight: Tensor) -> bool:
    """An ordinary parameter: neither sharded, nor quantised, nor elsewhere."""
    return type(weight) is nn.Parameter and weight.numel() > 0 and weight.device.type != "meta"


def _eps(module: Any) -> Any:
    # A name that a module lacks is slow to ask it for.
    name = "variance_epsilon" if "variance_epsilon" in vars(module) else "eps"
    return getattr(module, name, None)


def _twin(module: Any, tensors: dict[str, Tensor], parts: dict[str, nn.Module]) -> Any:
    """A module of the same code and settings, on other parameters and parts.

    What is not given is NaN: code that reads it will not agree with anything.
    """
    twin = object.__new__(type(module))
    vars(twin).update(vars(module))
    for name in ("_parameters", "_buffers"):
        own = {key: None if value is None else torch.full_like(value, torch.nan, dtype=torch.float32)
               for key, value in getattr(module, name).items()}  # fmt: skip
        vars(twin)[name] = {key: tensors.get(key, value) for key, value in own.items()}
    vars(twin)["_modules"] = {**module._modules, **parts}
    return twin


def _run_code(module: Any, states: Tensor) -> Any:
    """What the class of a module computes, without the hooks around it."""
    try:
        return type(module).forward(module, states)
    except _OTHER:
        return None


def _fused_norm(module: Any) -> _Maker | None:
    """The kind of norm that a module computes, found out by running it: Gemma's adds 1 to its weight."""
    weight, bias, eps = module.weight, getattr(module, "bias", None), _eps(module)
    twin = _twin(module, {"weight": _draw(weight, *weight.shape)}, {})
    if isinstance(bias, Tensor):
        twin = _twin(twin, {"weight": twin.weight, "bias": _draw(weight, 1, *weight.shape)[0]}, {})
    probe = _draw(weight, 4, *weight.shape)
    # Rows small enough for eps to count, and large ones.
    probe = probe * torch.tensor([1.0, 1e-3, 0.05, 30.0]).to(probe)[:, None]
    layer = type(module).__name__.endswith("LayerNorm")
    kinds = ("layer",) if layer else ("rms", "rms_wide", "rms_plus_one")
    makers = [functools.partial(_norm_maker, eps, kind) for kind in kinds]
    return _nearest(makers, twin, probe)


def _norm_maker(eps: float, kind: str, module: Any) -> Callable[[Tensor], Tensor]:
    # A module takes its time to tell that it has no bias.
    own = module._parameters
    others = own if "bias" in own else vars(module)

    def forward(hidden_states: Tensor) -> Tensor:
        dtype, weight = hidden_states.dtype, own["weight"]
        # What other dtypes give, and autocast of less than fp32, only the module's own code knows.
        mixed = dtype != torch.float32 and torch.is_autocast_enabled(hidden_states.device.type)
        if dtype != weight.dtype or mixed:
            return type(module).forward(module, hidden_states)
        return row_norm(hidden_states, weight, others.get("bias"), eps=eps, kind=kind)

    return forward


class _Part(nn.Module):
    """Stands in for a linear layer: a sum of some of its inputs for every output, without a weight."""

    def __init__(self, like: Any, seed: int, device: torch.device) -> None:
        super().__init__()
        self.in_features, self.out_features = like.in_features, like.out_features
        terms = max(self.in_features, self.out_features)
        generator = torch.Generator().manual_seed(seed)
        self.source = torch.randint(self.in_features, (terms,), generator=generator).to(device)
        self.target = torch.arange(terms, device=device) % self.out_features

    def forward(self, states: Tensor) -> Tensor:
        result = states.new_zeros(*states.shape[:-1], self.out_features)
        return result.index_add(-1, self.target, states[..., self.source])


def _gated_key(module: Any) -> Any:
    """A feed-forward layer with the names that gated layers have throughout transformers.

    What its linear layers are, with adapters or quantised, is their own matter: they are called as ever.
    """
    if "down_proj" not in module._modules:
        return None
    parts, activation = _linear_parts(module), _activation_of(module)
    if "down_proj" not in parts or activation is None:
        return None
    if ("gate_up_proj" in parts) == ("gate_proj" in parts) or ("gate_proj" in parts) != ("up_proj" in parts):
        return None
    weight = next(_held(parts["down_proj"], "_parameters"), None)
    others = [pair for pair in module._modules.items() if pair[0] not in parts and pair[1] is not None]
    # A norm in between, or anything else that learns.
    if weight is None or weight.device.type == "meta" or any([_learns(part) for _, part in others]):
        return None
    widths = tuple([(name, part.in_features, part.out_features) for name, part in parts.items()])
    kin = tuple([(name, type(part), plain_settings(part)) for name, part in others])
    # An activation without parts is told from others by its class and settings.
    is_kin = any([part is activation and not part._modules for _, part in others])
    name = None if is_kin else repr(activation)
    return weight.device, weight.dtype, widths, kin, name, *_code(module)


def _learns(part: Any) -> bool:
    """Whether a module holds parameters or buffers."""
    if not (part._modules or part._parameters or part._buffers):
        return False
    return any(True for table in ("_parameters", "_buffers") for _ in _held(part, table))


def _held(module: nn.Module, table: str) -> Iterator[Tensor]:
    """`module.parameters()`, or its buffers, without their names, which take longer."""
    for part in every_module(module) if module._modules else (module,):
        if own := vars(part)[table]:
            yield from [value for value in own.values() if value is not None]


def _linear_parts(module: Any) -> dict[str, Any]:
    """The linear layers of a feed-forward layer, whatever adapts or quantises them."""
    # Experts keep several matrices in one parameter, which is no module.
    found = module._modules
    return {name: found[name] for name in _PROJECTIONS if name in found and _is_linear(found[name])}


def _is_linear(part: Any) -> bool:
    widths = getattr(part, "in_features", None), getattr(part, "out_features", None)
    return type(widths[0]) is type(widths[1]) is int


def _activation_of(module: Any) -> Any:
    found = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)
    # One that is watched, or changed, must go on being called.
    watched = isinstance(found, nn.Module) and ("forward" in vars(found) or is_watched(found))
    return found if callable(found) and not watched else None


def _fused_gate(module: Any) -> _Maker | None:
    parts = _linear_parts(module)
    like = next(parts["down_proj"].parameters())
    steps = torch.linspace(-6, 6, 97, device=like.device)
    try:
        values = _activation_of(module)(steps)
    except _OTHER:
        return None
    # In fp32 the two forms of GELU, which bf16 cannot tell apart, are far from each other.
    same = [name for name in _ACTIVATIONS if _is_activation(name, steps, values)]
    stand_ins: dict[str, Any] = {
        name: _Part(part, seed, like.device) for seed, (name, part) in enumerate(parts.items())
    }
    width = parts["gate_up_proj" if "gate_up_proj" in parts else "gate_proj"].in_features
    makers = [functools.partial(_gate_maker, name) for name in same]
    twin, probe = _twin(module, {}, stand_ins), _draw(like, 2, 2, width)
    # Some layers cut what is large off, at 7 or 10, which small states never reach.
    found = _nearest(makers, twin, probe)
    return found if _nearest(makers, twin, 30 * probe) else None


def _is_activation(name: str, steps: Tensor, values: Any) -> bool:
    """Whether `values` are those of an activation at `steps`, in fp32."""
    result = gated_activation(steps, torch.ones_like(steps), activation=name)
    return isinstance(values, Tensor) and bool((result - values).abs().max() <= 1e-5)


def _gate_maker(activation: str, module: Any) -> Callable[[Tensor], Tensor]:
    fused_projection, parts = getattr(module, "gate_up_proj", None), module._modules

    def forward(hidden_states: Tensor) -> Tensor:
        if fused_projection is not None:
            gate, up = fused_projection(hidden_states).chunk(2, dim=-1)
        else:
            gate, up = parts["gate_proj"](hidden_states), parts["up_proj"](hidden_states)
        if gate.dtype != up.dtype:
            return parts["down_proj"](_activation_of(module)(gate) * up)
        return parts["down_proj"](gated_activation(gate, up, activation=activation))

    return forward


def _nearest(makers: list[Any], module: Any, probe: Tensor) -> _Maker | None:
    """Of the ways that agree with a module up to rounding the nearest, or None."""
    expected = _run_code(module, probe)
    if not isinstance(expected, Tensor):
        return None
    results = [(make, make(module)(probe)) for make in makers]
    agree = [(make, result) for make, result in results if _close(result, expected)]
    distances = [float((result.double() - expected.double()).norm()) for _, result in agree]
    return agree[distances.index(min(distances))][0] if agree else None


def _replace_rotations(changes: Setup, modules: list[nn.Module], like: Tensor) -> None:
    for name in {type(module).__module__ for module in modules}:
        source = sys.modules.get(name)
        original = vars(source).get(_ROTARY) if source is not None else None
        # Another thread may be running a model of this kind: one replacement is enough for both.
        if original is None or getattr(original, "func", None) is _rotate:
            continue
        key = (original, like.dtype, like.device)
        if key not in _FOUND:
            with _as_it_is(like.device):
                _FOUND[key] = _same_rotation(original, like, 16), _same_rotation(original, like, 24)
        if _FOUND[key][0]:
            changes.set(source, _ROTARY, functools.partial(_rotate, original, _FOUND[key]))


def _rotate(
    original: Callable[..., Any],
    proven: tuple[bool, bool],
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    unsqueeze_dim: int = 1,
) -> tuple[Tensor, Tensor]:
    """`proven` says whether `original` is, where all of a head turns, and where its first part does."""
    width = cos.shape[-1]
    whole, part = proven
    if cos.dtype != q.dtype or width > q.shape[-1] or not (part if width < q.shape[-1] else whole):
        return original(q, k, cos, sin, unsqueeze_dim)
    if unsqueeze_dim == 2:
        query, key = rotary_embedding(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return query.transpose(1, 2), key.transpose(1, 2)
    return rotary_embedding(q, k, cos, sin)


def _same_rotation(original: Callable[..., Any], like: Tensor, head_dim: int) -> bool:
    """Whether `original` turns the first 16 of `head_dim` as our kernel does, and leaves the others."""
    query, key = _draw(like, 2, 4, 3, head_dim), _draw(like, 2, 2, 3, head_dim)
    angle = _draw(like, 2, 3, 8).repeat(1, 1, 2)
    try:
        # Some write over what they are given.
        expected = original(query.clone(), key.clone(), angle.cos(), angle.sin())
    except _OTHER:
        # Another signature or layout: not this embedding.
        return False
    if not isinstance(expected, tuple) or len(expected) != 2:
        return False
    result = _rotate(original, (True, True), query, key, angle.cos(), angle.sin())
    return all(a.shape == b.shape and _close(a, b) for a, b in zip(result, expected, strict=True))


def _draw(like: Tensor, *shape: int) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(sum(shape))
    dtype = like.dtype if like.is_floating_point() else torch.float32
    return torch.randn(*shape, device=like.device, dtype=dtype, generator=generator)


def _close(result: Tensor, expected: Tensor) -> bool:
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return False
    # Two roundings of the model's own against one of ours.
    bound = 2 * torch.finfo(expected.dtype).eps * expected.double().norm()
    return bool((result.double() - expected.double()).norm() <= bound)
