import pytest
import torch
from torch import nn

from stillhouse.data.readers import read_data
from stillhouse.data.sets import TensorSet
from stillhouse.errors import ConfigError, DataError, RoleError
from stillhouse.evaluate.clustering import clustering_accuracy
from stillhouse.hub.models import resolve_model
from stillhouse.protocols import Classifier, DomainImages
from stillhouse.run import Run
from stillhouse.systems.representation import lls_ddfa
from stillhouse.systems.representation.lls_ddfa import Config, LatentClasses, distill
from stillhouse.testing import check_system


def trained(**changes):
    return distill(**{**lls_ddfa.tiny(), **changes}, run=Run(quiet=True))


def blobs(n=600, seed=0):
    """Two classes, each a brightness of its own, in domains of 100, 50 and 0 percent of the first."""
    g = torch.Generator().manual_seed(seed)
    domain = torch.arange(n) % 3
    label = (torch.rand(n, generator=g) > torch.tensor([1.0, 0.5, 0.0])[domain]).long()
    image = label[:, None, None, None] * 2.0 - 1 + 0.3 * torch.randn(n, 1, 4, 4, generator=g)
    return TensorSet(image=image, domain=domain, label=label)


def found(data=None, **changes):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    config = Config(**{"classes": 2, "cells": 4, "epochs": 5, "lr": 1e-2, **changes})
    return distill(net, data if data is not None else blobs().without("label"), None, config, Run(quiet=True))


@pytest.mark.parametrize("solver", ["nmf", "anchors"])
@pytest.mark.parametrize("space", ["domain", "image"])
def test_it_finds_hidden_classes_and_their_proportions(solver, space):
    result, test = found(solver=solver, space=space, smallest=0.1), blobs(seed=1)
    guess = result.predict(test.image, test.domain)
    assert clustering_accuracy(guess, test.label) > 0.97
    first = result.W[guess[test.label == 0].mode().values]
    assert (first - torch.tensor([1.0, 0.5, 0.0])).abs().max() < 0.15
    assert result.identified and result.centres.shape == (4, 3 if space == "domain" else 16)
    assert torch.allclose(result.C.sum(0), torch.ones(2)) and torch.allclose(result.W.sum(0), torch.ones(3))


def test_labels_are_never_read_and_the_order_of_the_domains_does_not_matter():
    data = blobs()
    a, b = found(data), found(data.without("label"))
    assert torch.equal(a.W, b.W)
    test = blobs(seed=1)
    order = torch.tensor([2, 0, 1])
    c = found(data.with_fields(domain=order[data.domain]))
    same = clustering_accuracy(c.predict(test.image, order[test.domain]), a.predict(test.image, test.domain))
    assert same > 0.99


def test_large_domains_do_not_weigh_more():
    counted = lls_ddfa.domain_weights(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), blobs().select(
        [0, 1, 2, 3, 6, 9, 12, 4]), None, Config(classes=2, cells=4))
    assert torch.allclose(counted, 8 / (3 * torch.tensor([5.0, 2, 1])))
    data = blobs(1800)
    kept = ((data.domain != 0) | (torch.arange(1800) % 9 == 0)).nonzero().flatten()
    fewer = found(data.select(kept))
    assert (fewer.domains(blobs(seed=1).image).mean(0) - 1 / 3).abs().max() < 0.1


