"""`lrconvert demo` is what a stranger runs first."""

from __future__ import annotations

import re

import pytest
from click.testing import CliRunner

from lrconvert.cli import cli
from lrconvert.core.errors import OutputExistsError
from lrconvert.formats.lrc.validation import validate


@pytest.mark.slow
def test_the_demo_shows_every_step_and_keeps_most_of_the_gain(tmp_path):
    done = CliRunner().invoke(cli, ["demo", "-o", str(tmp_path / "demo")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    steps = re.findall(r"^\$ lrconvert (\S+)", done.output, re.M)
    assert list(dict.fromkeys(steps)) == [
        *("inspect", "statistics", "lora-to-vblora", "lora-to-lowrank"),
        *("validate", "compare", "refine", "export", "merge-into-base"),
    ]
    rows = re.findall(r"^(base|LoRA|vblora|lowrank|refined) +([\d,]+|-) +([\d.]+) ", done.output, re.M)
    loss = {name: float(number) for name, _, number in rows}
    size = {name: int(number.replace(",", "")) for name, number, _ in rows if number != "-"}
    gain = loss["base"] - loss["LoRA"]
    for name, least in (("vblora", 0.6), ("lowrank", 0.6), ("refined", 0.95)):
        said = 500 if name == "refined" else 0  # bytes in which a file says what was done to it
        assert 30 * (size[name] - said) <= size["LoRA"] and loss["base"] - loss[name] > least * gain
        assert validate(tmp_path / "demo" / f"{name}.lrc").ok
    again = CliRunner().invoke(cli, ["demo", "-o", str(tmp_path / "demo")])
    assert isinstance(again.exception, OutputExistsError)
