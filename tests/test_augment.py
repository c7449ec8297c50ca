"""Augmentations: DSA, contrastive views, whitening."""

from __future__ import annotations

import pytest
import torch

from stillhouse.data.augment import (
    DSA_GROUPS,
    DSA_PAPER,
    affine,
    cutout,
    draw_dsa,
    dsa,
    dsa_of,
    fit_zca,
    random_tiles,
    random_view,
    rotation,
    scaling,
    shift,
    two_views,
)
from stillhouse.errors import DataError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("group", DSA_GROUPS)
def test_every_group_is_differentiable_and_keeps_shape(group):
    x = torch.rand(3, 2, 6, 8, dtype=torch.double, requires_grad=True)
    augment = draw_dsa(x, group, generator=seeded(1))
    assert augment(x).shape == x.shape
    assert torch.autograd.gradcheck(augment, x)


def test_the_same_seed_draws_the_same_augmentation():
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(dsa(x, generator=seeded(3)), dsa(x, generator=seeded(3)))
    torch.manual_seed(3)
    first = dsa(x)
    torch.manual_seed(3)
    assert torch.equal(first, dsa(x))


def test_one_group_is_drawn_for_the_batch_and_all_groups_occur():
    size, u = (8, 8), torch.rand(4, 3, generator=seeded())
    x = torch.randn(4, 3, 8, 8)
    for i, group in enumerate(DSA_GROUPS):
        assert torch.equal(dsa_of(DSA_PAPER, size, (i + 0.5) / 6, u)(x), dsa_of(group, size, 0.0, u)(x))


def test_siamese_parameters_are_shared_and_fit_any_batch():
    x = torch.randn(1, 3, 8, 8).expand(5, -1, -1, -1)
    for group in DSA_GROUPS:
        augment = draw_dsa(x, group, siamese=True, generator=seeded(2))
        moved = augment(x)
        assert all(torch.equal(moved[0], m) for m in moved)
        assert torch.equal(augment(x[:2]), moved[:2])
    assert not all(torch.equal(dsa(x, "crop", generator=seeded(2))[0], m)
                   for m in dsa(x, "crop", generator=seeded(2)))


def test_color_is_brightness_then_saturation_then_contrast():
    x = torch.randn(2, 3, 4, 4, dtype=torch.double)
    u = torch.tensor([[0.75, 0.25, 0.5], [0.5, 0.5, 0.5]], dtype=torch.double)
    moved = dsa_of("color", (4, 4), 0.0, u)(x)
    torch.testing.assert_close(moved[1], x[1])
    bright = x[0] + 0.25
    grey = bright.mean(0, keepdim=True)
    torch.testing.assert_close(moved[0], (bright - grey) * 0.5 + grey)


