"""PEFT's patterns of module names: matched by its rules, and looked at before they are matched.

Patterns are regular expressions of strangers. Those that could backtrack exponentially never reach the matcher.
"""

from __future__ import annotations

import re
import re._constants as _sre  # type: ignore[import-not-found]
import re._parser as _sre_parser  # type: ignore[import-not-found]
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import comb
from typing import Any

from lrconvert.core.errors import LrcError, PatternError
from lrconvert.core.limits import MAX_PATTERN_LENGTH, MAX_PATTERN_STEPS

_ONE_CHARACTER = (_sre.LITERAL, _sre.NOT_LITERAL, _sre.ANY, _sre.IN)
_MOST_REPEATS = 3


def _simple_repeats(parsed: Any) -> int:
    """Count the unbounded repeats of a parsed pattern, each over one character. Raises E-PATTERN for anything that
    could backtrack exponentially or that has no business in a module name."""
    repeats = 0
    for op, argument in parsed:
        if op in (_sre.MAX_REPEAT, _sre.MIN_REPEAT):
            _, most, body = argument
            one_character = len(body) == 1 and body[0][0] in _ONE_CHARACTER
            if most > 1 and not one_character:
                raise PatternError("a pattern repeats a group", fix="write the pattern without a repeated group")
            repeats += (most > 1) + (0 if one_character else _simple_repeats(body))
        elif op is _sre.SUBPATTERN:
            repeats += _simple_repeats(argument[-1])
        elif op is _sre.BRANCH:
            repeats += sum(_simple_repeats(branch) for branch in argument[1])
        elif op is not _sre.AT and op not in _ONE_CHARACTER:
            raise PatternError(f"a pattern uses {str(op).lower()}, which is not allowed here")
    return repeats


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compile PEFT's rule for keys of rank_pattern and alpha_pattern, ``re.match(r"(.*\\.)?(KEY)$", module)``, after a
    look at the pattern's structure: hostile ones (E-PATTERN) never reach the matcher."""
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise PatternError(f"a pattern has {len(pattern)} characters; at most {MAX_PATTERN_LENGTH} are allowed")
    try:
        if _simple_repeats(_sre_parser.parse(pattern)) > _MOST_REPEATS:
            raise PatternError(f"the pattern {pattern!r:.80} has more than three unbounded repeats")
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise PatternError(f"the pattern {pattern!r:.80} is not a regular expression: {error}") from None
    except LrcError as error:
        error.what = f"{error.what}: {pattern!r:.80}"
        raise


def check_work(patterns: Iterable[str], modules: Iterable[str]) -> None:
    """Raise E-PATTERN if matching these (allowed) patterns to the names of these modules could take too long: k repeats
    over n characters, and PEFT's own before them, are tried in some n^(k+1) / (k+1)! ways."""
    names = Counter(map(len, modules))
    by_repeats = Counter(_simple_repeats(_sre_parser.parse(pattern)) + 1 for pattern in patterns)
    steps = sum(
        many * count * comb(length + repeats, repeats)
        for repeats, many in by_repeats.items()
        for length, count in names.items()
    )
    if steps > MAX_PATTERN_STEPS:
        what = f"matching {by_repeats.total()} patterns to {names.total()} modules may take {steps} steps"
        fix = "write the patterns with fewer repeats"
        raise PatternError(f"{what}; at most {MAX_PATTERN_STEPS} are taken", fix=fix)


Rules = tuple[tuple[str, re.Pattern[str], float], ...]  # (pattern, compiled, the number of modules that match it)


def rules(table: Mapping[str, float]) -> Rules:
    """Return the compiled patterns of a table. Raises E-PATTERN."""
    return tuple((text, compile_pattern(text), value) for text, value in table.items())


@dataclass(frozen=True)
class Lookup:
    """A number for every module: that of the first pattern that matches its name, else the default."""

    rules: Rules
    default: float

    @property
    def patterns(self) -> list[str]:
        return [text for text, _, _ in self.rules]

    def _rule(self, module: str) -> tuple[str, float] | None:
        for text, compiled, value in self.rules:
            if text == module or compiled.match(module):
                return text, value
        return None

    def value(self, module: str) -> float:
        rule = self._rule(module)
        return self.default if rule is None else rule[1]

    def unmatched(self, modules: Iterable[str]) -> set[str]:
        """Return the patterns that decide for none of `modules`."""
        left = set(self.patterns)
        for module in modules:
            if not left:
                break
            rule = self._rule(module)
            if rule is not None:
                left.discard(rule[0])
        return left
