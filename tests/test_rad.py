import copy
import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import nn

from stillhouse.data.clusters import average_linkage
from stillhouse.data.digits import digits
from stillhouse.data.sets import TensorSet
from stillhouse.data.variants import degraded
from stillhouse.errors import ConfigError, DataError, RoleError
from stillhouse.measures.acquisition import (
    SCORES,
    draw,
    farthest_first,
    gains,
    in_turns,
    minimax,
    top,
    worst_case,
)
from stillhouse.parts.black_box import BlackBox, QueriesUsedUp, as_logits
from stillhouse.recipes.active import Query, learn_in_rounds, parts_of
from stillhouse.run import Run
from stillhouse.systems.compression import rad
from stillhouse.systems.compression.rad import RULES, Config, acquire, distill
from stillhouse.testing import check_system


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def asked(**changes):
    given = {**rad.tiny(), **changes}
    return acquire(**given, run=Run(quiet=True))


# ---------------------------------------------------------------- the game


def test_three_points_and_one_mistake():
    q, kept, value = minimax(torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64), 1)
    assert kept == 2 and torch.allclose(q, torch.tensor([1 / 3, 2 / 3, 0.0], dtype=torch.float64), atol=1e-15)
    assert value == pytest.approx(1 / 3, abs=1e-15)


