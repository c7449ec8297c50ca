"""Distillation on pruned data: selection and scores, the exact checks, the alphas, real models."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stillhouse
from stillhouse.cli import main
from stillhouse.data import pruning as selection
from stillhouse.data.digits import digits
from stillhouse.data.pruning import Kept
from stillhouse.data.sets import TensorSet, fetch
from stillhouse.errors import ConfigError, DataError
from stillhouse.hub.models import resolve_model
from stillhouse.measures.hardness import el2n, from_the_median, gradient_norms
from stillhouse.measures.ridge import ridge_student, ridge_student_bias, ridge_student_errors, ridge_teacher
from stillhouse.models.convnets import TinyConvNet
from stillhouse.protocols import Classifier
from stillhouse.recipes import pruning
from stillhouse.run import Run, fingerprint, set_lr
from stillhouse.run.schedules import warmup_cosine
from stillhouse.systems.compression import kd_data_pruning
from stillhouse.systems.compression.kd_data_pruning import Config, alpha_of, distill
from stillhouse.testing import check_system

SHORT = Config(steps=6, batch=6, fraction=0.5, lr=0.05, repeats=2)


def pictures(n=24, classes=4):
    torch.manual_seed(1)
    return TensorSet(image=torch.rand(n, 1, 8, 8), label=torch.arange(n) % classes)


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 4))


# ------------------------------------------------------------------------------------------ scores


def test_el2n_of_a_sure_and_of_an_even_prediction():
    sure = torch.tensor([[100.0, 0.0], [0.0, 100.0]], dtype=torch.float64)
    torch.testing.assert_close(el2n(sure, torch.tensor([0, 1])), torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(el2n(sure, torch.tensor([1, 0])), torch.full((2,), math.sqrt(2), dtype=torch.float64))
    even = torch.zeros(1, 2, dtype=torch.float64)
    torch.testing.assert_close(el2n(even, torch.tensor([0])), torch.tensor([math.sqrt(0.5)], dtype=torch.float64))


def test_gradient_norms_are_those_of_one_sample_at_a_time():
    model, data = nn.Sequential(small(), nn.Identity()).double().eval(), pictures(7)
    expected = []
    for x, y in zip(data.image.double(), data.label, strict=True):
        grads = torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), list(model.parameters()))
        expected.append(torch.cat([g.flatten() for g in grads]).norm())
    torch.testing.assert_close(gradient_norms(model, data.image.double(), data.label, chunk=3), torch.stack(expected))
    norm = TinyConvNet(classes=4, width=2).eval()
    assert gradient_norms(norm, data.image, data.label).shape == (7,)


def test_moderate_prefers_the_median_of_the_distances_to_the_class_means():
    features = torch.tensor([[0.0], [1.0], [2.0], [5.0], [10.0], [10.0], [12.0], [16.0]])
    label = torch.tensor([0] * 4 + [1] * 4)
    distance = torch.tensor([2.0, 1.0, 0.0, 3.0, 2.0, 2.0, 0.0, 4.0])
    torch.testing.assert_close(from_the_median(features, label), (distance - 2.0).abs())


def test_forgetting_counts_what_was_right_and_is_wrong_at_the_next_visit():
    """A network whose answer is its step's number: pictures of label 1 are right at the second of three visits."""
    data = TensorSet(image=torch.zeros(4, 1, 8, 8), label=torch.tensor([0, 1, 2, 3]))

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(4))
            self.register_buffer("step", torch.zeros((), dtype=torch.long))

        def forward(self, image):
            self.step += 1
            answer = F.one_hot((self.step - 1) % 4, 4) * 10.0
            return answer.expand(len(image), 4) + 0 * self.bias

    config = pruning.Config(way="forgetting", steps=3, repeats=1, batch=4)
    score = pruning.trained_score(data, Counting, config, Run(quiet=True))
    assert score.tolist() == [1.0, 1.0, 0.0, 4.0]


# ------------------------------------------------------------------------------------------ selection


def test_class_balanced_random_keeps_the_share_of_every_class():
    label = torch.tensor([0] * 20 + [1] * 7 + [2] * 3)
    kept = selection.at_random(label, 0.3, balanced=True)
    assert torch.bincount(label[kept]).tolist() == [6, 2, 1] and (kept.diff() > 0).all()
    assert len(selection.at_random(label, 0.3)) == 9
    assert selection.at_random(label, 1.0).tolist() == list(range(30))
    with pytest.raises(DataError, match="keeps none"):
        selection.at_random(label, 0.01)
    with pytest.raises(DataError, match="in \\(0, 1\\]"):
        selection.at_random(label, 0.0)


