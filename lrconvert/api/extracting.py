"""The verb that takes an adapter out of a fine-tuned model."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from lrconvert.api.shared import AnyPath, Progress, located, method_of, path_of, refuse_rest, silent
from lrconvert.convert.convert import Conversion, PreparedSource, convert_prepared
from lrconvert.convert.extract.extract import Extraction
from lrconvert.convert.extract.extract import extract as extract_lora
from lrconvert.convert.extract.options import ExtractOptions
from lrconvert.convert.options import ConvertOptions
from lrconvert.core.errors import QuantizedBaseError
from lrconvert.core.options import make, take
from lrconvert.core.wording import spelled
from lrconvert.io import hub, mistaken
from lrconvert.io.checkpoint import Checkpoint, quantization_name
from lrconvert.io.container import read_json
from lrconvert.lora.adapter import LoraAdapter
from lrconvert.lora.base_weights import BaseWeights
from lrconvert.merge.quantized_base import DequantizedCheckpoint, open_base
from lrconvert.methods import base as methods
from lrconvert.methods.lowrank.plan import DEFAULT_BITS

_CUT = 0.9  # of the progress: behind when a compact form is made


def extract(
    finetuned: AnyPath,
    base: AnyPath,
    method: str | None = None,
    options: ExtractOptions | None = None,
    *,
    dry_run: bool = False,
    progress: Progress | None = None,
    **more: Any,
) -> Extraction:
    """Return what the model `finetuned` has more than its `base` as a LoRA (`lora` of the result), or in the compact
    form `method` (`compact`): paths of model folders, or hub ids.

    Weights are read shard by shard, in row blocks; every difference is cut in rank by randomized subspace iteration,
    and the error of what is kept is measured on the difference itself. Vectors that changed (norms, biases), matrices
    with a side of 8 or less, trained tokens and new heads go along as they are. `more` are single fields of
    `ExtractOptions` (``rank=64``, ``min_captured=0.9``, ``target_size="50MB"``) and of the method's own options.
    `dry_run` reads headers only. The result is given to `write` where it is compact, and to `convert`, `compress`,
    `export`, `merge` as any adapter.

    Raises E-NO-EFFECT for a model that equals its base, E-EMPTY where no matrix changed, E-BASE for another base or
    vocabulary, E-BUDGET, E-OPTION, E-VALUE, E-BASE-QUANT, and what opening a model does.

    >>> from lrconvert import merge
    >>> report = merge("base-model", "my-adapter", "merged-model")
    >>> taken = extract("merged-model", "base-model", rank=8)
    >>> taken.captured > 0.99
    True
    >>> extract("merged-model", "base-model", "lowrank", target_size="8KB").compact
    <CompactAdapter: lowrank, ... targets>
    """
    progress = progress or silent
    form, fixed = (None, {}) if method is None else method_of(method)
    chosen = take(ExtractOptions, options, more, "extract")
    chosen.check()
    if form is None:
        refuse_rest(more, "extract", ExtractOptions)
        chosen.check_lora()
        return _extracted(finetuned, base, chosen, None, dry_run, progress)
    own = {**fixed, **more}
    make(methods.get(form).Options, own, form)  # before a model is read
    if form == "lowrank" and not own and chosen.target_size is None and chosen.target_ratio is None:
        own["bits"] = DEFAULT_BITS
    return _extracted(finetuned, base, chosen, (form, own), dry_run, progress)


def _extracted(
    finetuned: AnyPath,
    base: AnyPath,
    options: ExtractOptions,
    form: tuple[str, dict[str, Any]] | None,
    dry_run: bool,
    progress: Progress,
) -> Extraction:
    """Open both models and extract; with a `form`, and its options, make that of the LoRA."""
    name = hub.hint(path_of(base, "base"))
    with ExitStack() as stack:
        tuned, own = (
            stack.enter_context(_opened(path, argument, options.dequantize))
            for path, argument in ((finetuned, "finetuned"), (base, "base"))
        )
        if form is None:
            done = extract_lora(tuned, own, options, name, progress, dry_run=dry_run)
        else:
            form_name, settings = form

            def finish(lora: LoraAdapter) -> Conversion:
                under = ConvertOptions(
                    target_size=options.target_size, target_ratio=options.target_ratio, seed=options.seed
                )
                weights = BaseWeights(lora, own, own.content_digest())
                source = PreparedSource(lora, lora.half_bytes, weights, under, ())
                return convert_prepared(
                    source, form_name, settings, progress=lambda share, text: progress(_CUT, f"{form_name}: {text}")
                )

            lora_only = replace(options, target_size=None, target_ratio=None)
            done = extract_lora(tuned, own, lora_only, name, progress, dry_run=dry_run, finish=finish)
        notes = [
            f"{argument} is quantized: {len(one.weights)} tensors are taken as the bf16 that they stand for, and the "
            "error of quantizing is in the difference"
            for argument, one in (("the fine-tuned model", tuned), ("the base", own))
            if isinstance(one, DequantizedCheckpoint)
        ]
        for file in (*tuned.files, *own.files):
            file.check_unchanged()
    return replace(done, warnings=(*done.warnings, *notes))


def _opened(path: AnyPath, argument: str, dequantize: bool) -> Checkpoint:
    """Open a model; with `dequantize` one that is quantized as bf16. Raises E-BASE-QUANT for one without that."""
    where = located(path, argument)
    mistaken.check_base(where)
    config = where / "config.json"
    method = quantization_name(read_json(config)) if config.is_file() else ""
    if method and not dequantize:
        fix = f"use its unquantized parent, or pass {spelled('dequantize', True)} to take it as the bf16 it stands for"
        raise QuantizedBaseError(f"is stored quantized, by {method:.60}", fix=fix, path=where)
    return open_base(where, dequantize=bool(method))