@pytest.mark.parametrize("cost", [0.0, 1.0])
def test_the_closed_form_is_the_linear_programs_value(cost):
    """max t with t <= sum_{i not in M} q_i g_i - cost sum_{i in M} q_i g_i for every M."""
    for seed in range(12):
        n = 3 + seed % 6
        g = torch.rand(n, dtype=torch.float64, generator=generator(seed)) + 0.01
        for m in range(n if cost == 0 else (n - 1) // 2 + 1):
            rows = []
            for wrong in itertools.combinations(range(n), m):
                sign = np.ones(n)
                sign[list(wrong)] = -cost
                rows.append(np.append(-sign * g.numpy(), 1.0))
            best = linprog(np.append(np.zeros(n), -1.0), A_ub=np.array(rows), b_ub=np.zeros(len(rows)),
                           A_eq=[np.append(np.ones(n), 0.0)], b_eq=[1.0], bounds=[(0, None)] * n + [(None, None)])
            q, _, value = minimax(g, m if cost == 0 else 2 * m)
            assert value == pytest.approx(-best.fun, abs=1e-10)
            assert worst_case(q, g, m, cost) == pytest.approx(value, abs=1e-12)


def test_every_kept_point_is_expected_to_teach_the_same():
    g = torch.rand(200, dtype=torch.float64, generator=generator(1)) + 1e-3
    q, kept, value = minimax(g, 30)
    assert q.sum().item() == pytest.approx(1, abs=1e-12) and int((q > 0).sum()) == kept > 30
    each = (q * g)[q > 0]
    assert torch.allclose(each, each[0].expand(kept), atol=1e-15) and value == pytest.approx((kept - 30) * each[0])
    inside = g[q > 0]
    assert inside.min() >= g[q == 0].max()
    assert (q[q > 0][inside.argsort()].diff() <= 0).all()


def test_without_mistakes_all_mass_is_on_the_largest_gain_and_equal_gains_are_drawn_alike():
    q, kept, value = minimax(torch.tensor([0.2, 0.9, 0.5]), 0)
    assert q.tolist() == [0, 1, 0] and kept == 1 and value == pytest.approx(0.9)
    q, _, value = minimax(torch.full((8,), 0.3, dtype=torch.float64), 3)
    assert torch.allclose(q, torch.full((8,), 1 / 8, dtype=torch.float64)) and value == pytest.approx(5 * 0.3 / 8)


def test_scaling_the_gains_leaves_the_distribution_and_scales_the_value():
    g = torch.rand(40, dtype=torch.float64, generator=generator(2)) + 0.01
    a, b = minimax(g, 7), minimax(0.05 * g, 7)
    assert torch.allclose(a.q, b.q, atol=1e-14) and b.value == pytest.approx(0.05 * a.value)


def test_no_other_rule_guarantees_as_much():
    g = torch.rand(300, dtype=torch.float64, generator=generator(3)) + 0.01
    value = minimax(g, 40).value
    for q in (torch.full((300,), 1 / 300), g / g.sum(), torch.zeros(300).index_fill(0, top(g, 50), 1 / 50)):
        assert worst_case(q.double(), g, 40) < value
    assert worst_case(torch.zeros(300).index_fill(0, top(g, 40), 1 / 40), g, 40) == pytest.approx(0, abs=1e-6)


def test_wrong_games_are_refused():
    for gain, m in (([0.5, 0.0], 0), ([], 0), ([0.5, float("nan")], 0)):
        with pytest.raises(DataError):
            minimax(torch.tensor(gain), m)
    with pytest.raises(ConfigError, match="mistakes"):
        minimax(torch.tensor([0.5, 0.4]), 2)


# ---------------------------------------------------------------- scores and draws


def test_scores_of_certain_and_undecided_answers():
    sure, torn = torch.tensor([100.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, -100.0])
    z = torch.stack([sure, torn, torch.zeros(3)])
    assert gains(z, "margin").tolist() == pytest.approx([1e-6, 1.0, 1.0])
    assert gains(z, "entropy").tolist() == pytest.approx([1e-6, np.log(2) / np.log(3), 1.0])
    assert gains(z, "confidence").tolist() == pytest.approx([1e-6, 0.5, 2 / 3])
    assert set(SCORES) == {"margin", "entropy", "confidence"}


def test_points_are_drawn_without_replacement_and_in_proportion():
    gain = torch.tensor([1.0, 0.5, 0.25, 0.125])
    q = torch.tensor([0.5, 0.3, 0.2, 0.0])
    first = torch.stack([draw(q, gain, 1, generator(seed)) for seed in range(3000)]).flatten()
    assert torch.allclose(torch.bincount(first, minlength=4) / 3000, q, atol=0.03)
    assert all(len(draw(q, gain, 2, generator(s)).unique()) == 2 for s in range(20))
    assert draw(q, gain, 3).tolist() == [0, 1, 2]
    assert draw(torch.tensor([0.0, 0.0, 1.0, 0.0]), gain, 3).tolist() == [2, 0, 1]
    with pytest.raises(DataError):
        draw(q, gain, 5)


def test_diverse_rules():
    x = torch.tensor([[0.0], [1.0], [5.0], [10.0]])
    assert farthest_first(x, torch.tensor([[0.0]]), 3).tolist() == [3, 2, 1]
    gain = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])
    assert in_turns(gain, torch.tensor([0, 0, 0, 1, 1]), 4).tolist() == [3, 0, 4, 1]
    clusters = average_linkage(torch.tensor([[0.0], [0.1], [9.0], [9.1], [9.2]]), 2)
    assert len(set(clusters[:2].tolist())) == len(set(clusters[2:].tolist())) == 1 and clusters[0] != clusters[4]


# ---------------------------------------------------------------- the teacher behind its interface


def test_a_black_box_counts_and_stops_and_has_no_gradient():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    x = torch.randn(5, 1, 2, 2)
    box = BlackBox(model, "logits", budget=8)
    z = box(x)
    assert torch.equal(z, model(x)) and not z.requires_grad and not z.is_inference()
    assert box.queries == 5 and box.bytes == 5 * 4 * 4 and box.left == 3
    with pytest.raises(QueriesUsedUp, match="leaves 3"):
        box(x)
    assert box.queries == 5
    other = BlackBox(model, "logits")
    other.load_state_dict(box.state_dict())
    assert other.queries == 5 and other.left is None


def test_what_is_seen_of_the_teacher():
    z = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 3.0]])
    p = z.softmax(-1)
    x = torch.zeros(2, 1)
    for given in (z, p):
        assert torch.allclose(BlackBox(lambda _, given=given: given, "probabilities")(x).softmax(-1), p, atol=1e-6)
    hard = as_logits(torch.tensor([0, 2]), 3)
    assert hard.softmax(-1).amax(-1).min() > 1 - 1e-6
    assert torch.equal(BlackBox(lambda _: z, "label")(x), hard)
    assert torch.equal(BlackBox(lambda _: torch.tensor([0, 2]), "label", classes=3)(x), hard)
    for wrong in (lambda _: z[:1], lambda _: "0", lambda _: torch.tensor([0, 2])):
        with pytest.raises(RoleError):
            BlackBox(wrong, "probabilities")(x)


