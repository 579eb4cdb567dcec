"""Valid lrconvert files of every method, and their manifests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from lrconvert import api
from lrconvert.core.dtypes import STORAGE, Array, Stored
from lrconvert.formats.lrc import file
from lrconvert.lora.adapter import CompactAdapter, ExtraTensor, LoraAdapter, LoraTarget, Provenance, Target, View
from lrconvert.lora.base_weights import BLOCK, BaseWeights
from lrconvert.lora.fingerprint import fingerprint
from lrconvert.methods import base as methods
from lrconvert.testing import lazy
from lrconvert.testing.container_versions import encoded, versions
from lrconvert.testing.raw_files import RawFile

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

_PLACES = (
    ("blocks.{}.w", "matrix"),
    ("blocks.{}.w", "transposed"),
    ("h.{}.q.weight", "matrix"),
    ("lone{:02}", "matrix"),
)


@cache
def _fitted(method: str, example: int) -> CompactAdapter:
    """Return a tiny LoRA in the form of one of the method's examples."""
    rng = np.random.default_rng(example)
    pairs = []
    for n, (out, inner) in enumerate(((24, 16), (16, 20))):
        a, b = rng.standard_normal((3, inner)), rng.standard_normal((out, 3))
        target = Target(f"t.{n}.weight", (out, inner))
        factors = Stored("F32", a.astype(np.float32)), Stored("F32", b.astype(np.float32))
        pairs.append(LoraTarget(target, factors[0], factors[1], 2.0))
    lora, form = LoraAdapter(tuple(pairs)), methods.get(method)
    options = dict(form.examples[example])
    own = form.Options(**{f.name: options[f.name] for f in fields(form.Options) if f.name in options})
    if not form.wants_base(own):
        return api.convert(lora, method, **options).compact
    context = methods.FitContext(base=_Zeros())
    empty = CompactAdapter(method, None, lora.shapes(), {}, base=replace(fingerprint(lora.shapes()), content=_CONTENT))
    limit = options.get("target_size")
    budget = limit and methods.Budget(limit, lambda config: file.sizes(replace(empty, config=config)).adapter)
    config = form.plan(lora, own, budget, context)
    return replace(empty, config=config, tensors=form.fit(lora, config, context))


_CONTENT = "c0" * 32  # of no base


class _Zeros(BaseWeights):
    """A base of zeros, of any shape."""

    def __init__(self) -> None:
        self.content = _CONTENT

    def rows(self, target: Target, start: int, stop: int) -> Array:
        return np.zeros((stop - start, target.in_features), np.float32)

    def blocks(self, target: Target, step: int = 1, elements: int = BLOCK) -> Iterator[tuple[int, Array]]:
        yield 0, self.rows(target, 0, target.out_features)


def lrconvert_files(method: str | None = None) -> SearchStrategy[bytes]:
    """Return the bytes of small valid files of any container version, of `method` or of any: names, views, extras and
    notes around few fits."""
    st = lazy.st
    words = st.text('ab.01 é"\\/<', min_size=1, max_size=8)

    @st.composite
    def files(draw: DrawFn) -> bytes:
        chosen = method or draw(st.sampled_from(methods.module_names()))
        fitted = _fitted(chosen, draw(st.integers(0, len(methods.get(chosen).examples) - 1)))
        pattern, view = draw(st.sampled_from(_PLACES))
        first = draw(st.integers(0, 12))
        targets = []
        for n, old in enumerate(fitted.targets):
            shape = old.shape[::-1] if view == "transposed" else old.shape
            targets.append(Target(pattern.format(first + n), shape, View(view)))
        if targets != sorted(targets):  # 9 and 10 change places, and their tensors would have to
            targets = list(fitted.targets)
        extras = []
        for name in sorted(draw(st.sets(words, max_size=2))):
            dtype, length = draw(st.sampled_from(sorted(STORAGE))), draw(st.integers(1, 3))
            size = STORAGE[dtype].itemsize * length
            extras.append(ExtraTensor(name, dtype, (length,), draw(st.binary(min_size=size, max_size=size))))
        notes = Provenance(base_model=draw(st.just("") | words), fields=draw(st.dictionaries(st.just("note"), words)))
        dressed = replace(
            fitted,
            targets=tuple(targets),
            base=replace(fingerprint(targets), content=fitted.base.content),
            extras=tuple(extras),
            provenance=notes,
        )
        return encoded(dressed, draw(st.sampled_from(versions(dressed))))

    return files()


def manifests(method: str | None = None) -> SearchStrategy[dict[str, Any]]:
    """Return the manifests of `lrconvert_files`, as JSON values."""
    return lrconvert_files(method).map(lambda data: dict(RawFile.of(data).manifest))
