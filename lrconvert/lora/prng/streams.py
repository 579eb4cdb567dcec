"""The streams of seeded bases, and the maps from words to numbers."""

from __future__ import annotations

import hashlib
import operator
from dataclasses import dataclass
from functools import cached_property

from lrconvert.core.errors import LimitError, OptionError
from lrconvert.core.limits import OWN
from lrconvert.lora.prng import philox

DOMAIN = b"lrconvert/basis/v1\0"
SEEDS = 1 << 64
BASES = 1 << 32  # of a stream
BLOCKS = 1 << 32  # of a basis


@dataclass(frozen=True)
class ValueMap:
    """A map from words to numbers: lane i of a word is the code ``c = (word >> shifts[i]) mod 2^bits``, its numerator
    the odd integer ``2c + 1 - 2^bits``, its value the numerator times `unit`, a power of two: exact in float32."""

    name: str
    bits: int
    shifts: tuple[int, ...]
    unit: float

    @property
    def lanes(self) -> int:
        """Elements of a block, which has four words."""
        return 4 * len(self.shifts)

    @property
    def offset(self) -> int:
        """The numerator of code 0, the smallest one."""
        return 1 - (1 << self.bits)

    @property
    def variance(self) -> float:
        """The mean square of the values, whose mean is 0: for methods that fold ``variance ** -0.5`` into scales."""
        return ((1 << 2 * self.bits) - 1) / 3 * self.unit**2


MAPS = {
    "u8": ValueMap("u8", 8, (0, 8, 16, 24), 2.0**-8),
    "u24": ValueMap("u24", 24, (8,), 2.0**-24),
    "sign": ValueMap("sign", 1, tuple(range(32)), 1.0),
}


@dataclass(frozen=True)
class Stream:
    """The bases of one seed and label. Raises E-OPTION or E-LIMIT on a seed or label that the format does not have."""

    seed: int
    label: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", whole("the seed", self.seed, SEEDS - 1))
        if not isinstance(self.label, str) or not self.label:
            raise OptionError("the label of a stream is empty or no text")
        try:
            size = len(self.label.encode())
        except UnicodeEncodeError:
            raise OptionError(f"the label {self.label!r:.80} is no Unicode text: it has a lone surrogate") from None
        if size > OWN.string_bytes:
            raise LimitError(f"the label of a stream has {size} bytes; at most {OWN.string_bytes} are allowed")

    @property
    def key(self) -> tuple[int, int]:
        """The two key words: the low and the high half of the seed."""
        return self.seed & philox.MASK, self.seed >> 32

    @cached_property
    def sid(self) -> int:
        """The stream id: 64 bits made of the label."""
        return int.from_bytes(hashlib.sha256(DOMAIN + self.label.encode()).digest()[:8], "little")


def whole(what: str, number: int, largest: int) -> int:
    """Return `number` as an int in [0, largest]. Raises E-OPTION below, E-LIMIT above."""
    try:
        whole = operator.index(number)
    except TypeError:
        raise OptionError(f"{what} is {number!r:.40}, no integer") from None
    if whole < 0:
        raise OptionError(f"{what} is negative: {whole}")
    if whole > largest:
        raise LimitError(f"{what} is {whole}; at most {largest} is allowed")
    return whole
