import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stillhouse.data.sets import TensorSet
from stillhouse.data.shapes import shapes
from stillhouse.errors import ConfigError, DataError, RoleError
from stillhouse.measures.contrastive import nt_xent
from stillhouse.measures.divergences import kl, soft_cross_entropy
from stillhouse.parts.heads import Cut, Projected, classifier_from_head, first_layers, normed_projector, projector
from stillhouse.parts.lars import LARS
from stillhouse.recipes import kd, simclr, supervised
from stillhouse.recipes.supervised import optimizer_for
from stillhouse.recipes.views import colour_view, crop_view
from stillhouse.run import Run
from stillhouse.systems.representation import simclrv2
from stillhouse.systems.representation.simclrv2 import Config, distill, fine_tuned, strong_view, weak_view
from stillhouse.testing import check_system

F64 = torch.float64


def logits(n=5, classes=4, seed=0):
    return torch.randn(n, classes, dtype=F64, generator=torch.Generator().manual_seed(seed))


def trained(**changes):
    given = {**simclrv2.tiny(), **changes}
    return distill(**given, run=Run(quiet=True))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def stages(**changes):
    """Lengths of the stages that ran, by name."""
    run, given = Run(quiet=True), simclrv2.tiny()
    given["config"] = dataclasses.replace(given["config"], **changes)
    distill(**given, run=run)
    lengths = {}
    for line in run.history:
        lengths[line["stage"]] = lengths.get(line["stage"], 0) + 1
    return lengths


# ---------------------------------------------------------------- NT-Xent


def test_nt_xent_of_one_pair_is_zero_and_of_orthonormal_pairs_is_known():
    assert nt_xent(logits(1), logits(1, seed=1)).item() == 0
    n, tau = 3, 0.1
    z = torch.eye(8, dtype=F64)[:n]
    known = -math.log(math.exp(1 / tau) / (math.exp(1 / tau) + 2 * n - 2))
    assert nt_xent(z, z, tau).item() == pytest.approx(known, rel=1e-9)


def test_nt_xent_ignores_scale_and_leaves_out_the_similarity_with_itself():
    a, b = logits(), logits(seed=1)
    assert torch.allclose(nt_xent(7.0 * a, b / 3), nt_xent(a, b), atol=1e-14)
    equal = torch.ones(4, 6, dtype=F64)
    assert nt_xent(equal, equal, 0.3).item() == pytest.approx(math.log(2 * 4 - 1), abs=1e-14)


def test_a_queue_adds_its_keys_to_the_denominator_of_every_anchor():
    z, queue, tau = torch.eye(6, dtype=F64)[:2], torch.eye(6, dtype=F64)[2:5], 0.5
    known = -math.log(math.exp(1 / tau) / (math.exp(1 / tau) + 2 + 3))
    assert nt_xent(z, z, tau, queue=5 * queue).item() == pytest.approx(known, abs=1e-14)
    a, b = logits(), logits(seed=1)
    assert torch.equal(nt_xent(a, b, queue=a[:0]), nt_xent(a, b))


# ---------------------------------------------------------------- distillation loss


def test_with_a_sure_teacher_the_distillation_is_the_cross_entropy_at_the_temperature():
    z, label = logits(), torch.tensor([0, 3, 1, 2, 2])
    sure = torch.full_like(z, -torch.inf).scatter(1, label[:, None], 0.0)
    assert torch.allclose(soft_cross_entropy(sure, z), F.cross_entropy(z, label), atol=1e-14)
    assert torch.allclose(kl(sure, z), F.cross_entropy(z, label), atol=1e-14)
    for tau in (0.1, 2.0):
        assert torch.allclose(kl(sure, z, tau), tau**2 * F.cross_entropy(z / tau, label), atol=1e-12)


