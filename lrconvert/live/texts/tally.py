"""The account of what was read: which layouts, how many examples and tokens, what was cut or left out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from lrconvert.core.errors import printable
from lrconvert.core.notices import Notice
from lrconvert.core.wording import spelled
from lrconvert.live.texts.text import Conversation, Place, Text

BAD, NO_TURN, EMPTY, TOO_LONG = "bad", "no turn", "empty", "too long"
_SHOWN = 3  # of things that are named one by one
_WIDTH = 80
_SINGULAR = r"\1"
_PLURAL = re.compile(r"\b(conversation|prompt|completion|row|text|line)s\b")
_REASONS = {
    NO_TURN: "without an assistant's turn",
    EMPTY: "empty",
    TOO_LONG: "whose prompt alone fills {length}",
}


@dataclass
class Tally:
    """Counts, as they grow while data is read. `kinds` are of examples that are used; `passed_over` are columns that
    lost to others of their row; `notes` say how the files were chosen."""

    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    kinds: Counter[str] = field(default_factory=Counter)
    passed_over: Counter[str] = field(default_factory=Counter)
    unknown_labels: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    examples_of: dict[str, list[str]] = field(default_factory=dict)
    tokens: int = 0
    answers: int = 0
    cut: int = 0
    length: int = 0
    by_turns: int = 0
    max_tokens: int = 0
    is_stopped: bool = False

    def use(self, text: Text | Conversation, tokens: int, answers: int) -> None:
        """Count a text that is used, its tokens, and those of them that count as answers."""
        self.kinds[text.kind] += 1
        self.tokens += tokens
        self.answers += answers

    def leave_out(self, reason: str, place: Place | None, why: str = "") -> None:
        """Count an example that is not used, and why; the first of each reason are named."""
        self.left_out[reason] += 1
        named = self.examples_of.setdefault(reason, [])
        if place is not None and len(named) < _SHOWN:
            row = str(place) if len(self.files) > 1 else place.row
            named.append(printable(f"{row}: {why}" if why else row, _WIDTH))

    def notice(self) -> Notice:
        """Return all of it as one line, which is a warning if an example was left out, or a label is unknown."""
        return Notice(f"data: {self._line()}", is_warning=bool(self.left_out or self.unknown_labels))

    def _line(self) -> str:
        kinds = ", ".join(_counted(count, kind) for kind, count in self.kinds.most_common()) or "no example"
        masked = f" ({self.answers:,} in answers)" if self.answers != self.tokens else ""
        parts = [f"{kinds}, {self.tokens:,} tokens{masked}"]
        if self.is_stopped:
            parts.append(f"the rest is beyond {spelled('max_tokens', self.max_tokens)}")
        if self.cut:
            parts.append(f"{self.cut:,} cut to {self.length:,} tokens")
        if self.by_turns:
            parts.append(f"{self.by_turns:,} read turn by turn, since the chat template rewrites earlier turns")
        if self.passed_over:
            parts.append(f"not used: {_listed(f'`{name}`' for name in self.passed_over)}")
        parts += self.notes
        if self.unknown_labels:
            labels = _listed(repr(label) for label in self.unknown_labels)
            parts.append(f"{self.unknown_labels.total():,} labels are no class of the model ({labels})")
        if self.left_out:
            parts.append(f"left out: {', '.join(map(self._reason, self.left_out))}")
        names = _listed(printable(path.name, _WIDTH) for path in self.files)
        return f"{names}: {'; '.join(parts)}" if names else "; ".join(parts)

    def _reason(self, reason: str) -> str:
        count, places = self.left_out[reason], "; ".join(self.examples_of.get(reason, ()))
        more = "; ..." if count > _SHOWN and places else ""
        what = _REASONS.get(reason, "bad row" if count == 1 else "bad rows").format(length=spelled("length"))
        return f"{count:,} {what}" + (f" ({places}{more})" if places else "")


def _counted(count: int, kinds: str) -> str:
    """A count of things whose name is in the plural."""
    return f"{count:,} {_PLURAL.sub(_SINGULAR, kinds) if count == 1 else kinds}"


def _listed(names: Iterable[str]) -> str:
    """Return names with commas, the first of many."""
    every = list(names)
    more = len(every) - _SHOWN
    return ", ".join(every[:_SHOWN]) + (f" and {more:,} more" if more > 0 else "")
