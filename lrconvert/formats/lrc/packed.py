"""JSON values in few bytes, each with one spelling: what the manifest is stored as. Normative text:
``formats/lrconvert-v2.md``, section 3; for tables ``formats/lrconvert-v3.md``, section 3.

A value begins with a head: three bits of kind, and a number in five bits, continued in bytes of seven bits if it is 31
or more (the prefixed integers of RFC 7541). Frequent texts are one head; frequent parts of names are one byte. With
`tables`, as from container version 3 on, a list of objects that have the same keys holds the keys once, and then column
after column.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lrconvert.core import errors
from lrconvert.core.limits import OWN
from lrconvert.io import strictjson

INTEGER, NEGATIVE, TEXT, HEXADECIMAL, LIST, OBJECT, WORD, BOOLEAN = range(8)
TABLE = BOOLEAN  # of two rows or more: no boolean has such a number

# Texts that are a value or a key by themselves, by number. The first 31 take one byte.
WORDS = tuple(
    """
    base base_model bits budget captured config content dtype exponents extras fields group_size id length levels
    max_count members method name prefix provenance ranges rank requires shape source source_format suffix targets
    task_type version view use revision peft_version refined_steps refined_after refined_before refined_seed
    refined_data components uniform variant shard mini_rank num_vectors vector_length top_k weight_bits gains padded
    passes rows family map seed base_term counts num_basis lowrank vblora sbora bone nola hadamard sign peft
    CAUSAL_LM SEQ_CLS TOKEN_CLS SEQ_2_SEQ_LM FEATURE_EXTRACTION transposed row_indices magnitude BF16 F16 F32 I64
    """.split()  # noqa: SIM905 -- a table
)
# Parts of texts, by number: 0 to 31 are the bytes 00 to 1f, which no text has, 32 to 95 the bytes 80 to bf, which begin
# no character.
PARTS = tuple(
    """
    .weight .bias model.layers. .self_attn. .mlp. q_proj k_proj v_proj o_proj gate_proj up_proj down_proj
    out_proj qkv_proj gate_up_proj fc1 fc2 encoder. decoder. encoder.layer. encoder.layers. decoder.layers.
    .attention. .attention.self. .attention.output. .attention.attention. .output. .intermediate. dense query key value
    model. language_model. vision_model. vision_tower. visual. base_model transformer. transformer.h.
    transformer.layer. transformer.blocks. layers. layer. blocks. block. bert. roberta. distilbert. deberta. vit.
    q_lin k_lin v_lin out_lin .ffn. lin1 lin2 .attn. c_attn c_proj c_fc query_key_value dense_h_to_4h dense_4h_to_h
    .experts. .SelfAttention. .EncDecAttention. .DenseReluDense. .layer. to_q to_k to_v to_out .in_proj
    sentence-transformers/ embed_tokens lm_head classifier score embeddings meta-llama/ Llama- mistralai/ Mistral-
    Qwen/ Qwen google/ gemma- microsoft/ -Instruct -instruct -base -uncased HuggingFaceTB/
    """.split()  # noqa: SIM905 -- a table
)
_CODES = [bytes([n if n < 32 else n + 96]) for n in range(len(PARTS))]
_NUMBERS = {word: n for n, word in enumerate(WORDS)}
_CODE_OF = {part.encode(): code for part, code in zip(PARTS, _CODES, strict=True)}
_PART_OF = {code[0]: part for part, code in zip(PARTS, _CODES, strict=True)}
_LONGEST_PART = re.compile(b"|".join(re.escape(p) for p in sorted(_CODE_OF, key=lambda p: (-len(p), p))))
_HEXADECIMAL = re.compile(r"(?:[0-9a-f]{2})+")
_MOST_DIGITS = 8  # of seven bits, behind a head: 2^53 has as many


# --- out ------------------------------------------------------------------------------------------------------------


def pack(value: Any, *, tables: bool = False) -> bytes:
    """Return the one spelling of a JSON value. Raises E-CANON or E-JSON-NUM for what canonical JSON cannot hold."""
    strictjson.dump_canonical(value)
    return spell(value, tables=tables)


def spell(value: Any, *, tables: bool = False) -> bytes:
    """Return what `pack` does, without its checks."""
    out = bytearray()
    _pack(value, out, tables)
    return bytes(out)


def _pack(value: Any, out: bytearray, tables: bool) -> None:
    if isinstance(value, bool):
        out += _head(BOOLEAN, int(value))
    elif isinstance(value, int):
        out += _head(INTEGER, value) if value >= 0 else _head(NEGATIVE, -1 - value)
    elif isinstance(value, str):
        out += _text(value)
    elif isinstance(value, dict):
        out += _head(OBJECT, len(value))
        for key in sorted(value):
            out += _text(key)
            _pack(value[key], out, tables)
    elif tables and _is_table(value):
        out += _head(TABLE, len(value)) + _head(OBJECT, len(value[0]))
        for key in sorted(value[0]):
            out += _text(key)
            for row in value:
                _pack(row[key], out, tables)
    else:
        out += _head(LIST, len(value))
        for item in value:
            _pack(item, out, tables)


def _is_table(items: list[Any]) -> bool:
    """Return whether items are two objects or more with the same keys, and at least one."""
    if len(items) < 2 or not all(isinstance(item, dict) for item in items):
        return False
    return bool(items[0]) and all(item.keys() == items[0].keys() for item in items)


def _head(kind: int, number: int) -> bytes:
    if number < 31:
        return bytes([kind << 5 | number])
    out = [kind << 5 | 31]
    number -= 31
    while number > 127:
        out.append(128 | number & 127)
        number >>= 7
    return bytes([*out, number])


def _text(text: str) -> bytes:
    if text in _NUMBERS:
        return _head(WORD, _NUMBERS[text])
    if _HEXADECIMAL.fullmatch(text):
        return _head(HEXADECIMAL, len(text) // 2) + bytes.fromhex(text)
    stored = _LONGEST_PART.sub(lambda match: _CODE_OF[match[0]], text.encode())
    return _head(TEXT, len(stored)) + stored


# --- in -------------------------------------------------------------------------------------------------------------


def unpack(data: bytes, start: int, limit: int, *, tables: bool = False) -> tuple[Any, int]:
    """Return the value that is packed in `data` from byte `start` on, and where it ends. It may take `limit` bytes, and
    its texts as many.

    Raises E-JSON-SYNTAX (no such value, or `data` ends in it), E-JSON-NUM, E-JSON-DEPTH, E-JSON-DUP, E-HDR-TEXT (not
    UTF-8), E-LIMIT, E-CANON for any but the one spelling.
    """
    reader = _Reader(data, start, limit, tables)
    value = reader.value(OWN.json_depth)
    if pack(value, tables=tables) != data[start : reader.at]:
        raise errors.CanonicalError("the manifest is not in its one spelling (sorted keys, shortest forms)")
    return value, reader.at


class _Reader:
    def __init__(self, data: bytes, start: int, limit: int, tables: bool) -> None:
        self._data = data
        self._tables = tables
        self._limit = limit
        self._stop = start + limit
        self._texts = 0
        self.at = start

    def value(self, depth: int) -> Any:
        kind, number = self._head()
        if kind == INTEGER:
            return number
        if kind == NEGATIVE:
            return -1 - number
        if kind in (TEXT, HEXADECIMAL, WORD):
            return self._text(kind, number)
        if kind == BOOLEAN and (number < 2 or not self._tables):
            if number > 1:
                raise errors.JsonSyntaxError(f"the manifest has the unknown constant {number} before byte {self.at}")
            return bool(number)
        if depth == 0:
            raise errors.JsonDepthError(f"the manifest is nested more than {OWN.json_depth} levels deep")
        if kind == LIST:
            return [self.value(depth - 1) for _ in range(number)]
        if kind == TABLE:
            return self._table(number, depth - 1)
        members: dict[str, Any] = {}
        for _ in range(number):
            key = self._key(members)
            members[key] = self.value(depth - 1)
        return members

    def _table(self, count: int, depth: int) -> list[dict[str, Any]]:
        """`count` rows, which are not believed before the first column is there."""
        kind, number = self._head()
        if kind != OBJECT or number == 0:
            raise errors.JsonSyntaxError(f"a table of the manifest before byte {self.at} has no keys")
        if depth == 0:
            raise errors.JsonDepthError(f"the manifest is nested more than {OWN.json_depth} levels deep")
        columns: dict[str, list[Any]] = {}
        for _ in range(number):
            key = self._key(columns)
            columns[key] = [self.value(depth - 1) for _ in range(count)]
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _key(self, others: Mapping[str, Any]) -> str:
        key = self._text(*self._head())
        if key in others:
            raise errors.JsonDuplicateError(f"the key {key!r:.80} appears twice in one object of the manifest")
        return key

    def _take(self, count: int) -> bytes:
        if self.at + count > self._stop:
            raise errors.LimitError("the manifest has more bytes than are read")
        taken = self._data[self.at : self.at + count]
        if len(taken) < count:
            raise errors.JsonSyntaxError("the data end within the manifest")
        self.at += count
        return taken

    def _head(self) -> tuple[int, int]:
        first = self._take(1)[0]
        kind, number = first >> 5, first & 31
        if number < 31:
            return kind, number
        for n in range(_MOST_DIGITS):
            digit = self._take(1)[0]
            number += (digit & 127) << 7 * n
            if digit < 128:
                return kind, number
        raise errors.JsonNumberError(f"a number of the manifest before byte {self.at} is outside +-(2^53 - 1)")

    def _text(self, kind: int, number: int) -> str:
        if kind == WORD and number < len(WORDS):
            return self._counted(WORDS[number].encode())
        if kind not in (TEXT, HEXADECIMAL):
            raise errors.JsonSyntaxError(f"the manifest has no text before byte {self.at}, or one of no number")
        if number > OWN.string_bytes:
            raise errors.LimitError(f"a text of the manifest has {number} bytes; at most {OWN.string_bytes} are read")
        stored = self._take(number)
        return self._counted(stored.hex().encode() if kind == HEXADECIMAL else _expand(stored))

    def _counted(self, text: bytes) -> str:
        """The text, whose bytes count: what is stored in one may be twenty."""
        self._texts += len(text)
        if self._texts > self._limit:
            raise errors.LimitError(f"the texts of the manifest have more than {self._limit} bytes together")
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise errors.HeaderTextError(f"a text of the manifest before byte {self.at} is not UTF-8") from None


def _expand(stored: bytes) -> bytes:
    """UTF-8 in place of the codes of parts: bytes below 20 anywhere, 80 to bf where a character begins."""
    out, at = bytearray(), 0
    while at < len(stored):
        first = stored[at]
        if first in _PART_OF:
            out += _PART_OF[first].encode()
            at += 1
            continue
        size = 1 if first < 128 else 2 if first < 224 else 3 if first < 240 else 4
        out += stored[at : at + size]
        at += size
    return bytes(out)