def test_the_epoch_of_the_lowest_validation_loss_is_kept():
    run = Run(quiet=True)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    data, seen = blobs(30), []
    class Watch(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            if not self.training and len(x) == 60:
                seen.append(nn.functional.cross_entropy(self.net(x), blobs(60, 2).domain).item())
            return self.net(x)
    student = Watch()
    distill(student, data, blobs(60, 2), Config(classes=2, cells=4, epochs=25, lr=0.3, decay=1.0), run)
    assert len(seen) == 26 and seen[-1] == pytest.approx(min(seen[:-1]), abs=1e-6)  # the last call clusters
    assert seen[-1] < seen[-2]


def test_proportions_of_too_low_a_rank_are_flagged(monkeypatch):
    monkeypatch.setattr(lls_ddfa, "factorise", lambda *args: {
        "W": torch.full((2, 3), 0.5), "C": torch.full((4, 2), 0.25), "centres": torch.zeros(4, 3)})
    with pytest.warns(UserWarning, match="not identified"):
        assert not trained().identified


def test_wrong_input_is_named_before_any_step():
    given = lls_ddfa.tiny()
    with pytest.raises(DataError, match="no field 'domain'"):
        trained(data=given["data"].without("domain"))
    with pytest.raises(DataError, match="domain 1 of 0 to 3 has no pictures"):
        trained(data=given["data"].with_fields(domain=given["data"].domain % 2 * 3 + (given["data"].domain == 2) * 2))
    with pytest.raises(DataError, match="4 classes are not identified by 3 domains"):
        trained(config=Config(classes=4, cells=8))
    with pytest.raises(RoleError, match="5 outputs, the data 3 domains"):
        trained(student=nn.Sequential(nn.Flatten(), nn.Linear(16, 5)))
    with pytest.raises(DataError, match="validation has domains"):
        trained(validation=given["validation"].with_fields(domain=given["validation"].domain + 1))
    with pytest.raises(DataError, match="cannot fill 30 cells"):
        trained(config=Config(classes=2))
    with pytest.raises(ConfigError, match="as many cells"):
        Config(classes=40)
    with pytest.raises(ConfigError, match="solver"):
        Config(solver="svd")


def test_the_result_is_saved_and_loaded(tmp_path):
    result = found(epochs=1)
    folder = result.save(tmp_path)
    again = LatentClasses.load(folder, nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)))
    x = blobs(10).image
    assert torch.equal(again.posterior(x), result.posterior(x)) and torch.equal(again.W, result.W)
    assert result.discriminator.training and all(p.requires_grad for p in result.discriminator.parameters())


def test_the_contract():
    check_system(distill, lls_ddfa.tiny)


def test_it_runs_on_image_classifiers_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    resnet = transformers.ResNetForImageClassification(transformers.ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=3))
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=4, patch_size=2,
        num_channels=1, num_labels=3))
    for name, model in (("resnet", resnet), ("vit", vit)):
        model.save_pretrained(tmp_path / name)
        student = resolve_model(f"hf:{tmp_path / name}", Classifier)
        result = trained(student=student)
        assert result.discriminator is student
        assert result.posterior(lls_ddfa.tiny()["data"].image).shape == (12, 2)


def test_domains_are_read_from_arrays_folders_and_the_embedded_set(tmp_path):
    import numpy as np
    from PIL import Image

    np.savez(tmp_path / "a.npz", image=np.zeros((4, 1, 2, 2), np.float32), domain=np.array([0, 1, 1, 0]))
    assert read_data(tmp_path / "a.npz", DomainImages).fields == ("image", "domain")
    for name in ("here", "there"):
        (tmp_path / "d" / name).mkdir(parents=True)
        Image.new("L", (4, 4), 100).save(tmp_path / "d" / name / "x.png")
    folder = read_data(tmp_path / "d", DomainImages)
    assert set(folder.fields) == {"image", "domain"} and folder.column("domain").tolist() == [0, 1]
    assert folder[1]["domain"] == 1
    with pytest.raises(DataError, match="no field 'image'"):
        folder.column("image")
    drawn = read_data("domain-digits:test,n=80,styles=3", DomainImages)
    assert len(drawn) == 80 and "label" not in drawn.fields and int(drawn.domain.max()) == 7


def test_alignment_scores_both_by_the_same_order():
    of = lls_ddfa.ground(100)
    order = torch.tensor([3, 0, 4, 1, 2])
    scores = lls_ddfa.scores(order[of.test.label], of, of.W[order.argsort()])
    assert scores["accuracy"] == 1 and scores["proportions"] == pytest.approx(0, abs=1e-6)
    assert not set(map(tuple, of.train.image.flatten(1).tolist())) & set(map(tuple, of.test.image.flatten(1).tolist()))
