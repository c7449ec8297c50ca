"""Adapters on one network, on and off, and a fake score made of them."""

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from stillhouse.diffusion.denoise import NetworkDenoiser
from stillhouse.diffusion.process import VPCosine
from stillhouse.errors import RoleError
from stillhouse.models.denoisers import MLPDenoiser
from stillhouse.parts.fake_scores import FakeScore, SeparateScores
from stillhouse.parts.lora import LoRA, adapted


def denoiser(classes=0):
    torch.manual_seed(0)
    return NetworkDenoiser(MLPDenoiser((2,), 8, 2, classes=classes), VPCosine(), "v")


def grown(lora):
    with torch.no_grad():
        for p in lora.parameters():
            p.normal_()


X, T = torch.randn(4, 2, generator=torch.Generator().manual_seed(1)), torch.linspace(0.1, 0.9, 4)


def test_adapters_begin_at_zero_act_only_when_on_and_leave_no_trace():
    network = denoiser()
    network.network.leave.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    kinds = [(n, type(m)) for n, m in network.named_modules()]
    flags = [p.requires_grad for p in network.parameters()]
    plain = network(X, T)
    with pytest.raises(RuntimeError, match="outside"), adapted(network, 2) as lora:
        with lora.on():
            assert torch.equal(network(X, T), plain)
        grown(lora)
        assert torch.equal(network(X, T), plain)
        with lora.on():
            assert not torch.allclose(network(X, T), plain)
        assert {p.shape[0] for p in lora.parameters()} >= {2} and len(lora.state_dict()) == 2 * 4
        raise RuntimeError("from outside")
    assert torch.equal(network(X, T), plain)
    after = network.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    assert [(n, type(m)) for n, m in network.named_modules()] == kinds
    assert [p.requires_grad for p in network.parameters()] == flags and not hasattr(network, "peft_config")


def test_only_adapters_get_gradients_and_their_state_comes_back():
    network = denoiser().requires_grad_(False)
    with adapted(network, 2) as lora:
        grown(lora)
        with lora.on():
            loss = network(X, T).square().mean()
        loss.backward()
        assert all(p.grad is not None for p in lora.parameters())
        state = {k: v.clone() for k, v in lora.state_dict().items()}
        with lora.on():
            expected = network(X, T)
    assert all(p.grad is None for p in network.parameters())
    with adapted(network, 2) as lora:
        lora.load_state_dict(state)
        with lora.on():
            assert torch.equal(network(X, T), expected)


def test_targets():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q, self.to_k, self.other = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    assert set(LoRA(Attention())._layers) == {"to_q", "to_k"}
    assert set(LoRA(Attention(), targets=("other",))._layers) == {"other"}
    with pytest.raises(RoleError, match="no linear layer nothing"):
        LoRA(Attention(), targets=("nothing",))
    with pytest.raises(RoleError, match="no linear layer"):
        LoRA(nn.ReLU())


def test_a_new_fake_score_is_the_teacher_and_then_sees_the_camera():
    network = denoiser().requires_grad_(False)
    pose = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(2))
    with adapted(network, 2) as lora:
        fake = FakeScore(network, lora)
        assert torch.equal(fake(X, T, None, pose), network(X, T))
        names = set(fake.state_dict())
        assert names and all(n.startswith(("lora.", "camera.")) for n in names)
        nn.init.normal_(fake.camera.layers[-1].weight)
        assert not torch.allclose(fake(X, T, None, pose), fake(X, T, None, pose.flip(0)))
        free = fake(X, T, None, torch.zeros_like(pose))
        assert torch.equal(free, fake(X, T, None, torch.zeros_like(pose).flip(0)))
        assert torch.equal(network(X, T), denoiser()(X, T))
    with pytest.raises(RoleError, match="embeds the time"):
        FakeScore(NetworkDenoiser(nn.Linear(2, 2), VPCosine()))


def test_separate_scores_begin_alike_and_learn_apart():
    fake = FakeScore(denoiser())
    pose = torch.randn(4, 4, 4)
    scores = SeparateScores(fake, 3)
    which = torch.tensor([0, 2, 2, 1])
    torch.testing.assert_close(scores(X, T, None, pose, which), fake(X, T, None, pose))
    torch.testing.assert_close(scores(X, T, None, None, which), fake(X, T))
    scores(X[:1], T[:1], None, None, which[:1]).sum().backward()
    reached = [p.grad.flatten(1).abs().sum(1) > 0 for p in scores.copies if p.grad is not None]
    assert reached and all(not r[1:].any() for r in reached) and any(r[0] for r in reached)