def test_scores_keep_the_highest_or_the_lowest():
    score, label = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0, 0.0]), torch.tensor([0, 0, 0, 1, 1, 1])
    assert selection.by_score(score, label, 0.5).tolist() == [0, 3, 4]
    assert selection.by_score(score, label, 0.5, highest=False).tolist() == [1, 2, 5]
    assert selection.by_score(score, label, 1 / 3, balanced=True).tolist() == [0, 3]


def test_coverage_leaves_out_the_hardest_and_takes_of_every_stratum_alike():
    score = torch.cat([torch.linspace(0, 0.1, 80), torch.linspace(0.5, 0.51, 10), torch.tensor([0.99] * 4 + [9.0] * 6)])
    label = torch.zeros(100, dtype=torch.long)
    kept = selection.by_coverage(score, label, 0.12, hardest=0.06, bins=3)
    of = torch.bucketize(score[kept], torch.tensor([0.2, 0.7, 5.0]))
    assert torch.bincount(of, minlength=4).tolist() == [4, 4, 4, 0]
    assert torch.bincount(torch.bucketize(score[selection.by_coverage(score, label, 0.3, hardest=0.06, bins=3)],
                                          torch.tensor([0.2, 0.7, 5.0])), minlength=4).tolist() == [16, 10, 4, 0]
    assert len(selection.by_coverage(score, label, 1.0, hardest=0.5)) == 100
    same = selection.by_coverage(torch.ones(10), label[:10], 0.5)
    assert len(same) == len(same.unique()) == 5


@pytest.mark.parametrize("way", ["kcenter", "herding"])
def test_features_are_covered(way):
    features = torch.cat([torch.zeros(8, 2), torch.ones(1, 2) * 9])
    label = torch.zeros(9, dtype=torch.long)
    kept = selection.by_features(features, label, 2 / 9, way=way)
    assert len(kept) == 2 and (way == "herding" or 8 in kept)


def test_kept_pictures_know_their_place_in_the_whole_set():
    data = pictures(10)
    kept = Kept(data, torch.tensor([1, 4, 7]))
    assert len(kept) == 3 and kept[1]["index"] == 4 and kept.fields == ("image", "label")
    batch = fetch(kept, [2, 0])
    assert batch["index"].tolist() == [7, 1]
    torch.testing.assert_close(batch["image"], data.image[[7, 1]])
    rows = [dict(data[i]) for i in range(10)]
    assert fetch(Kept(rows, torch.tensor([3, 5])), [1])["index"].tolist() == [5]


@pytest.mark.parametrize("way", pruning.WAYS)
def test_every_way_goes_through_one_interface(way):
    data, run = pictures(), Run(quiet=True)
    config = pruning.Config(way=way, fraction=0.25, repeats=2, steps=4, batch=8, bins=4)
    kept = pruning.kept(data, lambda: small(torch.initial_seed() % 97), small(3), config, run)
    assert len(kept) == 6 and (kept.diff() > 0).all() and kept.max() < 24
    config = dataclasses.replace(config, balanced=True, fraction=0.34)
    even = pruning.kept(data, small, small(3), config, Run(quiet=True))
    assert torch.bincount(data.label[even]).tolist() == [2, 2, 2, 2]


# ------------------------------------------------------------------------------------------ the student's loss


def test_alpha_0_is_cross_entropy_on_the_subset_and_never_asks_the_teacher():
    data, teacher = pictures(), small(1)
    asked = []
    teacher.register_forward_hook(lambda *_: asked.append(1))
    made = distill(small(), data, teacher, config=dataclasses.replace(SHORT, alpha=0.0), run=Run(quiet=True))
    assert len(asked) == 1
    other = distill(small(), data, small(7), config=dataclasses.replace(SHORT, alpha=0.0), run=Run(quiet=True))
    assert fingerprint(made) == fingerprint(other)
    run = Run(quiet=True)
    kept = data.select(selection_of(data, run))
    by_hand = small()
    with run.scope("student"):
        optimizer = torch.optim.SGD(by_hand.parameters(), SHORT.lr, momentum=0.9, weight_decay=SHORT.weight_decay)
        for batch in run.loop("train", kept, batch=6, steps=6, drop_last=True, student=by_hand, optimizer=optimizer):
            set_lr(optimizer, SHORT.lr * warmup_cosine(run.progress, 0.0))
            run.update(optimizer, ce=F.cross_entropy(by_hand(batch["image"]), batch["label"]))
    assert fingerprint(by_hand) == fingerprint(made)