# ---------------------------------------------------------------- rounds


def test_steps_are_shared_out():
    assert parts_of(10, 4) == [2, 3, 2, 3] and sum(parts_of(401, 4)) == 401


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_asks_for_new_pictures_each_round_and_for_no_more_than_was_bought(rule):
    given = rad.tiny()
    calls = []

    def teacher(x):
        calls.append(len(x))
        return given["teacher"](x)

    config = Config(steps=9, batch=4, rounds=2, queries=3, lr=0.01, rule=rule)
    _, positions, answers = asked(teacher=teacher, config=config)
    assert len(positions) == len(positions.unique()) == 6 and positions.max() < 22
    assert sum(calls) == 4 + 6 + (10 if rule == "minimax" else 0)
    if rule != "unixkd":
        expected = given["teacher"](given["unlabelled"].image[positions]).log_softmax(-1)
        assert torch.allclose(answers, expected, atol=1e-5)


def test_top_rules_take_what_the_student_is_least_sure_of():
    found = asked(config=Config(steps=0, batch=4, rounds=1, queries=5, rule="top", score="entropy"))
    given = rad.tiny()
    gain = gains(given["student"](given["unlabelled"].image), "entropy")
    assert torch.equal(found.positions, top(gain.detach(), 5))


def test_the_mistakes_are_counted_on_the_held_out_pictures_and_doubled_where_they_cost():
    given = rad.tiny()
    answers = given["teacher"](given["validation"].image).argmax(-1)
    share = (answers != given["validation"].label).double().mean().item()
    for penalised in (False, True):
        run = Run(quiet=True)
        config = Config(steps=0, rounds=1, queries=2, penalised=penalised)
        acquire(**{**given, "config": config}, run=run)
        logged = next(line for line in run.history if "mistakes" in line)
        assert logged["mistakes"] == min(round(share * 22) * (1 + penalised), 21)
    run = Run(quiet=True)
    acquire(**{**given, "validation": None, "config": Config(steps=0, rounds=1, queries=2, mistakes=0.5)}, run=run)
    assert next(line for line in run.history if "mistakes" in line)["mistakes"] == 11


def test_labels_of_the_pool_are_never_read():
    pool = rad.tiny()["unlabelled"]
    plain = asked()
    labelled = asked(unlabelled=pool.with_fields(label=torch.randint(4, (22,))))
    assert same(plain.student, labelled.student) and torch.equal(plain.positions, labelled.positions)


def test_the_student_learns_from_the_answers_soft_or_hard():
    soft, hard = asked(), asked(config=Config(steps=6, batch=4, rounds=2, queries=3, lr=0.01, view=1.0, answer="label"))
    assert not same(soft.student, hard.student) and torch.equal(hard.answers.exp().sum(-1).round(), torch.ones(6))
    given = rad.tiny()
    x = given["unlabelled"].image

    def teacher(x):
        return 20 * given["teacher"](x)

    def distance(student):
        return (student(x).softmax(-1) - teacher(x).softmax(-1)).square().sum().item()

    before = distance(rad.tiny()["student"])
    config = Config(steps=600, batch=22, rounds=1, queries=22, rule="uniform", restart=False, lr=0.02)
    found = asked(teacher=teacher, config=config, labelled=given["labelled"].select([0]))
    assert distance(found.student) < 0.6 * before


def test_mixed_pictures_are_asked_for_and_learned_from():
    seen = []

    def teacher(x):
        seen.append(x.clone())
        return rad.tiny()["teacher"](x)

    found = asked(teacher=teacher, config=Config(steps=2, batch=4, rounds=1, queries=4, rule="unixkd"))
    pool = rad.tiny()["unlabelled"].image
    mixed = seen[-1]
    assert torch.allclose(mixed[0], pool[found.positions[0]]) and not torch.allclose(mixed[3], pool[found.positions[3]])


