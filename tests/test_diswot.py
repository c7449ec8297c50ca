"""DisWOT: the two metrics, the other zero-cost scores, evolution, and the search on real networks."""

import dataclasses
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stillhouse.data.digits import digits
from stillhouse.data.sets import fetch
from stillhouse.errors import ConfigError, DataError, RoleError
from stillhouse.evaluate.cost import parameters_of
from stillhouse.evaluate.zero_cost import PROXIES, gradient_norm, nwot, snip, synflow
from stillhouse.hub.models import resolve_model
from stillhouse.measures.zero_cost import channel_correlation, class_distance, relation_distance, semantic_distance
from stillhouse.models.convnets import MLP, SmallResNet, TinyConvNet
from stillhouse.models.stage_net import Stage, StageNet, mutated, named, parsed, sampled
from stillhouse.models.vit import SmallViT
from stillhouse.protocols import Classifier
from stillhouse.recipes.evolution import evolve, rank_best, sum_best
from stillhouse.run import Run
from stillhouse.systems.compression.diswot import Config, distill, evidence, scorer, tiny

torch.manual_seed(0)
G_T, G_S = torch.randn(2, 5, 7, dtype=torch.double)
F_T, F_S = torch.randn(6, 4, 3, 3, dtype=torch.double).relu(), torch.randn(6, 2, 5, 5, dtype=torch.double).relu()
FEW = digits(16, "labelled").select(range(24))
BATCH = fetch(FEW, range(24))


def rows(a):
    return F.normalize(a, dim=1)


# ------------------------------------------------------------------------- the metrics


def test_the_semantic_distance_is_the_one_of_the_rank_one_matrices():
    explicit = sum((rows(t[:, None] @ t[None]) - rows(s[:, None] @ s[None])).square().sum()
                   for t, s in zip(G_T, G_S, strict=True)) / (5 * 7)
    torch.testing.assert_close(semantic_distance(G_T, G_S), explicit, rtol=1e-12, atol=1e-12)
    assert 0 <= semantic_distance(G_T, G_S) <= 4


@pytest.mark.parametrize(("metric", "a", "b"), [(semantic_distance, G_T, G_S), (class_distance, G_T, G_S[:, :3]),
                                                 (relation_distance, F_T, F_S)])
def test_a_copy_is_at_distance_zero_and_scale_does_not_matter(metric, a, b):
    assert metric(a, a).abs() < 1e-12
    for c in (3.0, 1e-12):
        torch.testing.assert_close(metric(a, c * b), metric(a, b), rtol=1e-9, atol=1e-12)


def test_rotations_and_permutations():
    q = torch.linalg.qr(torch.randn(50, 50, dtype=torch.double)).Q
    torch.testing.assert_close(relation_distance(F_T, F_S.flatten(1) @ q), relation_distance(F_T, F_S))
    p = torch.randperm(6)
    torch.testing.assert_close(relation_distance(F_T[p], F_S[p]), relation_distance(F_T, F_S))
    r = torch.linalg.qr(torch.randn(7, 7, dtype=torch.double)).Q
    assert (semantic_distance(G_T, G_S @ r) - semantic_distance(G_T, G_S)).abs() > 1e-3


def test_the_relation_distance_is_bounded():
    assert 0 <= relation_distance(F_T, F_S) <= 2 / 6
    assert relation_distance(torch.randn(6, 9), torch.randn(6, 9)) <= 4 / 6


def test_correlations_of_channels_need_as_many():
    assert channel_correlation(F_T, F_T) == 0 and channel_correlation(F_T, F_T[:, :, :2]) > 0
    with pytest.raises(DataError, match="regressor"):
        channel_correlation(F_T, F_S)
    with pytest.raises(DataError, match="one width"):
        semantic_distance(G_T, G_S[:, :3])


# ------------------------------------------------------------------------- other scores


@pytest.mark.parametrize("proxy", list(PROXIES))
def test_scores_leave_the_network_as_it_was(proxy):
    network = StageNet(width=4).eval()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    value = PROXIES[proxy](network, BATCH["image"], BATCH["label"])
    assert value == value and value == PROXIES[proxy](network, BATCH["image"], BATCH["label"])
    assert all(torch.equal(before[k], v) and v.dtype == before[k].dtype for k, v in network.state_dict().items())
    assert not any(m.training for m in network.modules()) and all(p.grad is None for p in network.parameters())


def test_scores_of_small_networks_by_hand():
    linear = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False))
    x, y = torch.randn(5, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1])
    weight = linear[1].weight
    g = ((x.flatten(1) @ weight.T).softmax(1) - F.one_hot(y, 3)).T @ x.flatten(1) / 5
    assert gradient_norm(linear, x, y) == pytest.approx(g.norm().item(), rel=1e-5)
    assert snip(linear, x, y) == pytest.approx((g * weight).abs().sum().item(), rel=1e-5)
    assert synflow(linear, x) == pytest.approx(weight.abs().sum().log().item(), rel=1e-6)
    relu = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU())
    codes = (relu(x) > 0).double()
    kernel = codes @ codes.T + (1 - codes) @ (1 - codes).T
    assert nwot(relu, x) == pytest.approx(torch.linalg.slogdet(kernel)[1].item())
    with pytest.raises(RoleError, match="has none"):
        nwot(linear, x)


