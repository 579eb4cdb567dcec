"""Layouts other than PEFT's, read back by small decoders of their own and by our readers where there is one; ranks, the
name of the base, the licence. What loads them is in test_export_peers.py."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ADAPTERS, BASES, random_lora
from huggingface_hub.repocard import metadata_load
from models import extra, one_target
from safetensors import safe_open
from safetensors.numpy import load_file

from lrconvert import api
from lrconvert.core import errors
from lrconvert.formats import model_card
from lrconvert.formats.exporters import base as exporters
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter, Target, View
from lrconvert.methods import base as methods

Deltas = dict[str, np.ndarray]

LLAMA = (
    Target("lm_head.weight", (100, 48)),
    Target("model.embed_tokens.weight", (100, 48), View("transposed")),
    Target("model.layers.0.self_attn.k_proj.weight", (24, 48)),
    Target("model.layers.10.mlp.down_proj.weight", (48, 64)),
    Target("model.layers.2.self_attn.q_proj.weight", (48, 48)),
)
DIFFUSION = (
    Target("text_encoder.text_model.encoder.layers.0.mlp.fc1.weight", (48, 32)),
    Target("text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj.weight", (32, 32)),
    Target("unet.conv_in.weight", (32, 4, 3, 3), View("conv:3x3:1")),
    Target("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.weight", (32, 32)),
    Target("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight", (32, 32)),
)
TARGETS = {"diffusers": DIFFUSION, "gguf": LLAMA, "kohya": DIFFUSION, "mlx": LLAMA, "raw": LLAMA}
TARGETS |= {"comfyui": DIFFUSION, "onetrainer": DIFFUSION}
ONE_RANK = ("mlx",)


def made(targets: tuple[Target, ...], **options: Any) -> CompactAdapter:
    pairs = tuple(one_target(t, rank=2 + n % 3, seed=n) for n, t in enumerate(targets))
    return api.convert(LoraAdapter(pairs), "lowrank", **{"bits": 8, **options}).compact


def exported(compact: CompactAdapter, folder: Path, to: str, **options: Any) -> Path:
    api.export(compact, folder, to=to, base=BASES / "tiny-llama" if to == "gguf" else None, **options)
    return folder


def updates(compact: CompactAdapter) -> Deltas:
    """The (out, in) updates."""
    return {target.name: b.astype(np.float64) @ a for target, a, b in methods.expand_all(compact)}


# --- decoders, written from the layouts -----------------------------------------------------------------------------


def product(up: np.ndarray, down: np.ndarray) -> np.ndarray:
    rank = down.shape[0]
    assert up.shape[1] == rank
    return up.reshape(-1, rank).astype(np.float64) @ down.reshape(rank, -1)


def of_diffusers(folder: Path) -> Deltas:
    stored = load_file(folder / "pytorch_lora_weights.safetensors")
    modules = {name.removesuffix(".lora_A.weight") for name in stored if name.endswith(".lora_A.weight")}
    assert len(stored) == 2 * len(modules)
    return {f"{m}.weight": product(stored[f"{m}.lora_B.weight"], stored[f"{m}.lora_A.weight"]) for m in modules}


def of_kohya(folder: Path) -> Deltas:
    stored = load_file(folder / "lora.safetensors")
    deltas = {}
    for target in DIFFUSION:
        component, _, module = target.name.removesuffix(".weight").partition(".")
        prefix = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[component]
        name = f"{prefix}_{module.replace('.', '_')}"
        down, up, alpha = (stored.pop(f"{name}.{end}") for end in ("lora_down.weight", "lora_up.weight", "alpha"))
        assert alpha.shape == ()
        deltas[target.name] = float(alpha) / down.shape[0] * product(up, down)
    assert not stored
    return deltas


COMFYUI = (  # in the order of DIFFUSION
    "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
    "text_encoders.clip_g.transformer.text_model.encoder.layers.0.self_attn.q_proj",
    "diffusion_model.input_blocks.0.0",
    "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_out.0",
    "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
)


def of_comfyui(folder: Path) -> Deltas:
    stored = load_file(folder / "lora.safetensors")
    deltas = {}
    for target, name in zip(DIFFUSION, COMFYUI, strict=True):
        down, up = (stored.pop(f"{name}.{end}.weight") for end in ("lora_A", "lora_B"))
        deltas[target.name] = float(stored.pop(f"{name}.alpha", down.shape[0])) / down.shape[0] * product(up, down)
    assert not stored
    return deltas


def of_mlx(folder: Path) -> Deltas:
    stored = load_file(folder / "adapters.safetensors")
    settings = json.loads((folder / "adapter_config.json").read_text())["lora_parameters"]
    assert sorted(settings["keys"]) == sorted({name.rpartition(".")[0] for name in stored})
    halves = {m: (stored[f"{m}.lora_a"], stored[f"{m}.lora_b"]) for m in settings["keys"]}
    assert all(a.shape[1] == b.shape[0] == settings["rank"] for a, b in halves.values())
    return {f"{m}.weight": settings["scale"] * product(b.T, a.T) for m, (a, b) in halves.items()}


def of_raw(folder: Path) -> Deltas:
    stored = load_file(folder / "lora.safetensors")
    modules = {name.removesuffix(".lora_A") for name in stored if name.endswith(".lora_A")}
    assert len(stored) == 2 * len(modules)
    return {f"{m}.weight": product(stored[f"{m}.lora_B"], stored[f"{m}.lora_A"]) for m in modules}


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata and tensors of a GGUF file with strings, uint32 and float32 in it."""
    data = path.read_bytes()
    at = 0

    def take(form: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from(f"<{form}", data, at)
        at += struct.calcsize(f"<{form}")
        return value

    def text() -> str:
        length = take("Q")
        return take(f"{length}s").decode()

    assert take("4s") == b"GGUF" and take("I") == 3
    count, pairs = take("Q"), take("Q")
    fields = {}
    for _ in range(pairs):
        key, kind = text(), take("I")
        fields[key] = text() if kind == 8 else take({4: "I", 6: "f"}[kind])
    listed = []
    for _ in range(count):
        name, dims = text(), take("I")
        shape = [take("Q") for _ in range(dims)][::-1]
        listed.append((name, shape, {0: "<f4", 1: "<f2"}[take("I")], take("Q")))
    start = -(-at // 32) * 32
    tensors = {}
    for name, shape, dtype, offset in listed:
        assert offset % 32 == 0
        tensors[name] = np.frombuffer(data, dtype, int(np.prod(shape)), start + offset).reshape(shape)
    assert len(data) % 32 == 0
    return fields, tensors


def of_gguf(folder: Path) -> Deltas:
    fields, stored = read_gguf(folder / "adapter.gguf")
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    names = {"token_embd": "model.embed_tokens", "output": "lm_head"}
    parts = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "ffn_down": "mlp.down_proj"}
    heads = {"attn_q": 4, "attn_k": 2}  # of tiny-llama
    deltas = {}
    for name, a in stored.items():
        if not name.endswith(".weight.lora_a"):
            continue
        module = name.removesuffix(".weight.lora_a")
        b = stored[f"{module}.weight.lora_b"]
        alpha = fields["adapter.lora.alpha"]
        delta = (alpha / b.shape[1] if alpha else 1.0) * product(b, a.T if module == "token_embd" else a)
        layer = module.rpartition(".")[2]
        if layer in heads:  # undo: rows (head, pair, half) of the file are (head, half, pair) of the model
            delta = delta.reshape(heads[layer], -1, 2, delta.shape[1]).swapaxes(1, 2).reshape(delta.shape)
        full = names.get(module) or f"model.layers.{module.split('.')[1]}.{parts[layer]}"
        deltas[f"{full}.weight"] = delta
    assert 2 * len(deltas) == len(stored)
    return deltas


DECODERS: dict[str, Callable[[Path], Deltas]] = {
    "comfyui": of_comfyui, "onetrainer": of_kohya,
    "diffusers": of_diffusers, "gguf": of_gguf, "kohya": of_kohya, "mlx": of_mlx, "raw": of_raw
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"pad_rank": 8}, {"keep_ranks": True}, {"dtype": "F16"}], ids=str)
@pytest.mark.parametrize("layout", DECODERS)
def test_updates_come_back(layout: str, options: dict[str, Any], tmp_path: Path) -> None:
    if layout in ONE_RANK and "keep_ranks" in options:
        with pytest.raises(errors.OptionError, match="one rank"):
            exported(made(TARGETS[layout]), tmp_path / "out", layout, **options)
        return
    compact = made(TARGETS[layout])
    decoded = DECODERS[layout](exported(compact, tmp_path / "out", layout, **options))
    wanted = updates(compact)
    assert set(decoded) == set(wanted)
    bound = 2e-3 if "dtype" in options else 1e-6
    for name, delta in wanted.items():
        assert np.abs(decoded[name] - delta).max() <= bound * np.abs(delta).max(), name


