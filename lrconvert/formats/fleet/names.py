"""Names of members, and ``FLEET#NAME``, the spelling by which every verb takes one."""

from __future__ import annotations

import re
import unicodedata
from os import PathLike, fspath
from pathlib import Path

from lrconvert.core.errors import TensorNameError

PART = re.compile(r"(?!\.)[\w.+=@:, -]{1,200}")
NAME_BYTES = 255
MARK = "#"
HEAD = "fleet.json"
_RULE = "letters, digits and .+=@:,-_ in parts of at most 200 with / between, none of which begins with a dot"


def is_name(text: str) -> bool:
    """Return true if a text can be the name of a member: no part of it means another place, and it has one spelling."""
    return (
        len(text.encode("utf-8", "replace")) <= NAME_BYTES
        and unicodedata.normalize("NFC", text) == text
        and all(PART.fullmatch(part) for part in text.split("/"))
    )


def check_name(text: str) -> str:
    """Return a name. Raises E-NAME for a text that is none."""
    if is_name(text):
        return text
    if unicodedata.normalize("NFC", text) != text:
        raise TensorNameError(f"{text!r:.80} is not in Unicode normal form C", fix="give it another name")
    what = f"{text!r:.300} is no name of a member"
    raise TensorNameError(what, fix=f"a name has at most {NAME_BYTES} bytes: {_RULE}")


def is_fleet(path: Path) -> bool:
    """Return true if a path is the folder of a fleet."""
    try:
        return (path / HEAD).is_file()
    except OSError:
        return False


def member_of(path: str | PathLike[str]) -> tuple[Path, str] | None:
    """Return the fleet and the name that ``FLEET#NAME`` stands for; None for any other path. What exists under the
    whole of its name is that file. Raises E-NAME if what follows a fleet is no name."""
    text = fspath(path)
    if MARK not in text:
        return None
    place, _, name = text.rpartition(MARK)
    if not place or Path(text).exists() or not is_fleet(Path(place)):
        return None
    try:
        return Path(place), check_name(name)
    except TensorNameError as error:
        raise error.at(place) from None


def spelled_member(fleet: Path, name: str) -> Path:
    """Return the path that stands for a member."""
    return Path(f"{fleet}{MARK}{name}")
