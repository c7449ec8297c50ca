"""Flat networks and unrolled optimisation."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stillhouse.errors import ConfigError, RoleError
from stillhouse.models.convnets import ConvNet
from stillhouse.parts.unroll import FlatNetwork, sgd_step, unroll


@pytest.fixture
def problem():
    torch.manual_seed(0)
    flat = FlatNetwork(ConvNet(1, 3, 4, 1, 4).double())
    images = torch.randn(6, 1, 4, 4, dtype=torch.double, requires_grad=True)
    labels = torch.arange(6) % 3
    return flat, images, labels


def gradients(problem, steps=5, momentum=0.0, alpha=0.1, **options):
    flat, images, labels = problem
    rate = torch.full((steps,), alpha, dtype=torch.double).mul_(torch.linspace(1, 2, steps)).requires_grad_()
    theta = flat.flatten().requires_grad_()
    step = sgd_step(lambda th, n, inputs: F.cross_entropy(flat(th, inputs[1]), inputs[2]), momentum)
    state = (theta, torch.zeros_like(theta)) if momentum else (theta,)
    reached = unroll(step, state, steps, (rate, images, labels), **options)
    return reached[0], torch.autograd.grad(reached[0].square().sum(), [images, rate, theta], materialize_grads=True)


def test_unrolled_sgd_is_torch_sgd(problem):
    flat, images, labels = problem
    model = ConvNet(1, 3, 4, 1, 4).double()
    flat.load(flat.flatten(), model)
    for momentum in (0.0, 0.9):
        flat.load(flat.flatten(), model)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum)
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(images.detach()), labels).backward()
            optimizer.step()
        step = sgd_step(lambda th, n, inputs: F.cross_entropy(flat(th, images), labels), momentum)
        theta = flat.flatten()
        reached = unroll(step, (theta, torch.zeros_like(theta)) if momentum else (theta,), 4,
                         (torch.tensor(0.1, dtype=torch.double),))[0]
        torch.testing.assert_close(reached, flat.flatten(model), rtol=1e-12, atol=1e-12)


def test_gradients_agree_with_central_differences(problem):
    flat, images, labels = problem
    direction = torch.randn_like(images)
    _, (found, _, _) = gradients(problem)
    eps = 1e-6
    ends = [gradients((flat, (images + s * eps * direction).detach().requires_grad_(), labels))[0].square().sum()
            for s in (1, -1)]
    expected = (ends[0] - ends[1]) / (2 * eps)
    torch.testing.assert_close((found * direction).sum(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("momentum", [0.0, 0.7])
@pytest.mark.parametrize("window", [None, 2])
def test_flat_memory_gives_the_same_gradients(problem, momentum, window):
    reached, plain = gradients(problem, momentum=momentum, window=window)
    again, flat = gradients(problem, momentum=momentum, window=window, flat=True)
    torch.testing.assert_close(reached, again, rtol=1e-12, atol=1e-14)
    for a, b in zip(plain, flat, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert plain[0].abs().max() > 0 and (plain[2].abs().max() > 0) == (window is None)


@pytest.mark.parametrize("flat", [False, True])
def test_the_window_cuts_off_the_first_steps(problem, flat):
    _, (_, rate, theta) = gradients(problem, window=2, flat=flat)
    assert (rate[:3] == 0).all() and (rate[3:] != 0).all() and (theta == 0).all()


def test_flat_memory_draws_the_same_dropout_again():
    torch.manual_seed(0)
    flat = FlatNetwork(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 1)).double())
    x = torch.randn(16, 4, dtype=torch.double, requires_grad=True)
    step = sgd_step(lambda th, n, inputs: flat(th, inputs[1]).square().mean())
    found = []
    for memory in (False, True):
        torch.manual_seed(7)
        (reached,) = unroll(step, (flat.flatten(),), 4, (torch.tensor(0.1, dtype=torch.double), x), flat=memory)
        after = torch.rand(1)
        found.append((torch.autograd.grad(reached.square().sum(), x)[0], after))
    torch.testing.assert_close(found[0], found[1])


def live_tensors(problem, steps, flat_memory):
    """How many tensors autograd keeps alive after the forward pass."""
    flat, images, labels = problem
    seen: list[weakref.ref] = []

    class Box:
        def __init__(self, value):
            self.value = value

    def pack(value):
        box = Box(value)
        seen.append(weakref.ref(box))
        return box

    step = sgd_step(lambda th, n, inputs: F.cross_entropy(flat(th, inputs[1]), labels))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.value):
        reached = unroll(step, (flat.flatten(),), steps, (torch.tensor(0.1, dtype=torch.double), images),
                         flat=flat_memory)
    return sum(ref() is not None for ref in seen) if reached else 0


def test_flat_memory_keeps_no_graph(problem):
    assert live_tensors(problem, 8, False) > live_tensors(problem, 2, False) + 50
    assert live_tensors(problem, 8, True) == live_tensors(problem, 2, True)


def test_the_template_is_never_touched():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    before = {n: v.clone() for n, v in model.state_dict().items()}
    flat = FlatNetwork(model)
    step = sgd_step(lambda th, n, inputs: flat(th, inputs[1]).square().mean())
    (reached,) = unroll(step, (flat.flatten(),), 3, (torch.tensor(0.1), torch.randn(5, 1, 4, 4)))
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert not torch.equal(reached, flat.flatten())


def test_tied_parameters_appear_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    flat = FlatNetwork(model)
    assert flat.size == 9 + 3 + 3
    theta = torch.randn(flat.size)
    x = torch.randn(2, 3)
    w, a, b = theta[:9].view(3, 3), theta[9:12], theta[12:]
    torch.testing.assert_close(flat(theta, x), (x @ w.T + a) @ w.T + b)


def test_no_steps_return_the_start(problem):
    theta = problem[0].flatten()
    assert unroll(sgd_step(lambda *a: None), (theta,), 0, flat=True)[0] is theta


def test_wrong_vectors_and_settings_are_named(problem):
    with pytest.raises(RoleError, match="expected a vector of"):
        problem[0].split(torch.zeros(3))
    with pytest.raises(RoleError, match="other parameters"):
        problem[0].flatten(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="momentum"):
        sgd_step(lambda *a: None, momentum=1.0)
    with pytest.raises(ConfigError, match="steps"):
        unroll(sgd_step(lambda *a: None), (), -1)