def test_every_layout_is_decoded_here() -> None:
    """But `original`, which is the layout of the source: tests/formats/families."""
    assert {*DECODERS, "original"} == {name for name in exporters.ids() if not name.startswith("peft-")}


@pytest.mark.parametrize("layout", DECODERS)
def test_our_readers_read_our_exports(layout: str, tmp_path: Path) -> None:
    """Where there is a reader for the layout: equal updates under names that mean the same."""
    compact = made(TARGETS[layout])
    folder = exported(compact, tmp_path / "out", layout)
    for path in (folder, *sorted(folder.glob("*.safetensors")), *sorted(folder.glob("*.gguf"))):
        with contextlib.suppress(errors.UnknownLayoutError):
            again = api.load_lora(path)
            break
    else:
        pytest.skip(f"no reader knows what is exported to {layout}")
    norms = sorted(float(np.linalg.norm(p.scale * (p.B.astype(np.float64) @ p.A))) for p in again.targets)
    assert norms == pytest.approx(sorted(float(np.linalg.norm(d)) for d in updates(compact).values()), rel=1e-5)


@pytest.mark.parametrize("layout", ["peft-lora", *DECODERS])
def test_the_same_bytes_every_time(layout: str, tmp_path: Path) -> None:
    compact = made(TARGETS.get(layout, LLAMA))
    one, two = (exported(compact, tmp_path / name, layout) for name in ("one", "two"))
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in two.iterdir()}


