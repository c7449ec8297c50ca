import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stillhouse.data.sets import TensorSet
from stillhouse.errors import ConfigError, DataError, RoleError
from stillhouse.measures.adversarial import reverse_gradient, two_logit_loss
from stillhouse.measures.divergences import soft_cross_entropy
from stillhouse.parts.discriminators import LogitDiscriminator
from stillhouse.parts.ensembles import mean_log_probs
from stillhouse.recipes.supervised import optimizer_for
from stillhouse.recipes.views import cutmix, neighbours
from stillhouse.run import Run
from stillhouse.systems.compression import meal_v2
from stillhouse.systems.compression.meal_v2 import Config, distill, hard_loss, play, targets
from stillhouse.testing import check_system

PLAIN = Config(steps=4, batch=6, lr=0.1, discriminator_lr=0.1, crop=1.0, flip=False)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def trained(config=PLAIN, run=None, **changes):
    given = {**meal_v2.tiny(), "unlabelled": None, **changes, "config": config}
    return distill(**given, run=run or Run(quiet=True))


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- the soft target


def test_probabilities_are_averaged_and_that_is_not_the_softmax_of_the_mean():
    z = draw(3, 5, 4)
    p = mean_log_probs(z).exp()
    assert torch.allclose(p, z.softmax(-1).mean(0), atol=1e-15) and torch.allclose(p.sum(1), torch.ones(5).double())
    assert (p - z.mean(0).softmax(-1)).abs().max() > 1e-2
    alike = z[:1].expand(3, 5, 4)
    assert torch.allclose(mean_log_probs(alike).exp(), alike.mean(0).softmax(-1), atol=1e-15)


def test_the_gradient_of_the_similarity_loss_is_the_difference_of_probabilities():
    z, z_s = draw(2, 5, 4), draw(5, 4, seed=1).requires_grad_()
    soft_cross_entropy(mean_log_probs(z), z_s).backward()
    assert torch.allclose(z_s.grad, (z_s.detach().softmax(-1) - z.softmax(-1).mean(0)) / 5, atol=1e-15)


def test_identical_teachers_are_one_teacher_whose_probabilities_are_matched():
    teacher = meal_v2.tiny()["teachers"][0]
    config = dataclasses.replace(PLAIN, adversarial=0.0)
    one, three = trained(config, teachers=[teacher]), trained(config, teachers=[teacher] * 3)
    for p, q in zip(one.parameters(), three.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)
    by_hand = meal_v2.tiny()["student"]
    image = meal_v2.tiny()["data"].image
    whole = dataclasses.replace(config, steps=1, batch=len(image))
    loss = -(teacher(image).softmax(1).detach() * F.log_softmax(by_hand(image), 1)).sum(1).mean()
    loss.backward()
    for p, q in zip(trained(whole, teachers=[teacher]).parameters(), by_hand.parameters(), strict=True):
        assert torch.allclose(p, q - 0.1 * q.grad, atol=1e-6)


def test_the_average_can_be_taken_over_logits_instead():
    probabilities, logits = (trained(dataclasses.replace(PLAIN, average=a)) for a in ("probabilities", "logits"))
    assert not same(probabilities, logits)
    x = meal_v2.tiny()["data"].image
    teachers = meal_v2.tiny()["teachers"]
    _, log_p, z = targets(teachers, x, dataclasses.replace(PLAIN, average="logits"), Run(quiet=True))
    assert torch.allclose(log_p, z.log_softmax(1), atol=1e-6)
    assert torch.allclose(z, (teachers[0](x) + teachers[1](x)) / 2, atol=1e-6)


# ---------------------------------------------------------------- the discriminator


