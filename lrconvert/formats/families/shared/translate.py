"""Names of one scheme in another: what each module is called there, and updates of layers that one of the two fuses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from lrconvert.core.errors import ExportError
from lrconvert.core.wording import spelled
from lrconvert.formats.families.base import DIFFUSERS, Family, families
from lrconvert.formats.families.shared import rows
from lrconvert.formats.families.shared.table import Line, Numbers, filled
from lrconvert.lora.adapter import ExtraTensor, LoraTarget, Target

Shape = tuple[int, int]


@dataclass(frozen=True)
class Reading:
    """A family, and the scheme in which it has certain names."""

    id: str
    family: Family
    scheme: str

    def place(self, module: str, shape: Shape, is_flat: bool) -> tuple[Line, Numbers] | None:
        """Return the line of a module of this name and shape, or None."""
        return self.family.schemes[self.scheme].place(module, *shape, is_flat)

    def becomes(self, module: str, shape: Shape, is_flat: bool, scheme: str) -> tuple[str, ...] | None:
        """Return what the module is in a scheme; None if it is none of the family."""
        hit = self.place(module, shape, is_flat)
        if hit is None:
            return None
        line, numbers = hit
        if scheme == self.scheme:
            return (filled(line.name, numbers),)
        parts = tuple(filled(part, numbers) for part in line.parts)
        if scheme == DIFFUSERS:
            return parts
        ends = line.ends(*shape) or ()
        sizes = [end - start for start, end in zip((0, *ends), ends, strict=False)]
        hits = [self.family.schemes[scheme].of_part(p, size, shape[1]) for p, size in zip(parts, sizes, strict=True)]
        return tuple(dict.fromkeys(filled(hit[0].name, hit[2]) if hit else "" for hit in hits))

    def moves_rows(self, module: str, shape: Shape, is_flat: bool, scheme: str) -> bool:
        """Return whether a module of the family is not just called otherwise in a scheme, but fused or swapped."""
        hit = None if scheme == self.scheme else self.place(module, shape, is_flat)
        if hit is None:
            return False
        line, numbers = hit
        if len(line.parts) > 1 or line.is_swapped:
            return True
        other = self.family.schemes[scheme].of_part(filled(line.parts[0], numbers), *shape)
        return other is not None and (len(other[0].parts) > 1 or other[0].is_swapped)


def readings(modules: Mapping[str, Shape], is_flat: bool, only: str = "") -> list[Reading]:
    """Return every family and scheme that has all these modules, of these shapes; `only` of one family."""
    return [
        reading
        for name, family in families().items()
        if only in ("", name)
        for scheme in family.schemes
        if all((reading := Reading(name, family, scheme)).place(m, shape, is_flat) for m, shape in modules.items())
    ]


@dataclass(frozen=True)
class Choice:
    """The family that modules are of, the titles of all families that call them so, and a note, if any."""

    reading: Reading
    titles: str
    note: str = ""


def chosen(
    modules: Mapping[str, Shape], is_flat: bool, scheme: str, only: str = "", *, written_flat: bool = False
) -> Choice | None:
    """Return the family that these modules are of; None if there is none. Families count as one where they say the same
    of all modules, with underscores for dots if that is how the names are written. Where they do not, the one decides
    whose published models have as many blocks. Raises E-EXPORT for several."""
    by_meaning: dict[object, list[Reading]] = {}
    for reading in readings(modules, is_flat, only):
        names = (reading.becomes(module, shape, is_flat, scheme) or () for module, shape in modules.items())
        meaning = [tuple(name.replace(".", "_") if written_flat else name for name in each) for each in names]
        by_meaning.setdefault(tuple(meaning), []).append(reading)
    several = [group[0] for group in by_meaning.values()]
    titles = " or ".join(dict.fromkeys(one.family.title for group in by_meaning.values() for one in group))
    if len(several) < 2:
        return Choice(several[0], titles) if several else None
    deep = [reading for reading in several if _has_depths(reading, modules, is_flat)]
    if len(deep) == 1:
        title = deep[0].family.title
        note = f"names may be those of {titles}; the number of blocks is that of {title}"
        return Choice(deep[0], title, f"{note} ({spelled('base', ...)} says it for sure, its config.json is enough)")
    first = next(iter(modules))
    raise ExportError(
        f"the names may be those of {titles}, where they mean different modules, {first!r:.120} for one",
        fix=f"give {spelled('base', ...)}; its config.json is enough",
    )


def _has_depths(reading: Reading, modules: Mapping[str, Shape], is_flat: bool) -> bool:
    counts: dict[str, int] = {}
    for module, shape in modules.items():
        for part in reading.becomes(module, shape, is_flat, DIFFUSERS) or ():
            words = part.split(".")
            if len(words) > 1 and words[1].isdecimal():
                counts[words[0]] = max(counts.get(words[0], 0), int(words[1]) + 1)
    known = {word: count for word, count in counts.items() if word in reading.family.depths}
    return bool(known) and all(count in reading.family.depths[word] for word, count in known.items())


# --- updates ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """One module: its name, its update, and what rides along by its use, or ``difference``, which is added to the
    weight itself."""

    module: str
    pair: LoraTarget
    extras: Mapping[str, ExtraTensor]


def translated(pieces: Sequence[Piece], reading: Reading, is_flat: bool, scheme: str) -> list[Piece]:
    """Return the same updates under the names of another scheme. Modules are all of the family. Raises E-EXPORT for
    what that scheme has no module for."""
    if scheme == reading.scheme:
        return [_renamed(piece, reading, is_flat) for piece in pieces]
    parts = [part for piece in pieces for part in to_parts(piece, reading, is_flat)]
    return parts if scheme == DIFFUSERS else _from_parts(parts, reading.family, scheme)


def _renamed(piece: Piece, reading: Reading, is_flat: bool) -> Piece:
    hit = reading.place(piece.module, piece.pair.target.matrix_shape, is_flat)
    assert hit is not None
    return _named(piece, filled(hit[0].name, hit[1]))


def _named(piece: Piece, module: str) -> Piece:
    target = replace(piece.pair.target, name=f"{module}.weight")
    extras = {use: replace(extra, name=_beside(module, use)) for use, extra in piece.extras.items()}
    return Piece(module, replace(piece.pair, target=target), extras)


def _beside(module: str, use: str) -> str:
    return f"{module}.{'bias' if use == 'add' else 'weight'}"


def to_parts(piece: Piece, reading: Reading, is_flat: bool) -> list[Piece]:
    """Return the modules of diffusers that a module is."""
    hit = reading.place(piece.module, piece.pair.target.matrix_shape, is_flat)
    assert hit is not None
    line, numbers = hit
    out, width = piece.pair.target.matrix_shape
    ends = line.ends(out, width) or (out,)
    pair, extras = piece.pair, piece.extras
    if line.is_swapped:
        pair, extras = rows.swapped(pair), {use: rows.exchanged(extra) for use, extra in extras.items()}
    modules = [filled(part, numbers) for part in line.parts]
    pairs = rows.split(pair, [f"{module}.weight" for module in modules], ends, keep_zeros=bool(extras))
    by_name = {part.target.name: part for part in pairs}
    return [
        Piece(
            module,
            by_name[f"{module}.weight"],
            {use: _part_of(extra, _beside(module, use), (start, end), out) for use, extra in extras.items()},
        )
        for module, start, end in zip(modules, (0, *ends), ends, strict=False)
        if f"{module}.weight" in by_name
    ]


def _part_of(extra: ExtraTensor, name: str, within: rows.Rows, out: int) -> ExtraTensor:
    whole = within == (0, out)
    return replace(extra, name=name) if whole else rows.of_rows(extra, name, within, out)


def _from_parts(parts: Iterable[Piece], family: Family, scheme: str) -> list[Piece]:
    groups: dict[tuple[str, Line], dict[int, Piece]] = {}
    for part in parts:
        hit = family.schemes[scheme].of_part(part.module, *part.pair.target.matrix_shape)
        if hit is None:
            what = f"{part.module!r:.120} of {family.title} has no name among those of the layout"
            raise ExportError(what, fix="export to diffusers")
        line, n, numbers = hit
        groups.setdefault((filled(line.name, numbers), line), {})[n] = part
    return [_fused(name, line, group) for (name, line), group in groups.items()]


def _fused(name: str, line: Line, group: Mapping[int, Piece]) -> Piece:
    pairs = {n: piece.pair for n, piece in sorted(group.items())}
    if len(line.parts) == 1 and not line.is_swapped:
        return _named(group[0], name)
    sizes = [_size(name, line, n, group) for n in range(len(line.parts))]
    pair = rows.fuse(pairs, f"{name}.weight", sizes)
    uses = dict.fromkeys(use for piece in group.values() for use in piece.extras)
    extras = {
        use: rows.joined({n: p.extras[use] for n, p in group.items() if use in p.extras}, _beside(name, use), sizes)
        for use in uses
    }
    if line.is_swapped:
        pair, extras = rows.swapped(pair), {use: rows.exchanged(extra) for use, extra in extras.items()}
    return Piece(name, pair, extras)


def _size(name: str, line: Line, n: int, group: Mapping[int, Piece]) -> int:
    """The rows of a part: its own if it is adapted, else as the line says, or as many as another one of its kind."""
    shapes = {m: piece.pair.target.matrix_shape for m, piece in group.items()}
    if n in shapes:
        return shapes[n][0]
    fixed = line.rows[n]
    if fixed is not None:
        return fixed * next(iter(shapes.values()))[1]
    alike = next((shape[0] for m, shape in shapes.items() if line.rows[m] is None), None)
    if alike is None:
        what = f"{name!r:.120} is one layer there, and nothing says how many rows {line.parts[n]!r:.80} has"
        raise ExportError(what, fix="export to diffusers")
    return alike


def piece_of(pair: LoraTarget, module: str, extras: Mapping[str, Sequence[ExtraTensor]]) -> Piece:
    """Return a target with what rides along, from tables of extra tensors by name."""
    beside = (*extras.get(pair.target.name, ()), *extras.get(_bias_of(pair.target), ()))
    mine = {_use_of(extra, pair.target): extra for extra in beside if extra.use != "replace"}
    return Piece(module, pair, mine)


def _use_of(extra: ExtraTensor, target: Target) -> str:
    return "difference" if extra.use == "add" and extra.name == target.name else extra.use


def _bias_of(target: Target) -> str:
    return f"{target.name.removesuffix('.weight')}.bias"
