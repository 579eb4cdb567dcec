"""Texts as data for models: `sources` finds files, `rows` and `columnar` read them, `layouts` says what a row holds,
`chat` puts conversations into a base's own words, `tokens` and `batches` make of them what a model is given. `reading`
ties these together, and a `tally` keeps account of what was used, cut and left out."""

from lrconvert.live.texts.batches import Packing, batches, cut, padded
from lrconvert.live.texts.reading import TextData, are_paths, open_texts, read
from lrconvert.live.texts.tally import Tally
from lrconvert.live.texts.text import Conversation, Place, Text
from lrconvert.live.texts.tokens import IGNORED, Example, class_of, tokenize

__all__ = [
    "IGNORED",
    "Conversation",
    "Example",
    "Packing",
    "Place",
    "Tally",
    "Text",
    "TextData",
    "are_paths",
    "batches",
    "class_of",
    "cut",
    "open_texts",
    "padded",
    "read",
    "tokenize",
]
