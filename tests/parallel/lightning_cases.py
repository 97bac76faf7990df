"""What the ranks of lightning attention's tests do. Run as `python lightning_cases.py P,P... TOPIC...`."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import ranks
import tiny
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from hf_longattn.cache.token_rows import TokenRows, scan_rows
from hf_longattn.parallel.group import SequenceGroup
from hf_longattn.parallel.lightning import scan_slices

TIMEOUT = 30.0


def mesh_of(size):
    return init_device_mesh("cpu", (size,), mesh_dim_names=("cp",))


# One scan of a sequence in slices, against one scan of the whole


def rows_of(layout, batch, length):
    """(exists, starts) of the whole rows; a document begins inside, at and across the edges of slices."""
    exists = starts = None
    if "left" in layout:
        exists = tiny.padding([length, length // 3][:batch], length, "left").bool()
    if "right" in layout:
        exists = tiny.padding([length, length // 2][:batch], length, "right").bool()
    if "holes" in layout:
        exists = torch.rand(batch, length, generator=torch.Generator().manual_seed(3)) > 0.4
        exists[0, : length // 2] = False
    if "packed" in layout:
        starts = torch.zeros(batch, length, dtype=torch.bool)
        starts[0, [0, 7, length // 2, length // 2 + 1]] = True
        starts[-1, [length // 4, length - 2]] = True
        if exists is not None:
            starts &= exists
    return exists, starts


SHAPES = {"plain": (2, 4, 4, 8, 8), "gqa": (2, 4, 2, 16, 5)}
LAYOUTS = ("full", "left", "right", "holes", "packed", "packed-left", "packed-holes")


def inputs_of(shape, length, given, dtype):
    batch, heads, groups, key_dim, value_dim = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, length, key_dim), (batch, groups, length, key_dim)]
    shapes += [(batch, groups, length, value_dim), (batch, heads, key_dim, value_dim)]
    tensors = [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]
    slopes = torch.tensor([0.8, 0.1, 4e-3, 4e-8][:heads], dtype=dtype, requires_grad=True)
    weights = torch.randn(batch, length, heads, value_dim, generator=generator).to(dtype)
    last = torch.randn(batch, heads, key_dim, value_dim, generator=generator).to(dtype)
    return [*tensors[:3], slopes, tensors[3] if given else None], weights, last


def whole_scan(shape, layout, length, given, dtype):
    """Output, final state and the gradients of one process, the outputs of missing tokens left out."""
    tensors, weights, last = inputs_of(shape, length, given, dtype)
    q, k, v, slopes, state = tensors
    exists, starts = rows_of(layout, q.shape[0], length)
    output, left = scan_rows(q, k, v, slopes, 0.3, TokenRows(exists, starts), state, stateful=True)
    output = output if exists is None else output * exists[..., None, None]
    ((output * weights).sum() + (left * last).sum()).backward()
    return [output.detach(), left.detach(), *(t.grad for t in tensors if t is not None)]


def own_tokens(rank, size, length, zigzag):
    pieces = torch.arange(length).chunk(2 * size if zigzag else size)
    own = [rank, 2 * size - 1 - rank] if zigzag else [rank]
    return [slice(int(pieces[i][0]), int(pieces[i][-1]) + 1) for i in own]


def sliced_scan(rank, size, group, shape, layout, length, given, zigzag, dtype=torch.float32):
    """The same from slices, put together: shares of replicated gradients are added up."""
    tensors, weights, last = inputs_of(shape, length, given, dtype)
    q, k, v, slopes, state = tensors
    own = own_tokens(rank, size, length, zigzag)
    exists, starts = rows_of(layout, q.shape[0], length)
    whole = TokenRows(exists, starts)
    mine = [torch.cat([x[:, :, part] for part in own], 2) for x in (q, k, v)]
    rows = [whole.part(part) for part in own]
    output, left = scan_slices(group, *mine, slopes, 0.3, rows, state, stateful=True)
    everyone = group.gather(left.detach())
    assert torch.equal(everyone, everyone[:1].expand_as(everyone)), "the last state differs between ranks"
    index = torch.cat([torch.arange(part.start, part.stop) for part in own])
    if exists is not None:
        output = output * exists[:, index][..., None, None]
    # Every rank has the last state: its gradient counts once in all.
    ((output * weights[:, index]).sum() + (left * last).sum() / size).backward()
    placed = torch.zeros(q.shape[0], length, *output.shape[2:], dtype=dtype)
    placed[:, index] = output.detach()
    parts = [placed, *(t.grad for t in tensors if t is not None)]
    placed, *grads = [group.add_up(part.clone().contiguous()) for part in parts]
    return [placed, left.detach(), *grads]


def scans():
    """Shape, layout, tokens, whether a state enters."""
    yield "plain", "full", 24, False
    yield "gqa", "full", 144, True
    for layout in LAYOUTS[1:]:
        yield "gqa", layout, 48, True
    yield "plain", "packed-holes", 24, False


EXPECTED = {}


def scan(rank, size, mesh):
    """Output, last state and all gradients: as close to fp64 as the scan of one process."""
    group = SequenceGroup(mesh.get_group("cp") if size > 1 else None, timeout=TIMEOUT)
    eps = torch.finfo(torch.float32).eps
    names = ("output", "state", "query", "key", "value", "slopes", "entering")
    for case in scans():
        exact, single = EXPECTED[case]
        for zigzag in (False, True):
            found = sliced_scan(rank, size, group, *case, zigzag)
            for name, got, standard, want in zip(names, found, single, exact, strict=False):
                # The gradient of what every slice shares is a sum over them, rounded at each.
                roundings = size * (1 + zigzag) if name in ("slopes", "entering") else 1
                bound = 1.5 * (tiny.relative_error(standard, want) + roundings * eps)
                error = tiny.relative_error(got, want)
                assert error <= bound, f"{case}, {zigzag=}: {name} is off by {error}, more than {bound}"


def expect(topics):
    """Computes the expectations here, so that every rank inherits them."""
    if "scan" in topics:
        for case in scans():
            EXPECTED[case] = [whole_scan(*case, dtype) for dtype in (torch.float64, torch.float32)]


def enter(rank, size, topics):
    mesh = mesh_of(size)
    for topic in topics:
        started = time.time()
        globals()[topic](rank, size, mesh)
        dist.barrier()
        if rank == 0:
            print(f"P{size} {topic}: {time.time() - started:.1f} s", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sizes, topics = sys.argv[1].split(","), sys.argv[2:]
    expect(topics)
    for size in sizes:
        ranks.run(enter, int(size), topics)
