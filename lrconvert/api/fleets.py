"""Fleets: many compact adapters in one folder, in which what they have in common lies once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from types import TracebackType
from typing import Self

from lrconvert.api.shared import AnyCompact, AnyPath, Progress, compact_of, located, output_of, path_of, silent
from lrconvert.core.errors import ArgumentError, EmptyAdapterError, LrcError, UnknownLayoutError
from lrconvert.core.limits import OWN
from lrconvert.core.options import described
from lrconvert.core.wording import either
from lrconvert.formats.fleet import checking, facts, names, writing
from lrconvert.formats.fleet.facts import FleetMember, FleetSummary
from lrconvert.formats.fleet.intake import Arrival
from lrconvert.formats.fleet.opened import OpenFleet
from lrconvert.formats.fleet.writing import Compacted, Taken
from lrconvert.formats.lrc import file
from lrconvert.formats.lrc.validation import Validation
from lrconvert.io import durable, hub
from lrconvert.io.container import read_small
from lrconvert.lora.adapter import CompactAdapter

SUFFIX = ".lrc"
AnyMembers = AnyPath | Sequence[AnyPath] | Mapping[str, AnyCompact]


class Fleet:
    """A fleet that is open: a folder of compact adapters by name, as it was when it was opened; its own changes are
    seen at once, those of other writers after `refresh`. A context manager; adapters are read by name, as of a mapping.

    Marginal bytes of an adapter are its payload and at most 256: targets, shapes, base and method lie once for all
    that have them in common, and so does every tensor that is equal in two.

    >>> from lrconvert import Fleet, convert
    >>> small = convert("my-adapter", "lowrank", target_size=6000)
    >>> fleet = Fleet.build("fleet", {"support/mails": small, "support/chats": small})
    >>> list(fleet), fleet["support/mails"].method
    (['support/chats', 'support/mails'], 'lowrank')
    >>> fleet.remove("support/chats") > 0, len(fleet)
    (True, 1)
    """

    def __init__(self, path: AnyPath) -> None:
        self.path = located(path, "path")
        self._open = OpenFleet(self.path)

    @classmethod
    def build(
        cls,
        path: AnyPath,
        adapters: AnyMembers,
        *,
        share: Sequence[str] = (),
        overwrite: bool = False,
        progress: Progress = silent,
    ) -> Fleet:
        """Write a new fleet, whole or not at all, and return it open.

        `adapters` are paths of lrconvert files (named as their file), of folders of them (named by their path in
        there), of fleets (all members), or a mapping from names to paths, compact adapters and results of verbs.
        `share` names payload tensors that are stored once even if a single adapter has them. Raises E-NAME,
        E-OUT-EXISTS, E-OUT-PATH, E-LAYOUT for a LoRA, and what reading raises.
        """
        root = output_of(path, "path")
        sources, given = _given(adapters)
        durable.check_output(root, overwrite, sources, directory=True)
        writing.build(root, _told(given, progress), _names(share, "share"), overwrite=overwrite)
        return cls(root)

    # --- reading ----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self._open.head.members

    def __iter__(self) -> Iterator[str]:
        for entry in self._open.entries():
            yield entry.key.decode()

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and names.is_name(name) and self._open.find(name.encode()) is not None

    def __getitem__(self, name: str) -> CompactAdapter:
        """Return a member, fully checked. Raises KeyError for a name that is none, E-DIGEST for a damaged member."""
        if name not in self:
            raise KeyError(name)
        return self._open.compact(name)

    def __repr__(self) -> str:
        return f"<Fleet: {self.path}, {len(self)} members, {self.nbytes:,} bytes>"

    @property
    def nbytes(self) -> int:
        """The bytes of all files of the fleet."""
        return self.summary.bytes

    @property
    def dead(self) -> int:
        """The bytes of members that were removed or replaced, which `gc` frees."""
        return self.summary.dead

    @property
    def summary(self) -> FleetSummary:
        """Return where the fleet lies, how many members it has, and of how many bytes."""
        return facts.of_fleet(self._open)

    def members(self, prefix: str = "", refused: Callable[[LrcError], object] | None = None) -> Iterator[FleetMember]:
        """Yield what is known of the members whose names begin with `prefix`, in the order of their names; payloads are
        not read. A damaged one is raised, or handed to `refused`, and the others follow."""
        start = prefix.encode() or b"\1"
        for entry in self._open.entries(start):
            if not entry.key.startswith(prefix.encode()):
                return
            try:
                known = facts.of_member(self._open, entry)
            except LrcError as error:
                if refused is None:
                    raise
                refused(error)
            else:
                yield known

    def member(self, name: str) -> FleetMember:
        """Return what is known of one member. Raises E-MISSING, E-NAME."""
        return facts.of_member(self._open, self._open.entry(name))

    def read_bytes(self, name: str) -> bytes:
        """Return the bytes of a member's file, checked against its digest. Raises E-MISSING, E-DIGEST."""
        return self._open.bytes_of(name)

    def get(self, name: str, out: AnyPath, *, overwrite: bool = False) -> Path:
        """Write a member as a file of its own, and return its path: the very bytes that went in where that file was of
        the newest container version, else that file upgraded, with the same factors. Raises E-MISSING, E-OUT-EXISTS."""
        target = output_of(out)
        durable.check_output(target, overwrite, directory=False)
        data = self.read_bytes(name)
        with durable.atomic_file(target, overwrite=overwrite) as written:
            written.write(data)
        return target

    def validate(self, *members: str, base: AnyPath | None = None) -> Iterator[Validation]:
        """Yield the findings of every file of the fleet and of every member, or of those that are named, one after the
        other; with `base` each is held against that."""
        model = None if base is None else located(base, "base")
        if not members:
            yield from checking.check_all(self.path, model)
        for name in members:
            yield checking.check_member(self._open, self._open.entry(name), model)

    # --- changing ---------------------------------------------------------------------------------------------------

    def add(
        self,
        adapters: AnyMembers,
        *,
        share: Sequence[str] = (),
        overwrite: bool = False,
        progress: Progress = silent,
    ) -> list[Taken]:
        """Add adapters, as `build` takes them: all or none. Members that are there keep every byte. With `overwrite`
        one of the same name is replaced; where its file is the same, nothing is done. Raises E-LOCKED, E-OUT-EXISTS."""
        _, given = _given(adapters)
        taken = writing.add(self.path, _told(given, progress), _names(share, "share"), overwrite=overwrite)
        self.refresh()
        return taken

    def remove(self, *removed: str) -> int:
        """Remove members, all or none; their bytes, which this returns, stay until `gc`. Raises E-MISSING, E-LOCKED."""
        nbytes = writing.remove(self.path, _names(removed, "removed"))
        self.refresh()
        return nbytes

    def gc(self) -> Compacted:
        """Write the fleet anew without what was removed or replaced, and what nothing needs. What is shared is found
        anew, over all members. Readers go on undisturbed. Raises E-DIGEST for a damaged member, E-LOCKED."""
        done = writing.compact(self.path)
        self.refresh()
        return done

    def refresh(self) -> None:
        """See the fleet as it is now."""
        now = OpenFleet(self.path)
        self._open.close()
        self._open = now

    def close(self) -> None:
        """Close the fleet's files. Idempotent."""
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _names(given: Sequence[str], name: str) -> Sequence[str]:
    if isinstance(given, str) or not all(isinstance(one, str) for one in given):
        raise ArgumentError(f"{name} is {described(given)}; names were expected", fix=f"give a list: [{given!r:.40}]")
    return given


