"""Layers that wait in host memory: the bits of a cache that stays, in whatever order copies are done."""

import copy
import gc
import weakref

import pytest
import tiny
import torch
import transformers as tf
from safetensors.torch import load_file

from hf_longattn.cache import LongContextCache, offloaded, preallocated
from hf_longattn.cache.offloaded import OffloadedLayer, Slot, full_layers, offloaded_layers
from hf_longattn.cache.snapshot import Snapshot

LAYERS = 6


def config(**changes):
    return tiny.CONFIGS["llama"](num_hidden_layers=LAYERS, **changes)


def pair(count=4, cache_dtype=None, capacity=0):
    """A cache that stays, and one of the same model with offloaded layers."""
    made = [LongContextCache(config(), capacity, cache_dtype, number) for number in (0, count)]
    assert made[1].offload_layers == count
    return made


def states(batch, count, seed):
    generator = torch.Generator().manual_seed(seed)
    # As a model makes them: heads behind tokens.
    return [torch.randn(batch, count, 2, 16, generator=generator).transpose(1, 2) for _ in range(2)]


def forward(caches, count, seed=0, batch=2):
    """The same new tokens for all caches, layer by layer; the views must be equal when they are returned."""
    for index in range(len(caches[0].layers)):
        new = states(batch, count, 100 * seed + index)
        expected = caches[0].update(*new, index)
        for cache in caches[1:]:
            for result, wanted in zip(cache.update(*new, index), expected, strict=True):
                assert torch.equal(result, wanted) and result.stride() == wanted.stride()


class LateCopies(offloaded.DirectCopies):
    """Copies that are done as late as a stream may do them: when somebody waits, or when it has to.

    A source that changed in between, or a copy that nothing waits for, shows as wrong values.
    """

    def __init__(self):
        self.queue = []
        self.begun = False

    def begin(self, *sources):
        self.begun = True

    def move(self, target, source):
        assert self.begun, "a copy that does not wait for what was computed"
        self.queue.append((target, source))

    def mark(self):
        return list(self.queue)

    def join(self, mark):
        # The reader of the other buffer comes after this: it has to wait again before it is overwritten.
        self.begun = False
        done = 0 if mark is None else sum(any(move is other for other in mark) for move in self.queue)
        self._run(done)

    def finish(self):
        self._run(len(self.queue))

    def _run(self, count):
        # In order: a stream does nothing before what was queued earlier.
        for target, source in self.queue[:count]:
            target.copy_(source)
        del self.queue[:count]


@pytest.fixture(params=["at once", "late"])
def order(request, monkeypatch):
    """How far copies lag behind, with buffers that hold NaN wherever nothing was fetched for the owner."""
    if request.param == "late":
        monkeypatch.setattr(offloaded, "copies_for", lambda device: LateCopies())
    take = Slot.take

    def poisoning(slot, layer, device, copies):
        changed = not slot.holds(layer)
        take(slot, layer, device, copies)
        if changed and layer.dtype.is_floating_point:
            for buffer in slot.buffers:
                buffer.fill_(float("nan"))

    monkeypatch.setattr(Slot, "take", poisoning)


@pytest.mark.parametrize("count", range(LAYERS + 1))
@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_views_are_those_of_a_cache_that_stays(order, count, cache_dtype):
    caches = pair(count, cache_dtype)
    for step, tokens in enumerate([5, 5, 1, 1, 300, 1]):
        forward(caches, tokens, step)


def changes():
    return {
        "crop": lambda cache: cache.crop(-4),
        "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        "repeat": lambda cache: cache.batch_repeat_interleave(2),
        "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
        "reset": lambda cache: cache.reset(),
    }