@pytest.mark.parametrize("tau", [0.1, 1.0, 2.0])
def test_the_gradient_is_tau_times_the_gap_of_the_probabilities(tau):
    teacher, student = logits().requires_grad_(), logits(seed=1).requires_grad_()
    known = tau * ((student / tau).softmax(1) - (teacher / tau).softmax(1)).detach() / len(student)
    for loss in (kl, soft_cross_entropy):
        (gradient,) = torch.autograd.grad(loss(teacher.detach(), student, tau), student)
        assert torch.allclose(gradient, known, atol=1e-13)
    assert teacher.grad is None


def by_hand(alpha, labelled, unlabelled):
    torch.manual_seed(0)
    teacher, student = (nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double() for _ in range(2))
    config = kd.Config(steps=1, batch=6, optimizer="sgd", lr=1.0, warmup=0.0, weight_decay=0.0, temperature=1.0,
                       alpha=alpha)
    before = copy.deepcopy(student)
    kd.distill(teacher, student, labelled, config, Run(quiet=True), unlabelled=unlabelled)
    assert all(p.grad is None for p in teacher.parameters())
    return teacher, before, [b.detach() - a.detach() for b, a in zip(before.parameters(), student.parameters(),
                                                                     strict=True)]


def few_and_many():
    g = torch.Generator().manual_seed(1)
    few = TensorSet(image=torch.randn(6, 1, 2, 2, dtype=F64, generator=g), label=torch.arange(6) % 3)
    return few, TensorSet(image=torch.randn(6, 1, 2, 2, dtype=F64, generator=g))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_labels_weigh_one_minus_alpha_and_the_teacher_alpha(alpha):
    few, many = few_and_many()
    teacher, student, step = by_hand(alpha, few, many)
    loss = (1 - alpha) * F.cross_entropy(student(few.image), few.label)
    loss = loss + alpha * soft_cross_entropy(teacher(many.image).detach(), student(many.image))
    for known, got in zip(torch.autograd.grad(loss, list(student.parameters())), step, strict=True):
        assert torch.allclose(got, known, atol=1e-14)


def test_at_alpha_0_the_unlabelled_pictures_and_at_alpha_1_the_labels_have_exactly_no_part():
    few, many = few_and_many()
    others = few_and_many()[1].with_fields(image=torch.full((6, 1, 2, 2), 9.0, dtype=F64))
    wrong = few.with_fields(label=(few.label + 1) % 3)
    for alpha, a, b in ((0.0, (few, many), (few, others)), (1.0, (few, many), (wrong, many)),
                        (1.0, (few, many), (None, many))):
        one, two = by_hand(alpha, *a)[2], by_hand(alpha, *b)[2]
        assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


def test_without_labels_the_teacher_alone_needs_pictures():
    with pytest.raises(DataError):
        by_hand(0.5, None, few_and_many()[1])


# ---------------------------------------------------------------- head and cut


def test_the_head_has_three_layers_without_bias_and_no_shift_at_the_end():
    head = normed_projector(6, 4)
    assert [type(m).__name__ for m in head] == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    assert all(m.bias is None for m in head if isinstance(m, nn.Linear))
    assert [m.weight.shape[0] for m in head if isinstance(m, nn.Linear)] == [6, 6, 4]
    assert head[1].bias is not None and head[-1].bias is None and head[-1].weight.shape == (4,)
    z = head(torch.randn(50, 6))
    assert torch.allclose(z.mean(0), torch.zeros(4), atol=1e-6)
    again = normed_projector(6, 4)
    again.load_state_dict(head.state_dict())
    assert torch.equal(again.eval()(torch.ones(1, 6)), head.eval()(torch.ones(1, 6)))


