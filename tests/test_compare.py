"""Comparisons on common grounds."""

import dataclasses
import inspect
import json
import math
import typing

import pytest
import torch
from torch import nn

from benchmarks.tuning import best_rate, chosen
from stillhouse import catalog, cli, compare
from stillhouse.data.sets import TensorSet
from stillhouse.errors import ConfigError, RoleError, UnknownNameError
from stillhouse.protocols import OFFERS
from stillhouse.run import Run
from stillhouse.zoo import grounds

ENTRIES = [(s.slug, name) for s in catalog.systems().values() if s.built for name in s.grounds]


@pytest.mark.parametrize(("slug", "name"), ENTRIES)
def test_what_the_catalog_says_of_grounds_fits(slug, name):
    """Every entrant finds its roles, with the fields it reads, and its changes are fields of its config."""
    module, entry, ground = catalog.load(slug), catalog.find(slug).grounds[name], grounds.GROUNDS[name]
    assert set(entry) <= {"config", "options"}
    dataclasses.replace(module.EMBEDDED, **{k: tuple(v) if isinstance(v, list) else v
                                            for k, v in entry.get("config", {}).items()})
    roles = ground.roles(Run(quiet=True), **entry.get("options", {}))
    hints = typing.get_type_hints(module.distill)
    for role, parameter in inspect.signature(module.distill).parameters.items():
        if role in ("config", "run"):
            continue
        assert role in roles or parameter.default is not inspect.Parameter.empty, f"the ground has no {role}"
        for kind in (hints[role], *typing.get_args(hints[role])):
            if role in roles and isinstance(kind, type) and kind in OFFERS:
                assert set(OFFERS[kind]) <= set(roles[role].fields)


@pytest.fixture
def small(monkeypatch):
    """A ground of eight pictures, and workers in this process."""
    def roles(run):
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        image = torch.randn(16, 1, 8, 8)
        return {"teacher": nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), "student": net,
                "data": TensorSet(image=image), "labelled": TensorSet(image=image, label=torch.arange(16) % 3)}

    def measure(target, run):
        return {"size": float(sum(p.detach().abs().sum() for p in target.parameters()))}

    place = grounds.Ground("Small", "Eight pictures.", {"size": "lower", "training seconds": "lower"},
                           {"steps": 3, "batch": 4, "unheard_of": 1}, roles, measure,
                           {"untrained": lambda run, roles: roles["student"]})
    monkeypatch.setitem(grounds.GROUNDS, "digits", place)

    def here(jobs, workers, module):
        assert module == "stillhouse.compare"
        for job in jobs:
            if not job.outcome.is_file():
                job.folder.mkdir(parents=True, exist_ok=True)
                job.outcome.write_text(json.dumps(compare.run_entrant(job.slug, job.words[1], job.seed, job.folder)))

    monkeypatch.setattr(compare, "work", here)
    return place


def test_entrants_start_from_the_same_weights_and_rank_by_the_first_metric(small, tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    found = compare.compare(["ssld"], [0, 1])
    assert set(found["arms"]) == {"ssld", "untrained"} and found["baselines"] == ["untrained"]
    assert all(len(v) == 2 for v in found["arms"]["ssld"].values())
    means = [sum(arm["size"]) for arm in found["arms"].values()]
    assert means == sorted(means), "lower is better on this ground"
    assert compare.gains(found, "untrained")[0] == 0.0
    gain = compare.gains(found, "ssld")[0]
    assert gain == pytest.approx((sum(found["arms"]["untrained"]["size"]) - sum(found["arms"]["ssld"]["size"])) / 2)

    monkeypatch.setattr(compare, "run_entrant", None)
    assert compare.compare(["ssld"], [0, 1]) == found, "finished runs are taken from the cache"


def test_the_command_prints_a_table_and_writes_a_picture_that_the_report_shows(small, tmp_path, monkeypatch, capsys):
    from stillhouse.report import write_report

    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    cli.main(["compare", "ssld", "--seeds", "2", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "ssld" in printed and "better than untrained by" in printed
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    page = write_report(tmp_path / "out", tmp_path / "report.html").read_text()
    assert "Eight pictures." in page and page.count('class="dots"') >= 2


def test_students_of_several_sizes_make_a_trade_off(small, tmp_path, monkeypatch):
    def roles(run, hidden=8):
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 3))
        image = torch.randn(16, 1, 8, 8)
        return {"teacher": nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), "student": net,
                "data": TensorSet(image=image), "labelled": TensorSet(image=image, label=torch.arange(16) % 3)}

    def measure(target, run):
        return {"size": 1.0 / len(target), "parameters": float(sum(p.numel() for p in target.parameters()))}

    place = dataclasses.replace(small, roles=roles, measure=measure, main="big",
                                students={"tiny": {"hidden": 2}, "big": {"hidden": 8}},
                                better={"size": "lower", "training seconds": "lower", "parameters": "lower"})
    monkeypatch.setitem(grounds.GROUNDS, "digits", place)

    def here(jobs, workers, module):
        for job in jobs:
            job.folder.mkdir(parents=True, exist_ok=True)
            job.outcome.write_text(json.dumps(
                compare.run_entrant(job.slug, job.words[1], job.seed, job.folder, job.words[3])))

    monkeypatch.setattr(compare, "work", here)
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    found = compare.compare(["ssld"], [0, 1])
    assert list(found["students"]) == ["tiny", "big"] and found["student"] == "big"
    assert found["arms"] == found["students"]["big"]
    assert found["students"]["tiny"]["ssld"]["parameters"] == [139.0, 139.0]
    assert found["arms"]["ssld"]["parameters"] == [547.0, 547.0]
    picture = compare.write(found, tmp_path / "out")
    assert picture.name == "trade.png" and (tmp_path / "out" / "comparison.png").exists()
    lines = compare.draw_trade(found).axes[0].get_lines()
    assert any(len(line.get_xdata()) == 2 for line in lines)


