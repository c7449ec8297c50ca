import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stillhouse.data.sets import TensorSet
from stillhouse.errors import ConfigError, DataError, RoleError
from stillhouse.hub.models import resolve_model
from stillhouse.measures.adversarial import generator_loss
from stillhouse.models.generators import PictureGenerator
from stillhouse.parts.black_box import BlackBox
from stillhouse.parts.discriminators import PictureDiscriminator
from stillhouse.protocols import Classifier
from stillhouse.recipes import gan
from stillhouse.run import Run
from stillhouse.systems.compression import mekd
from stillhouse.systems.compression.mekd import Config, ask, emulated, image_term, logit_term, queries, sureness


class Spy(nn.Module):
    """A teacher that keeps what it is asked."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.asked = inner, []

    def forward(self, x):
        self.asked.append(x.clone())
        return self.inner(x)


def trained(teacher=None, **changes):
    given = mekd.tiny()
    given["config"] = dataclasses.replace(given["config"], **changes)
    given["teacher"] = teacher or given["teacher"]
    run = Run(quiet=True)
    return emulated(**given, run=run), run, given


def logits(n=6, classes=4, seed=0):
    return 3 * torch.randn(n, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- the two terms of step 2


@pytest.mark.parametrize("answer", ["logits", "label"])
def test_equal_logits_cost_nothing_and_pull_nowhere(answer):
    generator = PictureGenerator(4, 1, 8, 4).double().eval()
    config = Config(answer=answer, target="flat")
    t = logits()
    s = t.clone().requires_grad_()
    for distance in ("l1", "l2"):
        loss = image_term(s, t, generator, dataclasses.replace(config, distance=distance))
        loss.backward()
        assert loss.item() == 0 and s.grad.abs().max() == 0
    loss = logit_term(s, t, config)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-15) and s.grad.abs().max() < 1e-15


def test_the_logit_term_is_a_kl_times_tau_not_squared():
    s, t = logits(seed=1), logits()
    p, q = (t / 5).softmax(-1), (s / 5).softmax(-1)
    expected = 5 * (p * (p / q).log()).sum(-1).mean()
    assert logit_term(s, t, Config()).item() == pytest.approx(expected.item(), abs=1e-14)


def test_the_flat_target_of_labels_is_almost_even():
    p = (F.one_hot(torch.tensor(3), 10).double() / 5).softmax(-1)
    assert p[3].item() == pytest.approx(0.1195, abs=5e-5) and p[0].item() == pytest.approx(0.0978, abs=5e-5)
    s, t = logits(classes=10), F.one_hot(torch.arange(6), 10).double()
    assert logit_term(s, t, Config(answer="label")).item() == pytest.approx(
        F.cross_entropy(s, torch.arange(6)).item(), abs=1e-14)
    flat = logit_term(s, t, Config(answer="label", target="flat"))
    assert flat.item() == pytest.approx(logit_term(s, t, Config()).item(), abs=1e-14)


def test_through_a_linear_generator_the_squared_term_re_measures_the_logits():
    A = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    config = Config(distance="l2", image_temperature=1.0)
    for matrix in (A, torch.linalg.qr(A).Q):
        s, t = logits(seed=1).requires_grad_(), logits()
        (image_term(s, t, lambda z, m=matrix: z @ m.T, config) * 6 * 7).backward()
        assert torch.allclose(s.grad, 2 * (s - t) @ matrix.T @ matrix, atol=1e-12)
    assert torch.allclose(s.grad, 2 * (s - t), atol=1e-12)


def test_gradients_go_through_the_generator_into_the_student_alone():
    generator = PictureGenerator(4, 1, 8, 4).double().eval()
    s, t = logits(seed=1).requires_grad_(), logits().requires_grad_()
    image_term(s, t, generator.requires_grad_(False), Config()).backward()
    assert s.grad.abs().min() > 0 and t.grad is None and all(p.grad is None for p in generator.parameters())


# ---------------------------------------------------------------- the generator and the black box


def test_with_labels_alone_the_generators_loss_is_one_and_a_half_times_the_plain_one():
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).double()
    x, d = torch.randn(5, 1, 8, 8).double(), torch.randn(5).double()
    yhat = sureness(BlackBox(teacher, "label"), x)
    assert torch.equal(yhat, torch.ones(5))
    assert torch.allclose(generator_loss(d, weight=1 + 0.5 * yhat), 1.5 * generator_loss(d), rtol=1e-14, atol=0)
    soft = sureness(BlackBox(teacher, "logits"), x)
    assert torch.allclose(soft, teacher(x).softmax(-1).amax(-1)) and not soft.requires_grad
    weighted = generator_loss(d, weight=1 + 0.5 * soft)
    by_hand = -d.sigmoid().log().mean() - 0.5 * (soft * d.sigmoid().log()).mean()
    assert weighted.item() == pytest.approx(by_hand.item(), abs=1e-14)


@pytest.mark.parametrize("answer", ["logits", "probabilities", "label"])
@pytest.mark.parametrize("pool", [0, 6])
@pytest.mark.parametrize("information", [0.0, 0.5])
def test_every_query_is_counted_and_no_private_picture_is_sent(answer, pool, information):
    spy = Spy(mekd.tiny()["teacher"])
    (_, _, box), run, given = trained(spy, answer=answer, pool=pool, information=information)
    sent = torch.cat(spy.asked)
    assert int(box.queries) == len(sent) == queries(given["config"])
    assert int(box.bytes) == sent.numel() * 4
    private = given["unlabelled"].image
    assert ((sent[:, None] - private[None]).abs().amax((2, 3, 4)) > 1e-3).all()
    last = run.history[-1]
    assert last["queries"] == len(sent) and last["bytes received"] == len(sent) * (4 if answer == "label" else 16)


def test_nothing_depends_on_the_teachers_weights_by_gradient():
    teacher = mekd.tiny()["teacher"].requires_grad_()
    box = BlackBox(teacher, "logits")
    generator = PictureGenerator(4, 1, 8, 4)
    fake = generator(torch.randn(3, 4))
    weight = 1 + 0.5 * sureness(box, fake)
    assert not weight.requires_grad
    generator_loss(PictureDiscriminator(1, 8, 2)(fake), weight=weight).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in generator.parameters())
    (_, network, _), _, given = trained()
    assert not any(p.requires_grad for p in box.teacher.parameters()) or all(
        p.grad is None for p in given["teacher"].parameters())
    assert network.latent == 4


def test_the_answer_formats_agree_up_to_a_shift_and_labels_are_one_hot():
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).double()
    x = torch.randn(5, 1, 8, 8).double()
    raw = ask(BlackBox(teacher, "logits"), x)
    assert torch.allclose(raw, teacher(x))
    for given in (teacher, lambda x: teacher(x).softmax(-1)):
        shifted = ask(BlackBox(given, "probabilities"), x)
        assert torch.allclose(shifted, raw - raw.mean(-1, keepdim=True), atol=1e-9)
    for given in (teacher, lambda x: teacher(x).argmax(-1)):
        assert torch.equal(ask(BlackBox(given, "label", classes=4), x), F.one_hot(raw.argmax(-1), 4).double())


def test_a_function_that_gives_labels_can_teach():
    inner = mekd.tiny()["teacher"]
    (student, _, box), _, _ = trained(lambda x: inner(x).argmax(-1), answer="label")
    assert int(box.queries) > 0 and isinstance(student, nn.Module)


def test_every_setting_does_something():
    def weights(**changes):
        (student, generator, _), _, _ = trained(**changes)
        return torch.cat([p.detach().flatten() for m in (student, generator) for p in m.parameters()])

    same = weights()
    for changes in ({"information": 0.0}, {"image_weight": 0.0}, {"logit_weight": 0.0}, {"answer": "label"},
                    {"answer": "label", "target": "flat"}, {"answer": "probabilities"}, {"distance": "l2"},
                    {"pool": 0}, {"eps": 0.1}, {"temperature": 1.0}, {"image_temperature": 1.0}, {"emulation": 0.2},
                    {"gan_lr": 0.1}):
        assert not torch.equal(weights(**changes), same), changes


# ---------------------------------------------------------------- DCGAN


def test_the_generator_and_discriminator_fit_pictures_of_many_sizes():
    for size in (8, 16, 28, 32):
        x = PictureGenerator(5, 3, size, 4)(torch.randn(2, 5))
        assert x.shape == (2, 3, size, size) and x.abs().max() <= 1
        assert PictureDiscriminator(3, size, 2)(x).shape == (2,)


def test_a_gan_learns_the_mean_picture_of_its_data():
    stripes = torch.where(torch.arange(8) % 4 < 2, 0.8, -0.8).expand(1, 8, 8)
    real = TensorSet(image=(stripes + 0.05 * torch.randn(64, 1, 8, 8)).clamp(-1, 1))
    run = Run(quiet=True)
    config = gan.Config(steps=150, batch=32, latent=4, width=8, critic_width=4, lr=2e-3)
    generator = gan.train(real, config, run)
    with torch.no_grad():
        made = generator.eval()(torch.randn(64, 4)).mean(0)
    assert torch.corrcoef(torch.stack([made.flatten(), stripes.flatten()]))[0, 1] > 0.8
    assert set(run.history[0]) == {"stage", "k", "real", "fake", "generator"}


def test_the_weights_of_generated_pictures_reach_the_generator():
    real = TensorSet(image=torch.rand(8, 1, 8, 8) * 2 - 1)
    config = gan.Config(steps=2, batch=4, latent=4, width=4, critic_width=2)
    plain, same, other = (gan.train(real, config, Run(quiet=True), weigh) for weigh in (
        None, lambda x: torch.ones(len(x)), lambda x: torch.arange(float(len(x)))))
    equal = [all(torch.equal(a, b) for a, b in zip(plain.parameters(), g.parameters(), strict=True))
             for g in (same, other)]
    assert equal == [True, False]


# ---------------------------------------------------------------- input, real classes


def test_bad_input_is_refused_before_the_teacher_is_asked():
    spy = Spy(mekd.tiny()["teacher"])
    for image, match in ((torch.rand(10, 1, 8, 8) * 3, r"must lie in \[-1, 1\]"),
                         (torch.rand(10, 1, 10, 10), "multiple of 4")):
        student = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4, 4))
        with pytest.raises(DataError, match=match):
            mekd.distill(spy, student, TensorSet(image=image), run=Run(quiet=True))
    with pytest.raises(ConfigError, match="more than the budget of 20"):
        trained(spy, budget=20)
    assert not spy.asked
    with pytest.raises(RoleError, match="the teacher has 7 classes and the student 4"):
        trained(nn.Sequential(nn.Flatten(), nn.Linear(64, 7)))
    for bad in ({"emulation": 2.0}, {"answer": "text"}, {"target": "soft"}, {"distance": "l3"}, {"information": -1.0},
                {"image_weight": 0.0, "logit_weight": 0.0}, {"temperature": 0.0}, {"optimizer": "adam"},
                {"drops": (0.0,)}):
        with pytest.raises(ConfigError):
            Config(**bad)


def test_it_runs_on_models_of_transformers(tmp_path):
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    for name, width in (("teacher", 16), ("student", 8)):
        hf.ResNetForImageClassification(hf.ResNetConfig(
            embedding_size=width, hidden_sizes=[width, width], depths=[1, 1], layer_type="basic", num_labels=4)
        ).save_pretrained(tmp_path / name)
    teacher, student = (resolve_model(f"hf:{tmp_path / name}", Classifier) for name in ("teacher", "student"))
    private = TensorSet(image=torch.rand(6, 3, 16, 16) * 2 - 1)
    config = Config(steps=4, emulation=0.5, batch=4, gan_batch=4, width=4)
    before = student.model.classifier[-1].weight.clone()
    assert mekd.distill(teacher, student, private, config, Run(quiet=True)) is student
    assert not torch.equal(student.model.classifier[-1].weight, before)