def test_every_training_can_begin_again_or_go_on():
    config = {"steps": 6, "batch": 4, "rounds": 2, "queries": 3, "lr": 0.01, "rule": "uniform"}
    again, on = (asked(config=Config(**config, restart=restart)) for restart in (True, False))
    assert torch.equal(again.positions, on.positions) and not same(again.student, on.student)


def test_a_choice_that_repeats_itself_is_refused():
    given = rad.tiny()
    box = BlackBox(given["teacher"], classes=4)
    with pytest.raises(ConfigError, match="twice"):
        learn_in_rounds(given["student"], given["labelled"], given["unlabelled"], box,
                        lambda free, asked: Query(torch.tensor([1, 1])), 1, given["config"], Run(quiet=True).begin())


# ---------------------------------------------------------------- data, errors, contract, real models


def test_degraded_pictures():
    data = digits(8, "labelled")
    a, b = degraded(data, 0.45, seed=3), degraded(data, 0.45, seed=3)
    assert torch.equal(a.image, b.image) and int(a.degraded.sum()) == 90
    assert torch.equal(a.image[~a.degraded], data.image[~a.degraded])
    assert ((a.image - data.image).flatten(1).abs().amax(1) > 0).equal(a.degraded)
    hidden = degraded(data, 1.0, noise=0.0, erased=0.5)
    assert (hidden.image <= data.image).all() and ((hidden.image != data.image).flatten(1).sum(1) <= 16).all()
    with pytest.raises(DataError):
        degraded(data, 1.5)


def test_wrong_input_is_named_before_any_step():
    for wrong in ({"rule": "best"}, {"score": "luck"}, {"mistakes": 2.0}, {"answer": "text"}, {"queries": 0}):
        with pytest.raises(ConfigError):
            Config(**wrong)
    with pytest.raises(RoleError, match="validation"):
        asked(validation=None)
    with pytest.raises(DataError, match="rounds"):
        asked(config=Config(steps=6, rounds=3, queries=10))
    with pytest.raises(RoleError, match="teacher"):
        asked(teacher=nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))


def test_the_contract():
    check_system(distill, rad.tiny)


def test_it_asks_any_function_for_labels_and_trains_classifiers_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    from stillhouse.hub.models import resolve_model
    from stillhouse.protocols import Classifier

    torch.manual_seed(0)
    transformers.EfficientNetForImageClassification(transformers.EfficientNetConfig(
        num_channels=1, image_size=16, width_coefficient=0.1, depth_coefficient=0.1, hidden_dim=128, num_labels=4,
        kernel_sizes=[3] * 7, strides=[1, 2, 2, 1, 1, 1, 1])).save_pretrained(tmp_path / "teacher")
    transformers.ResNetForImageClassification(transformers.ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=4,
    )).save_pretrained(tmp_path / "student")
    teacher, student = (resolve_model(f"hf:{tmp_path / name}", Classifier) for name in ("teacher", "student"))
    image, label = torch.randn(30, 1, 16, 16), torch.arange(30) % 4
    given = {"labelled": TensorSet(image=image[:8], label=label[:8]), "unlabelled": TensorSet(image=image[8:24]),
             "validation": TensorSet(image=image[24:], label=label[24:])}
    before, start = copy.deepcopy(teacher), copy.deepcopy(student)
    for rule in ("minimax", "k-center"):
        config = Config(steps=4, batch=4, rounds=1, queries=3, lr=0.01, rule=rule)
        out = distill(teacher, student, **given, config=config, run=Run(quiet=True))
        assert out is student and same(teacher, before) and not same(student, start)
    labels = asked(teacher=lambda x: (x.mean((1, 2, 3)) > 0).long(), student=student, **given,
                   config=Config(steps=4, batch=4, rounds=1, queries=3, answer="label"))
    assert labels.answers.shape == (3, 4) and set(labels.answers.argmax(-1).tolist()) <= {0, 1}