def test_its_loss_is_the_mean_binary_cross_entropy_of_both_sides_and_ln_2_with_zero_weights():
    fake, real = draw(5, 2), draw(5, 2, seed=1)
    wanted = torch.tensor([[1.0, 0.0]] * 5 + [[0.0, 1.0]] * 5, dtype=torch.float64)
    expected = F.binary_cross_entropy_with_logits(torch.cat([fake, real]), wanted)
    assert two_logit_loss(fake, real).item() == pytest.approx(expected.item(), abs=1e-15)
    judge = LogitDiscriminator(10)
    for p in judge.parameters():
        nn.init.zeros_(p)
    z = torch.randn(6, 10)
    assert two_logit_loss(judge(z), judge(z + 1)).item() == pytest.approx(math.log(2), abs=1e-6)


def test_the_released_form_cannot_fall_below_half_of_ln_2():
    torch.manual_seed(0)
    judge = LogitDiscriminator(10, last_relu=True)
    assert (judge(100 * torch.randn(50, 10)) >= 0).all()
    perfect = torch.tensor([[50.0, 0.0]]), torch.tensor([[0.0, 50.0]])
    assert two_logit_loss(*perfect).item() == pytest.approx(math.log(2) / 2, abs=1e-6)


def test_its_widths_are_those_of_the_paper_and_never_vanish():
    def widths(classes):
        return [m.out_features for m in LogitDiscriminator(classes).layers if isinstance(m, nn.Linear)]

    assert widths(1000) == [125, 15, 2] and widths(10) == [8, 4, 2]


@pytest.mark.parametrize("coefficient", [0.0, 1.0, 0.3, -1.0])
def test_a_reversed_gradient(coefficient):
    x = draw(4, 3).requires_grad_()
    y = reverse_gradient(x, coefficient)
    assert torch.equal(y, x)
    (y**2).sum().backward()
    assert torch.equal(x.grad, -coefficient * 2 * x.detach())


def test_a_discriminator_that_looks_on_leaves_the_student_as_without_one():
    looking, none = (trained(dataclasses.replace(PLAIN, **c)) for c in ({"reversal": 0.0}, {"adversarial": 0.0}))
    for p, q in zip(looking.parameters(), none.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-7)
    assert not same(trained(), none) and not same(trained(dataclasses.replace(PLAIN, reversal=-1.0)), trained())


def test_the_student_goes_against_the_discriminators_loss_and_the_discriminator_with_it():
    played = {}
    for reversal in (1.0, 0.0, -1.0):
        config = dataclasses.replace(PLAIN, steps=1, batch=14, adversarial=50.0, reversal=reversal)
        given = {**meal_v2.tiny(), "unlabelled": None, "config": config, "run": Run(quiet=True)}
        played[reversal] = *play(**given), given["teachers"], given["data"].image
    against, none, along = (torch.cat([p.flatten() for p in played[r][0].parameters()]) for r in (1.0, 0.0, -1.0))
    assert torch.allclose(against - none, none - along, atol=1e-5) and (against - none).abs().max() > 1e-3
    assert same(played[1.0][1], played[0.0][1]) and same(played[1.0][1], played[-1.0][1])
    start = Run(quiet=True).begin() and LogitDiscriminator(4)
    image, teachers = played[1.0][3], played[1.0][2]
    z = torch.stack([t(image) for t in teachers]).mean(0)

    def loss(judge, student):
        return two_logit_loss(judge(student(image)), judge(z)).item()

    fresh = meal_v2.tiny()["student"]
    assert loss(start, played[1.0][0]) > loss(start, played[0.0][0]) > loss(start, played[-1.0][0])
    assert loss(played[1.0][1], fresh) < loss(start, fresh)


def test_only_the_student_and_the_discriminator_are_trained_and_without_weight_decay(monkeypatch):
    made = []

    def noting(parameters, *rest):
        made.append(optimizer_for(parameters, *rest))
        return made[-1]

    monkeypatch.setattr(meal_v2, "optimizer_for", noting)
    given = meal_v2.tiny()
    teachers = copy.deepcopy(given["teachers"])
    student = trained(teachers=given["teachers"], student=given["student"])
    assert all(same(t, b) for t, b in zip(given["teachers"], teachers, strict=True))
    assert all(group["weight_decay"] == 0.0 for optimizer in made for group in optimizer.param_groups)
    on = [{id(p) for group in optimizer.param_groups for p in group["params"]} for optimizer in made]
    assert len(on) == 2 and on[0] == {id(p) for p in student.parameters()} and not on[0] & on[1]


