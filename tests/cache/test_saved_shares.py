"""Files of a cache that several ranks share, the ranks being threads of one process."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_longattn import LongContextCache
from hf_longattn.cache import files
from hf_longattn.cache.placement import Slices
from hf_longattn.cache.sharded import CacheKind, ShardedCache
from hf_longattn.parallel.group import SequenceGroup

CONFIG = tiny.CONFIGS["gemma2"]()


class Table:
    """Where ranks in threads put their words; stands in for the watch and its store."""

    def __init__(self, size):
        self.words, self.barrier = [None] * size, threading.Barrier(size, timeout=20)


class Rank(SequenceGroup):
    """A rank without connections, which saving and loading do not need."""

    def __init__(self, rank, table):
        super().__init__()
        self.rank, self.world_size, self.table, self.watch = rank, len(table.words), table, self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def tell(self, words):
        """Every rank's words."""
        self.table.barrier.wait()
        self.table.words[self.rank] = words
        self.table.barrier.wait()
        return list(self.table.words)


OWN = threading.local()


def on_ranks(size, work):
    """What `work(group)` returns or raises on each rank."""
    table = Table(size)

    def enter(rank):
        OWN.rank = rank
        return work(Rank(rank, table))

    with ThreadPoolExecutor(size) as threads:
        calls = [threads.submit(enter, rank) for rank in range(size)]
        return [call.exception() or call.result() for call in calls]


def states(length, layer):
    """Keys and values that tell their position and layer."""
    numbers = torch.arange(length, dtype=torch.float32) + 1000 * layer
    return numbers[None, None, :, None].expand(2, 2, length, 4), -numbers[None, None, :, None].expand(
        2, 2, length, 3
    )


def fill(cache, steps):
    """Has a cache hold tokens: some cut in a run, some in blocks, some cropped again."""
    group, held = cache.group, 0
    for kind, count in steps:
        if kind == "crop":
            cache.crop(-count)
            held -= count
            continue
        slices = None
        if kind == "run" and group.world_size > 1:
            count = count // (2 * group.world_size) * 2 * group.world_size
            slices = Slices(held, count, group.rank, group.world_size) if count else None
        for index, layer in enumerate(cache.layers if count else ()):
            new = [part[:, :, held : held + count] for part in states(held + count, index)]
            if slices is None:
                layer.update(*new)
            elif layer.is_sliding:
                layer.append_run(*new)
            else:
                layer.slices = slices
                layer.update(*(slices.take(part, 2) for part in new))
                layer.slices = None
        held += count
    return held


HISTORIES = {
    "run": [("run", 90)],
    "chat": [("run", 70), ("step", 41), ("run", 33), ("step", 1), ("run", 64)],
    "cropped": [("run", 70), ("crop", 21), ("step", 40), ("crop", 3), ("run", 50), ("crop", 45), ("step", 9)],
    "few": [("step", 2)],
    "nothing": [],
}


def assert_holds(cache, length, history):
    assert cache.get_seq_length() == length, history
    for index, layer in enumerate(cache.layers):
        if not length:
            assert layer.keys is None
            continue
        if layer.is_sliding:
            positions = torch.arange(length)[-(layer.sliding_window - 1) :]
            found = layer.state()
        else:
            positions = torch.arange(length)
            if cache.group.world_size > 1:
                positions = layer.positions(torch.device("cpu"))
            found = {"keys": layer.keys, "values": layer.values}
        want = states(length, index)
        assert torch.equal(found["keys"], want[0][:, :, positions]), (history, index)
        assert torch.equal(found["values"], want[1][:, :, positions]), (history, index)


def saved(path, size, history, cache_dtype=None):
    """Saves a cache by so many ranks; returns its length and the cache of each."""

    def work(group):
        cache = ShardedCache(CONFIG, group, cache_dtype=cache_dtype)
        length = fill(cache, HISTORIES[history])
        cache.save(path)
        return length, cache

    return on_ranks(size, work)


