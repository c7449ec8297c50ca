"""Stages of networks, regressors between their features, several teachers as one."""

import pytest
import torch
from torch import nn

from stillhouse.errors import RoleError, UnknownNameError
from stillhouse.measures.divergences import kl, soft_cross_entropy
from stillhouse.models.convnets import MLP, ConvNet, SmallResNet, TinyConvNet
from stillhouse.models.vit import SmallMixer, SmallViT
from stillhouse.parts.ensembles import answers, mean_log_probs
from stillhouse.parts.regressors import Regressor
from stillhouse.parts.stages import feature_map, grid_of, pooled, stages_of
from stillhouse.parts.taps import taps

IMAGE = torch.randn(3, 1, 16, 16)


@pytest.mark.parametrize(("network", "expected"), [
    (SmallResNet(width=4), {"body.1": (4, 16, 16), "body.2": (8, 8, 8), "body.3": (16, 4, 4)}),
    (TinyConvNet(), {"body.0": (8, 16, 16), "body.2": (16, 8, 8), "body.4": (20, 4, 4)}),
    (SmallViT(width=8, depth=3), {f"blocks.{i}": (17, 8) for i in range(3)}),
    (SmallViT(width=8, depth=12), {f"blocks.{i}": (17, 8) for i in (1, 3, 9, 11)}),
    (SmallMixer(width=8, depth=2), {f"blocks.{i}": (16, 8) for i in range(2)}),
    (MLP(256), {}),
])
def test_stages_are_found_shallow_to_deep(network, expected):
    network.train()
    assert stages_of(network, IMAGE) == expected
    assert all(m.training for m in network.modules()) and not any(m._forward_hooks for m in network.modules())


def of_torchvision(expansion):
    """A ResNet in torchvision's form: each stage a list of blocks; with `expansion` the block that leaves a stage
    begins at its resolution."""
    def block(a, b, stride):
        inner = [nn.Conv2d(a, 2, 1), nn.BatchNorm2d(2)] if expansion else []
        return nn.Sequential(*inner, nn.Conv2d(2 if expansion else a, b, 3, stride, 1), nn.BatchNorm2d(b), nn.ReLU())

    net = nn.Sequential()
    net.add_module("conv1", nn.Conv2d(1, 4, 3, 2, 1))
    for i, (a, b) in enumerate([(4, 4), (4, 8), (8, 16)]):
        net.add_module(f"layer{i + 1}", nn.Sequential(block(a, b, 1 + (i > 0)), block(b, b, 1)))
    return nn.Sequential(net, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))


@pytest.mark.parametrize("expansion", [False, True])
def test_a_stage_that_is_a_list_of_blocks_is_one_of_several(expansion):
    found = stages_of(of_torchvision(expansion), IMAGE)
    assert found == {"0.layer1": (4, 8, 8), "0.layer2": (8, 4, 4), "0": (16, 2, 2)}


class ChannelsLast(nn.Module):
    """Maps as in timm's Swin, which says so; blocks with names of their own, as in torchvision's transformers."""

    output_fmt = "NHWC"

    def __init__(self):
        super().__init__()
        self.enter = nn.Conv2d(1, 6, 4, 4)
        self.layers = nn.Sequential()
        for i in range(2):
            self.layers.add_module(f"layer_{i}", nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.LayerNorm(6)))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.layers(self.enter(x).permute(0, 2, 3, 1)).mean((1, 2)))


def test_maps_with_channels_last_are_turned():
    model = ChannelsLast()
    assert stages_of(model, IMAGE) == {f"layers.layer_{i}": (6, 4, 4) for i in range(2)}
    with taps(model, ["layers.layer_1"]) as features:
        z = model(IMAGE)
    assert torch.allclose(model.head(features["layers.layer_1"].mean((2, 3))), z, atol=1e-6)


def test_stages_of_models_of_transformers():
    transformers = pytest.importorskip("transformers")
    three = torch.randn(2, 3, 32, 32)
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, image_size=32, patch_size=8))
    assert list(stages_of(vit, three).values()) == [(17, 8)] * 2
    swin = transformers.SwinForImageClassification(transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4))
    tokens = [shape[0] for shape in stages_of(swin, three).values()]
    assert tokens == sorted(tokens, reverse=True) and len(tokens) >= 1
    resnet = transformers.ResNetForImageClassification(transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"))
    assert list(stages_of(resnet, torch.randn(2, 3, 64, 64)).values()) == [(8, 16, 16), (16, 8, 8)]


def test_named_stages_are_taken_as_they_are():
    network = ConvNet(1, 10, 4, 2, 16)
    assert stages_of(network, IMAGE, ["body.1.0"]) == {"body.1.0": (4, 8, 8)}
    with pytest.raises(UnknownNameError, match=r"body\.7"):
        stages_of(network, IMAGE, ["body.7"])
    with pytest.raises(RoleError, match="no maps and no tokens"):
        stages_of(network, IMAGE, ["linear"])


def test_tokens_become_a_map_without_their_prefix():
    assert grid_of(17) == (4, 1) and grid_of(16) == (4, 0) and grid_of(2) == (1, 1)
    tokens = torch.arange(5 * 2.0).view(1, 5, 2)
    assert torch.equal(feature_map(tokens)[0, 0], torch.tensor([[2.0, 4.0], [6.0, 8.0]]))
    assert torch.equal(pooled(tokens), tokens.mean(1))
    maps = torch.randn(2, 3, 4, 4)
    assert feature_map(maps) is maps and torch.equal(pooled(maps), maps.mean((2, 3)))


@pytest.mark.parametrize(("student", "teacher"), [((20, 4, 4), (17, 8)), ((17, 8), (6, 8, 8)), ((3, 8, 8), (6, 4, 4))])
def test_a_regressor_brings_either_form_to_the_teachers_size(student, teacher):
    out = Regressor(student, teacher)(torch.randn(2, *student))
    assert out.shape == feature_map(torch.randn(2, *teacher)).shape
    assert Regressor(student, teacher, resize=False)(torch.randn(2, *student)).shape[2:] == feature_map(
        torch.randn(2, *student)).shape[2:]


def test_answers_of_several_teachers_may_enter_a_loss():
    teachers = [nn.Sequential(nn.Flatten(), nn.Linear(256, 5)) for _ in range(3)]
    logits = answers(teachers, IMAGE)
    assert logits.shape == (3, 3, 5) and not logits.requires_grad and not logits.is_inference()
    student = torch.randn(3, 5, requires_grad=True)
    kl(mean_log_probs(logits), student).backward()
    assert student.grad is not None
    assert torch.allclose(mean_log_probs(logits).exp(), logits.softmax(-1).mean(0))
    with pytest.raises(RoleError, match="at least one teacher"):
        answers([], IMAGE)
    with pytest.raises(RoleError, match=r"\[5, 4\]"):
        answers([teachers[0], nn.Sequential(nn.Flatten(), nn.Linear(256, 4))], IMAGE)


def test_one_teacher_several_times_is_that_teacher():
    z, student = torch.randn(4, 5, dtype=torch.double), torch.randn(4, 5, dtype=torch.double)
    torch.testing.assert_close(soft_cross_entropy(mean_log_probs(z.expand(3, 4, 5)), student),
                               soft_cross_entropy(z, student), rtol=1e-12, atol=0)