def test_crop_shifts_by_at_most_an_eighth():
    x = torch.arange(64.0).view(1, 1, 8, 8).expand(200, -1, -1, -1)
    moved = draw_dsa(x, "crop", fill=-1.0, generator=seeded())(x)
    seen = {int(m[4, 4]) for m in moved[:, 0]}
    assert seen == {36 + 8 * dy + dx for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
    by_hand = shift(x[:1], torch.tensor([[1, -1]]), fill=-1.0)[0, 0]
    assert (by_hand[-1] == -1).all() and (by_hand[:, 0] == -1).all()
    assert torch.equal(by_hand[:-1, 1:], x[0, 0, 1:, :-1])


def test_cutout_erases_half_the_side():
    x = torch.ones(1, 1, 8, 8)
    erased = cutout(x, torch.tensor([[2, 3]]), (4, 4), fill=-1.0)
    assert (erased == -1).sum() == 16 and (erased[0, 0, 2:6, 3:7] == -1).all()
    assert (cutout(x, torch.tensor([[-2, 6]]), (4, 4)) == 0).sum() == 4
    counts = (draw_dsa(x.expand(300, -1, -1, -1), "cutout", generator=seeded())(x.expand(300, -1, -1, -1)) == 0)
    counts = counts.sum((1, 2, 3))
    assert counts.max() == 16 and counts.min() == 4


def test_identity_parameters_and_the_empty_strategy_change_nothing():
    x = torch.randn(3, 1, 8, 8, dtype=torch.double)
    one, zero = torch.ones(1, dtype=torch.double), torch.zeros(1, dtype=torch.double)
    torch.testing.assert_close(affine(x, rotation(zero)), x)
    torch.testing.assert_close(affine(x, scaling(one, one)), x)
    assert draw_dsa(x, "")(x) is x


def test_a_quarter_turn_is_exact():
    x = torch.randn(2, 1, 6, 6, dtype=torch.double)
    turned = affine(x, rotation(torch.full((1,), 90.0, dtype=torch.double)))
    torch.testing.assert_close(turned, x.rot90(1, (2, 3)))


def test_fill_is_what_comes_from_outside():
    x = torch.full((1, 1, 8, 8), 3.0)
    factor = torch.full((1,), 2.0)
    assert affine(x, scaling(factor, factor), fill=-1.0)[0, 0, 0, 0] == -1.0


def test_unknown_groups_are_named():
    with pytest.raises(DataError, match="'colour'"):
        draw_dsa(torch.zeros(1, 1, 8, 8), "colour_crop")


def test_two_views_differ_and_repeat():
    x = torch.rand(4, 1, 16, 16) * 2 - 1
    a, b = two_views(x, generator=seeded())
    assert a.shape == b.shape == x.shape and not torch.allclose(a, b)
    again, _ = two_views(x, generator=seeded())
    assert torch.equal(a, again)


def test_a_view_with_all_strengths_off_is_the_picture():
    x = torch.randn(3, 3, 8, 8, dtype=torch.double)
    off = random_view(x, shift_by=0, rotate=0, scale=1, brightness=0, contrast=0, noise=0, erase=0)
    torch.testing.assert_close(off, x)
    flipped = random_view(x, shift_by=0, rotate=0, scale=1, brightness=0, contrast=0, noise=0, erase=0, flip=True)
    for view, picture in zip(flipped, x, strict=True):
        assert torch.allclose(view, picture, atol=1e-6) or torch.allclose(view, picture.flip(-1), atol=1e-6)


def test_tiles_wrap_around():
    canvas = torch.arange(16.0).view(1, 1, 4, 4).expand(50, -1, -1, -1)
    tiles = random_tiles(canvas, (3, 3), seeded())
    rolled = {tuple(canvas[0, 0].roll((-i, -j), (0, 1))[:3, :3].flatten().tolist()) for i in range(4) for j in range(4)}
    seen = {tuple(t.flatten().tolist()) for t in tiles}
    assert seen <= rolled and len(seen) > 8


def test_zca_whitens_and_inverts():
    x = torch.randn(400, 1, 3, 3, dtype=torch.double) @ torch.randn(3, 3, dtype=torch.double) + 2
    zca = fit_zca(x, eps=0.0)
    white = zca.apply(x).flatten(1)
    covariance = (white - white.mean(0)).T @ (white - white.mean(0)) / len(x)
    torch.testing.assert_close(covariance, torch.eye(9, dtype=torch.double))
    torch.testing.assert_close(zca.invert(zca.apply(x)), x)
    torch.testing.assert_close(zca.vectors * zca.values.rsqrt() @ zca.vectors.T, (zca.vectors * zca.values.rsqrt()
                               @ zca.vectors.T).T)
    regularised = fit_zca(x, eps=0.1)
    torch.testing.assert_close(regularised.invert(regularised.apply(x)), x)
    assert regularised.apply(x).var() < zca.apply(x).var()


def test_zca_names_pictures_of_another_size():
    with pytest.raises(DataError, match="9 numbers.*16"):
        fit_zca(torch.randn(5, 1, 3, 3)).apply(torch.randn(2, 1, 4, 4))