# ------------------------------------------------------------------------- the space and the search


def test_architectures_have_names():
    text = "conv3x1/depthwise3x2/pool1x3"
    assert named(parsed(text)) == text and parsed(text)[1] == Stage("depthwise", 3, 2)
    assert StageNet(text).stages == text and StageNet(text, width=4)(BATCH["image"]).shape == (24, 10)
    for wrong in ("conv3", "dense3x1", "", "conv3xx1"):
        with pytest.raises(ConfigError, match="is no stage"):
            parsed(wrong)
    network = resolve_model(f"stage-net:stages={text},width=4")
    assert network.stages == text and network.feature_dim == 16


def test_a_mutation_changes_one_thing_of_one_stage():
    draw, config = random.Random(0), Config()
    for _ in range(50):
        a = sampled(draw, config.space)
        b = mutated(a, draw, config.space)
        changed = [(x, y) for s, t in zip(a, b, strict=True) for x, y in zip(s, t, strict=True) if x != y]
        assert len(changed) == 1


def test_evolution_finds_the_top_of_a_hill_within_the_budget_and_ages():
    history = evolve(lambda d: d.randrange(1000), lambda c, d: c + d.choice((-7, -1, 1, 7)),
                     lambda c: (-abs(c - 500.0),), cycles=400, population=20, tournament=5, seed=1,
                     allowed=lambda c: 0 <= c <= 480)
    assert len(history) == 400 and max(c for c, _ in history) == 480
    again = evolve(lambda d: d.randrange(1000), lambda c, d: c + d.choice((-7, -1, 1, 7)),
                   lambda c: (-abs(c - 500.0),), cycles=400, population=20, tournament=5, seed=1,
                   allowed=lambda c: 0 <= c <= 480)
    assert history == again
    with pytest.raises(ConfigError, match="no candidate within the budget"):
        evolve(lambda d: 1, lambda c, d: c, lambda c: (0.0,), cycles=4, population=2, tournament=1,
               allowed=lambda c: False)
    with pytest.raises(ConfigError, match="tournament <= population"):
        evolve(lambda d: 1, lambda c, d: c, lambda c: (0.0,), cycles=4, population=2, tournament=3)


def test_the_sum_is_decided_by_the_larger_part_and_the_ranks_by_both():
    scores = [(-1.0, -0.03), (-1.05, -0.001), (-1.2, -0.002)]
    assert sum_best(scores) == 0 and rank_best(scores) == 1


def test_the_same_architecture_and_weights_score_highest_and_nothing_changes():
    teacher = StageNet("conv3x1/conv3x1/conv3x1", width=4)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    config = Config(draws=2)
    score = scorer(teacher, BATCH, config, seed=0)
    twin = score(lambda: StageNet("conv3x1/conv3x1/conv3x1", width=4))
    other = score(lambda: StageNet("pool3x1/pool3x1/pool3x1", width=4))
    assert sum(twin) > sum(other) and len(twin) == 2
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    g, f = evidence(teacher, BATCH, config)
    assert semantic_distance(g, g).abs() < 1e-6 and relation_distance(f, f) < 1e-6


@pytest.mark.parametrize(("combine", "parts"), [("semantic", 1), ("relation", 1), ("sum", 2), ("rank", 2)])
def test_either_metric_alone(combine, parts):
    score = scorer(SmallResNet(width=2), BATCH, Config(combine=combine), 0)
    assert len(score(lambda: TinyConvNet(width=2))) == parts


def test_the_winner_fits_the_budget_is_distilled_and_remembers_what_it_is(tmp_path):
    teacher = SmallResNet(width=4)
    config = dataclasses.replace(Config(), steps=2, batch=8, cycles=6, population=3, tournament=2, width=2, budget=0.5)
    with Run(tmp_path / "run", quiet=True) as run:
        student = distill(teacher, FEW, config=config, run=run)
    assert isinstance(student, StageNet) and parameters_of(lambda: StageNet(student.stages, width=2)) <= 0.5 * sum(
        p.numel() for p in teacher.parameters())
    assert list((tmp_path / "run").rglob("search.png"))


def test_candidates_of_the_user_s_own_also_of_another_family():
    made = []

    def factory(make):
        def build():
            made.append(make())
            return made[-1]
        return build

    candidates = [factory(lambda: TinyConvNet(width=2)), factory(lambda: SmallViT(width=8, depth=1))]
    for combine in ("rank", "semantic"):
        config = Config(steps=1, batch=8, combine=combine)
        assert distill(SmallResNet(width=2), FEW, candidates, config) in made
    with pytest.raises(RoleError, match="no stage was found"):
        distill(SmallResNet(width=2), FEW, [lambda: MLP(256)], Config(steps=1, batch=8))


def test_models_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1],
                                       layer_type="basic", num_labels=10)
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path / "net")
    teacher = resolve_model(f"hf:{tmp_path / 'net'}", Classifier)
    student = distill(teacher, FEW, config=Config(steps=1, batch=8, cycles=3, population=2, tournament=1, width=4,
                                                  budget=5.0))
    assert student(BATCH["image"]).shape == (24, 10)


def test_the_contract_s_inputs_search():
    assert tiny()["config"].kind == "sp+ickd"
