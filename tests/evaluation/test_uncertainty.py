import numpy as np
import pytest

from hf_distill.evaluation.uncertainty import interval, timings


def test_the_interval_of_a_mean_is_what_the_normal_law_says():
    values = np.random.default_rng(0).normal(50, 10, size=400)
    low, high = interval([(400, lambda rows: values[rows].mean())])
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)
    assert interval([(400, lambda rows: values[rows].mean())]) == [low, high]  # the same draws each time


def test_sets_are_drawn_on_their_own_and_count_alike():
    small, large = np.repeat([0.0, 100.0], 8), np.repeat([0.0, 100.0], 800)
    asked = []

    def statistic(values):
        return lambda rows: (asked.append(len(rows)), values[rows].mean())[1]

    low, high = interval([(16, statistic(small)), (1600, statistic(large))], resamples=500)
    assert (asked.count(16), asked.count(1600)) == (500, 500)
    # Standard errors: 50 / 4 and 50 / 40; of their mean half the root of the sum of squares, 6.28.
    assert (low, high) == pytest.approx((50 - 1.96 * 6.28, 50 + 1.96 * 6.28), abs=2)


def test_what_never_varies_has_no_spread():
    assert interval([(5, lambda rows: 7.0)]) == [7.0, 7.0]


def test_encoders_take_turns_and_are_measured_by_the_first(monkeypatch):
    # Seconds of the teacher, then of the student, in three rounds.
    spans = [(4.0, 1.0), (6.0, 2.0), (8.0, 1.0)]
    clock = iter([tick for round_ in spans for seconds in round_ for tick in (0.0, seconds)])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    calls = []
    encoders = {name: lambda texts, name=name: calls.append((name, len(texts))) for name in ("teacher", "student")}
    found = timings(encoders, ["a"] * 12)
    assert calls == [("teacher", 12), ("student", 12)] * 4  # the first round is not counted
    assert found["teacher"] == {"texts_per_s": 2.0, "times_faster": 1.0, "from": 1.0, "to": 1.0}
    assert found["student"] == {"texts_per_s": 12.0, "times_faster": 4.0, "from": 3.0, "to": 8.0}
