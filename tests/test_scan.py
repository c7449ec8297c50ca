import math

import pytest
import torch
from torch import nn

from stillhouse.data.sets import TensorSet
from stillhouse.errors import ConfigError, DataError, RoleError
from stillhouse.evaluate.clustering import clustering_accuracy
from stillhouse.hub.models import resolve_model
from stillhouse.measures.clustering import mean_entropy
from stillhouse.parts.heads import ClusterNet, Projected
from stillhouse.protocols import Encoder
from stillhouse.run import Run
from stillhouse.systems.representation import scan
from stillhouse.systems.representation.scan import Clustering, Config, distill
from stillhouse.testing import check_system

PLAIN = {"pretext_steps": 0, "clusters": 3, "neighbours": 5, "batch": 30, "lr": 0.05, "weight_decay": 0.0, "view": 0.0,
         "strong": 0.0, "erase": 0.0, "flip": False, "label_epochs": 0, "scan_epochs": 15, "most_epochs": 15}


def blobs(n=90, seed=0, wide=0.3):
    g = torch.Generator().manual_seed(seed)
    label = torch.arange(n) % 3
    corners = torch.tensor([[2.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 2.0, 0]])
    return TensorSet(image=(corners[label] + wide * torch.randn(n, 4, generator=g)).view(n, 1, 2, 2), label=label)


def clustered(data=None, student=None, run=None, **changes):
    torch.manual_seed(0)
    student = student or nn.Sequential(nn.Flatten(), nn.Identity())
    return distill(student, data if data is not None else blobs().without("label"), Config(**{**PLAIN, **changes}),
                   run or Run(quiet=True))


def test_neighbours_and_entropy_find_the_groups():
    result = clustered()
    test = blobs(seed=1)
    assert clustering_accuracy(result.predict(test.image), test.label) > 0.97
    p = result.probabilities(test.image)
    assert torch.allclose(p.sum(1), torch.ones(90)) and mean_entropy(p) > 0.95 * math.log(3)


def test_without_entropy_all_become_one_cluster():
    p = clustered(entropy=0.0, head_epochs=100, head_batch=30, scan_epochs=1, most_epochs=1).probabilities(
        blobs().image)
    assert mean_entropy(p) < 0.5 * math.log(3)


def test_labels_are_never_read():
    a, b = (clustered(data) for data in (blobs(), blobs().without("label")))
    assert torch.equal(a.net.heads.weight, b.net.heads.weight)


def test_more_clusters_than_groups():
    result, data = clustered(clusters=6), blobs()
    guess = result.predict(data.image)
    assert len(guess.unique()) > 3 and clustering_accuracy(guess, data.label, many_to_one=True) > 0.95


def test_the_head_of_the_lowest_loss_over_all_pairs_is_kept():
    run = Run(quiet=True)
    one, many = clustered(scan_epochs=2, most_epochs=2), clustered(heads=8, scan_epochs=2, most_epochs=2, run=run)
    assert many.net(blobs().image).shape == (90, 8, 3) and 0 <= many.head < 8
    mined = scan.nearest_neighbours(blobs().image.flatten(1), 5)

    def losses(net):
        p = net.eval()(blobs().image).softmax(-1)
        return [scan.neighbour_loss(head, mined).item() for head in p.unbind(1)]
    assert losses(many.net)[many.head] == min(losses(many.net)) and len(losses(one.net)) == 1
    logged = [line["pairs"] for line in run.history if "pairs" in line]
    assert min(logged) == pytest.approx(min(losses(many.net)), abs=1e-5)


def test_heads_may_be_trained_alone_first():
    weight = torch.eye(4) * 100
    linear = nn.Linear(4, 4, bias=False)
    linear.weight.data.copy_(weight)
    student = nn.Sequential(nn.Flatten(), linear)
    result = clustered(student=student, head_epochs=40, head_batch=30, scan_epochs=0, most_epochs=0)
    assert torch.equal(linear.weight, weight)
    features = result.net.encoder(blobs().image) * result.net.scale
    assert features.std().item() == pytest.approx(1, abs=0.01)
    assert clustering_accuracy(result.predict(blobs().image), blobs().label) > 0.97