def selection_of(data, run):
    run.begin()
    return pruning.kept(data, small, None, SHORT.pruned(0), run)


def test_alpha_1_never_reads_the_labels():
    data, teacher = pictures(), small(1)
    wrong = data.with_fields(label=(data.label + 1) % 4)
    made = [distill(small(), d, teacher, config=dataclasses.replace(SHORT, alpha=1.0), run=Run(quiet=True))
            for d in (data, wrong)]
    assert fingerprint(made[0]) == fingerprint(made[1])
    between = [distill(small(), d, teacher, config=dataclasses.replace(SHORT, alpha=0.9), run=Run(quiet=True))
               for d in (data, wrong)]
    assert fingerprint(between[0]) != fingerprint(between[1])


def test_alpha_falls_as_more_is_kept_and_is_searched_on_validation_pictures():
    assert alpha_of(0.0) == 1.0 and alpha_of(1.0) == 0.5 and alpha_of(0.2, 0.8, 0.3) == pytest.approx(0.7)
    data, teacher = pictures(), small(1)
    config = dataclasses.replace(SHORT, fraction=0.4)
    by_default = distill(small(), data, teacher, config=config, run=Run(quiet=True))
    given = distill(small(), data, teacher, config=dataclasses.replace(config, alpha=0.8), run=Run(quiet=True))
    assert fingerprint(by_default) == fingerprint(given)
    run = Run(quiet=True)
    with torch.no_grad():
        answered = data.with_fields(label=teacher(data.image).argmax(1))
    searched = dataclasses.replace(SHORT, search=(0.0, 1.0), steps=120, optimizer="adamw", lr=0.01)
    best = distill(small(), data, teacher, validation=answered, config=searched, run=run)
    stages = [line["stage"] for line in run.history]
    assert stages.count("alpha 0/train") == stages.count("alpha 1/train") == 60
    with torch.no_grad():
        agreed = (best(data.image).argmax(1) == answered.label).float().mean()
    assert agreed > 0.6


def test_answers_that_are_kept_are_those_of_every_step():
    data, teacher = pictures(), small(1)
    plain, kept = (distill(small(), data, teacher, config=dataclasses.replace(SHORT, alpha=1.0, cache=cache),
                           run=Run(quiet=True)) for cache in (False, True))
    for a, b in zip(plain.parameters(), kept.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_without_a_teacher_a_copy_of_the_student_is_trained_on_all():
    run, data = Run(quiet=True), pictures()
    config = dataclasses.replace(SHORT, steps=10, teaching=0.4, prune="el2n", scoring=0.2, alpha=0.5)
    student = small()
    assert distill(student, data, config=config, run=run) is student
    stages = [line["stage"] for line in run.history]
    assert {s: stages.count(s) for s in dict.fromkeys(stages)} == {
        "teacher/supervised": 4, "scoring 0/train": 1, "scoring 1/train": 1, "student/train": 4}
    made = pruning.fresh_copies(student)()
    assert not torch.equal(made[0].weight, student[0].weight) and made[0].weight.shape == student[0].weight.shape


@pytest.mark.parametrize("changes", [{"prune": "el2n", "cache": True, "view": 0.0}, {"prune": "moderate"},
                                     {"prune": "grand", "search": ()}])
def test_other_settings_keep_the_contract(changes):
    def inputs():
        given = kd_data_pruning.tiny()
        return {**given, "config": dataclasses.replace(given["config"], **changes)}

    check_system(distill, inputs)


def test_what_does_not_fit_is_refused_before_any_work():
    data, other = pictures(), nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    wrong = [({"labelled": data.without("label")}, DataError, "label"), ({"teacher": other}, Exception, "classes"),
             ({"network": lambda: other}, Exception, "classes"),
             ({"config": dataclasses.replace(SHORT, search=(0.5,))}, ConfigError, "give validation"),
             ({"config": dataclasses.replace(SHORT, fraction=0.01)}, DataError, "keeps none")]
    for given, error, words in wrong:
        run = Run(quiet=True)
        with pytest.raises(error, match=words):
            distill(**{"student": small(), "labelled": data, "run": run, "config": SHORT, **given})
        assert not run.begun
    for bad in ({"prune": "x"}, {"keep": "x"}, {"fraction": 0.0}, {"fraction": 1.1}, {"alpha": 2.0}, {"repeats": 0},
                {"alpha_small": 0.2}, {"search": (2.0,)}, {"temperature": 0.0}, {"scoring": 1.0}, {"teaching": 0.0},
                {"cache": True, "view": 1.0}, {"hardest": 1.0}, {"bins": 0}):
        with pytest.raises(ConfigError):
            Config(**bad)


# ------------------------------------------------------------------------------------------ ridge regression


def test_the_bias_of_the_ridge_student_falls_as_its_teacher_sees_more():
    lam, alpha, theta = 1.0, 0.6, torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)
    s = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    norms = [ridge_student_bias(s.sqrt().diag(), (s + more).sqrt().diag(), theta, lam, alpha).norm().item()
             for more in (0.0, 1.0, 3.0)]
    assert norms == pytest.approx([1.7889, 1.6667, 1.58], abs=5e-5)