def model(seed=0):
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    net = Projected(encoder, normed_projector(6, 4))
    for _ in range(3):
        net(torch.randn(16, 3, 8, 8))
    return net


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_the_classifier_keeps_the_first_layer_bit_for_bit_and_nothing_more():
    net, x = model().eval(), torch.randn(5, 3, 8, 8)
    cut = classifier_from_head(net, classes=3, features=6, layer=1).eval()
    linear, norm = net.projector[0], net.projector[1]
    assert torch.equal(cut.features(x), F.relu(norm(F.linear(net.encode(x), linear.weight))))
    assert count(cut) == count(net.encoder) + count(linear) + count(norm) + 6 * 3 + 3
    assert torch.equal(cut(x), torch.zeros(5, 3))


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_every_layer_can_be_the_last_that_is_kept(layer):
    net, x = model().eval(), torch.randn(5, 3, 8, 8)
    kept = {0: 0, 1: 3, 2: 6, 3: 8}[layer]
    cut = classifier_from_head(net, 3, 6, layer).eval()
    assert torch.equal(cut.features(x), net.projector[:kept](net.encode(x)))
    assert cut.linear.in_features == (4 if layer == 3 else 6)


def test_the_cut_is_a_copy_and_takes_nested_and_plain_heads():
    net = model()
    before = copy.deepcopy(net)
    cut = classifier_from_head(net, 3, 6)
    nn.init.ones_(cut.kept[0].weight)
    assert same(net, before)
    assert len(first_layers(projector(6, 5, 4), 1)) == 2
    assert len(first_layers(nn.Sequential(nn.Sequential(nn.Linear(6, 5), nn.ReLU()), nn.Linear(5, 4)), 1)) == 2
    with pytest.raises(RoleError, match="3 linear layers"):
        classifier_from_head(net, 3, 6, layer=4)


# ---------------------------------------------------------------- LARS


def test_lars_follows_its_equations_and_leaves_vectors_unscaled():
    w = nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=F64))
    b = nn.Parameter(torch.tensor([3.0, 4.0], dtype=F64))
    head = nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=F64))
    optimizer = LARS([{"params": [w, b]}, {"params": [head], "adapt": False}], lr=2.0, momentum=0.9, weight_decay=0.1)
    v, gradient = torch.zeros(1, 2, dtype=F64), torch.tensor([[1.0, 0.0]], dtype=F64)
    plain, known = torch.zeros(1, 2, dtype=F64), w.detach().clone()
    flat = known.clone()
    for _ in range(3):
        for p in (w, b, head):
            p.grad = gradient.clone().view_as(p)
        optimizer.step()
        g = gradient + 0.1 * known
        v = 0.9 * v + 2.0 * 1e-3 * known.norm() / g.norm() * g
        known = known - v
        plain = 0.9 * plain + 2.0 * gradient
        flat = flat - plain
    assert torch.allclose(w, known, atol=1e-14)
    assert torch.allclose(b, flat[0], atol=1e-14) and torch.allclose(head, flat, atol=1e-14)


def test_a_layer_at_zero_or_without_slope_takes_the_plain_step():
    w, still = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([w, still], lr=0.5)
    w.grad, still.grad = torch.ones(2, 2), torch.zeros(2, 2)
    optimizer.step()
    assert torch.equal(w, torch.full((2, 2), -0.5)) and torch.equal(still, torch.ones(2, 2))


def test_lars_is_one_of_the_optimizers_and_its_state_goes_on():
    torch.manual_seed(0)
    one, x = nn.Linear(3, 2), torch.randn(4, 3)
    first = optimizer_for(one.parameters(), "lars", 0.1, 1e-4)
    assert isinstance(first, LARS)

    def step(net, optimizer):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()

    step(one, first)
    two = copy.deepcopy(one)
    second = LARS(two.parameters(), lr=0.1, weight_decay=1e-4)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    step(one, first)
    step(two, second)
    assert same(one, two)
    with pytest.raises(ConfigError, match="lars"):
        optimizer_for(one.parameters(), "adam", 0.1, 0.0)
    with pytest.raises(ConfigError, match="weight_decay"):
        LARS(one.parameters(), lr=0.1, weight_decay=-1.0)


# ---------------------------------------------------------------- views


def coloured(n=64):
    return shapes(n, size=16, background="texture").image


