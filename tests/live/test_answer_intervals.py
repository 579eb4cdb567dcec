"""The interval of the share that a file closes: of texts, paired, and only where there are enough of them."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from lrconvert.live import compare_outputs
from lrconvert.live.answers import AnswerSums, Outputs


def sums(texts: int, closed: float, places: int = 5) -> AnswerSums:
    """Sums of batches of ten texts, whose answers are the teacher's moved by noise, less of it the more is closed."""
    generator, total = torch.Generator().manual_seed(0), AnswerSums()
    for start in range(0, texts, 10):
        count = min(10, texts - start)
        goal = torch.randn(count * places, 7, generator=generator)
        noise = torch.randn(count * places, 7, generator=generator)
        of = torch.arange(count).repeat_interleave(places)
        total.add(Outputs(goal, True, texts=of), Outputs(goal + (1 - closed) ** 0.5 * noise, True))
    return total


def test_it_holds_the_share_and_narrows_with_more_texts():
    widths = []
    for texts in (20, 80, 320):
        file, base = sums(texts, 0.8), sums(texts, 0.0)
        assert len(file.by_text) == texts and sum(file.by_text.of("distance")) == pytest.approx(file.distance)
        answers = file.answers(base)
        low, high = answers.interval
        assert low < answers.closed < high < 1
        for name, (least, most) in answers.intervals.items():  # of every measure there is one
            assert least < getattr(answers, name) < most
        assert set(answers.intervals) == {"distance", "base_distance", "agreement", "base_agreement"}
        widths.append(high - low)
    assert widths == sorted(widths, reverse=True)


def test_few_texts_have_none():
    few = sums(19, 0.8).answers(sums(19, 0.0))
    assert few.interval is None and not few.intervals
    alone = AnswerSums()
    alone.add(Outputs(torch.zeros(40, 3), True), Outputs(torch.ones(40, 3), True))  # whose rows are is not known
    assert not len(alone.by_text) and alone.answers(alone).interval is None


@pytest.mark.parametrize("masked", (False, True))
def test_rows_know_their_texts(masked):
    value = torch.arange(24.0).reshape(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]]) if masked else None
    expected = [0, 0, 1, 1] if masked else [0, 0, 0, 1, 1, 1]
    assert compare_outputs._texts_of(value, mask).tolist() == expected
    assert compare_outputs._texts_of(value[:, 0], None).tolist() == [0, 1]  # a classifier has one row for each text