class Recorder(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen, self.linear = [], nn.Linear(4, 4)

    def forward(self, image):
        if self.training:
            self.seen.append(image.detach().clone())
        return self.linear(image.flatten(1))


def test_partners_are_stored_neighbours_and_mining_happens_once():
    student, data = Recorder(), blobs()
    start = student(data.image).detach()
    mined = scan.nearest_neighbours(start, 5)
    student.seen.clear()
    clustered(student=student, scan_epochs=4, most_epochs=4)
    place = {tuple(x.flatten().tolist()): i for i, x in enumerate(data.image)}
    pairs = [(place[tuple(a.flatten().tolist())], place[tuple(b.flatten().tolist())])
             for x, y in zip(student.seen[::2], student.seen[1::2], strict=True) for a, b in zip(x, y, strict=True)]
    assert len(pairs) == 360 and all(b in mined[a] for a, b in pairs)
    assert 0.05 < sum(a == b for a, b in pairs) / 360 < 0.35
    itself = Recorder()
    clustered(student=itself, neighbours=0, scan_epochs=1, most_epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(itself.seen[::2], itself.seen[1::2], strict=True))


def test_a_projected_student_is_mined_by_its_projection_and_clustered_by_its_encoder():
    dead = nn.Linear(4, 1)
    model = Projected(nn.Flatten(), dead)
    assert clustered(student=model).net.encoder is model.encoder
    assert scan.with_projection(model, blobs(), Config()) is model
    fresh = scan.with_projection(nn.Flatten(), blobs(), Config())
    assert fresh(blobs().image).shape == (90, 128) and fresh.projector[0].in_features == 4


def test_the_pretext_trains_the_student():
    student = Recorder()
    before = student.linear.weight.clone()
    clustered(student=student, pretext_steps=3, pretext_batch=20, scan_epochs=0, most_epochs=0)
    assert not torch.equal(student.linear.weight, before)


# ---------------------------------------------------------------- self-labelling


def test_clustering_goes_on_until_the_guard_lets_self_labelling_begin():
    short, long = Run(quiet=True), Run(quiet=True)
    base = {"scan_epochs": 1, "lr": 0.02, "label_epochs": 2, "label_batch": 30, "threshold": 0.9}
    clustered(run=short, most_epochs=1, **base)
    clustered(run=long, most_epochs=60, **base)

    def steps(run, stage):
        return sum(line["stage"] == stage and ("consistency" in line or "ce" in line) for line in run.history)
    assert steps(short, "scan") == 3 and steps(short, "self-label") == 0
    assert 3 < steps(long, "scan") < 180 and steps(long, "self-label") == 6
    ended = [line for line in long.history if line["stage"] == "scan" and "confident" in line]
    assert ended[-1]["confident"] > 0.5 and all(line["confident"] <= 0.5 or line is ended[-1] for line in ended[-1:])


def net_of(logits):
    """A network of one head whose logits are those of its four pixels."""
    net = ClusterNet(nn.Flatten(), 4, 3)
    with torch.no_grad():
        net.heads.weight.copy_(torch.eye(4)[:3] * logits)
        net.heads.bias.zero_()
    return net


def labelled(net, data=None, run=None, **changes):
    config = Config(**{**PLAIN, "label_epochs": 1, "label_batch": 90, "label_lr": 1e-2, **changes})
    scan.self_label(net, 0, data if data is not None else blobs().without("label"), config, run or Run(quiet=True))
    return net


def test_without_confident_samples_nothing_is_learned():
    net = labelled(net_of(0.1))
    assert torch.equal(net.heads.weight, torch.eye(4)[:3] * 0.1)
    assert not torch.equal(labelled(net_of(5.0)).heads.weight, torch.eye(4)[:3] * 5.0)


def test_only_confident_samples_are_learned_from():
    data = blobs()
    unsure = TensorSet(image=torch.cat([data.image, torch.full((90, 1, 2, 2), 0.7)]))
    a = labelled(net_of(5.0), data, Run(quiet=True))
    b = labelled(net_of(5.0), unsure, Run(quiet=True), label_batch=180)
    assert torch.allclose(a.heads.weight, b.heads.weight, atol=1e-6)


def test_rare_clusters_weigh_as_much_as_frequent_ones():
    data = blobs()
    uneven = data.select([i for i in range(90) if i % 3 == 0 or i < 12])
    uneven = uneven.with_fields(image=uneven.image * (1 - 0.3 * (uneven.label == 0))[:, None, None, None])
    net = net_of(3.0)
    logits = net(uneven.image)[:, 0].detach()
    confidence, label = logits.softmax(-1).max(-1)
    sure = confidence > 0.9
    ce = nn.functional.cross_entropy(logits, label, reduction="none")
    each = torch.stack([ce[sure & (label == c)].mean() for c in range(3)])
    for balanced, expected in ((True, each.mean()), (False, ce[sure].mean())):
        run = Run(quiet=True)
        labelled(net_of(3.0), uneven, run, label_batch=38, balanced=balanced, threshold=0.9)
        assert run.history[0]["ce"] == pytest.approx(expected.item(), rel=1e-4)
    assert each.mean() != pytest.approx(ce[sure].mean().item(), rel=1e-2)


def test_it_ends_when_the_confident_samples_saturate_and_an_average_slows_it():
    run = Run(quiet=True)
    labelled(net_of(50.0), run=run, label_epochs=30, patience=3)
    assert sum("ce" in line for line in run.history) == 4  # all are confident from the first epoch on
    start = torch.eye(4)[:3] * 3.0
    full, slow = labelled(net_of(3.0)), labelled(net_of(3.0), ema=0.75)
    assert torch.allclose(slow.heads.weight - start, 0.25 * (full.heads.weight - start), atol=1e-6)


# ---------------------------------------------------------------- errors, contract, real models


def test_wrong_input_is_named_before_any_step():
    run = Run(quiet=True)
    with pytest.raises(ConfigError, match="90 pictures have no 200 neighbours"):
        clustered(neighbours=200, run=run)
    with pytest.raises(RoleError, match="student"):
        clustered(student=nn.Linear(3, 3), run=run)
    with pytest.raises(DataError, match="image"):
        clustered(TensorSet(label=torch.zeros(9)), run=run)
    assert not run.begun
    for wrong in ({"clusters": 1}, {"threshold": 1.0}, {"scan_epochs": 9, "most_epochs": 3}, {"erase": 2.0}):
        with pytest.raises(ConfigError):
            Config(**wrong)


def test_the_result_is_saved_and_loaded(tmp_path):
    result = clustered(student=Recorder(), heads=3, head_epochs=1)
    again = Clustering.load(result.save(tmp_path), Recorder())
    assert torch.equal(again.probabilities(blobs().image), result.probabilities(blobs().image))


def test_the_contract():
    check_system(distill, scan.tiny)


def test_it_runs_on_encoders_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    resnet = transformers.ResNetModel(transformers.ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic"))
    vit = transformers.ViTModel(transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=6, patch_size=3,
        num_channels=1))
    for name, model in (("resnet", resnet), ("vit", vit)):
        model.save_pretrained(tmp_path / name)
        student = resolve_model(f"hf:{tmp_path / name}", Encoder)
        given = scan.tiny()
        result = distill(student, given["data"], given["config"], Run(quiet=True))
        assert result.net.encoder is student and result.probabilities(given["data"].image).shape == (14, 3)
