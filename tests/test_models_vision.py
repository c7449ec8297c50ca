"""Small convolutional networks."""

from __future__ import annotations

import pytest
import torch

from stillhouse.errors import ConfigError
from stillhouse.models.convnets import (
    MLP,
    NORMS,
    ConvEncoder,
    ConvNet,
    LeNet,
    SmallAlexNet,
    SmallResNet,
    SmallVGG,
    TinyConvNet,
)


def count(model) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("model", [
    ConvNet(3, 7, 8, 2, 16), TinyConvNet(3, 7), SmallResNet(3, 7, 8), SmallVGG(3, 7, 8, 2, 16),
    SmallAlexNet(3, 7, 8, 16), LeNet(3, 7, 16), MLP(3 * 256, 7)], ids=lambda m: type(m).__name__)
def test_logits_are_the_linear_layer_on_the_features(model):
    model.eval()
    image = torch.randn(4, 3, 16, 16)
    features = model.features(image)
    assert features.shape == (4, model.feature_dim)
    assert torch.equal(model(image), model.linear(features)) and model(image).shape == (4, 7)


def test_the_convnet_of_the_papers_has_its_size():
    # 3 conv layers, 3 pairs of scale and shift, 128 * 4 * 4 features
    conv = 3 * 128 * 9 + 128 + 2 * (128 * 128 * 9 + 128)
    assert count(ConvNet(3, 10)) == conv + 3 * 256 + 2048 * 10 + 10 == 320_010


def test_the_tiny_student_is_tiny():
    assert count(TinyConvNet(1, 10)) <= 5000 and count(TinyConvNet(1, 28)) <= 5000
    assert TinyConvNet().eval()(torch.randn(2, 1, 16, 16)).shape == (2, 10)


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_keeps_shapes(norm):
    assert ConvNet(1, 4, 12, 2, 8, norm)(torch.randn(3, 1, 8, 8)).shape == (3, 4)
    assert ConvEncoder(norm=norm)(torch.randn(3, 1, 8, 8)).shape == (3, 64)


def test_instance_norm_ignores_contrast_and_batch_norm_the_other_pictures_only_in_eval():
    image = torch.randn(4, 1, 8, 8)
    body = ConvNet(1, 4, 8, 2, 8, "instance").double().body[0][0]
    scaled = body(image.double() * 3)
    body[0].bias.data.zero_()
    torch.testing.assert_close(body(image.double() * 3), body(image.double()), atol=1e-3, rtol=1e-3)
    assert scaled.shape == (4, 8, 8, 8)
    model = ConvNet(1, 4, 8, 2, 8, "batch")
    assert not torch.allclose(model(image)[:2], model(image[:2]))
    model.eval()
    torch.testing.assert_close(model(image)[:2], model(image[:2]))


def test_resnet_takes_any_size_and_depth():
    model = SmallResNet(1, 5, 8, blocks=(2, 1), norm="group")
    assert model.feature_dim == 16
    for size in (8, 13, 32):
        assert model(torch.randn(2, 1, size, size)).shape == (2, 5)


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match="at least 8 pixels"):
        ConvNet(depth=3, image_size=4)
    with pytest.raises(ConfigError, match="'layer'"):
        ConvNet(norm="layer")
    with pytest.raises(ConfigError, match="hidden layer"):
        MLP(hidden=())
