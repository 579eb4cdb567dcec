"""Commands that are killed at random moments, a few of the many that tests/kills.py kills."""

from __future__ import annotations

from pathlib import Path

import pytest
from kills import Kills, commands


@pytest.mark.slow
def test_killed_at_random_and_repeated(place: Path) -> None:
    """What a killed command left is gone on with, or done again: the bytes of a run without a break."""
    kills = Kills(place, {command.name: command for command in commands()})
    problems = [problem for number in range(24) if (problem := kills.kill(number))]
    assert not problems
    assert kills.counts["killed"] > 12
