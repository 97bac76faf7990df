"""What the ranks of lightning training do in its tests. Run as `python FILE P,P... TOPIC...`.

Every expectation is computed once, in one process on the unprepared models, before the ranks start.
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import ranks
import test_lightning_training as one
import tiny
import torch
from sequence_cases import approx, mesh_of

import hf_longattn

MODELS = ("model", "hybrid", "flag-hybrid", "minimax")
LAYOUTS = ("full", "left", "packed")


def prepare(name, mesh, **fields):
    fields = {"block_size": 5, "loss_chunk_size": 13, **fields}
    return hf_longattn.prepare_training(one.build(name), device_mesh=mesh, **fields)


def models(rank, size, mesh):
    """Loss and every gradient, the state passed on between blocks, slices and ranks."""
    for name in MODELS:
        for layout in LAYOUTS:
            # Groups of two layers, whose second forward shares states again.
            model = prepare(name, mesh, keep_every=2 if layout == "left" else 1)
            found, wanted = one.step(model, **one.batch(layout)), one.plain(name, layout)
            errors = [tiny.relative_error(found[0], wanted[0])]
            assert found[1].keys() == wanted[1].keys()
            errors.append(tiny.relative_error(one.flat(found[1]), one.flat(wanted[1])))
            bound = one.BOUNDS.get(name, one.BOUND)
            assert max(errors) <= bound, f"{name}, {layout}: loss and gradients differ by {errors}"


def train(model):
    """(losses, weights) of three steps of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)
    losses = []
    for layout in ("full", "packed", "left"):
        inputs = one.batch(layout)
        optimizer.zero_grad()
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, torch.cat([p.detach().flatten() for p in model.parameters()])


@functools.cache
def trained(name):
    return train(one.build(name))


def trajectory(rank, size, mesh):
    """Three steps on batches of several kinds: the losses and the weights of one process."""
    for name in ("model", "flag-hybrid"):
        losses, weights = train(prepare(name, mesh))
        assert losses == approx(trained(name)[0]), (name, losses, trained(name)[0])
        error = tiny.relative_error(weights, trained(name)[1])
        assert error <= one.BOUND, f"{name}: the weights differ by {error}"


def expect(topics):
    """Computes the expectations here, so that every rank inherits them."""
    if "models" in topics:
        for name in MODELS:
            for layout in LAYOUTS:
                one.plain(name, layout)
    if "trajectory" in topics:
        trained("model"), trained("flag-hybrid")


if __name__ == "__main__":
    ranks.run_topics(globals(), expect, mesh_of)
