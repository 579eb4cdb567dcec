"""Collecting input statistics: what is counted, what is shared, pauses, files, and the commands."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from click.testing import CliRunner
from conftest import ADAPTERS, BASES
from models import auto
from torch import nn

import lrconvert
from lrconvert import api
from lrconvert.cli import cli
from lrconvert.core.errors import DataError, FingerprintError, LrcError, StatisticsError, ValueRangeError
from lrconvert.io.durable import discard
from lrconvert.io.strictjson import dump_canonical
from lrconvert.live.collect_statistics import collect
from lrconvert.live.collector import Collector, Settings
from lrconvert.live.layer_inputs import patches
from lrconvert.live.watch import watched
from lrconvert.lora import statistics_file
from lrconvert.lora.fingerprint import content_digest

LLAMA = BASES / "tiny-llama"
DEMO = Path(lrconvert.__file__).parent / "demo"


def tokens(shape: tuple[int, ...], seed: int = 0, vocabulary: int = 100) -> Any:
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(model: nn.Module, batches: list[dict[str, Any]]) -> dict[str, Any]:
    """What flows into every linear layer, by hooks of its own: (tokens, in), real tokens only."""
    inputs: dict[str, list[Any]] = {}
    handles = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def look(_: Any, given: Any, name: str = f"{path}.weight") -> None:
                inputs.setdefault(name, []).append(given[0].detach())

            handles.append(module.register_forward_pre_hook(look))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    masks = [b.get("attention_mask", torch.ones_like(b["input_ids"])).bool() for b in batches]
    return {k: torch.cat([x[m] for x, m in zip(v, masks, strict=True)]) for k, v in inputs.items()}


def padded(seed: int = 0) -> dict[str, Any]:
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[1, 5:], mask[2, 2:] = 0, 0
    return {"input_ids": tokens((3, 9), seed), "attention_mask": mask}


@pytest.fixture(scope="module")
def llama() -> Any:
    return auto("CausalLM").from_pretrained(LLAMA).eval()


def test_moments_are_those_of_the_real_tokens(llama: Any) -> None:
    batches = [padded(n) for n in range(3)]
    statistics = collect(llama, batches)
    truth = inputs_of(llama, batches)
    assert statistics.tokens == 3 * 16
    seen = {name for entry in statistics.inputs for name in entry.names}
    assert seen == {*truth, "model.embed_tokens.weight"}
    for n, entry in enumerate(statistics.inputs):
        moment = statistics.load(n)
        if entry.names == ("model.embed_tokens.weight",):
            ids = torch.cat([b["input_ids"][b["attention_mask"].bool()] for b in batches])
            assert np.allclose(moment.squares, np.bincount(ids, minlength=100) / 48) and moment.matrix is None
            continue
        for name in entry.names:
            x = truth[name].double().numpy()
            assert entry.tokens == len(x) == 48
            assert np.allclose(moment.matrix, x.T @ x / len(x), rtol=1e-4, atol=1e-6)


def test_layers_that_are_given_one_tensor_share(llama: Any) -> None:
    groups = {entry.names for entry in collect(llama, [padded()]).inputs}
    layer = "model.layers.0"
    assert tuple(sorted(f"{layer}.self_attn.{p}_proj.weight" for p in "qkv")) in groups
    assert (f"{layer}.mlp.gate_proj.weight", f"{layer}.mlp.up_proj.weight") in groups
    assert (f"{layer}.self_attn.o_proj.weight",) in groups and (f"{layer}.mlp.down_proj.weight",) in groups


def test_the_model_is_left_as_it_was(llama: Any) -> None:
    llama.train()
    hooks = sum(len(m._forward_pre_hooks) for m in llama.modules())
    collect(llama, [padded()])
    assert all(m.training for m in llama.modules())
    assert sum(len(m._forward_pre_hooks) for m in llama.modules()) == hooks
    llama.eval()


def test_sketches_never_exceed_what_they_sketch(llama: Any) -> None:
    batches = [{"input_ids": tokens((4, 32), n)} for n in range(3)]
    whole = collect(llama, batches)
    for rank in (4, 16, 48):
        part = collect(llama, batches, settings=Settings(exact_width=0, rank=rank))
        for n, entry in enumerate(whole.inputs):
            goal, sketch = whole.load(n), part.load(n)
            if goal.matrix is None:
                continue
            if entry.width <= rank:  # a sketch would save nothing
                assert sketch.matrix is not None
                continue
            assert sketch.rows is not None and len(sketch.rows) <= rank
            assert np.allclose(sketch.squares, goal.squares, rtol=1e-5)
            left = np.linalg.eigvalsh(goal.matrix.astype(float) - sketch.rows.T.astype(float) @ sketch.rows)
            size = float(np.trace(goal.matrix))
            assert left.min() > -1e-5 * size
            rest = goal.matrix.astype(float) - sketch.rows.T.astype(float) @ sketch.rows
            least = np.sort(np.linalg.eigvalsh(goal.matrix.astype(float)))[: -(rank // 2)].sum()
            assert np.trace(rest) < 4 * least + 1e-5 * size  # near the best of half its rank


def test_a_pause_changes_nothing(llama: Any, tmp_path: Path) -> None:
    """Broken off after any batch, and gone on with: the bytes of a run without a pause, exact and sketched."""
    batches, partial = [padded(n) for n in range(5)], tmp_path / "out.partial"
    for settings in (Settings(), Settings(exact_width=40, rank=8)):
        statistics_file.write(collect(llama, batches, settings=settings), tmp_path / "whole", overwrite=True)
        for stop in (1, 3):
            with pytest.raises(KeyboardInterrupt):
                collect(llama, batches, settings=settings, partial=partial, every=0, progress=stop_after(stop))
            assert statistics_file.read_partial(partial)[0]["batches"] == stop
            tokens: list[int] = []
            again = collect(llama, batches, settings=settings, partial=partial, every=1e9, progress=tokens.append)
            assert len(tokens) == 5
            discard(partial)
            statistics_file.write(again, tmp_path / "again", overwrite=True)
            assert (tmp_path / "again").read_bytes() == (tmp_path / "whole").read_bytes()


def stop_after(batches: int) -> Callable[[int], None]:
    """A progress that breaks off after so many batches."""
    calls = itertools.count(1)

    def progress(tokens: int) -> None:
        if next(calls) > batches:
            raise KeyboardInterrupt

    return progress


def test_half_done_work_of_something_else_is_refused(llama: Any, tmp_path: Path) -> None:
    batches, partial = [padded(n) for n in range(3)], tmp_path / "partial"
    with pytest.raises(KeyboardInterrupt):
        collect(llama, batches, partial=partial, every=0, progress=stop_after(1))
    for changed in (
        {"batches": [padded(n + 1) for n in range(3)]},
        {"settings": Settings(rank=3)},
        {"content": "1" * 64},
        {"wanted": ["lm_head.weight"]},
        {"batches": []},
    ):
        options = {"batches": batches, **changed}
        with pytest.raises(StatisticsError, match="of another base, other data or other options"):
            collect(llama, options.pop("batches"), partial=partial, **options)  # type: ignore[arg-type]
    assert partial.exists()
    fields, arrays = statistics_file.read_partial(partial)
    del fields["version"]
    for broken in (
        {"sums": [[1, 2]]},
        {"sums": "x"},
        {"leaders": [["a", -1, 99]]},
        {"tokens": "many"},
        {"batches": "1"},
        {"sums": []},
    ):
        stored = [(name, "F64" if value.dtype == np.float64 else "F32", value) for name, value in arrays.items()]
        statistics_file.write_partial(partial, {**fields, **broken}, stored)
        with pytest.raises(StatisticsError, match="this checkpoint is of another"):
            collect(llama, batches, partial=partial)


def test_numbers_that_are_none(llama: Any) -> None:
    with watched(llama, collector := Collector()):
        collector.run(llama, padded())
    collector.sums[next(iter(collector.sums))].add(torch.full((1, 64), torch.nan), None)
    with pytest.raises(ValueRangeError, match="an activation is NaN or infinite"):
        list(collector.inputs())


def test_only_what_is_asked_for(llama: Any) -> None:
    names = ["model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.k_proj.weight"]
    statistics = collect(llama, [padded()], wanted=names)
    assert [entry.names for entry in statistics.inputs] == [(name,) for name in sorted(names)]
    with pytest.raises(StatisticsError, match="no layer of the model is asked for"):
        collect(llama, [padded()], wanted=["nothing"])


# --- other kinds of layers ------------------------------------------------------------------------------------------

CONVS = [
    nn.Conv2d(4, 6, (3, 2), padding=(1, 2), stride=(2, 1), dilation=(1, 2)),
    nn.Conv2d(4, 6, 3, groups=2, padding="same", padding_mode="reflect"),
    nn.Conv1d(4, 6, 3, stride=2, padding=2),
    nn.Conv1d(4, 4, 5, groups=4, padding_mode="circular", padding=2),
    nn.Conv3d(4, 6, (1, 3, 2), padding=(0, 1, 2), stride=(1, 2, 1), dilation=(1, 1, 2)),
    nn.Conv3d(4, 6, (3, 1, 2), groups=2),
]


@pytest.mark.parametrize("which", range(len(CONVS)))
def test_patches_are_what_a_convolution_multiplies(which: int) -> None:
    layer = CONVS[which]
    x = torch.randn(2, 4, *{3: (11,), 4: (9, 8), 5: (5, 6, 7)}[layer.weight.dim()])
    rows = patches(layer, x)  # (batch, group, place) flattened
    y = layer(x)
    weight = layer.weight.flatten(1).reshape(layer.groups, -1, rows.shape[1])
    grouped = rows.reshape(2, layer.groups, -1, rows.shape[1])
    ours = torch.einsum("bgpi,goi->bgop", grouped, weight).reshape(2, layer.out_channels, -1)
    assert torch.allclose(ours + layer.bias[:, None], y.flatten(2), atol=1e-5)


def test_vision_models_take_batches() -> None:
    model = auto("ImageClassification").from_pretrained(BASES / "tiny-vit").eval()
    size, channels = model.config.image_size, model.config.num_channels
    batches = [{"pixel_values": torch.randn(3, channels, size, size)} for _ in range(2)]
    statistics = api.statistics(model, batches)
    names = {name: n for n, entry in enumerate(statistics.inputs) for name in entry.names}
    conv = next(name for name in names if "patch_embeddings" in name)
    patch = model.get_submodule(conv.removesuffix(".weight"))
    places = (size // patch.kernel_size[0]) ** 2
    assert statistics.inputs[names[conv]].tokens == 6 * places and statistics.tokens == 6
    assert statistics.inputs[names["classifier.weight"]].tokens == 6


def mixtral() -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=12, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2,
        num_local_experts=5, num_experts_per_tok=2, vocab_size=50, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config).eval()


def test_experts_see_the_tokens_that_are_sent_to_them() -> None:
    model = mixtral()
    batch = {**padded(), "input_ids": tokens((3, 9), 3, 50)}
    before = model.config._experts_implementation
    statistics = collect(model, [batch])
    assert model.config._experts_implementation == before
    experts = model.model.layers[1].mlp.experts
    calls: list[Any] = []
    handle = experts.register_forward_pre_hook(lambda module, x: calls.append([v.clone() for v in x]))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    states, routed = calls[0][0], calls[0][1]
    real = batch["attention_mask"].reshape(-1).bool()
    up, down = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"
    places = {(entry.names[0], entry.expert): n for n, entry in enumerate(statistics.inputs)}
    total = 0
    for e in range(5):
        x = states[(routed == e).any(1) & real]
        if len(x) == 0:
            assert (up, e) not in places
            continue
        gate, upper = (x @ experts.gate_up_proj[e].T).chunk(2, -1)
        for name, rows in ((up, x), (down, experts.act_fn(gate) * upper)):
            n = places[name, e]
            assert statistics.inputs[n].tokens == len(rows)
            goal = (rows.T @ rows / len(rows)).detach().numpy()
            assert np.allclose(statistics.load(n).matrix, goal, rtol=1e-4, atol=1e-6)
        total += len(x)
    assert total == 2 * int(real.sum())


def test_encoder_decoders() -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=50, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    labels = tokens((3, 6), 1, 50)
    labels[0, 4:] = -100
    batch = {**padded(), "input_ids": tokens((3, 9), 0, 50), "labels": labels}
    statistics = collect(model, [batch])
    counted = {name: entry.tokens for entry in statistics.inputs for name in entry.names}
    assert counted["encoder.block.0.layer.0.SelfAttention.q.weight"] == 16
    assert counted["decoder.block.0.layer.0.SelfAttention.q.weight"] == 16  # 18 less 2
    cross = next(s.names for s in statistics.inputs if "decoder.block.0.layer.1.EncDecAttention.k.weight" in s.names)
    assert "decoder.block.1.layer.1.EncDecAttention.v.weight" in cross  # every layer reads the one encoder
    assert counted[cross[0]] == 16
    same = {**batch, "labels": torch.cat([labels, torch.full((3, 3), -100)], 1)}
    with pytest.raises(DataError, match="two attention masks of a batch have one shape and differ"):
        collect(model, [same])


def test_adapters_may_be_on_the_model(llama: Any) -> None:
    plain = collect(llama, [padded()])
    api.attach(llama, ADAPTERS / "llama-plain")
    with api.disabled(llama):
        disabled = collect(llama, [padded()])
    api.detach(llama)
    assert [entry.names for entry in disabled.inputs] == [entry.names for entry in plain.inputs]


def test_one_input_that_becomes_two_is_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Any, apart: bool) -> Any:
            return self.a(x) + self.b(x.clone() if apart else x)

    net = Net()
    one, two = {"x": torch.randn(2, 3), "apart": False}, {"x": torch.randn(2, 3), "apart": True}
    assert len(collect(net, [one]).inputs) == 1 and len(collect(net, [two]).inputs) == 2
    with pytest.raises(StatisticsError, match="shared their input at first and do not now"):
        collect(net, [one, two])


# --- the file -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("statistics") / "small.stats"
    names = [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.embed_tokens.weight",
    ]
    settings = Settings(exact_width=64, rank=3)
    statistics_file.write(collect(llama, [padded()], settings=settings, wanted=names), path)
    return path


def test_read_write(stored: Path, tmp_path: Path) -> None:
    statistics = api.load_statistics(stored)
    assert [entry.names[0].split(".")[-2] for entry in statistics.inputs] == ["embed_tokens", "down_proj", "q_proj"]
    assert statistics.load(1).rows is not None and statistics.load(2).matrix is not None
    statistics_file.write(statistics, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == stored.read_bytes()
    assert statistics_file.is_statistics(stored) and not statistics_file.is_statistics(ADAPTERS / "llama-plain")


def everything(path: Path) -> None:
    statistics = statistics_file.read(path)
    for n in range(len(statistics.inputs)):
        statistics.load(n)


@pytest.mark.medium
def test_every_flipped_byte_is_found(stored: Path, tmp_path: Path) -> None:
    data = bytearray(stored.read_bytes())
    where = tmp_path / "flipped"
    rng = np.random.default_rng(0)
    length = int.from_bytes(data[:8], "little") + 8
    for at in [*range(length), *rng.integers(length, len(data), 300)]:
        data[at] ^= 1 << int(rng.integers(8))
        where.write_bytes(data)
        with pytest.raises(LrcError):
            everything(where)
        data[:] = stored.read_bytes()


def rewritten(stored: Path, where: Path, **changes: Any) -> Path:
    """The file with other manifest fields, all else consistent."""
    from lrconvert.io.container import ContainerFile, encode_header

    with ContainerFile(stored) as file:
        manifest = json.loads(file.metadata[statistics_file.METADATA_KEY])
        entries = [(t.name, t.dtype, t.shape) for t in file.tensors]
        for path, value in changes.items():
            place = manifest
            *steps, last = path.split("__")
            for step in steps:
                place = place[int(step) if step.isdigit() else step]
            if value is None:
                del place[last]
            else:
                place[last] = value
        digests = manifest.pop("digests")
        digests["content"] = content_digest(digests["tensors"], manifest)
        text = dump_canonical({**manifest, "digests": digests}).decode()
        where.write_bytes(
            encode_header(entries, {statistics_file.METADATA_KEY: text})
            + b"".join(bytes(file.read(t)) for t in file.tensors)
        )
    return where


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "version": ({"version": 2}, "E-VER"),
    "no inputs": ({"inputs": []}, "E-JSON-SYNTAX"),
    "unknown field": ({"more": 1}, "E-UNKNOWN"),
    "missing field": ({"tokens": None}, "E-MISSING"),
    "form": ({"inputs__0__form": "rotated"}, "E-JSON-SYNTAX"),
    "width": ({"inputs__1__width": 10**12}, "E-LIMIT"),
    "other width": ({"inputs__1__width": 7}, "E-SHAPE"),
    "rank": ({"inputs__1__rank": 10**6}, "E-LIMIT"),
    "rank without sketch": ({"inputs__0__rank": 1}, "E-JSON-SYNTAX"),
    "twice": ({"inputs__0__names": ["model.layers.0.mlp.down_proj.weight"]}, "E-CANON"),
    "unsorted": ({"inputs__0__names": ["b", "a"]}, "E-CANON"),
    "names": ({"inputs__0__names": [1]}, "E-JSON-SYNTAX"),
    "tokens": ({"inputs__0__tokens": -1}, "E-LIMIT"),
    "expert": ({"inputs__0__expert": True}, "E-LIMIT"),
    "data": ({"data": "x"}, "E-DIGEST"),
    "families": ({"families": [1]}, "E-JSON-SYNTAX"),
    "digest": ({"digests__tensors__diagonal.0": None}, "E-UNKNOWN"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_hostile_manifests(case: str, stored: Path, tmp_path: Path) -> None:
    changes, code = BROKEN[case]
    with pytest.raises(LrcError) as caught:
        everything(rewritten(stored, tmp_path / "x", **changes))
    assert caught.value.code == code and str(tmp_path) in str(caught.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LrcError, match=r"Give a file that lrconvert\.statistics wrote"):
        statistics_file.read(ADAPTERS / "llama-plain" / "adapter_model.safetensors")


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


# --- commands -------------------------------------------------------------------------------------------------------


@pytest.mark.medium
def test_the_whole_way(tmp_path: Path) -> None:
    """Statistics of texts, a fit with them, and what the models answer: better than without at the same size."""

    def run(*words: Any) -> Any:
        done = CliRunner().invoke(cli, [str(w) for w in words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    base, adapter, stats = DEMO / "base", DEMO / "adapter", tmp_path / "demo.stats"
    run("statistics", base, "--data", DEMO / "train.jsonl", "-o", stats, "--max-tokens", 8000, "--adapter", adapter)
    assert not (tmp_path / "demo.stats.partial").exists()
    for name, words in (("plain", []), ("weighted", ["--statistics", stats])):
        run("lora-to-lowrank", adapter, "-o", tmp_path / f"{name}.lrc", "--target-ratio", 20, "--base", base, *words)
    files = [tmp_path / "plain.lrc", tmp_path / "weighted.lrc"]
    words = ["--statistics", stats, "--base", base, "--data", DEMO / "heldout.jsonl", "--max-tokens", 3000]
    shown = run("compare", adapter, *files, *words)
    assert "of it closed" in shown and "on the data" in shown
    rows = json.loads(run("compare", adapter, *files, *words, "--json"))["files"]
    closed = [row["answers"]["closed"] for row in rows]
    assert 1 - closed[1] < (1 - closed[0]) / 2 and 0.5 < closed[1] < 1
    summary = json.loads(run("statistics", base, "--data", DEMO / "train.jsonl", "-o", stats, "--overwrite", "--json",
                          "--max-tokens", 2000, "--include", "q_proj"))  # fmt: skip
    assert (
        all(i["names"][0].endswith("q_proj.weight") for i in summary["inputs"])
        and summary["bytes"] == stats.stat().st_size
    )
    assert 2000 <= summary["tokens"] < 2300


def test_statistics_of_another_base_are_refused(tmp_path: Path) -> None:
    other = shutil.copytree(LLAMA, tmp_path / "other")
    shard = next(other.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    text = lines(tmp_path / "t.jsonl", {"text": "one two"})
    statistics = api.statistics(other, text, adapter=ADAPTERS / "llama-plain")
    lora = api.load_lora(ADAPTERS / "llama-plain")
    api.convert(lora, "lowrank", rank=1, statistics=statistics)
    with pytest.raises(FingerprintError, match="the statistics are of a base with other contents"):
        api.convert(lora, "lowrank", rank=1, statistics=statistics, base=LLAMA)


def test_the_same_bytes_twice(tmp_path: Path) -> None:
    text = lines(tmp_path / "t.jsonl", *({"text": f"the {n}th text"} for n in range(20)))
    for name in ("one", "two"):
        api.statistics(LLAMA, [text], tmp_path / name, exact_width=48, rank=8)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with pytest.raises(LrcError, match="E-OUT-EXISTS"):
        api.statistics(LLAMA, [text], tmp_path / "one")


def test_bases_without_a_tokenizer(tmp_path: Path) -> None:
    text = lines(tmp_path / "t.jsonl", {"text": "one"})
    with pytest.raises(DataError, match="Give batches of model inputs"):
        api.statistics(BASES / "tiny-vit", text)


def test_validate_and_inspect_know_them(tmp_path: Path) -> None:
    path = tmp_path / "base.stats"
    (tmp_path / "t.txt").write_text("the sea is wide and so old " * 40)
    api.statistics(DEMO / "base", tmp_path / "t.txt", path, include=["q_proj"])
    fine = api.validate(path, base=DEMO / "base")
    assert fine.ok and fine.summary == {"method": "statistics", "targets": 6, "bytes": path.stat().st_size}
    assert [f.code for f in api.validate(path, base=BASES / "tiny-llama").findings] == ["E-FPR"]
    summary = api.inspect(path)
    assert summary["kind"] == "statistics" and len(summary["inputs"]) == 6 and summary["tokens"] > 40
    shown = CliRunner().invoke(cli, ["inspect", str(path)]).output
    assert "wide; 6 layers are measured, by 6 inputs" in shown and summary["base"] in shown
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    damaged = api.validate(path)
    assert [(f.level, f.code) for f in damaged.findings] == [("values", "E-DIGEST")]
    path.write_bytes(bytes(data).replace(b'version\\":1', b'version\\":2', 1))
    assert [(f.level, f.code) for f in api.validate(path).findings] == [("structure", "E-VER")]
