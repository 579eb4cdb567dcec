"""Adapters and statistics as they lie on disk: what `inspect` and `statistics` print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lrconvert.core.errors import printable
from lrconvert.formats.expansions.ranks import vllm_rank
from lrconvert.formats.inspection import inspect_statistics
from lrconvert.report.tables import count_bytes, listed, relative, shortened, span, table

if TYPE_CHECKING:
    from lrconvert.lora.input_statistics import InputStatistics


def inspection_text(path: str, facts: dict[str, Any]) -> str:
    """Return what `api.inspect` says of a file or folder as text."""
    if facts["kind"] == "statistics":
        return f"{_statistics(path, facts)}\nbase contents: {facts['base'] or 'not recorded'}"
    rows, method = facts["targets"], facts.get("method")
    kind = f"lrconvert file, {method['title']}" if method else "LoRA"
    lines = [f"{printable(path)}: {kind}, {len(rows)} targets"]
    if method:
        size = facts["bytes"]
        parts = ", ".join(f"{part} {size[part]:,}" for part in ("payload", "overhead", "extras"))
        lines.append(f"{size['total']:,} bytes: {parts}")
        lines.append(f"method {method['form']} version {method['version']}: {listed(method['config'])}")
        lines.append(f"base contents: {facts['base']['content'] or 'not recorded'}")
    else:
        stored = ", ".join(f"{count_bytes(n)} {dtype}" for dtype, n in facts["bytes_by_dtype"].items())
        lines.append(f"{facts['parameters']:,} numbers: {stored}; {facts['bytes_at_16_bit']:,} bytes at 16 bit")
    if facts["base_model"]:
        lines.append(f"base model (a hint, never opened): {printable(facts['base_model'])}")
    if facts["serving"]:
        lines.append(_serving(facts["serving"], bool(method)))
    if facts["extras"]:
        total = sum(e["bytes"] for e in facts["extras"])
        names = ", ".join(printable(e["name"]) for e in facts["extras"][:4])
        lines.append(f"{len(facts['extras'])} extra tensors carried along, {total:,} bytes: {names}")
    return "\n".join([*lines, "", _target_table(facts["kind"], rows)])


def _serving(needed: Mapping[str, Any], is_compact: bool) -> str:
    """The rank that a server needs, and whether a smaller one that vLLM has room for does."""
    vllm = needed["vllm_max_lora_rank"]
    line = (
        f"a server needs rank {needed['stored']} (vLLM: {f'--max-lora-rank {vllm}' if vllm else 'has none as large'})"
    )
    if needed["exact"] < needed["stored"] and vllm_rank(needed["exact"]) != vllm:
        rank, loss = needed["exact"], "nothing"
    elif vllm_rank(needed["close"]) != vllm:
        rank, loss = needed["close"], f"{needed['error']:.1g} of the update's norm"
    else:
        return line
    how = f": `lrconvert expand --max-rank {rank}`" if is_compact else ""
    return f"{line}; {rank} loses {loss}{how}"


def _target_table(kind: str, rows: Sequence[dict[str, Any]]) -> str:
    """One row per group of targets whose names differ in numbers only: the spectrum as a range over the group. What all
    names begin and end with is said once."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        pattern = ".".join("*" if part.isdigit() else part for part in row["name"].split("."))
        groups.setdefault((pattern, f"{row['out']} x {row['in']}"), []).append(row)
    head = ["target", "count", "out x in", "rank", "norm"]
    if kind == "lora":
        head += ["scale", "dtype", "rank for 90 %", "99 %", "99.9 %"]
    body = []
    above, names = _parted([printable(pattern) for pattern, _ in groups])
    for name, ((_, shape), members) in zip(names, groups.items(), strict=True):
        cells = [name, len(members), shape, span(m["rank"] for m in members)]
        norms = [m["norm"] for m in members if m["norm"] is not None]
        cells.append(span(norms, "{:.3g}") if norms else "-")
        if kind == "lora":
            cells += [span((m["scale"] for m in members), "{:g}"), "/".join(sorted({m["dtype"] for m in members}))]
            cells += [span(m["spectrum"][share] for m in members) for share in ("90", "99", "99.9")]
        body.append(cells)
    return above + table(head, body)


