"""The benchmarks: every one runs, its arms compute the same numbers, and the guide shows the figures that were kept."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import language, results, steps
from benchmarks.__main__ import main

ROOT = Path(__file__).parent.parent
SMALL = language.Sizes(24, 50, 8)


def gradients(arm):
    torch.manual_seed(0)
    given = language.inputs_of(SMALL)
    return arm(given), given.student.grad, given.student_weight.grad


def test_trl_and_ours_compute_the_same_loss_and_gradients():
    pytest.importorskip("trl")
    for a, b in zip(gradients(language.ours), gradients(language.trl), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_language_is_measured_in_time_and_in_memory():
    time, memory = language.measure(SMALL, repeats=2)
    assert {"ours", "bare", "bare, whole"} <= set(time["arms"]) and {len(v) for v in time["arms"].values()} == {2}
    assert "ours" in memory["arms"] and not any(name.startswith("bare") for name in memory["arms"])


def test_peak_memory_is_that_of_the_arm(monkeypatch):
    """A tensor of 64 MB that is gone again is seen, to a few MB."""
    def arm(given):
        if len(given.student) == SMALL.tokens:
            torch.ones(16_000_000)

    monkeypatch.setattr(language, "arms", lambda: {"ours": arm})
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux lets a process count its peak anew")
    assert language.peak_here("ours", SMALL) == pytest.approx(64, abs=8)


@pytest.mark.parametrize("name", list(steps.PAIRS))
def test_the_bare_loop_ends_with_the_weights_of_the_library(name):
    ours, bare = steps.both(name, steps=5)
    start = [p.detach().clone() for p in steps.PAIRS[name](5, True).trained[0].parameters()]
    assert max((a - b).abs().max() for a, b in zip(ours, start, strict=True)) > 1e-3
    for a, b in zip(ours, bare, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_pair_is_timed_step_by_step():
    result, = steps.measure(("kd",), steps=6, small=True)
    assert len(result["arms"]["ours"]) == len(result["arms"]["bare"]) >= 6
    assert min(result["arms"]["ours"]) > 0


def test_the_command_writes_figures_and_a_picture(tmp_path, capsys):
    assert main(["steps", "--quick", "--out", str(tmp_path / "sub" / "b.json")]) == 0
    written = json.loads((tmp_path / "sub" / "b.json").read_text())
    assert [r["name"] for r in written["results"]] == [f"a step of {name}" for name in steps.PAIRS]
    assert (tmp_path / "sub" / "b.png").read_bytes()[1:4] == b"PNG"
    assert "ours / bare" in capsys.readouterr().out
    for wrong in (["nothing"], ["steps", "--commit"], ["--quick", "--commit"]):
        with pytest.raises(SystemExit):
            main(wrong)


def test_ratios_are_of_repeats():
    result = {"name": "x", "unit": "s", "note": "", "arms": {"ours": [1.0, 2.0, 3.0], "other": [2.0, 2.0, 2.0]}}
    assert results.ratios(result) == {"other": (0.75, 1.0, 1.25)}
    assert "| x | 2 s | other | 2 s | 1.00 (0.75 to 1.25) |" in results.table([result])


def test_the_guide_shows_the_kept_figures():
    measured = results.read(ROOT / "benchmarks" / "measured.json")
    text = (ROOT / "docs" / "guide" / "benchmarks.md").read_text(encoding="utf-8")
    assert results.page(text, measured) == text
    assert len(measured["results"]) >= 6 and results.table(measured["results"]).count("\n") > 8
