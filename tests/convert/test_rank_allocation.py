"""ALoRA: scores against brute force, budgets, who loses first, the model left alone, the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from click.testing import CliRunner
from conftest import ADAPTERS, BASES, dense, random_lora
from models import auto

import lrconvert
from lrconvert import api
from lrconvert.api.shared import silent
from lrconvert.cli import cli
from lrconvert.convert import ablation, rank_allocation
from lrconvert.convert.rank_allocation import Allocation, Components
from lrconvert.core.dtypes import Stored
from lrconvert.core.errors import BudgetError, DataError, OptionError
from lrconvert.formats import fidelity
from lrconvert.live import statistics as gathering
from lrconvert.live.collect_statistics import collect
from lrconvert.live.load_model import load_model
from lrconvert.live.texts import Packing
from lrconvert.lora import svd
from lrconvert.lora.adapter import LoraAdapter
from lrconvert.methods import base as methods
from lrconvert.methods.base import FitContext

pytestmark = pytest.mark.medium  # all of them work on models, disks or processes

DEMO = Path(lrconvert.__file__).parent / "demo"
TOKENS = 300


def allocate(lora: LoraAdapter, **given: Any) -> Allocation:
    return api.allocate(lora, **{"rounds": 3, "exact": 4, "batch_tokens": 512, "max_tokens": TOKENS, **given})


@pytest.fixture(scope="module")
def lora() -> LoraAdapter:
    return api.load_lora(DEMO / "adapter")


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(DEMO / "base").float()


@pytest.fixture(scope="module")
def batches(model: Any) -> list[dict[str, Any]]:
    found = gathering.batches(model, DEMO / "base", DEMO / "heldout.jsonl", Packing("", 512, 256, TOKENS), silent)
    assert isinstance(found, list) and len(found) > 1
    return found


@pytest.fixture(scope="module")
def statistics(model: Any) -> Any:
    texts = gathering.batches(model, DEMO / "base", DEMO / "train.jsonl", Packing("", 512, 1024, 4000), silent)
    return collect(model, texts)


def whole(lora: LoraAdapter, statistics: Any = None) -> tuple[LoraAdapter, Components]:
    context = FitContext(statistics=statistics)
    return rank_allocation.canonical_pairs(lora, context), rank_allocation.components(lora, context)


def likelihood(model: Any, deltas: dict[str, np.ndarray], batches: list[dict[str, Any]]) -> float:
    """The mean log-likelihood of the next tokens with `deltas` added to the weights, token by token."""
    before = {name: model.get_parameter(name).detach().clone() for name in deltas}
    with torch.no_grad():
        for name, delta in deltas.items():
            model.get_parameter(name).add_(torch.from_numpy(delta).to(model.get_parameter(name)))
        found = []
        for batch in batches:
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                text = ids[mask.bool()]
                odds = model(input_ids=text[None]).logits[0].double().log_softmax(-1)
                found += [float(odds[n, token]) for n, token in enumerate(text[1:].tolist())]
        for name, value in before.items():
            model.get_parameter(name).copy_(value)
    return float(np.mean(found))


# --- scores ---------------------------------------------------------------------------------------------------------


def test_ablation_is_what_brute_force_finds(lora: LoraAdapter, model: Any, batches: list[dict[str, Any]]) -> None:
    """Dense updates added to the weights, texts one by one without padding."""
    parts = whole(lora)[1]
    alive = np.arange(len(parts.cost)) % 16 != 3
    picked = [0, 5, 16 * 20 + 1, 16 * 41]

    def answer(gates: np.ndarray) -> float:
        deltas = {}
        for t, pair in enumerate(lora.targets):
            f = svd.svd(pair)
            s = f.s * gates[parts.owner == t]
            deltas[pair.target.name] = (f.U * s) @ f.Vt
        return likelihood(model, deltas, batches)

    with ablation.on_trial(model, whole(lora)[0], batches) as trial:
        assert trial.items == sum(int(b["attention_mask"].sum()) - len(b["input_ids"]) for b in batches)
        found = [trial.ablation(alive, c) for c in picked]
        everything = trial.score(np.ones(len(alive), bool))
    full = {pair.target.name: dense(pair) for pair in lora.targets}
    assert everything == pytest.approx(likelihood(model, full, batches), abs=1e-5)
    nothing, present = answer(np.zeros(len(alive))), answer(alive)
    for c, score in zip(picked, found, strict=True):
        one = np.arange(len(alive)) == c
        goal = present - answer(alive & ~one) + answer(one) - nothing
        assert score == pytest.approx(goal, abs=3e-5) and abs(goal) > 1e-3


def test_slopes_are_finite_differences(lora: LoraAdapter, batches: list[dict[str, Any]]) -> None:
    model = load_model(DEMO / "base").double()
    n = 16 * len(lora.targets)
    rng = np.random.default_rng(0)
    some = rng.random(n) < 0.5
    with ablation.on_trial(model, whole(lora)[0], batches[:1]) as trial:
        for gates in (np.ones(n), np.zeros(n), some.astype(float)):
            slopes = trial.slopes(gates)
            for c in (0, 17, 16 * 30 + 2, int(np.argmax(np.abs(slopes)))):
                step = 2e-3 * (np.arange(n) == c)  # norms and softmax stay in float32
                slope = (trial.score(gates + step) - trial.score(gates - step)) / 4e-3
                assert slopes[c] == pytest.approx(slope, rel=1e-3, abs=1e-5)


def test_conv1d_and_other_names() -> None:
    """GPT-2's transposed weights, and an adapter that says `transformer.h` or not."""
    lora = api.load_lora(ADAPTERS / "gpt2-conv1d")
    model = auto("CausalLM").from_pretrained(BASES / "tiny-gpt2").double().eval()
    ids = torch.randint(0, model.config.vocab_size, (3, 11), generator=torch.Generator().manual_seed(0))
    n = sum(pair.rank for pair in lora.targets)
    with ablation.on_trial(model, whole(lora)[0], [{"input_ids": ids}]) as trial:
        assert trial.items == 30
        for gates in (np.ones(n), np.zeros(n), np.arange(n) % 3 / 2):
            slopes = trial.slopes(gates)
            for c in (0, n // 2, n - 1, int(np.argmax(np.abs(slopes)))):
                step = 1e-4 * (np.arange(n) == c)
                slope = (trial.score(gates + step) - trial.score(gates - step)) / 2e-4
                assert slopes[c] == pytest.approx(slope, rel=1e-5, abs=1e-9)


def encoder() -> tuple[Any, LoraAdapter, dict[str, Any]]:
    model = auto("SequenceClassification").from_pretrained(BASES / "tiny-bert", num_labels=3).eval()
    ids = torch.randint(5, model.config.vocab_size, (6, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[2:, 5:] = 0
    return model, api.load_lora(ADAPTERS / "bert-classifier"), {"input_ids": ids, "attention_mask": mask}


def test_answers_of_classifiers() -> None:
    """The labels of the batch; without them what the LoRA model itself answers. Heads are there at all gates."""
    model, lora, batch = encoder()
    n = sum(pair.rank for pair in lora.targets)
    api.attach(model, lora)
    with torch.no_grad():
        odds = model(**batch).logits.double().log_softmax(-1)
    api.detach(model)
    labels = torch.tensor([0, 2, 1, -100, 1, 0])
    for given, answers in (({**batch, "labels": labels}, labels), (batch, odds.argmax(-1))):
        asked = answers != -100
        goal = float(odds[asked].gather(1, answers[asked][:, None]).mean())
        with ablation.on_trial(model, whole(lora)[0], [given]) as trial:
            assert trial.items == int(asked.sum())
            assert trial.score(np.ones(n, bool)) == pytest.approx(goal, abs=1e-5)
            assert trial.score(np.zeros(n, bool)) != pytest.approx(goal, abs=1e-5)
    for wrong in (torch.full((6,), 3), torch.zeros(6, 2), torch.zeros(6)):
        with (
            pytest.raises(DataError, match="are no classes of logits of shape"),
            ablation.on_trial(model, lora, [{**batch, "labels": wrong}]),
        ):
            pass
    with pytest.raises(DataError, match="no answer to score"), ablation.on_trial(model, lora, []):
        pass
    assert "_lrconvert" not in vars(model)


def test_labels_of_decoders_are_shifted(lora: LoraAdapter, model: Any, batches: list[dict[str, Any]]) -> None:
    """As transformers itself reads them: the loss it gives is minus S."""
    ids, mask = batches[0]["input_ids"], batches[0]["attention_mask"]
    labels = ids.masked_fill(~mask.bool(), -100)
    labels[:, :40] = -100  # a prompt
    with ablation.on_trial(model, whole(lora)[0], [{**batches[0], "labels": labels}]) as trial:
        found = trial.score(np.ones(16 * len(lora.targets), bool))
    api.attach(model, lora)
    with torch.no_grad():
        goal = float(model(**batches[0], labels=labels).loss)
    api.detach(model)
    assert found == pytest.approx(-goal, abs=1e-5)


def test_models_without_logits() -> None:
    import transformers

    model = transformers.AutoModel.from_pretrained(BASES / "tiny-bert").eval()
    _, lora, batch = encoder()
    with (
        pytest.raises(DataError, match="gives no logits of several classes"),
        ablation.on_trial(model, replace(lora, extras=()), [batch]),
    ):
        pass
    assert "_lrconvert" not in vars(model)


def snapshot(model: Any) -> list[Any]:
    modules = [(name, id(module), type(module), module.training) for name, module in model.named_modules()]
    values = [
        (name, id(p), p.data_ptr(), p.requires_grad, p.grad, p.detach().numpy().tobytes())
        for name, p in model.named_parameters()
    ]
    return [modules, values, sorted(vars(model)), tuple(model.state_dict())]


def test_the_model_is_left_as_it_was(lora: LoraAdapter, model: Any, batches: list[dict[str, Any]]) -> None:
    model.model.layers[1].train()
    model.model.layers[2].requires_grad_(False)
    before = snapshot(model)
    allocate(lora, total_rank=100, base=model, data=batches, rounds=1, exact=1)
    assert snapshot(model) == before
    with pytest.raises(DataError, match="are no classes"):
        allocate(lora, total_rank=100, base=model, data=[{**batches[0], "labels": torch.zeros(3, 3)}])
    assert snapshot(model) == before
    model.eval().requires_grad_(True)
    # An adapter that is there already stays, and is part of the model.
    half = replace(lora, targets=lora.targets[:20])
    api.attach(model, half, name="own")
    before = snapshot(model)
    rest = replace(lora, targets=lora.targets[20:])
    with ablation.on_trial(model, whole(rest)[0], batches) as trial:
        together = trial.score(np.ones(16 * 22, bool))
    assert snapshot(model) == before
    api.detach(model)
    with ablation.on_trial(model, whole(lora)[0], batches) as trial:
        assert trial.score(np.ones(672, bool)) == pytest.approx(together, abs=1e-4)


def test_numbers_that_are_none(lora: LoraAdapter, model: Any, batches: list[dict[str, Any]]) -> None:
    wild = replace(lora.targets[0], scale=float("inf"))
    with (
        pytest.raises(DataError, match="the loss of the model on the data is NaN or infinite"),
        ablation.on_trial(model, replace(lora, targets=(wild, *lora.targets[1:])), batches) as trial,
    ):
        trial.score(np.ones(672, bool))


# --- choosing -------------------------------------------------------------------------------------------------------


@pytest.mark.medium
@pytest.mark.parametrize("weighted", [False, True])
def test_without_data_it_is_what_lowrank_chooses(lora: LoraAdapter, statistics: Any, weighted: bool) -> None:
    known = statistics if weighted else None
    for ratio in (9.5, 60.0):
        ours = allocate(lora, target_ratio=ratio, statistics=known)
        theirs = api.convert(lora, "lowrank", target_ratio=ratio, statistics=known)
        assert ours.compact.config == theirs.compact.config and ours.sizes == theirs.sizes
        for name, tensor in theirs.compact.tensors.items():
            assert np.array_equal(ours.compact.tensors[name], tensor)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_budget_of_ranks_goes_to_the_most_energy_per_number(
    lora: LoraAdapter, statistics: Any, weighted: bool
) -> None:
    """By one sort over the spectra of all modules."""
    context = FitContext(statistics=statistics if weighted else None)
    worth = [
        (s * s / sum(pair.target.matrix_shape), t)
        for t, pair in enumerate(lora.targets)
        for s in svd.singular_values(pair, context.metric(pair))
    ]
    done = allocate(lora, total_rank=100, statistics=context.statistics, dry_run=True)
    best = [t for _, t in sorted(worth, reverse=True)[:100]]
    assert done.compact.config.counts == tuple(np.bincount(best, minlength=len(lora.targets)).tolist())


def test_uneven_modules_get_uneven_ranks() -> None:
    """A small brute force: of all choices of three components the one with most energy per byte in sum of its order."""
    lora = random_lora([(24, 16), (24, 16)], rank=4, decay=0.5)
    loud = replace(lora.targets[1], scale=20.0)
    done = allocate(replace(lora, targets=(lora.targets[0], loud)), total_rank=4)
    assert done.compact.config.counts == (0, 4)
    error = sum(t.error for t in done.fidelity.targets)  # type: ignore[union-attr]
    assert error == pytest.approx(float((dense(lora.targets[0]) ** 2).sum()), rel=1e-3)


@pytest.mark.medium
def test_budgets_are_met(lora: LoraAdapter, model: Any, batches: list[dict[str, Any]], tmp_path: Path) -> None:
    for given in ({}, {"base": model, "data": batches[:1]}):
        for rank in (1, 41, 671):
            done = allocate(lora, total_rank=rank, rounds=2, exact=2, dry_run=True, **given)
            assert sum(done.compact.config.counts) == rank and done.fidelity is None
        coarse = allocate(lora, total_rank=41, bits=4, rounds=2, exact=2, dry_run=True, **given)
        assert 30 < sum(coarse.compact.config.counts) <= 41
        assert coarse.sizes.adapter < allocate(lora, total_rank=41, dry_run=True).sizes.adapter / 2
        for size in (20_000, 5_000):
            done = allocate(lora, target_size=size, rounds=2, exact=2, **given)
            assert api.write(done.compact, tmp_path / "x.lrc", overwrite=True) == done.sizes
            assert size - 448 - 400 < (tmp_path / "x.lrc").stat().st_size <= size
            assert api.validate(tmp_path / "x.lrc").ok
    with pytest.raises(BudgetError, match="the smallest possible file has") as caught:
        allocate(lora, target_size=200)
    least = int(str(caught.value).split(" bytes")[-2].split()[-1])
    assert allocate(lora, target_size=least, dry_run=True).sizes.adapter == least
    allocate(lora, target_size=least, dry_run=True, base=model, data=batches[:1], rounds=1, exact=0)
    with pytest.raises(BudgetError):
        allocate(lora, target_size=least - 1)


def test_more_than_there_is(lora: LoraAdapter, model: Any, batches: list[dict[str, Any]]) -> None:
    done = allocate(lora, total_rank=1000, base=model, data=batches)
    assert sum(done.compact.config.counts) == 672 and done.ablated == 0
    assert any("672 of the 1000 components" in line for line in done.warnings)
    assert done.fidelity is not None and done.fidelity.captured > 0.9999
    small = random_lora([(24, 16), (16, 40)])
    flat = [replace(pair, b=Stored("F32", np.zeros_like(pair.B))) for pair in small.targets]
    assert allocate(replace(small, targets=(flat[0], small.targets[1])), total_rank=8).compact.config.counts == (0, 4)
    assert allocate(replace(small, targets=tuple(flat)), total_rank=8).compact.config.counts == (1, 0)


def test_noise_that_the_data_never_meets_goes_first(
    lora: LoraAdapter, model: Any, batches: list[dict[str, Any]]
) -> None:
    """One module is loud noise orthogonal to all that flows into it: by energy it is kept, on data it goes."""
    which = next(n for n, p in enumerate(lora.targets) if p.target.name == "model.layers.0.self_attn.q_proj.weight")
    seen: list[Any] = []
    layer = model.model.layers[0].self_attn.q_proj
    handle = layer.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach().flatten(0, 1)))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    _, s, vt = np.linalg.svd(torch.cat(seen).double().numpy(), full_matrices=True)
    unseen = vt[np.sum(s > 1e-5 * s[0]) :][:16]
    assert len(unseen) == 16  # layer 0 sees normed embeddings: fewer tokens than dimensions
    pair = lora.targets[which]
    noise = np.random.default_rng(0).standard_normal(pair.B.shape).astype(np.float32)
    loud = replace(pair, a=Stored("F32", unseen.astype(np.float32)), b=Stored("F32", noise), scale=1.0)
    noisy = replace(lora, targets=(*lora.targets[:which], loud, *lora.targets[which + 1 :]))
    parts = whole(noisy)[1]
    with ablation.on_trial(model, whole(noisy)[0], batches) as trial:
        scores = trial.slopes(np.ones(672, bool)) + trial.slopes(np.zeros(672, bool))
        assert abs(trial.ablation(np.ones(672, bool), 16 * which)) < 1e-5
    assert np.abs(scores[parts.owner == which]).max() < 1e-5
    good = int((scores > 1e-5).sum())  # what is neither useless nor harmful
    assert good > 300
    kept = [
        allocate(noisy, total_rank=good, dry_run=True, rounds=1, exact=0, **given).compact.config.counts
        for given in ({}, {"base": model, "data": batches})
    ]
    assert kept[0][which] == 16 and kept[1][which] == 0
    again = allocate(noisy, total_rank=300, dry_run=True, base=model, data=batches, rounds=2)
    assert again.compact.config.counts[which] == 0


def test_any_set_of_components_is_kept_exactly(lora: LoraAdapter, statistics: Any) -> None:
    """Not only the beginning of each spectrum; and modules that keep nothing."""
    for known in (None, statistics):
        context = FitContext(statistics=known)
        pairs, parts = whole(lora, known)
        kept = np.random.default_rng(0).random(len(parts.cost)) < 0.3
        kept[parts.owner == 7] = False
        form, fitted = methods.get("lowrank"), rank_allocation.reduced(pairs, parts, kept)
        config = form.plan(fitted, form.Options(bits=13), None, context)
        tensors = form.fit(fitted, config, context)
        compact = replace(api.convert(lora, "lowrank", bits=12, dry_run=True).compact, config=config, tensors=tensors)
        found = fidelity.fidelity(lora, compact, known)
        assert [t.rank_after for t in found.targets] == list(config.counts) and config.counts[7] == 0
        for t, pair in enumerate(lora.targets):
            f = svd.svd(pair, context.metric(pair))
            goal = (f.U * (f.s * kept[parts.owner == t])) @ f.Vt
            a, b = next((a, b) for target, a, b in methods.expand_all(compact) if target == pair.target)
            assert np.abs(b @ a - goal).max() <= 2e-3 * np.abs(goal).max()
            lost = float((f.s[~kept[parts.owner == t]] ** 2).sum())
            error = found.targets[t].error
            if known is not None:
                error = svd.distance(pair, a, b, context.metric(pair))[0]
            assert error == pytest.approx(lost, rel=1e-2)  # squared errors add up


def test_options_that_say_nothing(lora: LoraAdapter) -> None:
    for given, message in (
        ({"total_rank": 3, "target_size": 9000}, "give one of total_rank, target_size and target_ratio"),
        ({"bits": 4}, "bits goes with total_rank"),
        ({"budget_minutes": 0.0}, "budget_minutes is 0"),
        ({"total_rank": 3, "bits": 16}, "bits is 16; above 0, at most 15"),
        ({"target_size": 9000, "bits": 5}, "bits and a size both say"),
        ({"total_rank": 0}, "total_rank is 0"),
        ({"total_rank": 3, "rounds": 0}, "rounds is 0"),
        ({"total_rank": 3, "data": ["x.txt"]}, "scores on data need the base"),
        ({"total_rank": 3, "bake_dora": 2}, "baking DoRA needs the weights of the base"),
    ):
        with pytest.raises(OptionError, match=message):
            allocate(lora, **given)
    with pytest.raises(DataError):
        allocate(lora, total_rank=3, base=DEMO / "base", data=[DEMO / "absent.txt"])


def test_time_is_shared_between_slopes_and_ablations() -> None:
    """All that is wanted if there is time; never more than the minutes, and fewer texts before no ablation at all."""
    limit = rank_allocation.Time(10.0, 8)
    assert limit.exact(16, 0.1) == 16 and limit.needed(16, 0.1) < 10
    for seconds in (1.0, 2.0, limit.of_a_pass):
        exact = limit.exact(16, seconds)
        assert 4 <= exact <= 16 and limit.needed(exact, seconds) <= 10.001
        assert exact == 16 or limit.needed(exact + 1, seconds) > 10
    assert limit.exact(16, 1e6) == 0


def test_too_little_time_is_said(lora: LoraAdapter) -> None:
    """Of the texts and of the ablations what there is time for is used; the file is made, and a warning says so."""
    asked: dict[str, Any] = {"base": DEMO / "base", "data": [DEMO / "heldout.jsonl"], "max_tokens": TOKENS}
    done = allocate(lora, total_rank=300, rounds=1, exact=4, budget_minutes=1e-6, dry_run=True, **asked)
    (cut,) = (line for line in done.warnings if "budget_minutes" in line)
    assert "batches of texts and 0 of 4 ablations a round were used" in cut and done.ablated == 0


# --- the command ----------------------------------------------------------------------------------------------------


def invoke(*words: Any) -> str:
    done = CliRunner().invoke(cli, ["lora-to-alora", *map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_command(lora: LoraAdapter, tmp_path: Path) -> None:
    """Twice the same bytes; a dry run tells the size; the table; what PEFT loads is what we compute."""
    peft = pytest.importorskip("peft")
    words = [DEMO / "adapter", "--total-rank", 100, "--base", DEMO / "base", "--data", DEMO / "heldout.jsonl"]
    words += ["--max-tokens", TOKENS, "--rounds", 2, "--exact", 2, "--device", "cpu"]
    planned = json.loads(invoke(*words, "--dry-run", "--json"))
    assert list(tmp_path.iterdir()) == []
    shown = invoke(*words, "-o", tmp_path / "x.lrc", "-v")
    again = json.loads(invoke(*words, "-o", tmp_path / "y.lrc", "--json"))
    assert (tmp_path / "x.lrc").read_bytes() == (tmp_path / "y.lrc").read_bytes()
    assert planned["bytes"] == again["bytes"] and planned["modules"] == again["modules"]
    assert again["bytes"]["total"] == (tmp_path / "x.lrc").stat().st_size
    assert again["scores"]["of"] == "ablation" and 2 <= again["scores"]["ablated"] <= 4 and "captured" not in planned

    modules = again["modules"]
    assert sum(m["rank_after"] for m in modules) == 100 and {m["rank_before"] for m in modules} == {16}
    assert [(m["kind"], m["layer"]) for m in modules] == sorted((m["kind"], m["layer"]) for m in modules)
    assert "rank      672 -> 100 over 42 modules, by ablation on" in shown
    for kind in ("mlp.down_proj", "self_attn.q_proj"):
        ranks = [m["rank_after"] for m in modules if m["kind"] == f"model.layers.*.{kind}.weight"]
        bar = "#" * round(20 * sum(ranks) / 96)
        row = next(line.split() for line in shown.splitlines() if line.startswith(kind))
        assert row[1:4] == ["6", "96", str(sum(ranks))] and row[4].rstrip(".") == bar
        assert row[5:] == list(map(str, ranks))

    compact = api.read(tmp_path / "x.lrc")
    assert compact.method == "lowrank" and compact.base.content and api.validate(tmp_path / "x.lrc").ok
    (found,) = api.compare(lora, [tmp_path / "x.lrc"])
    assert found.captured == pytest.approx(again["captured"]) and 0 < found.captured < 1
    api.export(compact, tmp_path / "peft", to="peft-lora", keep_ranks=True)
    ours, ids = load_model(DEMO / "base").float(), torch.arange(60).reshape(2, 30)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(load_model(DEMO / "base").float(), tmp_path / "peft").eval()
        goal = theirs(input_ids=ids).logits
        api.attach(ours, compact)
        assert (ours(input_ids=ids).logits - goal).abs().max() <= 1e-5 * goal.abs().max()
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert len({*config["rank_pattern"].values(), config["r"]}) > 1


def test_the_command_without_data(tmp_path: Path) -> None:
    words = [DEMO / "adapter", "--target-ratio", "20", "-o", tmp_path / "x.lrc"]
    shown = invoke(*words)
    assert "by energy" in shown and "ablated" not in shown
    theirs = api.convert(api.load_lora(DEMO / "adapter"), "lowrank", target_ratio=20)
    api.write(theirs.compact, tmp_path / "y.lrc")
    assert (tmp_path / "x.lrc").read_bytes() == (tmp_path / "y.lrc").read_bytes()
    assert invoke(*words, "--overwrite", "-q") == ""
    assert CliRunner().invoke(cli, ["lora-to-alora", str(DEMO / "adapter"), "--total-rank", "9"]).exit_code == 2