def test_systems_without_a_common_ground_are_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"share no ground.*ssld on digits; dmd2 on gauss2d"):
        compare.common_ground(["ssld", "dmd2"])
    with pytest.raises(ConfigError, match="mirage on none: a set of labelled graphs"):
        compare.common_ground(["mirage"])
    with pytest.raises(ConfigError, match="do not all stand on the ground 'gauss2d'"):
        compare.common_ground(["ssld"], "gauss2d")
    with pytest.raises(UnknownNameError, match="no system 'sslt'"):
        compare.common_ground(["ssld", "sslt"])
    assert compare.common_ground(["dmd2", "progressive-distillation"]) == "gauss2d"


def test_a_role_that_the_ground_lacks_is_named(small):
    class Module:
        EMBEDDED = catalog.load("ssld").EMBEDDED

        @staticmethod
        def distill(teacher, clients, config=None, run=None):
            raise AssertionError

    with pytest.raises(RoleError, match="has no clients; it has teacher, student"):
        grounds.enter(small, Module, Run(quiet=True))


def test_a_run_that_diverged_leaves_a_gap_not_a_number():
    comparison = {"title": "t", "better": {"x": "higher"}, "baselines": ["b"], "seeds": [0, 1, 2],
                  "arms": {"a": {"x": [1.0, None, 3.0]}, "b": {"x": [0.5, 1.0, 1.5]}}}
    mean, low, high = compare.gains(comparison, "a")
    assert mean == pytest.approx(1.0) and math.isfinite(low) and math.isfinite(high)
    assert len(compare.draw(comparison).axes) == 1


def test_learning_rates_are_those_that_tuning_found():
    """What `benchmarks.tuning` chose on validation pictures is what the entrants and baselines have."""
    found = json.loads((catalog.results_folder() / "comparisons" / "digits" / "tuning.json").read_text())
    ground = grounds.GROUNDS["digits"]
    assert set(found) == {*(s.slug for s in catalog.systems().values() if s.built and "digits" in s.grounds),
                          *(set(ground.baselines) - {"the teacher itself"})}
    for row, outcome in found.items():
        best = chosen({float(lr): scores for lr, scores in outcome["accuracy"].items()}, outcome["start"])
        if row in ground.baselines:
            has = inspect.signature(ground.baselines[row]).parameters["lr"].default
        else:
            has = grounds.config_on(ground, catalog.load(row), catalog.find(row).grounds["digits"].get("config")).lr
        assert math.isclose(has, best) and math.isclose(outcome["lr"], best), row


def test_tuning_goes_uphill_by_factors_of_two():
    asked = []

    def score(lr):
        asked.append(lr)
        return [-abs(math.log2(lr) - 2.0)]

    assert chosen(best_rate(score, 1.0), 1.0) == 4.0 and asked == [0.5, 1.0, 2.0, 4.0, 8.0]
    assert list(best_rate(lambda lr: [0.0], 1.0)) == [0.5, 1.0, 2.0]
    assert min(best_rate(lambda lr: [-lr], 1.0)) == 0.125
    assert chosen({1.0: [0.5], 0.5: [0.5], 2.0: [0.4]}, 0.5) == 0.5
