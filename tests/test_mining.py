import pytest
import torch
from torch import nn

from stillhouse.data.mining import near_duplicates, score_pool, shifted_pictures, top_k_per_class
from stillhouse.data.sets import TensorSet
from stillhouse.errors import ConfigError, DataError


def pictures(n, seed=0, size=12):
    return torch.rand(n, 1, size, size, generator=torch.Generator().manual_seed(seed))


def test_score_pool_gives_top1_and_its_probability():
    class Fixed(nn.Module):
        def forward(self, image):
            return image.flatten(1)[:, :3]

    pool = TensorSet(image=pictures(10))
    labels, scores = score_pool(Fixed(), pool, batch=3)
    p = pool.image.flatten(1)[:, :3].softmax(1)
    assert torch.equal(labels, p.argmax(1)) and torch.equal(scores, p.max(1).values)


def test_top_k_takes_at_most_k_of_each_class_the_best_first():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    scores = torch.tensor([0.5, 0.9, 0.7, 0.6, 0.8, 0.1])
    assert top_k_per_class(labels, scores, 2).tolist() == [1, 2, 3, 4, 5]
    assert top_k_per_class(labels, scores, 1).tolist() == [1, 4, 5]
    allowed = torch.tensor([True, False, True, True, False, False])
    assert top_k_per_class(labels, scores, 1, allowed).tolist() == [2, 3]
    assert top_k_per_class(torch.zeros(4), torch.ones(4), 2).tolist() == [0, 1]


def test_near_duplicates_finds_copies_in_other_light_and_place_but_no_others():
    validation = pictures(20, seed=1)
    shifted = validation[3].roll((1, -1), (-2, -1))
    pool = torch.cat([
        pictures(30, seed=2),
        validation[:1], 0.5 * validation[1:2] + 0.2, shifted[None],
        validation[4:5] + 0.02 * torch.randn(1, 1, 12, 12, generator=torch.Generator().manual_seed(5)),
    ])
    found = near_duplicates(TensorSet(image=pool), TensorSet(image=validation), threshold=0.9, batch=7)
    assert found.nonzero().flatten().tolist() == [30, 31, 32, 33]


def test_pictures_of_one_colour_never_match():
    flat = TensorSet(image=torch.full((2, 1, 12, 12), 0.3))
    assert not near_duplicates(flat, flat).any()


def test_first_view_is_the_unshifted_centre_of_unit_length():
    image = pictures(2)
    views = shifted_pictures(image, shift=1)
    centre = image[:, 0, 1:-1, 1:-1].flatten(1)
    centre = centre - centre.mean(1, keepdim=True)
    assert views.shape == (2, 9, 100)
    assert torch.allclose(views[:, 0], centre / centre.norm(dim=1, keepdim=True), atol=1e-6)
    assert shifted_pictures(torch.rand(1, 3, 64, 80)).shape == (1, 9, 900)


def test_the_descriptor_can_be_replaced():
    def mean_colour(images):
        return nn.functional.normalize(images.mean((2, 3)), dim=1)[:, None]

    pool = TensorSet(image=torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])[:, :, None, None].expand(2, 3, 8, 8))
    red = TensorSet(image=torch.tensor([[0.2, 0, 0]])[:, :, None, None].expand(1, 3, 8, 8))
    assert near_duplicates(pool, red, describe=mean_colour).tolist() == [True, False]


def test_bad_input_is_named():
    empty = TensorSet(image=torch.zeros(0, 1, 12, 12))
    with pytest.raises(DataError, match="empty"):
        score_pool(nn.Flatten(), empty)
    with pytest.raises(DataError, match="empty"):
        near_duplicates(empty, TensorSet(image=pictures(1)))
    with pytest.raises(DataError, match="too small"):
        shifted_pictures(torch.zeros(1, 1, 3, 3))
    with pytest.raises(DataError, match="different length"):
        near_duplicates(TensorSet(image=pictures(1)), TensorSet(image=pictures(1, size=14)))
    with pytest.raises(ConfigError, match="k must be"):
        top_k_per_class(torch.zeros(1), torch.zeros(1), 0)
