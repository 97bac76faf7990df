"""How a cache lies in safetensors files: one file, or one of every process that shares the cache.

The first file has the name that the caller gave, the others lie beside it as `name-00002-of-00003`. Each has
the keys and values of the tokens that its rank held; windows and states, which are the same on every rank,
are in the first. Every file tells which set it is of, and how all tokens were given out (see
`cache/placement.py`): so a reader knows where each token is, and any number of processes reads a set, each
its own share.
"""

import contextlib
import json
import os
import secrets
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_longattn.cache.placement import Placement
from hf_longattn.cache.preallocated import PreallocatedLayer
from hf_longattn.cache.recurrent import RecurrentLayer

_FORMAT = "hf_longattn.cache."
# Version 1 has one file of all tokens, and does not say so.
_VERSION, _KNOWN = "2", ("1", "2")
_NAMES = ("keys", "values", "scales", "recurrent_state")


class Alone:
    """The ranks of a cache that one process has for itself, as a `SequenceGroup` would be asked."""

    rank = 0
    world_size = 1

    def do_together(self, work: Callable[[], str]) -> list[str]:
        """What each rank's part of a task comes to: this one's."""
        return [work()]


@dataclass(frozen=True)
class Notes:
    """What a file says about itself and its set.

    Args:
        model: what tells models apart whose keys differ.
        lengths: tokens seen by each layer.
        cache_dtype: "int8" or "fp8", or None for the dtype of the model.
        stretches: how tokens were given out to the ranks (`Placement.stretches`).
        name: of the set, which no other save has.
        part: of this file, from 0.
        parts: files of the set.
    """

    model: dict[str, Any]
    lengths: list[int]
    cache_dtype: str | None
    stretches: list[tuple[int, int, int | None]]
    name: str
    part: int = 0
    parts: int = 1

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return max(self.lengths, default=0)

    def metadata(self) -> dict[str, str]:
        """As a file holds it."""
        return {"format": _FORMAT + _VERSION, **{name: json.dumps(v) for name, v in asdict(self).items()}}

    @classmethod
    def read(cls, metadata: dict[str, str] | None, owner: str) -> "Notes":
        """What a file says.

        Args:
            metadata: of the file.
            owner: its name, for messages.

        Raises:
            ValueError: it is no cache, or one of another version.
        """
        metadata = metadata or {}
        kind, version = metadata.get("format"), str(metadata.get("format")).removeprefix(_FORMAT)
        if version == kind or "model" not in metadata:
            raise ValueError(f"{owner} is not a saved cache: its format is {kind!r}.")
        if version not in _KNOWN:
            raise ValueError(
                f"{owner} is a cache in version {version} of the format, and this library reads versions "
                f"{' and '.join(_KNOWN)}; save it again, or use the library that made it."
            )
        try:
            if version == "1":
                return cls._read_first(metadata)
            return cls(**{name: json.loads(metadata[name]) for name in cls.__dataclass_fields__})
        except (KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{owner} is not a saved cache: its notes cannot be read ({error}).") from error

    @classmethod
    def _read_first(cls, metadata: dict[str, str]) -> "Notes":
        lengths = json.loads(metadata.get("lengths", "[]"))
        stretches: Any = [(0, max(lengths), None)] if any(lengths) else []
        return cls(json.loads(metadata["model"]), lengths, metadata.get("cache_dtype"), stretches, "")


def part_path(path: Path, part: int, parts: int) -> Path:
    """The file of one part of a set.

    Args:
        path: of the first.
        part: from 0.
        parts: of the set.
    """
    return path if part == 0 else path.with_name(f"{path.stem}-{part + 1:05}-of-{parts:05}{path.suffix}")


def lengths_of(layers: Sequence[Any]) -> list[int]:
    """Tokens that each layer has seen.

    Args:
        layers: of a cache that is to be saved.

    Raises:
        ValueError: a layer that cannot be.
    """
    for index, layer in enumerate(layers):
        if not isinstance(layer, (PreallocatedLayer, RecurrentLayer)):
            raise ValueError(f"`save` knows attention layers, but layer {index} is a {type(layer).__name__}.")
    return [int(layer.get_seq_length()) for layer in layers]


def is_cut(layer: Any) -> bool:
    """Whether a layer keeps every token, of which each rank that shares the cache has its own."""
    return isinstance(layer, PreallocatedLayer) and not layer.is_sliding


def save_layers(path: str | os.PathLike, layers: Sequence[Any], notes: Notes, ranks: Any) -> None:
    """Writes this rank's file of a set; the files that were there before are replaced once all are written.

    Args:
        path: of the first file, the same on every rank.
        layers: of the cache.
        notes: of it; set and part are filled in here.
        ranks: the `SequenceGroup` whose ranks share the cache, or `Alone`.

    Raises:
        ValueError: a layer that cannot be saved, or ranks that were not asked for the same.
        OSError: a file cannot be written.
    """
    said = json.dumps([os.fspath(path), notes.length, secrets.token_hex(8)])
    (where, length, name), *others = map(json.loads, ranks.do_together(lambda: said))
    for rank, other in enumerate(others, 1):
        if other[:2] != [where, length]:
            raise ValueError(
                f"`path`: rank {rank} saves {other[1]} tokens at {other[0]!r}, and rank 0 {length} at "
                f"{where!r}; call `save` alike on every process."
            )
    notes = replace(notes, name=name, part=ranks.rank, parts=ranks.world_size)
    own = part_path(Path(path), notes.part, notes.parts)
    fresh = own.with_name(own.name + ".new")
    try:
        ranks.do_together(lambda: _write(fresh, layers, notes))
        ranks.do_together(lambda: _put(fresh, own, notes))
    finally:
        fresh.unlink(missing_ok=True)


def _write(fresh: Path, layers: Sequence[Any], notes: Notes) -> str:
    tensors: dict[str, Tensor] = {}
    for index, layer in enumerate(layers):
        if notes.part == 0 or is_cut(layer):
            # To the host a layer at a time: what is filled of a buffer is copied first.
            tensors |= {f"layers.{index}.{name}": t.to("cpu") for name, t in layer.state().items()}
    try:
        save_file(tensors, fresh, metadata=notes.metadata())
    except SafetensorError as error:
        raise OSError(f"`path`: {fresh} cannot be written: {error}.") from error
    return ""


def _put(fresh: Path, own: Path, notes: Notes) -> str:
    """Puts a file in its place; behind the first one, what is left of the set that was there goes."""
    left = _left_over(own, notes.parts) if notes.part == 0 else []
    os.replace(fresh, own)
    for path in left:
        path.unlink(missing_ok=True)
    return ""


def _left_over(path: Path, parts: int) -> list[Path]:
    """The files of the set at `path` that one of so many parts does not replace."""
    if (before := _notes_at(path)) is None or before.parts == parts:
        return []
    others = [part_path(path, part, before.parts) for part in range(1, before.parts)]
    return [other for part, other in enumerate(others, 1) if _notes_at(other) == replace(before, part=part)]


def _notes_at(path: Path) -> Notes | None:
    """What a file says, None where there is none of a cache."""
    try:
        with safe_open(path, framework="pt") as file:
            return Notes.read(file.metadata(), "")
    except (OSError, SafetensorError, ValueError):
        return None


class SavedCache:
    """The open files of one set.

    Args:
        owner: its name, for messages.
        notes: of the first file.
        files: as `safe_open` gives them, in order.

    Raises:
        ValueError: the files do not hold the tokens that they say.
    """

    def __init__(self, owner: str, notes: Notes, files: Sequence[Any]) -> None:
        self.owner, self.notes, self._files = owner, notes, files
        self._names = [set(file.keys()) for file in files]
        self._held = [0] * notes.parts
        # (start, stop) of positions, the file and the place in it, in the order of the sequence.
        self._runs: list[tuple[int, int, int, int]] = []
        for part in range(notes.parts):
            placement = Placement(part, notes.parts)
            placement.follow(notes.stretches)
            if placement.length != notes.length:
                self._refuse()
            for start, stop in placement.runs:
                self._runs.append((start, stop, part, self._held[part]))
                self._held[part] += stop - start
        self._runs.sort()

    def _refuse(self) -> NoReturn:
        raise ValueError(
            f"{self.owner} does not hold all layers and tokens of the cache that it says it is; save it "
            "again."
        )

    def places(self, runs: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
        """Where some tokens are: (file, first place, tokens), in order.

        Args:
            runs: (start, stop) of their positions, ascending.
        """
        found = []
        for start, stop in runs:
            row = bisect_right(self._runs, start, key=lambda run: run[0]) - 1
            while start < stop:
                first, end, part, place = self._runs[row]
                count, place, row = min(stop, end) - start, place + start - first, row + 1
                if found and found[-1][0] == part and found[-1][1] + found[-1][2] == place:
                    found[-1] = (part, found[-1][1], found[-1][2] + count)
                else:
                    found.append((part, place, count))
                start += count
        # Also of no tokens, the shape is told by a file.
        return found or [(0, 0, 0)]

    def state(self, index: int, places: Sequence[tuple[int, int, int]] | None) -> dict[str, Tensor]:
        """What `load_state` of a layer takes, of which no more is read than these tokens.

        Args:
            index: of the layer.
            places: of its tokens; None for a layer of which the first file holds all.

        Raises:
            ValueError: the layer is not there, or not all of it.
        """
        keys = {name: f"layers.{index}.{name}" for name in _NAMES}
        keys = {name: key for name, key in keys.items() if key in self._names[0]}
        if self.notes.lengths[index] and not ({"keys", "values"} <= set(keys) or "recurrent_state" in keys):
            self._refuse()
        if places is None:
            return {name: self._files[0].get_tensor(key) for name, key in keys.items()}
        return {name: self._tokens(key, places) for name, key in keys.items()}

    def _tokens(self, key: str, places: Sequence[tuple[int, int, int]]) -> Tensor:
        if not all(key in names for names in self._names):
            self._refuse()
        slices = [file.get_slice(key) for file in self._files]
        if [part.get_shape()[2] for part in slices] != self._held:
            self._refuse()
        pieces = [slices[part][:, :, place : place + count] for part, place, count in places]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)


@contextlib.contextmanager
def open_set(path: Path, device: torch.device | str) -> Iterator[SavedCache]:
    """The files of a saved cache.

    Args:
        path: of the first.
        device: where tensors go.

    Raises:
        ValueError: they are no cache, not all of one, of several, or of another version.
        OSError: there is no such file.
    """
    owner = f"`path`={path}"
    try:
        with contextlib.ExitStack() as stack:

            def open_file(own: Path) -> tuple[Any, Notes]:
                file = stack.enter_context(safe_open(own, framework="pt", device=str(device)))
                return file, Notes.read(file.metadata(), f"`path`={own}")

            first, notes = open_file(path)
            if notes.part:
                raise ValueError(
                    f"{owner} is file {notes.part + 1} of the {notes.parts} of a saved cache; give the "
                    "first, which has no number in its name."
                )
            yield SavedCache(owner, notes, [first, *_open_others(path, notes, open_file)])
    except SafetensorError as error:
        raise ValueError(f"{owner} is not a saved cache, or not all of one: {error}.") from error


def _open_others(path: Path, notes: Notes, open_file: Callable[[Path], tuple[Any, Notes]]) -> list[Any]:
    """The files of a set behind the first."""
    files = []
    for part in range(1, notes.parts):
        own = part_path(path, part, notes.parts)
        if not own.exists():
            raise ValueError(
                f"`path`={path} is the first of the {notes.parts} files of a saved cache, and {own.name} is "
                "missing beside it; keep all of them in one folder that every process reads."
            )
        file, found = open_file(own)
        if found != replace(notes, part=part):
            raise ValueError(f"`path`={path}: {own.name} beside it is of another save; save it again.")
        files.append(file)
    return files


def load_cache(
    path: str | os.PathLike, make: Callable[[], Any], device: torch.device | str, ranks: Any
) -> Any:
    """A new cache that holds what a set of files holds, this rank's share of it.

    Args:
        path: of the first file.
        make: makes an empty cache.
        device: where its tensors go.
        ranks: the `SequenceGroup` whose ranks share the cache, or `Alone`.

    Raises:
        ValueError: as `open_set` does; a cache of another kind; or ranks that have read different files.
        OSError: there is no such file.
    """
    made = []

    def read() -> str:
        made.append(make())
        with open_set(Path(path), device) as saved:
            made[0].read(saved)
            return saved.notes.name

    names = ranks.do_together(read)
    odd = [rank for rank, name in enumerate(names) if name != names[0]]
    if odd:
        raise ValueError(
            f"`path`={path}: rank {odd[0]} has read another save than rank 0; let every process read the "
            "same files."
        )
    return made[0]
