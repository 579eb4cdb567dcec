"""Disks that fail, and disks that lose power: stand-ins for `lrconvert.io.durable.system`.

with faults.installed(faults.Faulty(7, errno.ENOSPC)) as disk:
    ...                                     # the seventh call fails; disk.made has the names of all calls

with faults.installed(faults.Recorder(folder)) as disk:
    ...
disk.after_power_loss(40, random, elsewhere)  # what may be in the folder if the power failed after 40 calls
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from lrconvert.io.durable import system
from lrconvert.io.durable.system import System

SHORT = -1  # in place of an errno: writes take half of what they are given
OPERATIONS = (
    *("open", "open_folder", "chown", "chmod", "write", "pwrite", "copy_range", "truncate", "fsync", "close"),
    *("mkdir", "rename", "exchange", "link", "unlink", "rmdir", "lock"),
)
_S = TypeVar("_S", bound=System)


@contextmanager
def installed(disk: _S) -> Iterator[_S]:
    """Let everything that is written go through `disk`."""
    before = system.current
    system.current = disk
    try:
        yield disk
    finally:
        system.current = before


class Quick(System):
    """A disk that need not survive anything, and does not wait for it."""

    def fsync(self, descriptor: int) -> None:
        os.fstat(descriptor)  # EBADF for what is not open


class Remote(Quick):
    """A disk that gives no locks (flock fails with `error`) and syncs no folders, as some network file systems."""

    def __init__(self, error: int) -> None:
        self.error = error

    def lock(self, descriptor: int) -> None:
        raise OSError(self.error, os.strerror(self.error))

    def lock_file(self, descriptor: int, shared: bool, wait: bool) -> None:
        self.lock(descriptor)

    def fsync(self, descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


class Faulty(Quick):
    """Call number `at` (from 1 on) fails with the errno `error`; with `persistent` all after it too. With SHORT nothing
    fails, but writes are cut short. A failing close closes all the same."""

    def __init__(self, at: int, error: int, persistent: bool = False) -> None:
        self.at, self.error, self.persistent = at, error, persistent
        self.made: list[str] = []

    @property
    def reached(self) -> bool:
        """Say whether there was a call to fail."""
        return len(self.made) >= self.at

    def _fails(self, name: str) -> bool:
        self.made.append(name)
        return len(self.made) == self.at or (self.persistent and len(self.made) > self.at)


def _failing(name: str) -> Any:
    real = getattr(Quick, name)

    def call(self: Faulty, *arguments: Any) -> Any:
        if not self._fails(name):
            return real(self, *arguments)
        if self.error == SHORT:
            if name in ("write", "pwrite"):
                descriptor, data, *rest = arguments
                return real(self, descriptor, data[: max(1, len(data) // 2)], *rest)
            return real(self, *arguments)
        if name == "close":
            real(self, *arguments)
        if name == "exchange":
            return False
        raise OSError(self.error, os.strerror(self.error))

    return call


for _name in OPERATIONS:
    setattr(Faulty, _name, _failing(_name))


class Killed(BaseException):
    """The process is gone: nothing that follows may have an effect."""


class Killer(Quick):
    """The process is killed before call number `at`: it and all later ones do nothing (but descriptors are closed, as
    the system does)."""

    def __init__(self, at: int) -> None:
        self.at, self.made = at, 0


def _killing(name: str) -> Any:
    real = getattr(Quick, name)

    def call(self: Killer, *arguments: Any) -> Any:
        self.made += 1
        if self.made < self.at or name == "close":
            result = real(self, *arguments)
        if self.made >= self.at:
            raise Killed
        return result

    return call


for _name in OPERATIONS:
    setattr(Killer, _name, _killing(_name))


# --- power loss -----------------------------------------------------------------------------------------------------


@dataclass
class _Node:
    """A file (`data`) or folder (`names`) as it is on the disk, and what has been done to it since it was synced."""

    data: bytearray | None = None
    names: dict[str, _Node] = field(default_factory=dict)
    pending: list[tuple[Any, ...]] = field(default_factory=list)
    now: dict[str, _Node] = field(default_factory=dict)  # of a folder: the names with all that is pending

    @property
    def is_folder(self) -> bool:
        return self.data is None


class Recorder(Quick):
    """Does everything, and writes it down, so that what a power loss may leave of `root` can be made.

    What may be lost: any of the bytes written to a file since its last fsync, each write apart, wholly or in part; and
    in every folder the last of the changes of names since its last fsync. A rename is one change, in the folder that it
    leads to.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[tuple[Any, ...]] = []
        self._start = _read(root)
        self._open: dict[int, str] = {}

    def _name(self, path: Path) -> str:
        return Path(path).relative_to(self.root).as_posix()

    def open(self, path: Path, flags: int, mode: int = 0o666) -> int:
        existed = path.exists()
        descriptor = super().open(path, flags, mode)
        self._open[descriptor] = self._name(path)
        if not existed:
            self.calls.append(("create", self._name(path)))
        self.calls.append(("open", descriptor, self._name(path)))
        return descriptor

    def open_folder(self, path: Path) -> int:
        descriptor = super().open_folder(path)
        self.calls.append(("open", descriptor, self._name(path)))
        return descriptor

    def write(self, descriptor: int, data: memoryview) -> int:
        at = os.lseek(descriptor, 0, os.SEEK_CUR)
        done = super().write(descriptor, data)
        self.calls.append(("write", descriptor, at, bytes(data[:done])))
        return done

    def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        done = super().pwrite(descriptor, data, offset)
        self.calls.append(("write", descriptor, offset, bytes(data[:done])))
        return done

    def copy_range(self, source: int, target: int, nbytes: int, offset: int) -> int:
        at = os.lseek(target, 0, os.SEEK_CUR)
        done = super().copy_range(source, target, nbytes, offset)
        self.calls.append(("write", target, at, os.pread(source, done, offset)))
        return done

    def truncate(self, descriptor: int, nbytes: int) -> None:
        super().truncate(descriptor, nbytes)
        self.calls.append(("truncate", descriptor, nbytes))

    def fsync(self, descriptor: int) -> None:
        super().fsync(descriptor)
        self.calls.append(("fsync", descriptor))

    def after_power_loss(self, count: int, random: Random, folder: Path) -> None:
        """Write into the new `folder` what a disk may hold if the power failed after the first `count` calls."""
        disk = _Disk(_copy(self._start, {}))
        for call in self.calls[:count]:
            getattr(disk, f"on_{call[0]}")(*call[1:])
        disk.survivors(random)
        _write(disk.root, folder)


