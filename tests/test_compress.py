"""The budget chooses: what is tried, what wins, what is said where nothing can."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from conftest import ADAPTERS, random_lora
from test_moments import statistics_for

from lrconvert import api, file
from lrconvert.cli import cli
from lrconvert.errors import BudgetError, OptionError, VersionError

FORMS = ("vblora", "lowrank")
LORA = random_lora([(96, 64), (64, 96), (40, 72)], rank=6, seed=1)


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
    from lrconvert.methods import base as methods

    done = api.compress(LORA, target_size=2600)
    assert {c.method for c in done.candidates} == set(methods.module_names())


def test_statistics_rank():
    statistics = statistics_for(LORA)
    done = api.compress(LORA, target_size=2600, forms=FORMS, statistics=statistics)
    for some in done.candidates:
        assert some.conversion.fidelity.fit_captured == some.score
        assert some.conversion.fidelity.output_captured == some.captured
    assert done.chosen.fidelity.fit_captured == max(c.score for c in done.candidates)


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
    with pytest.raises(BudgetError, match=r"no form can be that small: lowrank: .*smallest.*; vblora: .*smallest"):
        api.compress(LORA, target_size=100, forms=FORMS)
    with pytest.raises(BudgetError, match=r"no form keeps 1\.0.*; lowrank keeps 0\.9\d+, the most"):
        api.compress(LORA, min_captured=1.0, forms=["lowrank"])
    for given in ({}, {"target_size": 1, "target_ratio": 2.0}, {"min_captured": 0.5, "target_size": 9}):
        with pytest.raises(OptionError, match="give one of --target-size, --target-ratio and --min-captured"):
            api.compress(LORA, **given)
    for share in (0.0, 1.1, -1.0):
        with pytest.raises(OptionError, match="a share above 0, at most 1"):
            api.compress(LORA, min_captured=share)
    with pytest.raises(VersionError):
        api.compress(LORA, target_ratio=9, forms=["zip"])
    with pytest.raises(OptionError, match="is not a regular expression"):
        api.compress(LORA, target_ratio=9, forms=FORMS, include=["("])


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