def test_a_parameter_without_gradient_stays_unless_weight_decay_is_asked_for():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.idle = meal_v2.tiny()["student"], nn.Parameter(torch.ones(3))

        def forward(self, image):
            return self.inner(image) + 0 * self.idle.sum()

    assert torch.equal(trained(student=Idle()).idle, torch.ones(3))
    assert (trained(dataclasses.replace(PLAIN, weight_decay=0.1), student=Idle()).idle < 1).all()


# ---------------------------------------------------------------- labels, first phase, CutMix


def test_labels_are_not_read():
    data = meal_v2.tiny()["data"]
    shuffled = data.with_fields(label=torch.randint(4, (14,), generator=torch.Generator().manual_seed(5)))
    assert same(trained(), trained(data=shuffled)) and same(trained(), trained(data=data.without("label")))
    hard = dataclasses.replace(PLAIN, hard=1.0)
    assert not same(trained(hard), trained()) and not same(trained(hard), trained(hard, data=shuffled))


def test_the_hard_term_counts_pictures_without_a_label_as_zero():
    z, labels = draw(4, 3), torch.tensor([2, 0, 1])
    loss = hard_loss(z, torch.tensor([1, 7, 0, 3]), labels)
    expected = F.cross_entropy(z[[0, 2]], torch.tensor([0, 2]), reduction="sum") / 4
    assert loss.item() == pytest.approx(expected.item(), abs=1e-15)


def test_the_first_phase_is_a_part_of_the_steps():
    run = Run(quiet=True)
    trained(dataclasses.replace(PLAIN, steps=6, initial=1 / 3), run)
    assert [line["stage"] for line in run.history] == ["initial/supervised"] * 2 + ["distil"] * 4
    only = dataclasses.replace(PLAIN, steps=2, initial=1.0, initial_lr=0.3)
    start = meal_v2.tiny()["student"]
    assert not same(trained(only), start) and same(trained(dataclasses.replace(PLAIN, steps=0)), start)


def test_both_learning_rates_fall_to_a_tenth():
    lrs = []

    class Spy(Run):
        def update(self, optimizers, **terms):
            lrs.append([o.param_groups[0]["lr"] for o in optimizers])
            super().update(optimizers, **terms)

    trained(dataclasses.replace(PLAIN, drop=0.5, discriminator_lr=0.01), Spy(quiet=True))
    assert lrs[1] == [0.1, 0.01] and lrs[2] == pytest.approx([0.01, 0.001])


def test_cutmix_takes_a_box_of_the_neighbour_and_says_what_is_left():
    run = Run(quiet=True).begin()
    x = torch.arange(1.0, 9.0)[:, None, None, None].expand(8, 1, 12, 10).clone()
    mixed, own = cutmix(x, run)
    partner = neighbours(x, run)
    assert torch.equal(partner[:-1], x[1:]) and torch.equal(partner[-1], x[0])
    kept = mixed == x
    assert (kept | (mixed == partner)).all() and torch.allclose(kept.float().mean((1, 2, 3)), own)
    for picture in kept[:, 0]:
        where = (~picture).nonzero()
        if len(where):
            (top, left), (bottom, right) = where.amin(0).tolist(), where.amax(0).tolist()
            assert not picture[top : bottom + 1, left : right + 1].any()
    assert 0.2 < own.mean() < 0.95 and torch.equal(cutmix(x, run, probability=0.0)[0], x)


def test_the_box_of_cutmix_has_the_drawn_area_before_it_is_cut():
    from stillhouse.recipes.views import _beta

    u = torch.linspace(0.001, 0.999, 999)
    assert torch.equal(_beta(u, 1.0), u)
    assert _beta(u, 0.2).mean().item() == pytest.approx(0.5, abs=1e-3)
    assert _beta(u, 0.2).var().item() == pytest.approx(1 / (4 * 1.4), abs=2e-3)