def _recorded(name: str) -> Any:
    """Return a method that writes down a call about names; an exchange that returned False was not made."""
    real = getattr(Quick, name)

    def call(self: Recorder, *paths: Path) -> Any:
        result = real(self, *paths)
        if result is not False:
            self.calls.append((name, *map(self._name, paths)))
        return result

    return call


for _name in ("mkdir", "rename", "exchange", "link", "unlink", "rmdir"):
    setattr(Recorder, _name, _recorded(_name))


class _Disk:
    """The calls, played on nodes."""

    def __init__(self, root: _Node) -> None:
        self.root = root
        self.open: dict[int, _Node] = {}

    def _find(self, name: str) -> _Node:
        node = self.root
        for part in Path(name).parts:
            node = node.now[part]
        return node

    def _parent(self, name: str) -> tuple[_Node, str]:
        return self._find(Path(name).parent.as_posix()), Path(name).name

    def _change(self, folder: _Node, *edits: tuple[_Node, str, _Node | None]) -> None:
        """Names that come (a node) or go (None), together; the change belongs to `folder`."""
        folder.pending.append(edits)
        for place, name, node in edits:
            if node is None:
                place.now.pop(name, None)
            else:
                place.now[name] = node

    def on_create(self, name: str) -> None:
        folder, last = self._parent(name)
        self._change(folder, (folder, last, _Node(data=bytearray())))

    def on_open(self, descriptor: int, name: str) -> None:
        self.open[descriptor] = self._find(name)

    def on_mkdir(self, name: str) -> None:
        folder, last = self._parent(name)
        self._change(folder, (folder, last, _Node()))

    def on_write(self, descriptor: int, offset: int, data: bytes) -> None:
        self.open[descriptor].pending.append((offset, data))

    def on_truncate(self, descriptor: int, nbytes: int) -> None:
        self.open[descriptor].pending.append((nbytes, None))

    def on_fsync(self, descriptor: int) -> None:
        node = self.open[descriptor]
        if node.is_folder:
            self._settle(node, len(node.pending))
        else:
            for edit in node.pending:
                _apply(node, *edit)
            node.pending.clear()

    def on_rename(self, source: str, target: str) -> None:
        (from_folder, from_name), (to_folder, to_name) = self._parent(source), self._parent(target)
        node = from_folder.now[from_name]
        self._change(to_folder, (from_folder, from_name, None), (to_folder, to_name, node))

    def on_exchange(self, one: str, other: str) -> None:
        (folder, name), (to_folder, to_name) = self._parent(one), self._parent(other)
        nodes = folder.now[name], to_folder.now[to_name]
        self._change(to_folder, (folder, name, nodes[1]), (to_folder, to_name, nodes[0]))

    def on_link(self, source: str, target: str) -> None:
        folder, last = self._parent(target)
        self._change(folder, (folder, last, self._find(source)))

    def on_unlink(self, name: str) -> None:
        folder, last = self._parent(name)
        self._change(folder, (folder, last, None))

    on_rmdir = on_unlink

    def _settle(self, folder: _Node, count: int) -> None:
        """The first `count` changes of a folder are on the disk."""
        for edits in folder.pending[:count]:
            for place, name, node in edits:
                if node is None:
                    place.names.pop(name, None)
                else:
                    place.names[name] = node
        del folder.pending[:count]

    def survivors(self, random: Random) -> None:
        """Of what is pending, let some be on the disk."""
        done: set[int] = set()
        todo = [self.root]
        while todo:
            node = todo.pop()
            if id(node) in done:
                continue
            done.add(id(node))
            if node.is_folder:
                todo += [*node.names.values(), *node.now.values()]
                self._settle(node, random.choice((0, len(node.pending), random.randint(0, len(node.pending)))))
                todo += list(node.names.values())
                continue
            luck = random.choice((0.0, 0.5, 1.0))
            for offset, data in node.pending:
                if random.random() < luck:
                    torn = data is not None and luck == 0.5 and random.random() < 0.5
                    _apply(node, offset, data[: len(data) // 2] if torn else data)


def _apply(node: _Node, offset: int, data: bytes | None) -> None:
    assert node.data is not None
    if data is None:
        del node.data[offset:]
        return
    node.data.extend(bytes(max(0, offset - len(node.data))))
    node.data[offset : offset + len(data)] = data


def _read(path: Path) -> _Node:
    if not path.is_dir():
        return _Node(data=bytearray(path.read_bytes()))
    names = {inner.name: _read(inner) for inner in path.iterdir()}
    return _Node(names=names, now=dict(names))


def _copy(node: _Node, seen: dict[int, _Node]) -> _Node:
    if id(node) not in seen:
        made = seen[id(node)] = _Node(data=None if node.data is None else bytearray(node.data))
        made.names = {name: _copy(inner, seen) for name, inner in node.names.items()}
        made.now = dict(made.names)
    return seen[id(node)]


def _write(node: _Node, path: Path) -> None:
    if node.data is not None:
        path.write_bytes(node.data)
        return
    path.mkdir(exist_ok=True)
    for name, inner in node.names.items():
        _write(inner, path / name)


ERRORS = (errno.EIO, errno.ENOSPC, SHORT, errno.EINTR, errno.EXDEV)
