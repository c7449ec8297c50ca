"""Embedded digits, small distilled sets, coresets."""

from __future__ import annotations

import pytest
import torch

from stillhouse.data.augment import fit_zca
from stillhouse.data.coresets import herding, k_center, random_per_class
from stillhouse.data.digits import CORRUPTIONS, SPLITS, corrupted_digits, digits
from stillhouse.data.distilled import DistilledSet
from stillhouse.errors import ConfigError, DamagedFileError, DataError, StoreError, UnknownNameError


@pytest.mark.parametrize("size", [8, 16])
def test_digits_are_in_range_and_typed(size):
    data = digits(size, "labelled")
    assert data.image.shape == (200, 1, size, size) and data.image.dtype == torch.float32
    assert data.label.dtype == torch.int64
    assert data.image.min() == -1.0 and data.image.max() == 1.0


def test_splits_have_their_sizes_and_are_stratified():
    sizes = {name: len(digits(8, name)) for name in SPLITS}
    assert sizes == {"all": 1797, "train": 1200, "test": 597, "labelled": 200, "unlabelled": 1000}
    share = digits(8, "all").label.bincount().double() / 1797
    for name in SPLITS:
        label = digits(8, name).label
        assert (label.bincount().double() - share * len(label)).abs().max() <= 2, name


def test_train_and_test_are_disjoint_and_complete():
    everything, train, test = (digits(8, s).image.flatten(1) for s in ("all", "train", "test"))
    assert torch.equal(torch.cat([train, test]), everything)
    assert torch.equal(torch.cat([digits(8, "labelled").image, digits(8, "unlabelled").image]).flatten(1), train)
    assert (torch.cdist(train, test).amin(0) > 0).all()


def test_digits_are_a_fresh_copy_each_time():
    first = digits(8, "test")
    first.image.zero_()
    assert digits(8, "test").image.abs().sum() > 0


def test_unknown_split_and_size_are_named():
    with pytest.raises(UnknownNameError, match="'dev'.*train"):
        digits(8, "dev")
    with pytest.raises(DataError, match="size 4"):
        digits(4)


def test_corrupted_digits_repeat_and_are_no_digits():
    pool = corrupted_digits(20, 8)
    assert torch.equal(pool.image, corrupted_digits(20, 8).image)
    assert not torch.equal(pool.image, corrupted_digits(20, 8, seed=1).image)
    assert pool.kind.bincount().tolist() == [4] * len(CORRUPTIONS)
    assert pool.image.min() >= -1 and pool.image.max() <= 1
    assert (torch.cdist(pool.image.flatten(1), digits(8, "all").image.flatten(1)).amin(1) > 0).all()
    assert "label" not in pool.fields
    inverted = pool.image[pool.kind == CORRUPTIONS.index("inverted")]
    assert (torch.cdist(-inverted.flatten(1), digits(8, "unlabelled").image.flatten(1)).amin(1) == 0).all()


def distilled(**options) -> DistilledSet:
    return DistilledSet(torch.randn(6, 3, 8, 8), torch.arange(6) % 3, **options)


@pytest.mark.parametrize("soft", [False, True])
def test_a_distilled_set_survives_saving(tmp_path, soft):
    small = distilled(lr=0.03, tile=(4, 4), whitening=fit_zca(torch.randn(20, 3, 4, 4)))
    if soft:
        small.labels = torch.rand(6, 3).softmax(-1)
    again = DistilledSet.load(small.save(tmp_path / "set"))
    assert torch.equal(again.images, small.images) and torch.equal(again.labels, small.labels)
    assert again.lr == 0.03 and again.tile == (4, 4)
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(again.prepare(x), small.prepare(x))
    assert (tmp_path / "set" / "pictures.png").read_bytes()[:4] == b"\x89PNG"


def test_a_distilled_set_counts_its_bytes_and_is_a_data_set():
    small = distilled()
    assert small.bytes == 6 * 3 * 64 * 4 + 6 * 8
    assert small.classes == 3
    data = small.as_data_set()
    assert torch.equal(data.image, small.images) and data[1]["label"] == 1


def test_pictures_undo_the_whitening():
    real = torch.randn(50, 1, 4, 4, dtype=torch.double) * 3 + 1
    zca = fit_zca(real)
    small = DistilledSet(zca.apply(real[:5]), torch.arange(5), whitening=zca)
    torch.testing.assert_close(small.pictures(), real[:5])


def test_bad_sets_are_refused(tmp_path):
    with pytest.raises(DataError, match="labels must be"):
        DistilledSet(torch.zeros(3, 1, 4, 4), torch.zeros(2, dtype=torch.long))
    with pytest.raises(DataError, match="images must be"):
        DistilledSet(torch.zeros(3, 4, 4), torch.zeros(3, dtype=torch.long))
    with pytest.raises(StoreError, match="no file"):
        DistilledSet.load(tmp_path)
    from stillhouse.store import save_tree

    save_tree(tmp_path / "distilled.safetensors", {"images": torch.zeros(1)})
    with pytest.raises(DamagedFileError, match="distilled set"):
        DistilledSet.load(tmp_path)


def test_coresets_choose_from_every_class():
    data = digits(8, "labelled")
    flat = data.image.flatten(1)
    for chosen in (random_per_class(data.label, 3), herding(flat, data.label, 3), k_center(flat, data.label, 3)):
        assert len(chosen.unique()) == 30
        assert data.label[chosen].tolist() == [c for c in range(10) for _ in range(3)]


def test_herding_and_k_centre_by_hand():
    points = torch.tensor([[0.0], [1.0], [2.0], [3.0], [14.0]])  # mean 4
    labels = torch.zeros(5, dtype=torch.long)
    assert herding(points, labels, 3).tolist() == [3, 2, 1]  # means 3; 2.5; 2 against (0+3+2)/3 and (14+3+2)/3 = 6.3
    assert k_center(points, labels, 3).tolist() == [3, 4, 0]
    assert sorted(herding(points, labels, 5).tolist()) == [0, 1, 2, 3, 4]


def test_coresets_name_a_class_that_is_too_small():
    with pytest.raises(DataError, match="class 1 has only 1"):
        random_per_class(torch.tensor([0, 0, 1]), 2)
    with pytest.raises(ConfigError, match="ipc"):
        random_per_class(torch.tensor([0]), 0)