# --- what is put in -------------------------------------------------------------------------------------------------

Given = tuple[str, writing.Load]


def _given(adapters: AnyMembers) -> tuple[list[Path], list[Given]]:
    """The paths that are read, and every adapter as its name and what loads it."""
    if isinstance(adapters, Mapping):
        paths = [Path(fspath(item)) for item in adapters.values() if isinstance(item, (str, PathLike))]
        return paths, [(name, partial(_arrival, name, item)) for name, item in adapters.items()]
    listed = [adapters] if isinstance(adapters, (str, PathLike)) else adapters
    if not isinstance(listed, Iterable):
        what = f"adapters is {described(adapters)}; paths, or a mapping from names to adapters, were expected"
        raise ArgumentError(what)
    places = [_place(path) for path in listed]
    given = [one for place in places for one in _inside(place)]
    if not given:
        raise EmptyAdapterError("no adapters are given", fix="name lrconvert files, or folders of them")
    return places, given


def _place(path: object) -> Path:
    if isinstance(path, CompactAdapter) or hasattr(path, "compact"):
        raise ArgumentError("an adapter in memory has no name", fix="give a mapping: {'name': adapter}")
    given = path_of(path, "adapters", "paths, or a mapping from names to adapters")
    return Path(given) if names.member_of(given) is not None else hub.adapter_at(given)


def _inside(place: Path) -> Iterator[Given]:
    """The adapters at a path. Raises E-LAYOUT for a folder without lrconvert files."""
    member = names.member_of(place)
    if member is not None:
        yield member[1], partial(_from_fleet, *member)
        return
    if names.is_fleet(place):
        with OpenFleet(place) as fleet:
            listed = [entry.key.decode() for entry in fleet.entries()]
        for name in listed:
            yield name, partial(_from_fleet, place, name)
        return
    if not place.is_dir():
        yield place.name.removesuffix(SUFFIX), partial(_arrival, place.name.removesuffix(SUFFIX), place)
        return
    inside = [path for path in sorted(place.rglob(f"*{SUFFIX}")) if path.is_file() and not _is_hidden(path, place)]
    if not inside:
        fix = f"make compact files first, with {either('lrconvert.convert_many', '`lrconvert compress`')}"
        raise UnknownLayoutError("holds no lrconvert files", fix=fix, path=place)
    for path in inside:
        name = path.relative_to(place).as_posix().removesuffix(SUFFIX)
        yield name, partial(_arrival, name, path)


def _is_hidden(path: Path, place: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(place).parts)


def _arrival(name: str, item: AnyCompact) -> Arrival:
    """An adapter in memory, or of a file, as it becomes a member."""
    if not isinstance(item, (str, PathLike)):
        return Arrival.of(names.check_name(name), compact_of(item, "adapters"))
    if (member := names.member_of(item)) is not None:
        return _from_fleet(*member, name)
    place = hub.adapter_at(path_of(item, "adapters"))
    if place.is_dir() or not file.is_lrconvert(place):
        if not place.exists():
            read_small(place, 0)  # which says that it is not there
        fix = f"make it compact first, with {either('lrconvert.convert(...)', '`lrconvert compress`')}"
        raise UnknownLayoutError("is no lrconvert file, of which a fleet is made", fix=fix, path=place)
    return Arrival.of_file(name, read_small(place, OWN.file_bytes), place)


def _from_fleet(place: Path, name: str, renamed: str = "") -> Arrival:
    """A member of another fleet."""
    with OpenFleet(place) as fleet:
        return writing.arrival_of(fleet, fleet.entry(name), renamed)


def _told(given: Sequence[Given], progress: Progress) -> list[Given]:
    """The same adapters; each reports when it is loaded."""
    loaded = 0

    def load(name: str, original: writing.Load) -> Arrival:
        nonlocal loaded
        progress(loaded / len(given), name)
        loaded += 1
        return original()

    return [(name, partial(load, name, original)) for name, original in given]
