import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stillhouse.data.sets import TensorSet
from stillhouse.errors import ConfigError, DataError, RoleError
from stillhouse.parts.heads import Projected, projector, replace_head
from stillhouse.recipes import federated, kd, simclr, supervised
from stillhouse.recipes.views import random_view
from stillhouse.run import Run


def data(n=24, classes=3):
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(n) % classes
    image = torch.randn(classes, 1, 4, 4, generator=generator)[label]
    return TensorSet(image=image + 0.1 * torch.randn(n, 1, 4, 4, generator=generator), label=label)


def network(classes=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, classes))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# ---------------------------------------------------------------- supervised


def test_supervised_learns_separated_classes():
    net = supervised.train(network(), data(), supervised.Config(steps=60, batch=8, lr=0.1), Run(quiet=True))
    net.eval()
    assert (net(data().image).argmax(1) == data().label).all()


def test_one_step_of_supervised_is_sgd_on_the_cross_entropy():
    net, other = network().double(), network().double()
    whole = TensorSet(image=data().image.double(), label=data().label)
    config = supervised.Config(steps=1, batch=24, lr=0.1, warmup=0.0, weight_decay=0.0)
    supervised.train(net, whole, config, Run(quiet=True))
    F.cross_entropy(other(whole.image), whole.label).backward()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q - 0.1 * q.grad, atol=1e-12)


def test_fine_tuning_with_a_frozen_backbone_moves_the_head_alone():
    net = network()
    before = copy.deepcopy(net)
    config = supervised.Config(steps=3, batch=8, lr=0.1, warmup=0.0)
    supervised.fine_tune(net, data(), net[-1], config, Run(quiet=True), backbone_lr=0.0)
    assert same(net[:-1], before[:-1]) and not torch.equal(net[-1].weight, before[-1].weight)


def test_fine_tuning_moves_the_backbone_at_its_own_rate():
    moved = {}
    for rate in (1.0, 0.1):
        net = network()
        before = net[1].weight.detach().clone()
        config = supervised.Config(steps=1, batch=24, lr=0.1, warmup=0.0, weight_decay=0.0)
        supervised.fine_tune(net, data(), net[-1], config, Run(quiet=True), backbone_lr=rate)
        moved[rate] = net[1].weight.detach() - before
    assert torch.allclose(moved[1.0], 10 * moved[0.1], atol=1e-6)


def test_replace_head_gives_a_new_task_or_an_encoder_and_leaves_the_model_alone():
    net = network().eval()
    other, head = replace_head(net, classes=5)
    assert other(data().image).shape == (24, 5) and other[-1] is head and net[-1].out_features == 3
    encoder, _ = replace_head(net)
    assert torch.equal(net[-1](encoder(data().image)), net(data().image))
    with pytest.raises(RoleError, match="no linear layer"):
        replace_head(nn.Flatten())


def test_wrong_settings_and_missing_labels_are_named():
    with pytest.raises(ConfigError, match="lr"):
        supervised.Config(lr=0.0)
    with pytest.raises(ConfigError, match="alpha"):
        kd.Config(alpha=2.0)
    with pytest.raises(DataError, match="label"):
        supervised.train(network(), data().without("label"), run=Run(quiet=True))
    with pytest.raises(ConfigError, match="part of the student"):
        supervised.fine_tune(network(), data(), nn.Linear(1, 1), run=Run(quiet=True))


# ---------------------------------------------------------------- KD


def test_kd_is_the_sum_of_both_terms_with_temperature_squared():
    teacher, student = network().double().eval(), network().double()
    with torch.no_grad():
        teacher[-1].weight.mul_(3)
    whole, other = TensorSet(image=data().image.double(), label=data().label), copy.deepcopy(student)
    config = kd.Config(steps=1, batch=24, lr=0.1, warmup=0.0, weight_decay=0.0, temperature=4.0, alpha=0.7)
    kd.distill(teacher, student, whole, config, Run(quiet=True))
    z = other(whole.image)
    t, s = (torch.softmax(x / 4.0, 1) for x in (teacher(whole.image).detach(), z))
    loss = 0.3 * F.cross_entropy(z, whole.label) + 0.7 * 16 * (t * (t.log() - s.log())).sum(1).mean()
    loss.backward()
    for p, q in zip(student.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q - 0.1 * q.grad, atol=1e-12)


