import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stillhouse.data.sets import TensorSet
from stillhouse.errors import ConfigError, DataError, RoleError
from stillhouse.parts.multi_head import MultiHead
from stillhouse.recipes import fixmatch, supervised
from stillhouse.run import Run
from stillhouse.systems.compression import distillweighted
from stillhouse.systems.compression.distillweighted import Config, distill, similarities, source_weights
from stillhouse.testing import check_system

PLAIN = Config(steps=4, batch=16, unlabelled_batch=10, power=1.0, lr=0.1, view=0.0, flip=False, weight_decay=0.0)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def close(a, b, atol=1e-6):
    return all(torch.allclose(p, q, atol=atol) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def trained(config=PLAIN, run=None, **changes):
    given = {**distillweighted.tiny(), **changes, "config": config}
    return distill(**given, run=run or Run(quiet=True))


# ---------------------------------------------------------------- similarity and weights


def test_each_source_is_scored_on_the_labelled_pictures_alone_without_being_changed():
    given = distillweighted.tiny()
    run = Run(quiet=True)
    before = copy.deepcopy(given["teachers"])
    found = similarities(given["teachers"], given["labelled"], PLAIN, run)
    assert found["classes"].tolist() == [3, 5] and found["e"].shape == (2,) and found["e"].abs().max() <= 1
    assert all(map(same, given["teachers"], before))
    other = similarities(given["teachers"], given["labelled"], dataclasses.replace(PLAIN, taps=("0", "1")), run)
    assert not torch.equal(other["e"], found["e"])


def test_weights_follow_the_power_and_log_likelihoods_enter_as_likelihoods():
    e = torch.tensor([0.2, 0.4, -0.1], dtype=torch.float64)

    def alpha(power, similarity="parc"):
        return source_weights(e, dataclasses.replace(PLAIN, power=power, similarity=similarity))

    assert torch.allclose(alpha(1.0), torch.tensor([1 / 3, 2 / 3, 0]).double())
    assert torch.equal(alpha(math.inf), torch.tensor([0.0, 1, 0]).double())
    assert torch.allclose(alpha(2.0, "leep"), (2 * e).softmax(0))
    assert torch.equal(source_weights(torch.ones(3), dataclasses.replace(PLAIN, power=math.inf)),
                       torch.tensor([1.0, 0, 0]))


def test_what_was_found_is_logged():
    run = Run(quiet=True)
    trained(run=run)
    line = next(entry for entry in run.history if "similarity 0" in entry)
    assert line["weight 0"] + line["weight 1"] == pytest.approx(1)


# ---------------------------------------------------------------- the loss


def test_the_loss_is_the_weighted_sum_of_the_cross_entropies_of_all_heads(monkeypatch):
    given = distillweighted.tiny()
    labelled, unlabelled, teachers = given["labelled"], given["unlabelled"], given["teachers"]
    config = dataclasses.replace(PLAIN, steps=1, unlabelled_batch=20, labels=0.3, temperature=2.0, power=0.5, least=0.0)
    monkeypatch.setattr(distillweighted, "source_weights", lambda e, config: torch.tensor([0.25, 0.75]))
    made, found = [], []
    monkeypatch.setattr(distillweighted, "MultiHead", lambda *args: made.append(MultiHead(*args)) or made[-1])

    class Spy(Run):
        def update(self, optimizers, **terms):
            x = torch.cat([labelled.image, unlabelled.image])
            logits, by_source = made[0](x)
            each = [-((t(x) / 2).softmax(1) * (z / 2).log_softmax(1)).sum(1).mean() * 4
                    for t, z in zip(teachers, by_source, strict=True)]
            found.append((terms["ce"], 0.3 * F.cross_entropy(logits[:16], labelled.label)))
            found.append((terms["sources"], 0.7 * (0.25 * each[0] + 0.75 * each[1])))
            super().update(optimizers, **terms)

    trained(config, Spy(quiet=True), teachers=teachers)
    assert [h.out_features for h in made[0].heads] == [3, 5]
    for term, expected in found:
        assert term.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_term_of_a_source_is_soft_cross_entropy_in_its_own_classes():
    given = distillweighted.tiny()
    seen = []

    class Spy(Run):
        def update(self, optimizers, **terms):
            seen.append(terms["sources"].item())
            super().update(optimizers, **terms)

    class Fixed(nn.Module):
        """Ignores the picture: its feature and logits are constant but for a trace."""

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(1, 3)

        def forward(self, image):
            return self.linear(0 * image.flatten(1).sum(1, keepdim=True))

    fixed = Fixed()
    config = dataclasses.replace(PLAIN, steps=400, labels=0.0, power=math.inf)
    trained(config, Spy(quiet=True), teachers=[fixed])
    p = fixed.linear.bias.softmax(0)
    entropy = -(p * p.log()).sum().item()
    assert seen[0] > entropy and seen[-1] == pytest.approx(entropy, abs=1e-3)
    assert given["labelled"].label.max() == 3


def test_labels_alone_are_supervised_fine_tuning_and_the_other_pictures_are_not_read():
    class Unread:
        def __init__(self, data):
            self.data, self.calls = data, 0

        def __len__(self):
            return len(self.data)

        def __getitem__(self, index):
            self.calls += 1
            return self.data[index]

    unread = Unread(distillweighted.tiny()["unlabelled"])
    config = dataclasses.replace(PLAIN, labels=1.0, weight_decay=0.01)
    student = trained(config, unlabelled=unread)
    assert unread.calls <= 12
    plain = supervised.Config(steps=4, batch=16, lr=0.1, warmup=0.0, weight_decay=0.01)
    assert close(student, supervised.train(distillweighted.tiny()["student"], distillweighted.tiny()["labelled"], plain,
                                           Run(quiet=True)))


def test_the_unlabelled_pictures_and_each_weight_count():
    start = trained()
    others = TensorSet(image=torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(9)))
    assert not same(start, trained(unlabelled=others))
    assert not same(start, trained(dataclasses.replace(PLAIN, power=0.0)))
    assert not same(start, trained(dataclasses.replace(PLAIN, labels=0.2)))
    assert not same(start, trained(dataclasses.replace(PLAIN, temperature=3.0)))


