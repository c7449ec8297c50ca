"""`still advise`: rules of the catalog that fit the systems they speak of."""

import dataclasses
import shlex

import pytest

from stillhouse import advice, catalog
from stillhouse.advice import Situation, advise
from stillhouse.cli import main
from stillhouse.cli.words import roles
from stillhouse.errors import ConfigError

BUILT = [s for s in catalog.systems().values() if s.built]


def names(answer):
    return [a.system.slug for a in answer.fitting]


@pytest.mark.parametrize("system", BUILT, ids=lambda s: s.slug)
def test_every_built_system_has_a_rule_whose_command_it_understands(system):
    rule = system.advice
    assert set(rule["goals"]) <= set(advice.GOALS) and set(rule["tasks"]) <= set(advice.TASKS)
    assert all(set(rule[axis]) <= set(advice.MEANING[axis]) for axis in advice.AXES)
    assert set(rule.get("needs", ())) <= set(advice.NEEDS)
    words = shlex.split(rule["command"].replace("[", "").replace("]", ""))
    assert words[:3] == ["still", "run", system.slug]
    given = {w.removeprefix("--") for w in words if w.startswith("--")}
    declared = roles(catalog.load(system.slug))
    needed = {n for n, p in declared.items() if p.default is p.empty}
    bare = {w.removeprefix("--") for w in shlex.split(advice._command(rule["command"], Situation(
        rule["goals"][0], rule["tasks"][0], teacher="none", labels="none", data="none"), "", "")) if w.startswith("--")}
    assert given <= set(declared) and needed <= bare


@pytest.mark.parametrize("system", BUILT, ids=lambda s: s.slug)
def test_every_system_is_the_answer_to_what_its_rule_describes(system):
    rule = system.advice
    situation = Situation(rule["goals"][0], rule["tasks"][0], rule["teacher"][0], rule["labels"][0],
                          rule["architecture"][0], rule["data"][0], has=tuple(rule.get("needs", ())))
    assert system.slug in names(advise(situation, most=99))


def test_what_is_needed_and_not_there_rules_a_system_out_and_is_said():
    answer = advise(Situation("smaller", "images", teacher="open", labels="none"))
    assert "quantized-distillation" not in names(answer)
    assert ("quantized-distillation", "it needs labels for a few samples") in [(s.slug, t) for s, t in answer.nearly]
    assert "dphubert" not in {s.slug for s, _ in answer.nearly}
    assert "quantized-distillation" in names(advise(Situation("smaller", "images", labels="all", teacher="none")))


def test_more_than_is_needed_rules_nothing_out():
    assert "ssld" in names(advise(Situation("smaller", "images", teacher="open", labels="all", data="yes")))
    assert "dmd2" in names(advise(Situation("fewer-steps", "images", teacher="open", labels="all", data="yes")))


def test_a_system_for_special_data_comes_first_where_there_is_such_data():
    assert names(advise(Situation("clusters", "images", has=("domains",))))[0] == "lls-ddfa"
    assert names(advise(Situation("clusters", "images")))[0] == "scan"


def test_steps_and_size_rank_and_warn():
    one = advise(Situation("fewer-steps", "images", teacher="open", data="yes", steps=1))
    assert names(one)[-1] == "progressive-distillation" and "not 1" in " ".join(one.fitting[-1].cautions)
    many = advise(Situation("fewer-steps", "images", steps=8))
    assert names(many) == ["progressive-distillation"]


def test_commands_take_the_words_one_has_and_leave_out_what_is_not_there():
    situation = Situation("fewer-steps", "images", teacher="open", data="none")
    command = advise(situation, model="diffusers:big").fitting[0].command
    assert command == "still run dmd2 --teacher diffusers:big --student diffusers:big"
    same = Situation("smaller", "images", teacher="open", architecture="same", size=0.25)
    assert "--student smaller:fraction=0.25 --data pics" in advise(same, data="pics").fitting[0].command
    api = advise(Situation("smaller", "text", teacher="api")).fitting[0].command
    assert "--teacher api:URL" in api


def test_nothing_of_the_kind_says_what_there_is():
    with pytest.raises(ConfigError, match="built are --goal density for images, points, and for text "
                                          "--goal better, smaller"):
        advise(Situation("density", "text"))
    for wrong in ({"size": 2.0}, {"steps": 0}, {"teacher": "open-source"}, {"has": ("money",)}):
        with pytest.raises(ConfigError):
            dataclasses.replace(Situation("smaller", "images"), **wrong)


def test_the_command_prints_reasons_and_commands(capsys):
    main(["advise", "--goal", "smaller", "--task", "text", "--teacher", "open", "--model", "hf:big"])
    said = " ".join(capsys.readouterr().out.split())
    assert "1. distillm" in said and "still run distillm --teacher hf:big" in said and "shares its tokenizer" in said


def test_the_command_asks_a_person_and_refuses_a_pipe(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        main(["advise"])
    assert "--goal" in capsys.readouterr().err
    answers = iter(["9", "1", "speech", "", "1", "", ""])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    main(["advise"])
    said = capsys.readouterr().out
    assert "one of 1 to 8" in said and "1. dphubert" in said
