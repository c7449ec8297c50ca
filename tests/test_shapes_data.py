"""The drawn shapes."""

import pytest
import torch

from stillhouse.data.shapes import COLOURS, SHAPES, captions, edges, grey, shapes
from stillhouse.errors import DataError, UnknownNameError


def test_the_same_arguments_give_the_same_pictures_and_factors_are_independent():
    data = shapes(1600, seed=3)
    assert torch.equal(data.image, shapes(1600, seed=3).image)
    assert not torch.equal(data.image, shapes(1600, seed=4).image)
    assert data.image.shape == (1600, 3, 32, 32) and data.image.min() >= -1 and data.image.max() <= 1
    pairs = torch.bincount(data.shape * 4 + data.colour, minlength=16)
    assert (pairs == 100).all()
    correlation = torch.corrcoef(torch.stack([data.label.float(), data.colour.float(), data.scale, data.x, data.y]))
    assert (correlation - torch.eye(5)).abs().max() < 0.1


@pytest.mark.parametrize("kind", SHAPES)
def test_every_shape_lies_within_the_picture_with_its_colour_at_its_place(kind):
    data = shapes(40, seed=0, shapes=[kind], colours=["white"], noise=0.0)
    bright = data.image.mean(1) > 0.2
    border = torch.cat([bright[:, 0], bright[:, -1], bright[:, :, 0], bright[:, :, -1]], 1)
    assert not border.any()
    at = (torch.arange(32) + 0.5) / 32
    x = (bright.sum(1) * at).sum(1) / bright.sum((1, 2))
    assert (x - data.x).abs().max() < 0.06


def test_grounds_hue_and_captions():
    plain, texture = (shapes(64, background=b, noise=0.0) for b in ("plain", "texture"))
    assert torch.equal(plain.label, texture.label)
    assert texture.image[:, :, 0, :].std(-1).mean() > 10 * plain.image[:, :, 0, :].std(-1).mean()
    turned = shapes(64, background="plain", noise=0.0, hue=120.0)
    inside = plain.image[:, :, 16, 16].sum(1)
    assert torch.allclose(turned.image[:, :, 16, 16].sum(1), inside, atol=1e-4)
    assert torch.allclose(turned.image[:, 1], plain.image[:, 0], atol=1e-4)
    assert captions(plain.select([0])) == [f"{list(COLOURS)[plain.colour[0]]} {SHAPES[plain.shape[0]]}"]


def test_edges_do_not_see_colour_and_grey_has_one_channel():
    data = shapes(32, noise=0.0, colours=["white"])
    lines = edges(data.image)
    assert lines.shape == grey(data.image).shape == (32, 1, 32, 32)
    assert torch.allclose(lines, edges(0.5 * data.image), atol=1e-4)
    assert (edges(torch.zeros(1, 3, 8, 8)) == -1).all()


def test_bad_requests_are_refused():
    with pytest.raises(UnknownNameError, match="hexagon"):
        shapes(4, shapes=["hexagon"])
    with pytest.raises(UnknownNameError, match="background"):
        shapes(4, background="sky")
    with pytest.raises(DataError, match="n >= 1"):
        shapes(0)