def test_one_source_with_all_the_weight_is_distillnearest():
    given = distillweighted.tiny()
    e = similarities(given["teachers"], given["labelled"], PLAIN, Run(quiet=True))["e"]
    best = given["teachers"][int(e.argmax())]
    nearest = trained(dataclasses.replace(PLAIN, power=math.inf))
    assert same(nearest, trained(dataclasses.replace(PLAIN, power=math.inf), teachers=[best]))
    assert same(nearest, trained(dataclasses.replace(PLAIN, power=1e6), teachers=given["teachers"]))
    assert e.max() > 0 and same(nearest, trained(dataclasses.replace(PLAIN, power=3.0), teachers=[best]))


def test_sources_without_weight_are_not_called():
    class Counted(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.calls = model, 0

        def forward(self, image):
            self.calls += 1
            return self.model(image)

    sources = [Counted(t) for t in distillweighted.tiny()["teachers"]]
    trained(dataclasses.replace(PLAIN, power=math.inf), teachers=sources)
    fewest, most = sorted(s.calls for s in sources)
    assert most - fewest == 4


# ---------------------------------------------------------------- the heads


def test_the_heads_read_the_penultimate_feature_of_one_pass():
    student = distillweighted.tiny()["student"]
    image = torch.rand(3, 1, 8, 8)
    network = MultiHead(student, [2, 6], image)
    logits, (a, b) = network(image)
    feature = student[:3](image)
    assert torch.equal(logits, student(image)) and torch.allclose(a, network.heads[0](feature))
    assert b.shape == (3, 6) and not student[3]._forward_pre_hooks
    by_path = MultiHead(student, [2], image, where="0")
    assert by_path.heads[0].in_features == 2
    with pytest.raises(RoleError, match="linear layer"):
        MultiHead(nn.Sequential(nn.Flatten()), [2], image)


# ---------------------------------------------------------------- FixMatch


def test_a_pseudo_label_counts_only_where_the_weak_view_is_sure():
    weak = torch.tensor([[9.0, 0.0, 0.0], [1.0, 0.9, 0.8], [0.0, 0.0, 9.0]], dtype=torch.float64, requires_grad=True)
    strong = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = fixmatch.pseudo_label_loss(weak, strong, 0.95)
    expected = F.cross_entropy(strong[[0, 2]], torch.tensor([0, 2]), reduction="sum") / 3
    assert loss.item() == pytest.approx(expected.item(), abs=1e-15)
    loss.backward()
    assert weak.grad is None and strong.grad[1].abs().max() == 0 and strong.grad[0].abs().max() > 0
    assert fixmatch.pseudo_label_loss(weak, strong, 1.0).item() == 0


def test_fixmatch_without_sure_predictions_is_supervised_and_learns_from_the_rest_otherwise():
    given = distillweighted.tiny()
    config = fixmatch.Config(steps=4, batch=16, ratio=1, threshold=1.0, lr=0.1, weak=0.0, flip=False, weight_decay=0.0)

    def run(config):
        return fixmatch.train(distillweighted.tiny()["student"], given["labelled"], given["unlabelled"], config,
                              Run(quiet=True))

    by_hand = distillweighted.tiny()["student"]
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9)
    for k in range(4):
        optimizer.param_groups[0]["lr"] = 0.1 * math.cos(7 * math.pi / 16 * k / 4)
        optimizer.zero_grad()
        F.cross_entropy(by_hand(given["labelled"].image), given["labelled"].label).backward()
        optimizer.step()
    assert close(run(config), by_hand, 1e-5)
    assert not close(run(dataclasses.replace(config, threshold=0.0)), by_hand, 1e-5)
    average = run(dataclasses.replace(config, ema=0.9))
    assert not close(average, by_hand, 1e-5)
    with pytest.raises(ConfigError, match="threshold"):
        fixmatch.Config(threshold=2.0)