def test_views_that_change_nothing():
    x, run = coloured(), Run(quiet=True)
    assert torch.allclose(crop_view(x, run, (1.0, 1.0), ratio=1.0, flip=False), x, atol=1e-5)
    assert torch.allclose(colour_view(x, run, strength=0.0, grey=0.0, blur=0.0), x, atol=1e-5)
    assert torch.allclose(colour_view(x, run, jitter=0.0, grey=0.0, blur=0.0), x, atol=1e-5)
    mirrored = crop_view(x, run, (1.0, 1.0), ratio=1.0)
    same_as = [(torch.allclose(m, p, atol=1e-4), torch.allclose(m, p.flip(-1), atol=1e-4))
               for m, p in zip(mirrored, x, strict=True)]
    assert all(a or b for a, b in same_as) and 10 < sum(b and not a for a, b in same_as) < 54


def test_grey_views_have_no_colour_and_jitter_changes_it():
    x, run = coloured(), Run(quiet=True)
    grey = colour_view(x, run, grey=1.0, blur=0.0)
    assert torch.allclose(grey[:, 0], grey[:, 1], atol=1e-5) and torch.allclose(grey[:, 0], grey[:, 2], atol=1e-5)
    view = colour_view(x, run, grey=0.0, blur=0.0)
    unchanged = (view - x).abs().amax((1, 2, 3)) < 1e-5
    assert 2 <= unchanged.sum() <= 30
    assert view.min() >= -1 and view.max() <= 1 + 1e-6
    assert not torch.equal(view, colour_view(x, Run(quiet=True, seed=1), grey=0.0, blur=0.0))


def test_blur_keeps_plain_pictures_and_smooths_others():
    run, plain = Run(quiet=True), torch.full((8, 3, 20, 20), 0.3)
    assert torch.allclose(colour_view(plain, run, strength=0.0, grey=0.0, blur=1.0), plain, atol=1e-5)
    noise = torch.rand(64, 1, 20, 20) * 2 - 1
    blurred = colour_view(noise, run, strength=0.0, blur=0.5)
    rough, smooth = (v.diff(dim=-1).abs().mean((1, 2, 3)) for v in (noise, blurred))
    assert 15 < (smooth < 0.9 * rough).sum() < 50 and (smooth <= rough + 1e-5).all()


def test_views_name_what_they_cannot_take():
    run = Run(quiet=True)
    with pytest.raises(DataError, match="1 or 3 channels"):
        colour_view(torch.zeros(2, 4, 8, 8), run)
    with pytest.raises(ConfigError, match="area"):
        crop_view(torch.zeros(2, 3, 8, 8), run, (0.5, 1.5))


# ---------------------------------------------------------------- the momentum queue


def test_the_queue_is_written_by_the_average_and_starts_with_the_second_step(monkeypatch):
    seen = []
    real = simclr.nt_xent

    def spy(a, b, temperature, queue=None):
        seen.append(queue)
        return real(a, b, temperature, queue=queue)

    monkeypatch.setattr(simclr, "nt_xent", spy)
    net, data = model().train(), TensorSet(image=torch.randn(16, 3, 8, 8))
    frozen_copy = copy.deepcopy(net)
    config = simclr.Config(steps=3, batch=4, lr=0.5, warmup=0.0, queue=6, decay=1.0)
    simclr.train(net, data, lambda x: x, config, Run(quiet=True))
    assert [len(q) for q in seen] == [0, 4, 6]
    assert not same(net, frozen_copy)
    pool = torch.cat([frozen_copy.encode(data.image)])
    assert seen[2].shape == (6, 4) and pool.shape == (16, 6)
    seen.clear()
    simclr.train(net, data, lambda x: x, simclr.Config(steps=1, batch=4), Run(quiet=True))
    assert seen == [None]


# ---------------------------------------------------------------- the stages