@pytest.mark.parametrize("change", changes())
@pytest.mark.parametrize("cache_dtype", [None, "int8"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_changes_between_two_forwards(order, change, cache_dtype, count):
    caches = pair(count, cache_dtype)
    forward(caches, 9, 0)
    forward(caches, 1, 1)
    for cache in caches:
        changes()[change](cache)
    batch = {"repeat": 4, "select": 1}.get(change, 2)
    for step, tokens in enumerate([3, 1, 1]):
        forward(caches, tokens, 2 + step, batch)
    for mine, theirs in zip(caches[1].layers, caches[0].layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)
        assert mine.get_seq_length() == theirs.get_seq_length()


def test_forks_go_on_side_by_side_and_share_the_buffers(order):
    caches = pair()
    forward(caches, 9)
    forks = [cache.fork(2) for cache in caches]
    twins = [copy.deepcopy(cache) for cache in caches]
    fork, first = (cache.layers[0].carrier for cache in (forks[1], caches[1]))
    assert fork.lanes is first.lanes and fork.layers == offloaded_layers(forks[1].layers)
    for step in range(3):
        forward(caches, 1, 10 + step)
        forward(forks, 2, 20 + step, batch=4)
        forward(twins, 1, 30 + step)


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_saved_files_do_not_depend_on_where_layers_wait(order, tmp_path, cache_dtype):
    caches = pair(4, cache_dtype)
    forward(caches, 9)
    files = [tmp_path / name for name in ("stays", "offloaded")]
    for cache, file in zip(caches, files, strict=True):
        cache.save(file)
    saved = [load_file(file) for file in files]
    assert saved[0].keys() == saved[1].keys()
    for name, tensor in saved[0].items():
        assert torch.equal(tensor.float(), saved[1][name].float())
    loaded = [
        LongContextCache.load(files[0], config(), cache_dtype=cache_dtype, offload_layers=count)
        for count in (0, 3)
    ]
    assert loaded[1].offload_layers == 3
    forward([caches[0], *loaded], 1, 1)
    forward([caches[0], *loaded], 2, 2)
    # Other tokens into layers that have some in their buffers.
    for index in range(LAYERS):
        state = {name: tensor.flip(2) for name, tensor in loaded[0].layers[index].state().items()}
        for cache in loaded:
            cache.layers[index].load_state(state, 12)
    forward(loaded, 1, 3)


def test_a_snapshot_takes_back_what_was_added(order):
    caches = pair()
    snapshots = [Snapshot(cache) for cache in caches]
    forward(caches, 9, 0)
    for snapshot in snapshots:
        snapshot.restore()
    assert not caches[1].layers[0].carrier.lanes
    forward(caches, 7, 1)
    snapshots = [Snapshot(cache) for cache in caches]
    forward(caches, 5, 2)
    # The next error comes in the middle of a forward.
    for index in range(3):
        for cache in caches:
            cache.update(*states(2, 400, index), index)
    for cache, snapshot in zip(caches, snapshots, strict=True):
        snapshot.restore()
        assert all(layer.get_seq_length() == 7 for layer in cache.layers)
    forward(caches, 3, 4)
    forward(caches, 300, 5)


@pytest.mark.parametrize("buffer", [1, 2, 3])
def test_host_buffers_that_could_not_grow_hold_what_they_held(monkeypatch, order, buffer):
    caches = pair(capacity=16)
    forward(caches, 16)
    real, made = preallocated._moved, []

    def moved(filled, capacity):
        made.append(1)
        if len(made) == buffer:
            raise torch.OutOfMemoryError("out of memory")
        return real(filled, capacity)

    snapshots = [Snapshot(cache) for cache in caches]
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(preallocated, "_moved", moved)
        for index in range(1, LAYERS):
            caches[1].update(*states(2, 4, index), index)
    for snapshot in snapshots:
        snapshot.restore()
    for step in range(3):
        forward([caches[0].fork(), caches[1].fork()], 2, 1 + step)
        forward(caches, 2, 1 + step)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_layers_are_spread_evenly_and_windows_stay(count):
    kinds = ["full_attention", "sliding_attention"] * 6
    made = tiny.CONFIGS["gemma2"](num_hidden_layers=12, layer_types=kinds)
    layers = LongContextCache(made, offload_layers=count).layers
    places = [full_layers(layers).index(layers.index(layer)) for layer in offloaded_layers(layers)]
    assert len(places) == count
    gaps = [after - before for before, after in zip(places, [*places[1:], places[0] + 6], strict=True)]
    assert max(gaps) - min(gaps) <= 1


def test_what_cannot_be_offloaded_is_refused():
    for count in (-1, LAYERS + 1):
        with pytest.raises(ValueError, match=f"`offload_layers` must be from 0 to {LAYERS}.*got {count}"):
            LongContextCache(config(), offload_layers=count)
    with pytest.raises(ValueError, match="from 0 to 0"):
        LongContextCache(tiny.CONFIGS["mistral-window"](), offload_layers=1)
    shared = tf.Gemma3nTextConfig(
        num_hidden_layers=4, num_kv_shared_layers=2, layer_types=["full_attention"] * 4
    )
    with pytest.raises(ValueError, match="num_kv_shared_layers=2"):
        LongContextCache(shared, offload_layers=1)
    cache = pair()[1]
    new = [tensor.requires_grad_() for tensor in states(2, 3, 0)]
    with pytest.raises(ValueError, match="`offload_layers`.*no gradient"):
        cache.update(*new, cache.layers.index(offloaded_layers(cache.layers)[0]))
    filled = pair()
    forward(filled, 3, batch=1)
    with pytest.raises(ValueError, match="`rows`: layer 0 is a OffloadedLayer"):
        filled[1].fork(rows=2)


def test_two_buffers_serve_all_layers_and_go_with_the_cache():
    cache = pair(LAYERS)[1]
    forward([cache], 9)
    lane = cache.layers[0].carrier.lanes[torch.device("cpu")]
    assert len({slot.buffers[0].data_ptr() for slot in lane.slots}) == 2
    assert {slot.owner() for slot in lane.slots} == {cache.layers[-1], cache.layers[0]}
    gone = [weakref.ref(lane), weakref.ref(cache.layers[0])]
    gc.disable()
    try:
        del cache, lane
        assert all(reference() is None for reference in gone)
    finally:
        gc.enable()


def test_new_tokens_alone_go_to_the_host_and_old_ones_alone_come_back(monkeypatch):
    moved = []

    class Counted(offloaded.DirectCopies):
        def move(self, target, source):
            moved.append(source.shape[2])
            super().move(target, source)

    monkeypatch.setattr(offloaded, "copies_for", lambda device: Counted())
    cache = pair(LAYERS, capacity=16)[1]
    forward([cache], 9)
    moved.clear()
    forward([cache], 1)
    # A key and a value of each layer, out and in.
    assert sorted(moved) == [1] * 2 * LAYERS + [9] * 2 * (LAYERS - 1) + [10] * 2
    two = pair(2, capacity=16)[1]
    forward([two], 9)
    moved.clear()
    forward([two], 1)
    assert sorted(moved) == [1] * 4


@pytest.mark.gpu
@pytest.mark.parametrize("slow", ["copies", "compute"])
@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_copies_beside_the_computing_stream(monkeypatch, slow, cache_dtype):
    move, cycles = offloaded.StreamCopies.move, 2_000_000

    def late(self, target, source):
        with torch.cuda.stream(self.stream):
            torch.cuda._sleep(cycles)
        move(self, target, source)

    def poisoning(slot, layer, device, copies):
        changed = not slot.holds(layer)
        take(slot, layer, device, copies)
        if changed and layer.dtype.is_floating_point:
            with torch.cuda.stream(copies.stream):
                for buffer in slot.buffers:
                    buffer.fill_(float("nan"))
            slot.ready = copies.mark()

    take = Slot.take
    monkeypatch.setattr(Slot, "take", poisoning)
    if slow == "copies":
        monkeypatch.setattr(offloaded.StreamCopies, "move", late)
    caches, wrong = pair(5, cache_dtype), torch.zeros((), device="cuda")
    # Made before, for a copy from pageable memory would wait for the computing stream.
    counts = [9, 5, 1, 1, 300, 1, 1, 1]
    steps = [
        [[tensor.cuda() for tensor in states(2, count, 100 * step + index)] for index in range(LAYERS)]
        for step, count in enumerate(counts)
    ]
    for layers in steps:
        for index, new in enumerate(layers):
            expected, result = (cache.update(*new, index) for cache in caches)
            if slow == "compute":
                torch.cuda._sleep(cycles)
            for mine, theirs in zip(result, expected, strict=True):
                # No wait of the host: the comparison is queued behind the sleep.
                wrong += (mine.float() != theirs.float()).sum()
    assert wrong.item() == 0
    for mine, theirs in zip(caches[1].layers, caches[0].layers, strict=True):
        assert torch.equal(mine.keys.cpu(), theirs.keys.cpu())
    layer = offloaded_layers(caches[1].layers)[0]
    assert layer.keys.device.type == "cpu" and layer._keys.is_pinned()
    twin = caches[1].fork(2)
    new = [tensor.cuda() for tensor in states(4, 1, 7)]
    assert not offloaded_layers(twin.layers)[0]._keys.is_pinned()
    for index in range(LAYERS):
        twin.update(*new, index)
    assert isinstance(offloaded_layers(twin.layers)[0], OffloadedLayer)
    assert offloaded_layers(twin.layers)[0]._keys.is_pinned()


@pytest.mark.gpu
def test_buffers_of_a_dropped_cache_are_not_written_for_others(monkeypatch):
    move = offloaded.StreamCopies.move

    def late(self, target, source):
        with torch.cuda.stream(self.stream):
            torch.cuda._sleep(50_000_000)
        move(self, target, source)

    cache = pair(LAYERS)[1]
    for step, tokens in enumerate([300, 1]):
        if step:
            monkeypatch.setattr(offloaded.StreamCopies, "move", late)
        for index in range(LAYERS):
            cache.update(*(tensor.cuda() for tensor in states(2, tokens, index)), index)
    shape = offloaded_layers(cache.layers)[0].host_buffers()[0].shape
    del cache
    others = [torch.zeros(shape, device="cuda") for _ in range(8)]
    torch.cuda.synchronize()
    assert all(not other.any() for other in others)