def _parted(names: Sequence[str]) -> tuple[str, list[str]]:
    """Return a line that says which segments all names begin and end with, or "", and the rest of each name."""
    parts = [name.split(".") for name in names]
    most = min(map(len, parts), default=1) - 1
    if len({*names}) < 2:
        return "", list(names)
    first = next((n for n in range(most) if len({part[n] for part in parts}) > 1), most)
    last = next((n for n in range(most - first) if len({part[-1 - n] for part in parts}) > 1), most - first)
    start, end = ".".join(parts[0][:first]), ".".join(parts[0][len(parts[0]) - last :])
    if not first and not last:
        return "", list(names)
    said = " and ".join([f"begin with {start}."] * bool(first) + [f"end with .{end}"] * bool(last))
    return f"all names {said}\n", [".".join(part[first : len(part) - last]) for part in parts]


_BASE_WIDTH = 24


def inspections_text(facts: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Return one row for each adapter, its name and what `api.inspect` says of it, or its ``error``, and the sums."""
    above, names = relative([name for name, _ in facts])
    rows = [_row(name, one) for name, (_, one) in zip(names, facts, strict=True)]
    totals = inspection_totals([one for _, one in facts])
    refused = f", {totals['refused']} refused" if totals["refused"] else ""
    end = [
        f"{totals['adapters']} adapters{refused}",
        "",
        f"{totals['targets']:,}",
        "",
        "",
        "",
        f"{totals['bytes']:,}",
        "",
    ]
    head = ["adapter", "form", "targets", "rank", "99 %", "dtype", "bytes", "base model"]
    return above + table(head, [*rows, end])


def inspection_totals(facts: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Return how many adapters were looked at and refused, and the sums of their targets and bytes."""
    read = [one for one in facts if "error" not in one]
    return {
        "adapters": len(facts),
        "refused": len(facts) - len(read),
        "targets": sum(len(one.get("targets", ())) for one in read),
        "bytes": sum(map(_bytes, read)),
    }


def _bytes(facts: Mapping[str, Any]) -> int:
    """The bytes of a file of ours, or of the factors of a LoRA."""
    if facts["kind"] == "statistics":
        return int(facts["bytes"])
    return int(facts["bytes"]["total"] if facts["kind"] == "lrconvert" else sum(facts["bytes_by_dtype"].values()))


def _row(name: str, facts: Mapping[str, Any]) -> list[str]:
    """The cells of an adapter."""
    name = printable(name)
    if "error" in facts:
        return [name, facts["error"]["code"], *["-"] * 6]
    nbytes = f"{_bytes(facts):,}"
    if facts["kind"] == "statistics":
        return [name, "statistics", "-", "-", "-", "-", nbytes, "-"]
    targets, is_lora = facts["targets"], facts["kind"] == "lora"
    form = "LoRA" if is_lora else facts["method"]["form"]
    needed = span(target["spectrum"]["99"] for target in targets) if is_lora else "-"
    dtypes = "/".join(facts["bytes_by_dtype"]) if is_lora else "-"
    base = shortened(printable(facts["base_model"]), _BASE_WIDTH) or "-"
    return [name, form, f"{len(targets):,}", span(t["rank"] for t in targets), needed, dtypes, nbytes, base]


def statistics_json(statistics: InputStatistics, nbytes: int) -> dict[str, Any]:
    """Return what `nbytes` of input statistics hold."""
    facts = inspect_statistics(statistics, nbytes)
    return {key: facts[key] for key in ("tokens", "bytes", "base", "data", "inputs")}


def statistics_text(output: str, measured: InputStatistics, nbytes: int) -> str:
    """Return the same as text."""
    return f"wrote {_statistics(output, inspect_statistics(measured, nbytes))}"


def _statistics(path: str, facts: dict[str, Any]) -> str:
    inputs = facts["inputs"]
    layers = sum(len(i["names"]) for i in inputs)
    lines = [
        f"{printable(path)}: {facts['bytes']:,} bytes",
        f"tokens  {facts['tokens']:,}",
        f"inputs  {span({i['width'] for i in inputs})} wide; {layers} layers are measured, by {len(inputs)} inputs"
        + (": layers that are given the same tensor share one" if len(inputs) < layers else ""),
    ]
    if few := [i for i in inputs if i["tokens"] < i["width"]]:
        example = printable(few[0]["names"][0])
        lines.append(f"warning: {len(few)} inputs saw fewer tokens than they are wide, {example} for one")
    return "\n".join(lines)