def test_the_stages_come_in_order_with_their_lengths():
    assert stages() == {"simclr": 3, "fine-tune": 2, "self-distillation/kd": 2, "kd": 3}
    assert list(stages()) == ["simclr", "fine-tune", "self-distillation/kd", "kd"]
    assert stages(self_distil=0.0, queue=0) == {"simclr": 3, "fine-tune": 2, "kd": 3}


def test_published_defaults():
    config = Config()
    assert config.steps_of(config.pretrain) == 250_000 and config.steps_of(config.fine_tune) == 750
    assert config.lr * math.sqrt(config.batch) == pytest.approx(6.4)
    assert config.fine_tune_lr * math.sqrt(config.fine_tune_batch) == pytest.approx(0.16)
    assert (config.head_layers, config.layer, config.temperature, config.optimizer) == (3, 1, 0.1, "lars")


def test_labels_of_the_unlabelled_pictures_are_never_read_and_those_of_the_labelled_are():
    given = simclrv2.tiny()
    plain = trained()
    with_labels = given["unlabelled"].with_fields(label=torch.randint(4, (len(given["unlabelled"]),)))
    assert same(trained(unlabelled=with_labels), plain)
    other = given["labelled"].with_fields(label=(given["labelled"].label + 1) % 4)
    assert not same(trained(labelled=other), plain)


