"""Setting up a model whose sequences lie on several ranks: what can be cut, and what accelerate leaves us."""

from typing import Any

from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from hf_longattn.instance import Setup
from hf_longattn.parallel.group import SequenceGroup
from hf_longattn.training.forwards import is_norm, tokenwise_forward
from hf_longattn.training.layer import Runtime
from hf_longattn.training.sequence import SequenceParallel, depends_on_length, whole_rotary_forward

# Seconds that a rank waits for the others: one may be writing a checkpoint.
_TIMEOUT = 1800.0
_TOKENWISE = (nn.Embedding, nn.Linear, nn.Dropout)


def make_parallel(
    accelerator: Any, device_mesh: Any, decoder: nn.Module, layers: list[Any]
) -> SequenceParallel | None:
    """The ranks that share the sequences of a model, or None for this process alone.

    Args:
        accelerator: of `prepare_training`.
        device_mesh: of `prepare_training`.
        decoder: the module that holds the layers and the final norm.
        layers: its layers.

    Raises:
        ValueError: a mesh or a decoder that cannot be cut along the sequence.
    """
    group = SequenceGroup.find(accelerator, device_mesh, _TIMEOUT)
    if group is None or group.world_size == 1:
        return None
    mesh = getattr(accelerator, "torch_device_mesh", None) if device_mesh is None else device_mesh
    names = getattr(mesh, "mesh_dim_names", None) or ()
    if mesh is not None and "tp" in names and mesh["tp"].size() > 1:
        raise ValueError(
            f"`device_mesh` has dimensions {tuple(names)}: tensor parallelism does not go together with one "
            "sequence over several processes in training; use FSDP to spread the parameters."
        )
    _check_decoder(decoder, layers)
    config = getattr(accelerator, "parallelism_config", None)
    is_configured = device_mesh is None and getattr(config, "cp_enabled", False)
    copies = group.world_size if is_configured else 1
    return SequenceParallel(group, decoder, copies, has_mesh=device_mesh is not None)


def _check_decoder(decoder: nn.Module, layers: list[Any]) -> None:
    """Every parameter must be where gradients are added up over the ranks."""
    known = {id(p) for module in (*layers, *_outside(decoder)) for p in module.parameters()}
    missing = [name for name, p in decoder.named_parameters() if id(p) not in known]
    if missing:
        raise ValueError(
            f"`model`: {type(decoder).__name__} uses {', '.join(missing[:3])} outside its layers in a way "
            "that is not known here, so its sequences cannot lie on several processes; leave out "
            "`accelerator` and `device_mesh`."
        )


def _outside(decoder: nn.Module) -> list[nn.Module]:
    """Children that treat every token alone: embeddings, projections, norms, dropout."""
    return [
        child
        for child in decoder.children()
        if is_norm(child) or isinstance(_without_adapter(child), _TOKENWISE)
    ]


def _without_adapter(module: nn.Module) -> nn.Module:
    children = dict(module.named_children())
    return children.get("base_layer", children.get("original_module", module))


def share_sequences(changes: Setup, parallel: SequenceParallel, accelerator: Any, runtime: Runtime) -> None:
    """Replaces the forwards around the layers by those that a sequence over several ranks needs.

    Args:
        changes: where the changes are noted, to be undone.
        parallel: the ranks.
        accelerator: of `prepare_training`, or None.
        runtime: settings of the model.
    """
    decoder = parallel.decoder
    for child in _outside(decoder):
        if not is_norm(child):
            changes.set(child, "forward", tokenwise_forward(child, runtime))
    for module in decoder.modules():
        if depends_on_length(module):
            changes.set(module, "forward", whole_rotary_forward(module))
    changes.set_forward(decoder, parallel.forward(runtime.is_active))
    if accelerator is not None and not parallel.has_mesh:
        _share_batches(changes, parallel, accelerator)


def _share_batches(changes: Setup, parallel: SequenceParallel, accelerator: Any) -> None:
    """Makes the accelerator hand whole batches to us, the same to every rank of a group."""
    if parallel.copies > 1:
        # accelerate would cut the batch itself, for torch's own context parallelism, and take the mask from
        # attention; it asks this field who does.
        changes.set(accelerator.parallelism_config, "cp_backend", "hf_longattn")
        changes.set(accelerator, "_prepare_cp", _leave_as_they_are)
        return
    # Where all processes form the group. Loaders ask for the mesh, and know its "cp".
    shape = (parallel.group.world_size,)
    mesh = init_device_mesh(accelerator.device.type, shape, mesh_dim_names=("cp",))
    changes.set(accelerator, "_prepare_device_mesh", lambda: mesh)


def _leave_as_they_are(*args: Any) -> tuple[Any, ...]:
    return args