def test_kd_hands_the_teacher_back_as_it_came():
    teacher = network().train()
    before = copy.deepcopy(teacher)
    kd.distill(teacher, network(), data(), kd.Config(steps=2, batch=8), Run(quiet=True))
    assert same(teacher, before) and teacher.training and all(p.requires_grad for p in teacher.parameters())


# ---------------------------------------------------------------- SimCLR and views


def test_simclr_brings_views_together():
    torch.manual_seed(0)
    model = Projected(nn.Sequential(nn.Flatten(), nn.Linear(16, 8)), projector(8, 8, 4))
    run = Run(quiet=True)
    config = simclr.Config(steps=40, batch=24, lr=0.1, temperature=0.5)

    def view(x):
        return x + 0.3 * torch.randn_like(x)

    simclr.train(model, data(), view, config, run)
    losses = [line["nt_xent"] for line in run.history]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_views_of_strength_zero_are_the_pictures():
    x = torch.rand(5, 1, 8, 8)
    assert torch.allclose(random_view(x, Run(quiet=True), 0.0), x, atol=1e-6)


def test_views_differ_within_a_step_and_keep_their_shape_and_surroundings():
    x = torch.rand(5, 2, 8, 8) + 3
    run = Run(quiet=True)
    a, b = random_view(x, run), random_view(x, run)
    assert a.shape == x.shape and not torch.allclose(a, b) and a.min() > 2
    erased = random_view(x, run, 0.0, erase=0.5)
    gone = (erased - x).abs() > 1e-5
    assert (gone[:, 0].sum((1, 2)) >= 15).all() and (gone[:, 0].sum((1, 2)) <= 16).all()
    assert torch.equal(erased[gone], x.amin((1, 2, 3), keepdim=True).expand_as(x)[gone])
    mirrored = random_view(x, run, 0.0, flip=True)
    flips = [torch.allclose(m, o.flip(-1), atol=1e-5) for m, o in zip(mirrored, x, strict=True)]
    kept = [torch.allclose(m, o, atol=1e-5) for m, o in zip(mirrored, x, strict=True)]
    assert all(f or k for f, k in zip(flips, kept, strict=True)) and any(flips)
    with pytest.raises(ConfigError, match="erase"):
        random_view(x, run, erase=2.0)


# ---------------------------------------------------------------- federated averaging


def filled(value, count):
    net = network()
    with torch.no_grad():
        for t in federated.tensors(net).values():
            t.fill_(value)
        net[2].num_batches_tracked.fill_(count)
    return net


def test_average_weighs_every_tensor_by_the_number_of_samples():
    target = network()
    federated.average(target, [filled(1.0, 8), filled(5.0, 4)], [30, 10])
    for name, value in federated.tensors(target).items():
        expected = 7 if name.endswith("num_batches_tracked") else 0.75 * 1.0 + 0.25 * 5.0
        assert (value == expected).all(), name


def test_average_of_one_model_is_that_model_exactly():
    target, only = network(), network()
    with torch.no_grad():
        for p in only.parameters():
            p.add_(torch.randn_like(p))
    federated.average(target, [only], [7])
    assert same(target, only)


def test_average_names_models_that_differ():
    with pytest.raises(RoleError, match="differ in '4.weight'"):
        federated.average(network(), [network(), network(classes=2)], [1, 1])
    with pytest.raises(ConfigError, match="sizes"):
        federated.average(network(), [network()], [0])


def test_fedavg_downloads_trains_and_averages_who_joins():
    sets = [data(n) for n in (6, 12, 24, 3)]
    seen = []

    def client_step(local, downloaded, i, part):
        assert same(local, downloaded) and not any(p.requires_grad for p in downloaded.parameters())
        assert not downloaded.training and all(p.requires_grad for p in local.parameters())
        seen.append(i)
        with torch.no_grad():
            for t in federated.tensors(local).values():
                t.fill_(i)

    net, run = network(), Run(quiet=True)
    federated.fedavg(net, sets, client_step, 1, run, share=0.5)
    assert len(seen) == 2 and seen == sorted(seen)
    n = [len(sets[i]) for i in seen]
    expected = sum(i * m for i, m in zip(seen, n, strict=True)) / sum(n)
    assert torch.allclose(net[1].weight, torch.tensor(expected).expand_as(net[1].weight))
    assert all(p.requires_grad for p in net.parameters()) and net.training