class Recorder(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.seen = net, []

    def forward(self, x):
        if self.training:
            self.seen.append(x.detach().clone())
        return self.net(x)


def test_the_teacher_speaks_about_all_pictures_or_the_labelled_ones():
    given = simclrv2.tiny()
    few = {tuple(x.flatten().tolist()) for x in given["labelled"].image}
    for targets, expected in (("all", 22), ("labelled", 8)):
        student = Recorder(given["student"])
        config = dataclasses.replace(given["config"], alpha=1.0, targets=targets, weak_area=(1.0, 1.0), flip=False,
                                     steps=6, self_distil=0.0)
        seen = []
        plain = simclrv2.crop_view
        simclrv2.crop_view = lambda x, run, area, flip, seen=seen: (seen.append(x), x)[1]
        try:
            trained(student=student, config=config)
        finally:
            simclrv2.crop_view = plain
        shown = {tuple(x.flatten().tolist()) for batch in student.seen for x in batch}
        assert len(shown) == expected and (shown <= few) == (targets == "labelled")


def test_the_student_comes_with_its_teacher_which_keeps_the_head_s_first_layer():
    student = trained()
    big = student.__dict__["teacher"]
    assert isinstance(big, Cut) and big.linear.out_features == 4 and len(big.kept) == 3
    given = simclrv2.tiny()
    dropped = trained(config=dataclasses.replace(given["config"], layer=0)).__dict__["teacher"]
    assert len(dropped.kept) == 0
    assert "teacher" not in dict(student.named_modules())


def test_a_pretrained_encoder_with_its_head_is_taken_as_it_is():
    given = simclrv2.tiny()
    net = model().eval()
    before = copy.deepcopy(net)
    config = dataclasses.replace(given["config"], pretrain=0.0, fine_tune=0.0, self_distil=0.0)
    big = fine_tuned(net, 4, given["labelled"], given["unlabelled"], config, Run(quiet=True))
    x = torch.randn(5, 3, 8, 8)
    assert torch.equal(big.eval().features(x), net.projector[:3](net.encode(x)))
    trained(teacher=net, config=dataclasses.replace(config, fine_tune=1.0))
    assert same(net, before) and not net.training


def test_self_distillation_trains_a_copy_of_the_pretrained_network():
    given = simclrv2.tiny()
    config = dataclasses.replace(given["config"], pretrain=0.0, fine_tune=1.0)
    big, again = (fine_tuned(model(), 4, given["labelled"], given["unlabelled"], dataclasses.replace(
        config, self_distil=part), Run(quiet=True)) for part in (0.0, 1.0))
    assert count(big) == count(again) and not same(big, again)


def test_the_student_approaches_its_teacher_and_no_label_is_needed():
    given = simclrv2.tiny()
    x = given["unlabelled"].image
    config = dataclasses.replace(given["config"], steps=150, pretrain=0.1, fine_tune=1.0, self_distil=0.0, alpha=1.0,
                                 optimizer="adamw", lr=0.01, fine_tune_lr=0.01, weak_area=(1.0, 1.0), flip=False)
    start, student = given["student"], trained(config=config)
    big = student.__dict__["teacher"].eval()
    assert kl(big(x), student(x)).item() < 0.3 * kl(big(x), start(x)).item()


# ---------------------------------------------------------------- errors, contract, real models


def test_wrong_input_is_named_before_any_step():
    with pytest.raises(ConfigError, match="layer lies"):
        Config(layer=4)
    with pytest.raises(ConfigError, match="targets"):
        Config(targets="some")
    given = simclrv2.tiny()
    with pytest.raises(RoleError, match="student has 4 classes"):
        trained(labelled=given["labelled"].with_fields(label=torch.arange(8)))
    with pytest.raises(RoleError, match="pretrain=0"):
        trained(config=dataclasses.replace(given["config"], pretrain=0.0))
    with pytest.raises(DataError, match=r"\[-1, 1\]"):
        trained(unlabelled=given["unlabelled"].with_fields(image=3 * given["unlabelled"].image))
    short = Projected(model().encoder, nn.Linear(6, 4))
    with pytest.raises(RoleError, match="cannot be cut"):
        trained(teacher=short, config=dataclasses.replace(given["config"], layer=2))


def test_the_contract():
    check_system(distill, simclrv2.tiny)


def test_views_of_the_two_kinds():
    run, config = Run(quiet=True), Config(weak_area=(1.0, 1.0), flip=False)
    x = coloured(8)
    weak, strong = weak_view(config, run)(x), strong_view(config, run)(x)
    assert weak.shape == strong.shape == x.shape
    assert (weak - x).abs().mean() < (strong - x).abs().mean()


def test_it_runs_on_residual_networks_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    from stillhouse.hub.models import resolve_model
    from stillhouse.protocols import Classifier, Encoder

    torch.manual_seed(0)
    big = transformers.ResNetModel(transformers.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="bottleneck"))
    small = transformers.ResNetForImageClassification(transformers.ResNetConfig(
        num_channels=3, embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1], layer_type="basic", num_labels=4))
    for name, net in (("big", big), ("small", small)):
        net.save_pretrained(tmp_path / name)
    teacher = resolve_model(f"hf:{tmp_path / 'big'}", Encoder)
    student = resolve_model(f"hf:{tmp_path / 'small'}", Classifier)
    before, start = copy.deepcopy(teacher), copy.deepcopy(student)
    out = trained(teacher=teacher, student=student)
    assert out is student and same(teacher, before) and not same(student, start)
    assert student(torch.rand(2, 3, 8, 8)).shape == (2, 4)
    assert student.__dict__["teacher"](torch.rand(2, 3, 8, 8)).shape == (2, 4)


def test_fine_tuning_with_lars_does_not_adapt_the_classifier():
    seen = []
    real = supervised.optimizer_for

    def spy(groups, *rest):
        optimizer = real(groups, *rest)
        seen.append([g["adapt"] for g in optimizer.param_groups])
        return optimizer

    given = simclrv2.tiny()
    supervised.optimizer_for = spy
    try:
        trained(config=dataclasses.replace(given["config"], fine_tune=0.4))
    finally:
        supervised.optimizer_for = real
    assert seen == [[False, True]]


def test_the_embedded_student_is_much_smaller_than_its_teacher():
    from stillhouse.zoo.contrastive import residual_encoder

    small, big = simclrv2.small_encoder(), residual_encoder()
    assert count(small.encoder) <= 5000 and count(big.encoder) >= 15 * count(small.encoder)
