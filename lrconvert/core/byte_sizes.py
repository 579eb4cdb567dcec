"""Sizes in bytes and shares, as people write them."""

from __future__ import annotations

from lrconvert.core.errors import OptionError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


def byte_count(text: str) -> int:
    """Return the bytes of a size such as 200KB, 1.5MiB or 4096. KB = 1000 bytes, KiB = 1024. Raises E-OPTION."""
    plain = text.strip().lower()
    number = plain.rstrip("bikmg")
    try:
        return int(float(number) * _UNITS[plain[len(number) :].strip()])
    except (ValueError, KeyError, OverflowError):
        raise OptionError(f"{text!r:.80} is not a size", fix="write 200KB, 1.5MiB or 4096") from None


def share(text: str) -> float:
    """Return the number of a share such as 5% or 0.05. Raises E-OPTION."""
    plain = text.strip()
    try:
        return float(plain.removesuffix("%")) / (100 if plain.endswith("%") else 1)
    except ValueError:
        raise OptionError(f"{text!r:.80} is not a share", fix="write 5% or 0.05") from None