# --- refusals -------------------------------------------------------------------------------------------------------

GPT2 = Target("transformer.h.0.mlp.c_fc.weight", (8, 8))
ROWS = Target("model.layers.0.self_attn.q_proj.weight", (48, 48), View("rows:0:24"))
GROUPS = Target("unet.conv_in.weight", (32, 2, 3, 3), View("conv:3x3:2"))
REFUSED = {
    "no diffusion model": ("kohya", LLAMA, "lm_head"),
    "no diffusion model either": ("diffusers", LLAMA, "lm_head"),
    "GPT-2 is no transformer of diffusers": ("diffusers", (GPT2,), "h.0"),
    "no language model": ("mlx", DIFFUSION, "text_encoder"),
    "not known in llama.cpp": ("gguf", DIFFUSION, "text_encoder"),
    "a slice": ("mlx", (ROWS,), "rows:0:24"),
    "a slice in GGUF": ("gguf", (ROWS,), "rows:0:24"),
    "an expert": ("raw", (Target("a.experts.up", (4, 8, 8), View("expert:1")),), "no module's weight"),
    "a convolution in groups": ("kohya", (GROUPS,), "in groups"),
    "a convolution of loralib": ("raw", DIFFUSION, "convolution"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_layout_cannot_express_is_refused_by_name(case: str, tmp_path: Path) -> None:
    layout, targets, message = REFUSED[case]
    with pytest.raises(errors.ExportError, match=message):
        exported(made(targets), tmp_path / "out", layout)
    assert list(tmp_path.iterdir()) == []


def test_two_modules_of_one_kohya_name(tmp_path: Path) -> None:
    names = ("unet.down_blocks.0.a_b.weight", "unet.down_blocks.0.a.b.weight")
    with pytest.raises(errors.ExportError, match="one name"):
        exported(made(tuple(Target(n, (8, 8)) for n in sorted(names))), tmp_path / "out", "kohya")


@pytest.mark.parametrize("layout", DECODERS)
def test_tensors_beside_factors(layout: str, tmp_path: Path) -> None:
    """Refused by name, but for whole tensors in a bare state dict."""
    compact = made(TARGETS[layout])
    head = extra("classifier.weight", np.ones((3, 4)))
    if layout == "raw":
        stored = load_file(exported(replace(compact, extras=(head,)), tmp_path / "out", layout) / "lora.safetensors")
        assert (stored["classifier.weight"] == 1).all()
    else:
        with pytest.raises(errors.ExportError, match=r"classifier\.weight"):
            exported(replace(compact, extras=(head,)), tmp_path / "out", layout)
    magnitude = replace(extra(compact.targets[0].name, np.ones(4)), use="magnitude")
    with pytest.raises(errors.ExportError, match="DoRA"):
        exported(replace(compact, extras=(magnitude,)), tmp_path / "no", layout)


def test_gguf_needs_a_known_base(tmp_path: Path) -> None:
    compact = made(LLAMA)
    with pytest.raises(errors.ExportError, match="was not given"):
        api.export(compact, tmp_path / "out", to="gguf")
    with pytest.raises(errors.ExportError, match="a Bert"):
        api.export(compact, tmp_path / "out", to="gguf", base=BASES / "tiny-bert")
    base = tmp_path / "base"
    base.mkdir()
    config = json.loads((BASES / "tiny-llama" / "config.json").read_text())
    changes = {"num_attention_heads": (7, errors.ConfigError), "tie_word_embeddings": (True, errors.ExportError)}
    for key, (value, error) in changes.items():
        (base / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(error):
            api.export(compact, tmp_path / "out", to="gguf", base=base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["peft-lora", *DECODERS])
def test_values_beyond_half(layout: str, tmp_path: Path) -> None:
    lora = LoraAdapter(tuple(one_target(t, scale=1e13) for t in TARGETS.get(layout, LLAMA)[:2]))
    compact = api.convert(lora, "lowrank", bits=14).compact
    with pytest.raises(errors.ExportError, match="beyond the range of F16"):
        exported(compact, tmp_path / "out", layout, dtype="F16")
    assert list(tmp_path.iterdir()) == []


# --- ranks, the name of the base, the licence -----------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["peft-lora", *DECODERS])
def test_one_rank_of_ones_choice(layout: str, tmp_path: Path) -> None:
    compact = made(TARGETS.get(layout, LLAMA))
    with pytest.raises(errors.OptionError, match="rank of 4"):
        exported(compact, tmp_path / "out", layout, pad_rank=3)
    if layout not in ONE_RANK:
        with pytest.raises(errors.OptionError, match="exclude each other"):
            exported(compact, tmp_path / "out", layout, pad_rank=8, keep_ranks=True)


def test_padded_peft_folder(tmp_path: Path) -> None:
    lora = random_lora()
    compact = api.convert(lora, "lowrank", bits=8).compact
    api.export(compact, tmp_path / "out", to="peft-lora", pad_rank=16)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 16
    again = api.load_lora(tmp_path / "out")
    assert {p.rank for p in again.targets} == {16}
    for pair, delta in zip(again.targets, updates(compact).values(), strict=True):
        assert np.array_equal(pair.B.astype(np.float64) @ pair.A, delta)


def named(compact: CompactAdapter, base: str) -> CompactAdapter:
    return replace(compact, provenance=replace(compact.provenance, base_model=base))


@pytest.mark.parametrize("path", ["/home/someone/models/llama", "C:\\models\\llama", "~/llama", "../models/llama/"])
def test_private_paths_are_cut_and_said(path: str, tmp_path: Path) -> None:
    done = api.export(named(made(LLAMA), path), tmp_path / "out", to="peft-lora")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "llama" and "private path" in done.notes[0]
    assert not [p.name for p in (tmp_path / "out").iterdir() if path.encode() in p.read_bytes()]
    assert "private path" in " ".join(api.convert(named_lora(path), "lowrank", bits=8).warnings)


def named_lora(base: str) -> LoraAdapter:
    lora = random_lora()
    return replace(lora, provenance=replace(lora.provenance, base_model=base))


@pytest.mark.parametrize("layout", ["peft-lora", *DECODERS])
def test_the_base_is_named_as_asked(layout: str, tmp_path: Path) -> None:
    compact = named(made(TARGETS.get(layout, LLAMA)), "/srv/secret/model")
    done = exported(compact, tmp_path / "out", layout, base_model_id="org/model@v2")
    assert "base_model: org/model\n" in (done / "README.md").read_text()
    if layout == "peft-lora":
        config = json.loads((done / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == ("org/model", "v2")
    assert not [p.name for p in done.iterdir() if b"secret" in p.read_bytes()]
    for bad in ("", "@main", "a\nb"):
        with pytest.raises(errors.OptionError):
            exported(compact, tmp_path / "no", layout, base_model_id=bad)


def test_a_hub_id_is_no_private_path(tmp_path: Path) -> None:
    done = api.export(named(made(LLAMA), "org/llama"), tmp_path / "out", to="peft-lora")
    assert "path" not in " ".join(done.notes) and not api.convert(named_lora("gpt2"), "lowrank", bits=8).warnings


CARDS = {
    "---\nlicense: apache-2.0\ntags:\n- lora\n---\n# x\n": {"license": "apache-2.0"},
    "---\r\nlicense: 'other' # ours\r\nlicense_name: llama3\r\n---\r\n": {"license": "other", "license_name": "llama3"},
    "---\nlicense:\n- mit\n- \"bsd\"\ntags:\n- x\n---\n": {"license": "mit, bsd"},
    "---\nlicense: [mit, bsd]\n---\n": {"license": "mit, bsd"},
    "# x\nlicense: mit\n": {},
    "---\ntags: []\n---\nlicense: mit\n": {},
    "---\nlicense:\n---\n": {},
    "---\nlicense: [mit\n---\n": {},
    "---\nlicense: mit\n- x\n---\n": {},
    f"---\nlicense: {'[' * 30000}\n---\n": {},
    "---\n- license\n---\n": {},
    "\ufeff---\nlicense: mit\n---\n": {"license": "mit"},
    "---\nlicense: mit\n---\n" + "x" * (1 << 20): {},
    "": {},
}  # fmt: skip


@pytest.mark.parametrize("text", CARDS, ids=lambda text: repr(text)[:30])
def test_the_licence_of_a_card(text: str, tmp_path: Path) -> None:
    if text.startswith("\ufeff") and int(metadata.version("huggingface_hub").split(".")[0]) < 2:
        pytest.skip("huggingface_hub 1 does not read a card behind a byte-order mark")
    (tmp_path / "README.md").write_bytes(text.encode())
    assert model_card.licence(tmp_path) == CARDS[text]
    assert model_card.licence(tmp_path / "absent") == {}


STATED = {"license": "other", "license_name": "llama3", "license_link": "https://example.org/LICENSE"}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "peft-vblora": ("vblora", {"peft_compatible": True, "num_vectors": 32, "vector_length": 8, "top_k": 2}),
    "peft-miss": ("bone", {"peft_compatible": True, "rank": 2}),
}


def for_layout(layout: str, base_model: str) -> CompactAdapter:
    """Something that a layout can express, with a licence and the name of a base."""
    if layout in FORMS:
        form, options = FORMS[layout]
        compact = api.convert(random_lora(), form, **options).compact
    else:
        compact = made(DIFFUSION if layout == "original" else TARGETS.get(layout, LLAMA))
    fields = {**compact.provenance.fields, **STATED}
    fields |= {"spelling": "lora_unet_* lora_down alpha"} if layout == "original" else {}
    return replace(compact, provenance=replace(compact.provenance, base_model=base_model, fields=fields))


def notes_in(folder: Path) -> dict[str, str]:
    """The metadata of the one file of weights, by the names that safetensors files have them under."""
    if (folder / "adapter.gguf").exists():
        fields, _ = read_gguf(folder / "adapter.gguf")
        return {key.replace("lrconvert.", "lrconvert_"): value for key, value in fields.items()}
    (weights,) = folder.glob("*.safetensors")
    with safe_open(weights, "np") as opened:
        return dict(opened.metadata())


@pytest.mark.parametrize("layout", exporters.ids())
def test_every_export_says_its_licence_and_no_private_path(layout: str, tmp_path: Path) -> None:
    """The card and the metadata carry the licence, which our readers take from the card again; the folders of a path
    that names the base are in no file, which is said, unless the base is named."""
    private = "/home/somebody/secret/model-7b"
    base = BASES / "tiny-llama" if layout == "gguf" else None
    cases = (
        (None, "model-7b", "base_model_id=..."),
        ("org/model@v2", "org/model", ""),
        ("/srv/x/y", "/srv/x/y", "private path"),
    )
    for n, (base_model_id, shown, note) in enumerate(cases):
        out = tmp_path / str(n)
        done = api.export(for_layout(layout, private), out, to=layout, base=base, base_model_id=base_model_id)
        notes = " ".join(done.notes)
        assert note in notes and ("private" in notes) == bool(note)
        assert not [path.name for path in out.iterdir() if b"secret" in path.read_bytes()]
        assert metadata_load(out / "README.md")["base_model"] == shown and model_card.licence(out) == STATED
        stored = notes_in(out)
        assert {key: stored[f"lrconvert_{key}"] for key in STATED} == STATED
        assert stored["lrconvert_base_model"] == shown
        if layout == "gguf":
            theirs = ("license", "license.name", "license.link")
            assert [stored[f"general.{key}"] for key in theirs] == [*STATED.values()]
    again = api.load(tmp_path / "1")
    assert {key: again.provenance.fields[key] for key in STATED} == STATED


@pytest.mark.parametrize("license", ["apache-2.0", "mit, bsd"])
def test_the_licence_goes_all_the_way(license: str, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for path in (ADAPTERS / "llama-plain").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "README.md").write_text(f"---\nlicense: [{license}]\n---\n")
    compact = api.convert(api.load_lora(source), "lowrank", bits=8).compact
    api.write(compact, tmp_path / "x.lrc")
    api.export(tmp_path / "x.lrc", tmp_path / "out", to="peft-lora")
    assert model_card.licence(tmp_path / "out") == {"license": license}
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "np") as opened:
        notes = opened.metadata()
    assert notes["lrconvert_license"] == license and notes["lrconvert_source"] == compact.provenance.source
    assert notes["lrconvert_method"] == "lowrank 2" and notes["format"] == "pt"