def test_fixmatch_resumes_exactly():
    def make():
        given = distillweighted.tiny()
        return {**{k: given[k] for k in ("student", "labelled", "unlabelled")},
                "config": fixmatch.Config(steps=4, batch=4, ratio=2, threshold=0.2, lr=0.1, ema=0.5)}

    check_system(fixmatch.train, make)


# ---------------------------------------------------------------- errors, contract, real models


def test_wrong_input_is_named_before_any_step():
    for wrong in ({"labels": 1.5}, {"power": -1.0}, {"similarity": "cosine"}, {"subsets": 0}, {"least": 0.5}):
        with pytest.raises(ConfigError):
            Config(**wrong)
    given = distillweighted.tiny()
    with pytest.raises(RoleError, match="at least one source"):
        trained(teachers=[])
    with pytest.raises(ConfigError, match="one module path for each source"):
        trained(dataclasses.replace(PLAIN, taps=("0",)))
    with pytest.raises(DataError, match="label"):
        trained(labelled=given["labelled"].without("label"))
    with pytest.raises(RoleError, match=r"teachers\[1\]"):
        trained(teachers=[given["teachers"][0], nn.Sequential(nn.Flatten(), nn.Linear(5, 3))])


def test_the_contract():
    check_system(distill, distillweighted.tiny)


def test_it_runs_on_image_classifiers_of_transformers_saved_and_loaded(tmp_path):
    transformers = pytest.importorskip("transformers")
    from stillhouse.hub.models import resolve_model
    from stillhouse.protocols import Classifier

    torch.manual_seed(0)
    transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        num_channels=1, num_labels=7)).save_pretrained(tmp_path / "vit")
    transformers.ResNetForImageClassification(transformers.ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )).save_pretrained(tmp_path / "resnet")
    transformers.MobileNetV2ForImageClassification(transformers.MobileNetV2Config(
        num_channels=1, image_size=8, depth_multiplier=0.1, min_depth=8, num_labels=4
    )).save_pretrained(tmp_path / "mobile")
    teachers = [resolve_model(f"hf:{tmp_path / name}", Classifier) for name in ("vit", "resnet")]
    student = resolve_model(f"hf:{tmp_path / 'mobile'}", Classifier)
    before, start = copy.deepcopy(teachers), copy.deepcopy(student)
    out = trained(dataclasses.replace(PLAIN, power=0.5), teachers=teachers, student=student)
    assert out is student and not same(student, start) and all(map(same, teachers, before))
    assert student(torch.rand(2, 1, 8, 8)).shape == (2, 4)


def test_the_target_task_is_another_domain_with_other_classes():
    task = distillweighted.target_task(64, 0)
    assert task.image.shape == (64, 3, 16, 16) and set(task.label.tolist()) == set(range(8))
    assert (task.label // 2).unique(return_counts=True)[1].tolist() == [16] * 4