def load(path, size, **kwargs):
    """The caches, or errors, of so many ranks."""

    class Model(torch.nn.Module):
        config = CONFIG

    def work(group):
        model = Model()
        model._hf_longattn_caches = CacheKind(model, group, LongContextCache, ShardedCache)
        return LongContextCache.load(path, model, "cpu", **kwargs)

    return on_ranks(size, work)


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_any_number_of_ranks_reads_what_any_number_has_saved(size, history, tmp_path):
    path = tmp_path / "cache.safetensors"
    before = saved(path, size, history)
    length = before[0][0]
    names = [f"cache-{part:05}-of-{size:05}.safetensors" for part in range(2, size + 1)]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["cache.safetensors", *names])
    for readers in (1, 2, 3, 4):
        caches = load(path, readers, capacity=10)
        held = 0
        for rank, cache in enumerate(caches):
            assert_holds(cache, length, history)
            held += sum(stop - start for start, stop in cache.placement.runs)
            if readers == size:
                assert cache.placement.runs == before[rank][1].placement.runs
        assert readers == 1 or held == length
        assert len({tuple(layer.capacity for layer in cache.layers) for cache in caches}) == 1
        # And it goes on, blocks and runs, as every rank expects the others to.
        for cache in caches:
            more = fill_on(cache, length)
            assert_holds(cache, more, history)


def fill_on(cache, held):
    for count in (40, 1):
        for index, layer in enumerate(cache.layers):
            layer.update(*(part[:, :, held:] for part in states(held + count, index)))
        held += count
    return held


def test_no_file_holds_more_than_its_share(tmp_path):
    path = tmp_path / "cache.safetensors"
    saved(path, 3, "chat")
    total = 0
    for file in sorted(tmp_path.iterdir()):
        tensors = load_file(file)
        assert any("layers.0." in name for name in tensors) == (file == path), "windows are in the first"
        total += tensors["layers.1.keys"].shape[2]
        assert tensors["layers.1.keys"].shape[2] <= 208 / 3 + 32 + 6
    assert total == saved(tmp_path / "other", 3, "chat")[0][0]


def errors(path, size, words, kind=ValueError, **kwargs):
    """Asserts that loading is refused on all ranks, by these words."""
    found = load(path, size, **kwargs)
    for rank, error in enumerate(found):
        assert isinstance(error, kind) and words in str(error), (rank, error)


def test_files_that_do_not_belong_together_are_refused_on_all_ranks(tmp_path):
    path, other = tmp_path / "cache.safetensors", tmp_path / "other.safetensors"
    saved(path, 3, "chat"), saved(other, 3, "chat")
    second = tmp_path / "cache-00002-of-00003.safetensors"
    for size in (1, 2, 3):
        errors(second, size, "is file 2 of the 3 of a saved cache; give the first")
        errors(tmp_path / "nowhere", size, "nowhere", OSError)
        errors(path, size, "use `cache_dtype=None`", cache_dtype="int8")
    whole = second.read_bytes()
    for content, words in {
        (tmp_path / "other-00002-of-00003.safetensors").read_bytes(): "is of another save",
        (tmp_path / "cache-00003-of-00003.safetensors").read_bytes(): "is of another save",
        whole[:-9]: "not a saved cache, or not all of one",
    }.items():
        second.write_bytes(content)
        errors(path, 2, words)
    second.unlink()
    errors(path, 2, "cache-00002-of-00003.safetensors is missing beside it")
    second.write_bytes(whole)
    # What a file says of its set, all of them say.
    for name, change, words in (
        ("parts", lambda parts: parts + 1, "cache-00002-of-00004.safetensors is missing beside it"),
        ("lengths", lambda lengths: lengths[:-1], "is of another save"),
        ("model", lambda model: {**model, "hidden_size": 8}, "is of another save"),
        ("layers.1.keys", lambda keys: keys[:, :, 1:].contiguous(), "does not hold all layers and tokens"),
    ):
        change_file(path, name, change)
        errors(path, 2, words)
        saved(path, 3, "chat")
    saved(path, 1, "chat")
    change_file(path, "stretches", lambda stretches: stretches[:-1] + [[0, 1, None]])
    errors(path, 2, "does not hold all layers and tokens")
    notes = {"format": "hf_longattn.cache.2", "model": "{}"}
    save_file({}, path, metadata=notes)
    errors(path, 2, "is not a saved cache: its notes cannot be read ('lengths')")