def test_the_closed_forms_are_those_of_the_columns_of_the_paper_and_of_a_simulation():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, dtype=torch.float64, generator=generator)
    theta = torch.randn(5, dtype=torch.float64, generator=generator)
    kept, lam, alpha = torch.arange(0, 40, 4), 0.7, 0.6
    y = x @ theta + torch.randn(40, dtype=torch.float64, generator=generator)
    columns, all_columns = x[kept].T, x.T
    a, b = columns @ columns.T + lam * torch.eye(5).double(), all_columns @ all_columns.T + lam * torch.eye(5).double()
    theta_t = torch.linalg.solve(b, all_columns @ y)
    by_hand = torch.linalg.solve(a, columns @ (alpha * columns.T @ theta_t + (1 - alpha) * y[kept]))
    torch.testing.assert_close(ridge_student(x[kept], y[kept], ridge_teacher(x, y, lam), lam, alpha), by_hand,
                               rtol=0, atol=1e-12)
    without = ridge_student(x[kept], (x @ theta)[kept], ridge_teacher(x, x @ theta, lam), lam, alpha)
    torch.testing.assert_close(ridge_student_bias(x[kept], x, theta, lam, alpha), without - theta, rtol=0, atol=1e-12)
    bias, spread = ridge_student_errors(x, kept, torch.arange(40), theta, lam, alpha, noise=0.5, draws=4000)
    assert bias == pytest.approx((without - theta).norm().item())
    per = torch.linalg.solve(a, columns @ (alpha * columns.T @ torch.linalg.solve(b, all_columns)))
    per[:, kept] += torch.linalg.solve(a, (1 - alpha) * columns)
    assert spread == pytest.approx(0.5 * per.norm().item(), rel=0.05)
    spreads = [ridge_student_errors(x, kept, torch.arange(40), theta, lam, a, noise=0.5)[1] for a in (0.0, 0.5, 1.0)]
    assert spreads == sorted(spreads, reverse=True)


# ------------------------------------------------------------------------------------------ classifiers of libraries


def test_a_resnet_of_transformers_learns_from_what_is_kept_and_is_loaded_back(tmp_path, monkeypatch):
    hf = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    for name, widths in (("big", [8, 16]), ("small", [8, 8])):
        hf.ResNetForImageClassification(hf.ResNetConfig(
            num_channels=1, embedding_size=8, hidden_sizes=widths, depths=[1, 1], layer_type="basic", num_labels=10
        )).save_pretrained(tmp_path / name)
    main(["run", "kd-data-pruning", "--student", "hf:small", "--teacher", "hf:big", "--labelled", "digits16:labelled",
          "--quiet", "--config.steps", "3", "--config.batch", "8", "--config.prune", "moderate", "--out", "done"])
    student, teacher = (resolve_model(f"hf:{name}", Classifier) for name in ("small", "big"))
    data = digits(16, "labelled").select(range(20))
    for way in ("el2n", "grand", "forgetting", "ccs", "kcenter", "herding"):
        made = distill(student, data, teacher, config=dataclasses.replace(SHORT, prune=way, steps=4, scoring=0.5),
                       run=Run(quiet=True))
    loaded = stillhouse.load("done")
    assert loaded(data.image).shape == made(data.image).shape == (20, 10)
