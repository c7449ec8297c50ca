import math

import pytest

from stillhouse.evaluate.claims import Claim, interval, judge, worst


def seeds(*values):
    return [{"a": {"x": v}, "b": {"x": 0.0}} for v in values]


HIGHER = Claim("a beats b", lambda arms: arms["a"]["x"] - arms["b"]["x"])


def test_the_interval_is_students():
    mean, low, high = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0
    assert math.isclose(high - mean, 2.7764451 * math.sqrt(2.5 / 5), rel_tol=1e-6)
    assert math.isclose(mean - low, high - mean)
    assert interval([2.0, 2.0, 2.0]) == (2.0, 2.0, 2.0)
    assert interval([2.0])[1:] == (-math.inf, math.inf)


@pytest.mark.parametrize("values, verdict", [
    ((1.0, 1.1, 0.9, 1.0, 1.05), "holds"),
    ((1.0, -0.9, 0.2, 0.1, 0.3), "leans"),
    ((-1.0, -0.9, 0.2, 0.1, 0.3), "fails"),
    ((0.0, 0.0, 0.0), "fails"),
    ((1.0, 1.0, math.nan), "fails"),
    ((1.0,), "leans"),
])
def test_verdicts(values, verdict):
    assert judge(HIGHER, seeds(*values)).verdict == verdict


def test_a_missing_or_crashed_arm_fails():
    assert judge(HIGHER, [{"a": {"x": 1.0}}]).verdict == "fails"
    assert judge(HIGHER, [{"a": {}, "b": {"x": 1.0}}]).verdict == "fails"


def test_what_is_only_reported_has_no_verdict():
    outcome = judge(Claim("x", HIGHER.slack, report=True), seeds(1.0, 1.1))
    assert outcome.verdict == "report" and outcome.mean == pytest.approx(1.05)
    assert worst(["report"]) == ""
    assert worst(["holds", "report", "leans"]) == "leans" and worst(["fails", "holds"]) == "fails"
