"""Matching training trajectories, and the recipes it stands on."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stillhouse.data import TensorSet, digits
from stillhouse.data.coresets import random_per_class
from stillhouse.data.distilled import DistilledSet
from stillhouse.errors import ConfigError, DataError, RoleError, StillError
from stillhouse.measures.matching import gradient_distance, trajectory_distance
from stillhouse.models.convnets import ConvNet
from stillhouse.parts.unroll import FlatNetwork, sgd_step, unroll
from stillhouse.recipes.dataset_evaluation import evaluate_across, evaluate_dataset, train_on
from stillhouse.recipes.gradient_matching import GradientMatching, match_gradients
from stillhouse.recipes.trajectories import Trajectories, record_trajectories
from stillhouse.run import Run
from stillhouse.systems.datasets.mtt import EMBEDDED, Config, distill, draw_segments, segment_loss, tiny
from stillhouse.testing import check_system

PLAIN = replace(EMBEDDED, dsa="", student_steps=3)


def small_network() -> nn.Module:
    return ConvNet(1, 3, 4, depth=1, image_size=4)


def small_data(n: int = 24, dtype=torch.float32) -> TensorSet:
    g = torch.Generator().manual_seed(5)
    label = torch.arange(n) % 3
    image = torch.randn(n, 1, 4, 4, generator=g) + label[:, None, None, None]
    return TensorSet(image=image.to(dtype), label=label)


@pytest.fixture
def segment():
    """A student and the pieces of one segment in float64."""
    torch.manual_seed(0)
    student = FlatNetwork(small_network().double())
    start = student.flatten()
    target = start + 0.1 * torch.randn_like(start)
    images = torch.randn(6, 1, 4, 4, dtype=torch.double, requires_grad=True)
    alpha = torch.tensor(0.1, dtype=torch.double, requires_grad=True)
    return student, start, target, images, torch.arange(6) % 3, alpha


# ---------------------------------------------------------------- exact checks of the method


def test_no_student_steps_give_loss_one_exactly(segment):
    student, start, target, images, labels, alpha = segment
    for reach in (target, target * 7 - 3):
        assert segment_loss(student, start, reach, images, labels, alpha, replace(PLAIN, student_steps=0)) == 1.0


def test_the_real_set_itself_is_a_minimum():
    torch.manual_seed(1)
    real = small_data(24, torch.double)
    experts = record_trajectories(lambda: small_network().double(), real, count=1, epochs=4, lr=0.1, batch=24,
                                  run=Run(quiet=True))
    student = FlatNetwork(small_network().double())
    start, target = experts.experts[0][1], experts.experts[0][4]
    images = real.image.clone().requires_grad_()
    alpha = torch.tensor(0.1, dtype=torch.double, requires_grad=True)
    loss = segment_loss(student, start, target, images, real.label, alpha, PLAIN)
    towards = torch.autograd.grad(loss, [images, alpha])
    assert loss < 1e-24 and max(g.abs().max() for g in towards) < 1e-11
    off = segment_loss(student, start, target, images + 0.1 * torch.randn_like(images), real.label, alpha, PLAIN)
    away = torch.autograd.grad(off, [images, alpha])
    assert off > 1e-6 and min(g.abs().max() for g in away) > 1e-5


def test_the_scalar_model_by_hand():
    alpha = torch.tensor(0.5, dtype=torch.double, requires_grad=True)
    theta = torch.zeros(1, dtype=torch.double)
    (reached,) = unroll(sgd_step(lambda th, n, inputs: th.sum()), (theta,), 1, (alpha,))
    loss = trajectory_distance(reached, theta, torch.full_like(theta, -2.0))
    assert loss == 0.5625
    assert torch.autograd.grad(loss, alpha)[0] == -0.75


def test_the_distance_ignores_scale_and_shift():
    a, b, c = torch.randn(3, 50, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    moved = torch.randn(50, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(trajectory_distance(3 * a, 3 * b, 3 * c), trajectory_distance(a, b, c))
    torch.testing.assert_close(trajectory_distance(a + moved, b + moved, c + moved), trajectory_distance(a, b, c))
    assert not torch.allclose(trajectory_distance(3 * a, 3 * b, 3 * c, False), trajectory_distance(a, b, c, False))


@pytest.mark.parametrize("flat_memory", [False, True])
@pytest.mark.parametrize("distance", ["normalised", "squared"])
def test_gradients_agree_with_central_differences(segment, distance, flat_memory):
    student, start, target, images, labels, alpha = segment
    config = replace(PLAIN, distance=distance, flat_memory=flat_memory)
    towards = torch.autograd.grad(segment_loss(student, start, target, images, labels, alpha, config), [images, alpha])
    direction, eps = torch.randn_like(images), 1e-6

    def at(x, a):
        return segment_loss(student, start, target, x, labels, a, config).item()

    by_images = (at(images + eps * direction, alpha) - at(images - eps * direction, alpha)) / (2 * eps)
    by_alpha = (at(images, alpha + eps) - at(images, alpha - eps)) / (2 * eps)
    assert (towards[0] * direction).sum().item() == pytest.approx(by_images, rel=1e-6)
    assert towards[1].item() == pytest.approx(by_alpha, rel=1e-6)


@pytest.mark.parametrize("texture", [1, 2])
def test_augmentation_windows_and_batches_are_replayed_in_flat_memory(segment, texture):
    student, start, target, _, labels, alpha = segment
    images = torch.randn(6, 1, 4 * texture, 4 * texture, dtype=torch.double, requires_grad=True)
    tile = (4, 4) if texture > 1 else None
    found = []
    for memory in (False, True):
        config = replace(EMBEDDED, student_steps=5, batch_syn=4, flat_memory=memory, texture=texture)
        loss = segment_loss(student, start, target, images, labels, alpha, config,
                            torch.Generator().manual_seed(3), tile)
        found.append([loss, *torch.autograd.grad(loss, [images, alpha])])
    torch.testing.assert_close(found[0], found[1], rtol=1e-11, atol=1e-13)
    assert found[0][1].abs().sum() > 0


# ---------------------------------------------------------------- the system


def test_contract():
    check_system(distill)


@pytest.mark.parametrize("options", [{"texture": 2, "init": "noise"}, {"zca": False, "flat_memory": True}])
def test_options_keep_the_contract(options):
    def inputs():
        given = tiny()
        given["config"] = replace(given["config"], **options, steps=2)
        return given

    check_system(distill, inputs)


def test_segments_start_below_the_limit_and_at_every_expert():
    experts = Trajectories([torch.arange(6.0)[:, None] + 100 * i for i in range(3)])
    config = replace(EMBEDDED, max_start=4, expert_epochs=2)
    starts = set()
    with Run(quiet=True, seed=100) as run:
        for _ in run.loop("draw", steps=200):
            for start, target, _ in draw_segments(run, experts, config):
                assert target - start == 2
                starts.add(int(start))
    assert starts == {100 * i + t for i in range(3) for t in range(4)}


class Block(nn.Module):
    """A residual block as torchvision writes it, with group norm."""

    def __init__(self, inplanes: int, planes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, padding=1, bias=False)
        self.bn1 = nn.GroupNorm(2, planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.GroupNorm(2, planes)
        self.downsample = nn.Conv2d(inplanes, planes, 1, bias=False)

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + self.downsample(x))


def residual() -> nn.Module:
    return nn.Sequential(Block(1, 8), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8 * 16, 10))


def test_distils_for_any_module():
    data = digits(8, "labelled")
    config = replace(EMBEDDED, steps=30, experts_per_step=1, student_steps=5, max_start=2, expert_epochs=1, experts=2,
                     epochs=3, lr_img=2.0, dsa="")
    run = Run(quiet=True, seed=100)
    distilled = distill(residual, data, config=config, run=run)
    losses = [line["match"] for line in run.history if "match" in line]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert distilled.images.shape == (10, 1, 8, 8) and distilled.labels.tolist() == list(range(10))
    assert distilled.lr != config.alpha


def test_alpha_stays_fixed_where_its_rate_is_zero():
    given = tiny()
    given["config"] = replace(given["config"], lr_alpha=0.0)
    assert distill(**given).lr == pytest.approx(given["config"].alpha)


def test_the_best_evaluation_is_kept():
    given = tiny()
    given["config"] = replace(given["config"], steps=6, evaluate_every=1, lr_img=5000.0)
    run = Run(quiet=True, seed=100)
    distilled = distill(**given, run=run)
    accuracies = [line["accuracy"] for line in run.history if "accuracy" in line]
    assert len(accuracies) == 6
    for steps in range(1, 7):
        given["config"] = replace(given["config"], steps=steps, evaluate_every=99)
        if accuracies[steps - 1] == max(accuracies):
            last = distill(**{**given, "validation": None}, run=Run(quiet=True, seed=100))
            torch.testing.assert_close(last.images, distilled.images)
            assert last.lr == pytest.approx(distilled.lr)
            break


def test_the_whitening_travels_with_the_set():
    given = tiny()
    distilled = distill(**given)
    assert distilled.whitening is not None
    white = distilled.prepare(given["labelled"].image)
    assert white.mean().abs() < 1e-5 and not torch.allclose(white, given["labelled"].image)
    given["config"] = replace(given["config"], zca=False)
    assert distill(**given).whitening is None


def test_wrong_input_is_named():
    given = tiny()
    other = Trajectories([torch.zeros(4, 7)])
    with pytest.raises(RoleError, match="7 parameters"):
        distill(**given, teachers=other)
    size = FlatNetwork(given["network"]()).size
    with pytest.raises(ConfigError, match="trajectories at 1"):
        distill(**given, teachers=Trajectories([torch.zeros(2, size)]))
    with pytest.raises(DataError, match="ipc = 9"):
        distill(**{**given, "config": replace(given["config"], ipc=9)})
    with pytest.raises(StillError, match="label"):
        distill(**{**given, "labelled": given["labelled"].without("label")})
    with pytest.raises(ConfigError, match="segments end"):
        replace(EMBEDDED, max_start=99)
    with pytest.raises(ConfigError, match="dsa joins"):
        Config(dsa="colour")


# ---------------------------------------------------------------- recipes


def test_experts_start_at_their_initial_weights_and_learn():
    data = digits(8, "labelled")
    run = Run(quiet=True, seed=100)
    experts = record_trajectories(lambda: ConvNet(1, 10, 8, 2, 8), data, count=2, epochs=6, lr=0.1, batch=50,
                                  run=run)
    assert len(experts) == 2 and experts.epochs == 6
    assert not torch.equal(experts.experts[0][0], experts.experts[1][0])
    model = ConvNet(1, 10, 8, 2, 8)
    flat = FlatNetwork(model)
    losses = [F.cross_entropy(flat(w, data.image), data.label).item() for w in experts.experts[0]]
    assert losses[0] > 2.2 and losses[-1] < losses[0] - 0.5
    assert all(b < a for a, b in itertools.pairwise(losses))


def test_recorded_trajectories_resume_exactly():
    def inputs():
        return {"network": small_network, "labelled": small_data(), "count": 2, "epochs": 2, "batch": 12,
                "strategy": "crop_cutout"}

    check_system(record_trajectories, inputs)


def test_trajectories_survive_saving(tmp_path):
    experts = Trajectories([torch.randn(3, 5), torch.randn(3, 5)])
    again = Trajectories.load(experts.save(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(again.experts, experts.experts, strict=True))
    with pytest.raises(DataError, match="no expert trajectories"):
        Trajectories.load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="one shape"):
        Trajectories([torch.zeros(3, 5), torch.zeros(2, 5)])


def test_gradient_distance_is_zero_on_equal_and_counts_units_on_opposite_gradients():
    gradients = [torch.randn(4, 3, 3, 3), torch.randn(4), torch.randn(2, 5)]
    opposite = [-g for g in gradients]
    for form in ("cosine", "squared"):
        assert gradient_distance(gradients, gradients, form) == pytest.approx(0.0, abs=1e-5)
    assert gradient_distance(gradients, opposite) == pytest.approx(2 * (4 + 2), abs=1e-4)
    torch.testing.assert_close(gradient_distance([3 * g for g in gradients], opposite),
                               gradient_distance(gradients, opposite))
    expected = sum(4 * g.square().sum() for g in gradients)
    torch.testing.assert_close(gradient_distance(gradients, opposite, "squared"), expected)


def test_gradient_matching_contract():
    def inputs():
        config = GradientMatching(steps=5, restart=2, batch_real=4, dsa="crop_cutout", lr_img=1.0)
        return {"network": small_network, "labelled": small_data(), "config": config}

    check_system(match_gradients, inputs)


def test_gradient_matching_brings_gradients_together():
    config = GradientMatching(steps=40, batch_real=16, dsa="", lr_img=0.5)
    run = Run(quiet=True, seed=100)
    match_gradients(small_network, small_data(48), config, run)
    losses = [line["match"] for line in run.history]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_evaluation_is_a_function_of_the_seed_and_trains_on_soft_labels():
    test, train = small_data(60), small_data(12)
    soft = DistilledSet(train.image, F.one_hot(train.label, 3).float(), lr=0.05)
    scores = []
    for data in (train, soft, soft):
        torch.manual_seed(3)
        scores.append(evaluate_dataset(data, small_network, test, networks=2, steps=40, lr=0.05))
    assert scores[0] == scores[1] == scores[2]
    assert scores[0]["accuracy"] > 0.6 and len(scores[0]["each"]) == 2


def test_more_data_gets_the_same_number_of_steps():
    calls = []
    for n in (3, 12, 24):
        def counted(x, n=n):
            calls.append((n, len(x)))
            return x

        train_on(small_data(n), small_network(), steps=7, lr=0.01, batch=8, augment=counted)
    assert [sum(c[0] == n for c in calls) for n in (3, 12, 24)] == [7, 7, 7]
    assert {c for c in calls if c[0] == 12} == {(12, 8), (12, 4)}


def test_evaluation_across_architectures_and_without_a_rate():
    small, test = small_data(6), small_data(30)
    networks = {"narrow": small_network, "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3))}
    scores = evaluate_across(small, networks, test, steps=5, lr=0.05)
    assert set(scores) == {"narrow", "linear"} and all(0 <= s["accuracy"] <= 1 for s in scores.values())
    with pytest.raises(ConfigError, match="no learning rate"):
        evaluate_dataset(small, small_network, test)


def test_random_pictures_of_every_class():
    label = digits(8, "train").label
    torch.manual_seed(0)
    assert label[random_per_class(label, 1)].tolist() == list(range(10))