def change_file(path, name, change):
    """Writes a file again with one of its tensors, or of its notes, changed."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        notes = file.metadata()
    if name in tensors:
        tensors[name] = change(tensors[name])
    else:
        notes[name] = json.dumps(change(json.loads(notes[name])))
    save_file(tensors, path, metadata=notes)


def test_another_model_is_refused_on_all_ranks(tmp_path, monkeypatch):
    path = tmp_path / "cache.safetensors"
    saved(path, 2, "run")
    monkeypatch.setitem(globals(), "CONFIG", tiny.CONFIGS["gemma2"](sliding_window=9))
    errors(path, 2, "sliding_window")


def test_an_error_of_one_rank_ends_all_and_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "cache.safetensors"
    length = saved(path, 2, "chat")[0][0]
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    write = files.save_file

    def fail(tensors, file, **kwargs):
        if "00002" in file.name:
            raise OSError("no space left on the device")
        write(tensors, file, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(files, "save_file", fail)
        found = saved(path, 2, "few")
    assert all(isinstance(error, OSError) for error in found)
    assert str(found[0]) == "rank 1 of 2: no space left on the device"
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert all(cache.get_seq_length() == length for cache in load(path, 2))
    # A file that one of them alone does not see.
    opened = files.open_set

    def hidden(where, device):
        if OWN.rank == 1:
            raise FileNotFoundError("no such file here")
        return opened(where, device)

    monkeypatch.setattr(files, "open_set", hidden)
    found = load(path, 2)
    assert list(map(str, found)) == ["rank 1 of 2: no such file here", "no such file here"]


def test_ranks_that_save_to_different_places_are_told(tmp_path):
    def work(group):
        cache = ShardedCache(CONFIG, group)
        fill(cache, HISTORIES["run"])
        cache.save(tmp_path / f"cache-{group.rank}")

    for error in on_ranks(2, work):
        assert isinstance(error, ValueError) and "call `save` alike on every process" in str(error)
    assert not list(tmp_path.iterdir())


def test_a_set_takes_the_place_of_another_one(tmp_path):
    path, mine = tmp_path / "cache.safetensors", tmp_path / "cache-00004-of-00007.safetensors"
    mine.write_bytes(b"of somebody else")
    for size in (1, 4, 2, 2, 3, 1):
        length = saved(path, size, "chat")[0][0]
        assert len(list(tmp_path.iterdir())) == size + 1
        assert load(path, 2)[1].get_seq_length() == length
    assert mine.read_bytes() == b"of somebody else"


def to_first_version(path):
    """Writes a file of one process again as the first version of the format had it."""
    with safe_open(path, framework="pt") as file:
        notes = file.metadata()
    first = {"format": "hf_longattn.cache.1", "model": notes["model"], "lengths": notes["lengths"]}
    if (dtype := json.loads(notes["cache_dtype"])) is not None:
        first["cache_dtype"] = dtype
    save_file(load_file(path), path, metadata=first)


def test_files_of_the_first_version_are_read_by_one_process_and_by_several(tmp_path):
    path = tmp_path / "cache.safetensors"
    for dtype in (None, "fp8"):
        length = saved(path, 1, "chat", dtype)[0][0]
        to_first_version(path)
        for size in (1, 2, 3):
            for cache in load(path, size, cache_dtype=dtype):
                assert cache.get_seq_length() == length
                if dtype is None:
                    assert_holds(cache, length, "chat")
    errors(path, 2, "use `cache_dtype='fp8'`")


def test_who_shares_a_cache_must_be_known(tmp_path):
    path = tmp_path / "cache.safetensors"
    saved(path, 1, "few")
    with pytest.raises(ValueError, match="must be the model that `prepare_generation` has prepared"):
        ShardedCache.load(path, CONFIG)
    with pytest.raises(TypeError, match="must be a model of transformers or its config, got Linear"):
        LongContextCache.load(path, torch.nn.Linear(2, 2))
    found = load(path, 2, offload_layers=1)
    assert all("`offload_layers` must be 0 for a cache that several processes share" in str(e) for e in found)
