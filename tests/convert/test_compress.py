"""The budget chooses: what is tried, what wins, what is said where nothing can."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import ADAPTERS, BASES, random_lora
from test_input_statistics import statistics_for

from lrconvert import api
from lrconvert.cli import cli
from lrconvert.convert.compress import Candidate
from lrconvert.convert.strength import strength_without_data
from lrconvert.core.errors import BudgetError, OptionError
from lrconvert.formats.lrc import file
from lrconvert.methods import base as methods
from lrconvert.refine import answered_fits, successive_halving
from lrconvert.refine.session import open_session
from lrconvert.refine.settings import RunOptions, Settings
from lrconvert.report.compression import compression_json, compression_text
from lrconvert.report.conversion import conversion_text

FORMS = ("vblora", "lowrank")
LORA = random_lora([(96, 64), (64, 96), (40, 72)], rank=6, seed=1)
SAID = "No size was asked for: at least 50 times smaller."


@pytest.mark.medium
def test_the_best_of_those_that_fit_wins():
    done = api.compress(LORA, target_size=2600, forms=FORMS)
    assert [c.method for c in done.candidates] == ["lowrank", "vblora"]  # the cheapest first
    for some in done.candidates:
        alone = api.convert(LORA, some.method, target_size=2600)
        assert some.conversion is not None and some.conversion.sizes == alone.sizes and some.nbytes <= 2600
        assert some.captured == some.score == alone.fidelity.captured
    assert done.chosen is max((c.conversion for c in done.candidates), key=lambda c: c.fidelity.captured)
    ratio = api.compress(LORA, target_ratio=3, forms=["lowrank"])
    assert ratio.chosen.ratio >= 3 and len(ratio.candidates) == 1


def test_all_forms_are_tried():
    done = api.compress(LORA, target_size=2600)
    assert {c.method for c in done.candidates} == set(methods.module_names())


def test_statistics_rank():
    statistics = statistics_for(LORA)
    done = api.compress(LORA, target_size=2600, forms=FORMS, statistics=statistics)
    for some in done.candidates:
        assert some.conversion.fidelity.fit_captured == some.score
        assert some.conversion.fidelity.output_captured == some.captured
    assert done.chosen.fidelity.fit_captured == max(c.score for c in done.candidates)


@pytest.mark.medium
@pytest.mark.parametrize("share", (0.5, 0.9, 0.99))
def test_the_smallest_that_keeps_enough_wins(share):
    done = api.compress(LORA, min_captured=share, forms=["lowrank"])
    found = done.candidates[0]
    assert found.captured >= share
    less = api.convert(LORA, "lowrank", target_size=int(0.9 * found.nbytes))
    assert less.fidelity.captured < share
    both = api.compress(LORA, min_captured=share, forms=FORMS)
    assert both.chosen.sizes.adapter <= found.nbytes and both.chosen.fidelity.captured >= share


def test_what_cannot_be_is_said():
    with pytest.raises(
        BudgetError, match=r"no form can be that small; .*is (\w+)\. Ask for .* [\d.]+ times smaller, or for \d+ bytes"
    ):
        api.compress(LORA, target_size=100, forms=FORMS)
    with pytest.raises(BudgetError, match=r"no form keeps 1\.0.*; lowrank keeps 0\.9\d+, the most"):
        api.compress(LORA, min_captured=1.0, forms=["lowrank"])
    for given in (
        {"target_ratio": 2.0, "min_captured": 0.5},
        {"target_size": 1, "target_ratio": 2.0},
        {"min_captured": 0.5, "target_size": 9},
        {"max_loss": 0.1, "target_size": 9},
        {"max_accuracy_loss": "1%", "min_captured": 0.5},
    ):
        with pytest.raises(OptionError, match="give one of target_size, target_ratio, min_captured and max_loss"):
            api.compress(LORA, **given)
    for share in (0.0, 1.1, -1.0):
        with pytest.raises(OptionError, match="a share above 0, at most 1"):
            api.compress(LORA, min_captured=share)
    with pytest.raises(OptionError, match="min_captured measures the nearest fit"):
        api.compress(LORA, min_captured=0.5, strength=1.5)
    with pytest.raises(OptionError, match="no form 'zip'"):
        api.compress(LORA, target_ratio=9, forms=["zip"])
    with pytest.raises(OptionError, match="is not a regular expression"):
        api.compress(LORA, target_ratio=9, forms=FORMS, include=["("])


@pytest.mark.medium
def test_the_command(tmp_path):
    def run(*words):
        done = CliRunner().invoke(
            cli, ["compress", str(ADAPTERS / "llama-plain"), *map(str, words)], catch_exceptions=False
        )
        assert done.exit_code == 0, done.output
        return done.output

    out = tmp_path / "x.lrc"
    shown = run("-o", out, "--target-size", "6KB", "--methods", "lowrank,vblora")
    assert "* " in shown and "favours low rank" in shown and file.read(out).method in FORMS
    told = json.loads(run("-o", out, "--overwrite", "--target-size", "6KB", "--methods", "lowrank", "--json"))
    assert told["candidates"][0]["winner"] and told["candidates"][0]["bytes"] <= 6000


# --- by answers -----------------------------------------------------------------------------------------------------

LLAMA, LORA_ON_LLAMA = BASES / "tiny-llama", ADAPTERS / "llama-plain"


def words(folder: Path, count: int = 40) -> Path:
    """Texts for a tiny base."""
    path = folder / "words.jsonl"
    rng = np.random.default_rng(0)
    rows = [{"text": " ".join(rng.choice(["the", "sea", "is", "wide", "and", "so", "old"], 12))} for _ in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def by_answers(folder: Path) -> api.Compression:
    lora, data = api.load_lora(LORA_ON_LLAMA), words(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(successive_halving, "STEPS", 6)
        return api.compress(
            lora, target_size=5000, forms=["lowrank", "vblora", "nola"], base=LLAMA, data=data, batch_tokens=96, steps=4
        )


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> api.Compression:
    return by_answers(tmp_path_factory.mktemp("data"))


@pytest.mark.medium
def test_answers_rank_by_halving(ranked):
    """The better half of a round goes on, twice as long; the winner is nearest, and is what was measured."""
    steps = {c.method: c.steps for c in ranked.candidates}
    first = sorted(ranked.candidates, key=lambda c: c.after.distance)
    winner = ranked.candidates[ranked.winner]
    assert sorted(steps.values()) == [6, 18, 22]
    assert winner is first[0] and winner.steps == max(steps.values())
    assert all(c.after.distance <= c.before.distance for c in ranked.candidates)
    for some in ranked.candidates:  # of the fits with and without statistics the one with the nearer answers
        assert some.norm in ("outputs", "weights") and some.before.distance <= some.other.distance * (1 + 1e-4)
    assert winner.after.distance < winner.before.distance
    for some in ranked.candidates:  # whichever is written says what was done to it
        told = some.conversion.compact.provenance.fields
        assert int(told["refined_steps"]) <= some.steps and some.conversion.sizes.adapter <= 5000
        for name, measured in (("refined_after", some.after), ("refined_before", some.before)):
            assert name not in told or f"{measured.distance:.6g} of" in told[name]  # as far as there is room
    assert file.sizes(ranked.chosen.compact) == ranked.chosen.sizes and ranked.chosen.sizes.adapter <= 5000


@pytest.mark.medium
def test_what_won_is_what_was_measured(ranked, tmp_path):
    """Measured again from the file, beside the base and the LoRA themselves."""
    api.write(ranked.chosen.compact, tmp_path / "x.lrc")
    data, lora = words(tmp_path), api.load_lora(LORA_ON_LLAMA)
    settings = Settings(batch_tokens=96)
    with open_session(LLAMA, lora, data, settings, RunOptions(), progress=lambda s, t: None) as session:
        api.attach(session.teacher_model.model, tmp_path / "x.lrc", name="written")
        found = session.evaluator.sums(("written",))
        api.detach(session.teacher_model.model, "written")
    after = ranked.candidates[ranked.winner].after
    assert found.items == after.items and np.isclose(found.mean, after.distance, rtol=1e-4)


@pytest.mark.medium
def test_the_same_again(ranked, tmp_path):
    again = by_answers(tmp_path)
    one, two = (b"".join(file.encode(done.chosen.compact)) for done in (ranked, again))
    assert one == two


@pytest.mark.medium
def test_minutes_end_it(tmp_path, monkeypatch):
    monkeypatch.setattr(successive_halving, "STEPS", 6)
    done = api.compress(
        api.load_lora(LORA_ON_LLAMA), target_size=5000, forms=FORMS, base=LLAMA, data=words(tmp_path),
        batch_tokens=96, budget_minutes=0.02,
    )  # fmt: skip
    assert all(0 < c.steps <= 6 * 8 for c in done.candidates)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"rank_by": "answers"}, "answers need the base"),
        ({"data": "x.txt"}, "which needs the base"),
        ({"base": LLAMA, "rank_by": "answers", "target_size": None, "min_captured": 0.5}, "the smallest file"),
        ({"base": LLAMA, "rank_by": "answers", "bake_dora": 2}, "baked DoRA"),
        ({"base": BASES / "tiny-bert", "rank_by": "answers"}, "give data="),
        ({"rank_by": "luck"}, "auto, answers, fit"),
        ({"max_loss": 0.05, "target_size": None}, "max_loss and max_accuracy_loss are bounds on .*the base"),
        ({"base": LLAMA, "max_loss": "5", "target_size": None}, "max_loss is 5; a share above 0"),
        ({"base": LLAMA, "max_loss": "little", "target_size": None}, "'little' is not a share"),
        ({"base": LLAMA, "budget_minutes": 0.0}, "budget_minutes is 0.0"),
        ({"base": LLAMA, "steps": -1}, "steps is -1"),
    ],
)
def test_answers_that_cannot_rank(given, reason):
    with pytest.raises(OptionError, match=reason):
        api.compress(api.load_lora(LORA_ON_LLAMA), **{"target_size": 5000, "forms": ["lowrank"], **given})


@pytest.mark.parametrize("method", ["lowrank", "vblora", "sbora"])
def test_a_strength_multiplies_what_is_fitted(method):
    """A fit at twice the strength is twice the update, and what it captures is measured against the LoRA as it is."""
    lora = api.load_lora(LORA_ON_LLAMA)
    one, two = (api.convert(lora, method, target_size=6000, strength=s) for s in (1.0, 2.0))
    pairs = zip(methods.expand_all(one.compact), methods.expand_all(two.compact), strict=True)
    updates = [(b.astype(float) @ a, other_b.astype(float) @ other_a) for (_, a, b), (_, other_a, other_b) in pairs]
    size = sum(np.square(plain).sum() for plain, _ in updates)
    assert size > 0 and sum(np.square(2 * plain - double).sum() for plain, double in updates) < 0.02 * size
    assert two.fidelity.captured < one.fidelity.captured
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(OptionError, match="strength is"):
            api.convert(lora, method, target_size=6000, strength=wrong)


def test_without_data_the_winner_is_written_stronger():
    """The nearest fits are ranked; the winner is fitted anew at the strength that its captured share asks for, meets
    the size, and both numbers are shown. A strength that is given, 1 too, is kept, and a share asks for the nearest."""
    lora = api.load_lora(LORA_ON_LLAMA)
    done = api.compress(lora, target_size=3000, forms=["lowrank", "sbora"])
    ranked = done.candidates[done.winner]
    near = api.convert(lora, ranked.method, target_size=3000)
    captured = ranked.conversion.fidelity.captured
    assert ranked.method == "lowrank" and captured == near.fidelity.captured
    assert done.stronger.strength == pytest.approx(captured**-0.7) and 1 < done.stronger.strength < 2
    again = api.convert(lora, ranked.method, target_size=3000, strength=done.stronger.strength)
    assert b"".join(file.encode(done.chosen.compact)) == b"".join(file.encode(again.compact))
    assert done.chosen.sizes.adapter <= 3000
    shown = compression_text("x", "y", done)
    assert f"{done.stronger.strength:.2f} times the LoRA's strength" in shown and f"captured  {captured:.1%}" in shown
    assert compression_json(done)["strength"] == done.stronger.strength
    for given in ({"strength": 1.0}, {"strength": 1.5}):
        kept = api.compress(lora, target_size=3000, forms=["lowrank"], **given)
        assert kept.stronger is None and kept.chosen.compact.tensors.keys() == near.compact.tensors.keys()
    assert api.compress(lora, min_captured=0.5, forms=["lowrank"]).stronger is None
    assert api.compress(lora, target_size=3000, forms=["sbora"]).stronger is None


def test_without_a_size_every_converter_makes_a_file_50_times_smaller():
    """And it is said, by `compress`, `allocate` and each converter, in whose own options no size is."""
    lora = random_lora([(256, 256)] * 6, rank=8, seed=1)
    done = api.compress(lora, forms=["lowrank"])
    assert done.by_default and done.chosen.ratio >= 50
    assert not api.compress(lora, forms=["lowrank"], target_ratio=50).by_default
    made = [api.convert(lora, form, dry_run=True) for form in methods.module_names()]
    for one in (*made, api.allocate(lora)):
        assert one.by_default and one.ratio >= 50, one
        assert SAID in conversion_text("x", "y", one, False)
    assert SAID in compression_text("x", "y", done)
    for form, own in (("lowrank", {"bits": 12}), ("lowrank", {"target_ratio": 50}), ("alora", {"total_rank": 3})):
        assert not api.convert(lora, form, **own).by_default
    with pytest.raises(BudgetError, match=r"no size was asked for, and 50 times smaller is too small here: .*smallest"):
        api.convert(random_lora([(8, 8)], rank=1, seed=1), "lowrank")


def test_the_strength_without_data():
    assert strength_without_data("lowrank", 0.5) == pytest.approx(1.6245, abs=1e-4)
    assert strength_without_data("vblora", 0.01) == 2
    for method, captured in (
        ("bone", 0.5),
        ("sbora", 0.5),
        ("lowrank", 1.0),
        ("lowrank", 0.99),
        ("lowrank", 0.0),
        ("nola", -0.2),
    ):
        assert strength_without_data(method, captured) == 1


class _Answers:
    """What an update of `size` answers, where one of 2 would answer as the teacher does."""

    def __init__(self, size):
        self.mean = abs(2 - size) + 0.1

    def answers(self, base):
        return self.mean


def test_the_strength_is_that_of_the_nearest_answers(monkeypatch):
    """It rises while answers come nearer, and a fit that gains nothing stays as it is."""

    def distance(session, candidate, scale=1.0):
        return _Answers(candidate.nbytes * scale)

    class Fit(Candidate):
        nbytes = property(lambda self: self.steps)

    monkeypatch.setattr(answered_fits, "distance_of", distance)
    session = SimpleNamespace(base_distance=None)
    weak = answered_fits.strengthened(
        session, Fit("lowrank", {}, None, steps=1, norm="outputs"), lambda one, s: replace(one, steps=s)
    )
    assert weak.strength == pytest.approx(1.25**3) and weak.norm == "outputs"
    assert weak.plain == _Answers(1).mean and weak.steps == weak.strength
    for strong in (2, 3):
        fit = Fit("lowrank", {}, None, steps=strong)
        assert answered_fits.strengthened(session, fit, lambda one, s: replace(one, steps=s)) is fit
    poor = Fit("lowrank", {}, None, steps=1)
    assert answered_fits.strengthened(session, poor, lambda one, s: replace(one, steps=0)) is poor


@pytest.mark.medium
def test_without_answers_it_says_why(tmp_path):
    lora = api.load_lora(LORA_ON_LLAMA)
    asked = {"target_size": 5000, "forms": ["lowrank"]}
    assert api.compress(lora, **asked).note == ""
    assert api.compress(lora, base=LLAMA, rank_by="fit", **asked).note == ""
    kept = api.compress(lora, base=LLAMA, min_captured=0.3, forms=["lowrank"])
    assert "the smallest file" in kept.note and kept.candidates[0].after is None
    bare = tmp_path / "bare"
    shutil.copytree(LLAMA, bare)
    for path in bare.glob("tokenizer*"):
        path.unlink()
    assert "give data=..." in api.compress(lora, base=bare, **asked).note
    (bare / "tokenizer.json").write_text("{}")
    assert "tokenizer" in api.compress(lora, base=bare, **asked).note  # one that cannot be loaded


@pytest.mark.medium
def test_the_command_ranks_by_answers(tmp_path, monkeypatch):
    out = tmp_path / "x.lrc"
    monkeypatch.setattr(successive_halving, "STEPS", 6)
    words_ = ["compress", LORA_ON_LLAMA, "-o", out, "--target-size", "5KB", "--methods", "lowrank,vblora"]
    words_ += ["--base", LLAMA, "--data", words(tmp_path), "--batch-tokens", 96]
    done = CliRunner().invoke(cli, [str(word) for word in words_], catch_exceptions=False)
    assert done.exit_code == 0 and "refined" in done.output and "held-out items" in done.output
    assert max(map(len, done.stdout.splitlines()[1:])) <= 100  # the first names what was given
    told = CliRunner().invoke(cli, [*map(str, words_), "--overwrite", "--json", "--budget-minutes", "0.02"])
    rows = json.loads(told.stdout)["candidates"]
    assert all(row["after"]["distance"] <= row["before"]["distance"] and row["steps"] for row in rows)
    assert all(row["norm"] in ("outputs", "weights") and row["other"]["distance"] > 0 for row in rows)
    stronger = [row for row in rows if "strength" in row]
    assert all(row["strength"] > 1 and row["plain"]["distance"] > row["before"]["distance"] for row in stronger)
    shown = [line.split() for line in done.output.splitlines() if " outputs " in line or " weights " in line][
        : len(rows)
    ]
    strengths = {row["method"]: f"{row.get('strength', 1):.3g}" for row in rows}
    assert len(shown) == len(rows) and all(strengths[r[-10]] == r[-5] for r in shown)
