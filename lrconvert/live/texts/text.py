"""Examples of text, as rows of data hold them, before a tokenizer has seen them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Turn = Mapping[str, Any]  # `role`, `content`, and what else a chat template reads


@dataclass(frozen=True)
class Place:
    """A row of data: its number, counted from 1, in a file (None: in memory)."""

    path: Path | None
    number: int
    unit: str = "line"

    @property
    def row(self) -> str:
        """The row without its file."""
        return f"{self.unit} {self.number}"

    def __str__(self) -> str:
        return self.row if self.path is None else f"{self.path.name} {self.row}"


@dataclass(frozen=True)
class Text:
    """One example: `prompt` and what follows it. A plain text is all `completion`; `label` is a class. `running` text
    goes on in the next one. `kind` is the layout of its row, in words."""

    completion: str
    prompt: str = ""
    label: str | None = None
    running: bool = False
    kind: str = field(default="texts", compare=False)
    place: Place | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Conversation:
    """The `turns` of a conversation, for the chat template of a base. The assistant's turns count, from number `first`
    on. `tools` and `options` are the template's."""

    turns: tuple[Turn, ...]
    first: int = 0
    tools: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    kind: str = field(default="conversations", compare=False)
    place: Place | None = field(default=None, compare=False)