def test_soft_targets_are_mixed_by_area_or_by_the_teachers():
    given = meal_v2.tiny()
    x, teachers = given["data"].image, given["teachers"]
    run = Run(quiet=True).begin()
    config = dataclasses.replace(PLAIN, cutmix=1.0)
    seen, log_p, z = targets(teachers, x, config, run)
    _, plain, mean = targets(teachers, x, PLAIN, run)
    _, own = cutmix(x, Run(quiet=True).begin())
    assert torch.allclose(log_p.exp(), own[:, None] * plain.exp() + (1 - own[:, None]) * plain.exp().roll(-1, 0))
    assert torch.allclose(z, own[:, None] * mean + (1 - own[:, None]) * mean.roll(-1, 0), atol=1e-6)
    assert torch.allclose(log_p.exp().sum(1), torch.ones(14))
    run = Run(quiet=True).begin()
    again, by_teachers, _ = targets(teachers, x, dataclasses.replace(config, cutmix_target="seen"), run)
    _, direct, _ = targets(teachers, seen, PLAIN, run)
    assert torch.equal(again, seen) and torch.allclose(by_teachers, direct)


# ---------------------------------------------------------------- errors, contract, real models


def test_wrong_input_is_named_before_any_step():
    for wrong in ({"drop": 2.0}, {"hard": -1.0}, {"cutmix": 2.0}, {"average": "votes"}, {"discriminator_lr": 0.0}):
        with pytest.raises(ConfigError):
            Config(**wrong)
    with pytest.raises(RoleError, match="at least one teacher"):
        trained(teachers=[])
    with pytest.raises(RoleError, match="same number of classes"):
        trained(student=nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    for asks in ({"hard": 1.0}, {"initial": 0.5}):
        with pytest.raises(DataError, match="label"):
            trained(dataclasses.replace(PLAIN, **asks), data=TensorSet(image=torch.rand(8, 1, 8, 8)))


def test_the_contract():
    check_system(distill, meal_v2.tiny)


def test_it_runs_on_image_classifiers_of_transformers_saved_and_loaded(tmp_path):
    transformers = pytest.importorskip("transformers")
    from stillhouse.hub.models import resolve_model
    from stillhouse.protocols import Classifier

    torch.manual_seed(0)
    transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        num_channels=1, num_labels=4)).save_pretrained(tmp_path / "vit")
    for name, kind in (("deep", "bottleneck"), ("small", "basic")):
        transformers.ResNetForImageClassification(transformers.ResNetConfig(
            num_channels=1, embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type=kind, num_labels=4
        )).save_pretrained(tmp_path / name)
    teachers = [resolve_model(f"hf:{tmp_path / name}", Classifier) for name in ("vit", "deep")]
    student = resolve_model(f"hf:{tmp_path / 'small'}", Classifier)
    before, start = copy.deepcopy(teachers), copy.deepcopy(student)
    out = trained(teachers=teachers, student=student, unlabelled=meal_v2.tiny()["unlabelled"])
    assert out is student and not same(student, start) and all(map(same, teachers, before))
    assert student(torch.rand(2, 1, 8, 8)).shape == (2, 4)


def test_it_enters_the_ground_of_the_digits_with_a_fresh_student():
    from stillhouse.models.convnets import TinyConvNet

    torch.manual_seed(0)
    image = torch.rand(20, 1, 16, 16)
    labelled = TensorSet(image=image, label=torch.arange(20) % 10)
    teachers = [nn.Sequential(nn.Flatten(), nn.Linear(256, 10)) for _ in range(2)]
    config = dataclasses.replace(meal_v2.EMBEDDED, steps=6, batch=8)
    run = Run(quiet=True)
    distill(teachers, TinyConvNet(), labelled, TensorSet(image=image), config, run)
    assert len(run.history) == 6
