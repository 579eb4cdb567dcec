"""Fleets are changed here: built, added to, taken from, compacted, indexed anew.

Every change writes new bytes behind the old and a new run of the index, syncs both, and replaces the head last: what a
killed writer has left is not stated there, and the next one removes it. One writer at a time holds the folder's lock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from lrconvert.core import errors
from lrconvert.core.errors import LrcError
from lrconvert.core.wording import spelled
from lrconvert.formats.fleet import head as heads
from lrconvert.formats.fleet import index, names, records
from lrconvert.formats.fleet.head import Head
from lrconvert.formats.fleet.index import Entry, Run
from lrconvert.formats.fleet.intake import Arrival, Intake
from lrconvert.formats.fleet.opened import OpenFleet
from lrconvert.formats.fleet.records import MAGIC, MEMBER, REMOVAL
from lrconvert.formats.fleet.scanning import scan
from lrconvert.io import durable
from lrconvert.io.durable import StagedDirectory

_NEW_HEAD = f"{names.HEAD}.new"

Load = Callable[[], Arrival]


@dataclass(frozen=True)
class Taken:
    """The outcome for a given adapter: a member "added", "replaced", or "unchanged"; `nbytes` that it takes in
    the fleet, and `whole` in a file of its own; the container `version` of the file that it was."""

    name: str
    state: str
    nbytes: int
    whole: int
    version: int
    digest: str


@dataclass(frozen=True)
class Compacted:
    """The bytes of a fleet before and after it was compacted."""

    before: int
    after: int


def build(
    root: Path, given: Sequence[tuple[str, Load]], share: Sequence[str] = (), *, overwrite: bool = False
) -> list[Taken]:
    """Write a new fleet of adapters, each as its name and what loads it; it appears whole or not at all. Raises E-NAME,
    E-OUT-EXISTS (also two of one name), E-OUT-PATH, E-OPTION, E-IO-WRITE, and what loading raises."""
    _check_replaceable(root)
    _check_apart([name for name, _ in given])
    taken: list[Taken] = []
    lock = durable.locked(root, needed=False) if names.is_fleet(root) else nullcontext()
    with lock, durable.atomic_directory(root, overwrite=overwrite) as folder:
        head = Head()
        with folder.create(head.data_name) as out:
            out.write(MAGIC)
            intake = Intake(out, share=share)
            for _, load in sorted(given, key=_by_name):
                taken.append(_put(intake, load()))
            entries = intake.finish()
            head = replace(heads.grown(head, out.position, len(given), 0), next=2)
        _check_share(intake)
        run = _write_run(folder, entries, 1)
        folder.write_bytes(names.HEAD, heads.encode(replace(head, runs=(run,) if run else ())))
    return _sized(taken, entries)


def add(
    root: Path, given: Sequence[tuple[str, Load]], share: Sequence[str] = (), *, overwrite: bool = False
) -> list[Taken]:
    """Add adapters to a fleet: all of them, or none. What is there keeps every byte. With `overwrite` a member of the
    same name is replaced; one whose file is the same stays. Raises what `build` raises, and E-LOCKED."""
    _check_apart([name for name, _ in given])
    with _changing(root) as change:
        taken, dead, new = [], 0, 0
        with change.appending() as out:
            intake = Intake(out, change.fleet, share)
            for name, load in sorted(given, key=_by_name):
                arrival, old = load(), change.fleet.find(name.encode())
                if old is not None and change.fleet.holds(old, arrival.digest):
                    taken.append(_taken(arrival, "unchanged", old.length))
                    continue
                if old is not None and not overwrite:
                    fix = f"give it another name, or pass {spelled('overwrite', True)}"
                    what = f"the fleet has a member {name!r} of other content, or a damaged one"
                    raise errors.OutputExistsError(what, fix=fix, path=root)
                taken.append(_put(intake, arrival, "added" if old is None else "replaced"))
                dead, new = dead + (old.length if old else 0), new + (old is None)
            entries = intake.finish()
            head = heads.grown(change.fleet.head, out.position, new, dead)
            _check_share(intake)
        if entries:
            change.commit(head, entries)
    return _sized(taken, entries)


def remove(root: Path, removed: Sequence[str]) -> int:
    """Remove members: their bytes stay until the fleet is compacted. Returns how many bytes those are. Raises E-MISSING
    for a name that is none, and then removes nothing; E-LOCKED, E-IO-WRITE."""
    with _changing(root) as change:
        old = [change.fleet.entry(name) for name in dict.fromkeys(removed)]
        if not old:
            return 0
        dead = sum(entry.length for entry in old)
        with change.appending() as out:
            for entry in old:
                stored = records.removal(entry.key.decode())
                out.write(stored)
                dead += len(stored)
            head = heads.grown(change.fleet.head, out.position, -len(old), dead)
        change.commit(head, sorted(Entry(entry.key, 0, 0) for entry in old))
    return sum(entry.length for entry in old)


def compact(root: Path) -> Compacted:
    """Write the fleet anew, as `build` would make it of its members: without what was removed or replaced, and without
    shared parts that none of them needs; which are shared is found anew. Raises what a damaged member is refused with,
    and then changes nothing; E-LOCKED, E-IO-WRITE."""
    with _changing(root) as change:
        fleet = change.fleet
        generation = fleet.head.generation + 1
        new = Head(generation=generation, next=fleet.head.next)
        with change.folder.create(new.data_name) as out:
            out.write(MAGIC)
            intake = Intake(out)
            count = 0
            for count, entry in enumerate(fleet.entries(), 1):  # noqa: B007 -- their number
                intake.put(arrival_of(fleet, entry))
            entries = intake.finish()
            new = heads.grown(new, out.position, count, 0)
        before = _nbytes(root, fleet.head)
        change.commit_whole(new, entries)
        return Compacted(before, _nbytes(root, heads.read(root)))


def arrival_of(fleet: OpenFleet, entry: Entry, name: str = "") -> Arrival:
    """Return a member of a fleet as it arrives in another, under its name or another one. Raises E-DIGEST."""
    own = entry.key.decode()
    try:
        came_as = fleet.member(entry).version
        return Arrival.of_file(name or own, fleet.file_bytes(entry), fleet.shown(own), came_as)
    except LrcError as error:
        raise error.at(fleet.shown(own)) from None


def reindex(root: Path) -> int:
    """Make the index anew from the data file, and the head too if that is damaged: from the last data file then, as
    far as it can be read. Returns the number of members. Raises E-DIGEST if the data are damaged before their end;
    E-LOCKED, E-IO-WRITE."""
    with durable.locked(root, fix="copy the fleet to another disk"):
        head, stop = _head_or_last(root)
        if stop is None:
            durable.discard(root / _NEW_HEAD)
        else:
            _tidy(root, head)
        newest: dict[bytes, Entry] = {}
        end, total = len(MAGIC), 0
        for record in scan(root / head.data_name, stop):
            if record.error is not None:
                if stop is None:
                    break
                raise record.error.at(root / head.data_name)
            end = record.entry.offset + record.entry.length
            total += record.entry.length if record.kind in (MEMBER, REMOVAL) else 0
            is_removed = record.kind == REMOVAL
            newest[record.entry.key] = record.entry._replace(length=0) if is_removed else record.entry
        entries = sorted(entry for entry in newest.values() if entry.length)
        members = [entry for entry in entries if entry.key[:1] != b"\0"]
        dead = total - sum(entry.length for entry in members)
        new = replace(head, bytes=end, members=len(members), dead=dead, runs=())
        _commit(_folder(root), new, entries, ())
        _tidy(root, heads.read(root))
    return len(members)


def _head_or_last(root: Path) -> tuple[Head, int | None]:
    """The head, and where the data end; of a damaged one what the names of the files tell, and None."""
    try:
        head = heads.read(root)
    except LrcError:
        pass
    else:
        return head, head.bytes
    of = {name: [int(p.name[len(name) :]) for p in root.glob(f"{name}*") if heads.is_ours(p.name)] for name in _FILES}
    if not of["members-"]:
        raise errors.FileKindError("there is no data file of a fleet", path=root)
    return Head(generation=max(of["members-"]), next=max(of["index-"], default=0) + 1), None


_FILES = ("members-", "index-")


# --- one change -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Change:
    """A fleet that is locked: as it is, and its folder."""

    fleet: OpenFleet
    folder: StagedDirectory

    @contextmanager
    def appending(self) -> Iterator[durable.File]:
        """Append to the data file."""
        head = self.fleet.head
        durable.check_changeable(self.folder.root / head.data_name)
        with self.folder.reopen(head.data_name, head.bytes) as out:
            yield out

    def give_up(self) -> None:
        """Remove what was written, unless the new head is in place."""
        root, head = self.folder.root, self.fleet.head
        if heads.read(root) == head:
            if (root / head.data_name).stat().st_size > head.bytes:
                self.folder.reopen(head.data_name, head.bytes).close()
            _tidy(root, head)

    def commit(self, head: Head, entries: Sequence[Entry]) -> None:
        """Put a new run, merged with those that are not much larger, and the head."""
        runs = self.fleet.head.runs
        count = index.to_merge(runs, len(entries))
        keep = len(runs) - count
        merged = index.newest([*(tree.entries() for tree in self.fleet.trees[keep:]), entries])
        every = merged if keep else (entry for entry in merged if entry.length)
        _commit(self.folder, head, every, runs[:keep])
        _tidy(self.folder.root, heads.read(self.folder.root))

    def commit_whole(self, head: Head, entries: Sequence[Entry]) -> None:
        """Put the index of a new data file, and the head."""
        _commit(self.folder, head, entries, ())
        _tidy(self.folder.root, heads.read(self.folder.root))


@contextmanager
def _changing(root: Path) -> Iterator[_Change]:
    """Lock a fleet, and open it; what an ended writer has left is removed."""
    if not names.is_fleet(root):
        raise errors.UnknownLayoutError("is no fleet", fix="`lrconvert pack build` makes one", path=root)
    with durable.locked(root, fix="copy the fleet to another disk"), OpenFleet(root) as fleet:
        _tidy(root, fleet.head)
        change = _Change(fleet, _folder(root))
        try:
            yield change
        except BaseException:
            with suppress(LrcError, OSError):  # the next writer does it, too
                change.give_up()
            raise


def _folder(root: Path) -> StagedDirectory:
    return StagedDirectory(root, root, lambda name: heads.is_ours(name) or name == _NEW_HEAD)


def _commit(folder: StagedDirectory, head: Head, entries: Iterable[Entry], keep: Sequence[Run]) -> None:
    """Write a run and the head, which is put in place last."""
    run = _write_run(folder, entries, head.next)
    new = replace(head, runs=(*keep, run) if run else tuple(keep), next=head.next + 1)
    folder.write_bytes(_NEW_HEAD, heads.encode(new))
    folder.sync()
    durable.install(folder.root / _NEW_HEAD, folder.root / names.HEAD)


def _write_run(folder: StagedDirectory, entries: Iterable[Entry], number: int) -> Run | None:
    name = f"index-{number}"
    with folder.create(name) as out:
        run = index.write(entries, number, out.write)
    if run is None:
        folder.remove(name)
    return run


def _tidy(root: Path, head: Head) -> None:
    """Delete what the head does not state: what it has replaced, or an ended writer has left."""
    stated = heads.files_of(head)
    for path in sorted(root.iterdir()):
        if path.name == _NEW_HEAD or (heads.is_ours(path.name) and path.name not in stated):
            durable.discard(path)


def _nbytes(root: Path, head: Head) -> int:
    return (root / names.HEAD).stat().st_size + head.bytes + sum(run.bytes for run in head.runs)


# --- what comes in --------------------------------------------------------------------------------------------------


def _check_replaceable(root: Path) -> None:
    """Raise E-OUT-PATH for a folder with other things than a fleet in it, which no option replaces."""
    if root.is_dir() and not root.is_symlink() and any(root.iterdir()) and not names.is_fleet(root):
        what = "is a folder with other files than those of a fleet, and is not replaced"
        raise errors.OutputPathError(what, fix="choose another output", path=root)


def _check_apart(given: Sequence[str]) -> None:
    """Raise E-NAME for a text that is no name, E-OUT-EXISTS for one that is given twice."""
    seen: set[str] = set()
    for name in given:
        if names.check_name(name) in seen:
            raise errors.OutputExistsError(f"two of the adapters are called {name!r}", fix="name one otherwise")
        seen.add(name)


def _check_share(intake: Intake) -> None:
    missing = sorted(set(intake.share) - intake.named)
    if missing:
        what = f"no adapter has a tensor {missing[0]!r} of {records.SHARED_LEAST} bytes or more to share"
        raise errors.OptionError(what, fix="name tensors as the page of their method does, or leave it out")


def _by_name(given: tuple[str, Load]) -> bytes:
    return given[0].encode()


def _put(intake: Intake, arrival: Arrival, state: str = "added") -> Taken:
    intake.put(arrival)
    return _taken(arrival, state, 0)


def _taken(arrival: Arrival, state: str, nbytes: int) -> Taken:
    return Taken(arrival.name, state, nbytes, arrival.nbytes, arrival.version, arrival.digest.hex())


def _sized(taken: Sequence[Taken], entries: Sequence[Entry]) -> list[Taken]:
    """Return what was taken in, with the bytes of the records."""
    length = {entry.key: entry.length for entry in entries}
    return [replace(one, nbytes=length.get(one.name.encode(), one.nbytes)) for one in taken]
