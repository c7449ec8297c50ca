"""Fantastic gains: partitioned transfer between trained classifiers, flips, several teachers."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stillhouse.data.sets import TensorSet
from stillhouse.errors import ConfigError, DataError, RoleError
from stillhouse.evaluate.classification import accuracy
from stillhouse.evaluate.flips import (
    flips,
    gain_concentration,
    gain_entropy,
    gain_similarity,
    success_rate,
    top_classes,
    transfer_scores,
)
from stillhouse.measures.confidence import confidence, of_each, surest
from stillhouse.measures.divergences import kl
from stillhouse.recipes.several_teachers import several_teachers
from stillhouse.run import Run
from stillhouse.systems.compression.fantastic_gains import Config, distill, tiny


def net(seed, width=6, classes=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.ReLU(), nn.Linear(width, classes)).double()


def pictures(n=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    return TensorSet(image=torch.randn(n, 1, 4, 4, generator=g, dtype=torch.float64), label=torch.arange(n) % 3)


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_same(a, b, **tolerance):
    torch.testing.assert_close(dict(a), dict(b), **tolerance)


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 3.0, 0.5])
def test_the_loss_is_the_two_masked_divergences(labels, temperature):
    """One KL against the chosen logits is L with m_t and m_st = 1 - m_t; the masks do not know the temperature."""
    torch.manual_seed(0)
    z_t, z_st, z_s = torch.randn(3, 50, 7, dtype=torch.float64) * 3
    y = torch.arange(50) % 7
    p_t, p_st = z_t.softmax(-1), z_st.softmax(-1)
    if labels:
        m_t = p_t[range(50), y] > p_st[range(50), y]
    else:
        m_t = p_t.amax(-1) > p_st.amax(-1)
    m_st = 1 - m_t.double()
    assert torch.equal(m_t + m_st, torch.ones(50).double()) and 0 < m_t.sum() < 50
    z = torch.stack([z_st, z_t])
    chosen = surest(z, y if labels else None)
    assert torch.equal(chosen, m_t.long())
    both = kl(z_t, z_s, temperature, weight=m_t) + kl(z_st, z_s, temperature, weight=m_st)
    torch.testing.assert_close(kl(of_each(z, chosen), z_s, temperature), both, rtol=1e-12, atol=0)


def test_confidence_is_a_log_probability():
    z = torch.randn(4, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(confidence(z).exp(), z.softmax(-1).amax(-1))
    y = torch.tensor([0, 1, 2, 3, 4, 0])
    torch.testing.assert_close(confidence(z, y)[2].exp(), z[2].softmax(-1)[range(6), y])


@pytest.mark.unchecked
def test_as_many_labels_as_samples():
    with pytest.raises(DataError, match="3 labels|\\(3,\\)"):
        confidence(torch.randn(2, 4, 5), torch.arange(3))


@pytest.mark.parametrize("labels", [True, False])
def test_samples_that_stay_have_no_loss_and_no_gradient_at_first(labels):
    """s = st at step 0: where the frozen student is the surer, the divergence and its gradient are exactly 0."""
    student, teacher, data = net(0), net(1), pictures()
    z_s = student(data.image)
    z = torch.stack([z_s.detach(), teacher(data.image).detach()])
    chosen = surest(z, data.label if labels else None)
    assert 0 < chosen.sum() < len(chosen)
    each = kl(of_each(z, chosen), z_s, 2.0, reduction="none")
    assert each[chosen == 0].abs().max() == 0 and each[chosen == 1].min() > 0
    each[chosen == 0].sum().backward()
    assert all(p.grad.abs().max() < 1e-15 for p in student.parameters())


@pytest.mark.parametrize("partition", ["labels", "confidence"])
@pytest.mark.parametrize("order", ["sequential", "parallel", "soup"])
def test_a_copy_teaches_nothing(partition, order):
    """Equal models: the strict inequality keeps every sample, and nothing moves but by float rounding."""
    student = net(0)
    before = state(student)
    teachers = [copy.deepcopy(student), copy.deepcopy(student)]
    distill(teachers, student, pictures(), config=Config(
        steps=6, batch=8, lr=0.5, weight_decay=0.0, share=1.0, partition=partition, order=order), run=Run(quiet=True))
    assert_same(student.state_dict(), before, rtol=0, atol=1e-14)


def steps_by_hand(student, teacher, data, steps, loss, lr=0.1):
    """The reference: plain SGD with momentum on the whole set at every step."""
    optimizer = torch.optim.SGD(student.parameters(), lr=lr, momentum=0.9)
    old = copy.deepcopy(student)
    for k in range(steps):
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * k / steps)).item())
        with torch.no_grad():
            z_t, z_st = teacher(data.image), old(data.image)
        optimizer.zero_grad()
        loss(z_t, z_st, student(data.image), data.label).backward()
        optimizer.step()


@pytest.mark.parametrize("partition, alpha", [("none", 1.0), ("none", 0.3), ("labels", 1.0), ("confidence", 0.6)])
def test_steps_are_those_of_the_equations(partition, alpha):
    """KL-Dist, XE-KL and both partitions, ten steps in float64; the masks come from the student as it was at first."""
    teacher, data, T = net(1), pictures(), 2.0
    ours, theirs = net(0), net(0)
    distill([teacher], ours, data, config=Config(
        steps=10, batch=len(data), lr=0.1, weight_decay=0.0, temperature=T, partition=partition, alpha=alpha,
        share=1.0), run=Run(quiet=True))

    def loss(z_t, z_st, z_s, y):
        p = z_t.softmax(-1), z_st.softmax(-1)
        if partition == "labels":
            m = p[0].gather(1, y[:, None])[:, 0] > p[1].gather(1, y[:, None])[:, 0]
        else:
            m = p[0].amax(1) > p[1].amax(1)
        m = torch.ones_like(m) if partition == "none" else m
        target = torch.where(m[:, None], z_t, z_st)
        divergence = F.kl_div((z_s / T).log_softmax(-1), (target / T).log_softmax(-1), reduction="batchmean",
                              log_target=True)
        return alpha * T**2 * divergence + (1 - alpha) * F.cross_entropy(z_s, y)

    steps_by_hand(theirs, teacher, data, 10, loss)
    assert_same(ours.state_dict(), theirs.state_dict(), rtol=1e-8, atol=1e-10)


def test_masks_that_are_all_one_are_kl_dist():
    """A teacher that is surer on every sample gives both partitions what `partition="none"` gives."""
    data, results = pictures(), {}
    sure = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double()
    for p in sure.parameters():
        p.data.mul_(400)
    for partition in ("confidence", "none"):
        student = net(0)
        run = Run(quiet=True)
        distill([sure], student, data, config=Config(steps=5, batch=8, lr=0.05, share=1.0, partition=partition),
                run=run)
        results[partition] = state(student)
        if partition == "confidence":
            assert all(line["taught"] == 1 for line in run.history if "taught" in line)
    assert_same(results["confidence"], results["none"], rtol=0, atol=0)


@pytest.mark.parametrize("labels", [True, False])
def test_equal_logits_choose_the_first(labels):
    z = torch.randn(1, 9, 4).expand(3, -1, -1)
    assert torch.equal(surest(z, torch.arange(9) % 4 if labels else None), torch.zeros(9).long())


def test_slow_weights_are_interpolated_every_n_steps():
    """theta_slow <- tau theta_slow + (1 - tau) theta_fast after steps 3 and 6 of 8, checked against the fast run."""
    data, teacher, tau = pictures(), net(1), 0.7
    fast, config = {}, Config(steps=8, batch=len(data), lr=0.1, weight_decay=0.0, share=1.0)

    class Watching(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.calls = model, 0

        def forward(self, x):
            if self.training:
                fast[self.calls] = state(self.model)
                self.calls += 1
            return self.model(x)

    distill([teacher], Watching(net(0)), data, config=config, run=Run(quiet=True))
    slow = net(0)
    distill([teacher], slow, data, config=dataclasses.replace(config, slow_every=3, slow=tau), run=Run(quiet=True))
    expected = {}
    for name, first in fast[0].items():
        once = tau * first + (1 - tau) * fast[3][name]
        expected[name] = tau * once + (1 - tau) * fast[6][name]
    assert_same(slow.state_dict(), expected, rtol=1e-10, atol=1e-12)


# -------------------------------------------------------------------- several teachers


def test_a_lesson_after_another_starts_where_it_ended_and_keeps_to_it():
    """Sequential: the second lesson equals a run of its own whose student is the first lesson's result."""
    data, teachers, config = pictures(), [net(1), net(2)], Config(steps=6, batch=len(data := pictures()), lr=0.1,
                                                                  share=1.0)
    together = net(0)
    distill(teachers, together, data, config=config, run=Run(quiet=True))
    apart = net(0)
    for teacher in teachers:
        distill([teacher], apart, data, config=dataclasses.replace(config, steps=3), run=Run(quiet=True))
    assert_same(together.state_dict(), apart.state_dict(), rtol=1e-12, atol=1e-14)


def test_a_soup_is_the_mean_of_separate_transfers():
    data, teachers = pictures(), [net(1), net(2), net(3)]
    config = Config(steps=9, batch=len(data), lr=0.1, share=1.0, order="soup")
    soup = net(0)
    distill(teachers, soup, data, config=config, run=Run(quiet=True))
    each = []
    for teacher in teachers:
        each.append(net(0))
        distill([teacher], each[-1], data, config=dataclasses.replace(config, steps=3), run=Run(quiet=True))
    mean = {k: torch.stack([m.state_dict()[k] for m in each]).mean(0) for k in soup.state_dict()}
    assert_same(soup.state_dict(), mean, rtol=1e-12, atol=1e-14)


def test_in_parallel_the_surest_of_all_is_heard():
    """Three models, each the surest on some samples; a teacher that is never the surest changes nothing."""
    z = torch.zeros(3, 4, 2)
    z[0, 0, 0], z[1, 1, 1], z[2, 2, 0] = 2.0, 3.0, 4.0
    assert surest(z).tolist() == [0, 1, 2, 0]
    data, timid = pictures(), net(5)
    for p in timid.parameters():
        p.data.zero_()
    config = Config(steps=5, batch=len(data), lr=0.1, share=1.0, partition="confidence", order="parallel")
    with_it, without = net(0), net(0)
    distill([net(1), timid], with_it, data, config=config, run=Run(quiet=True))
    distill([net(1)], without, data, config=config, run=Run(quiet=True))
    assert_same(with_it.state_dict(), without.state_dict(), rtol=0, atol=0)


def test_steps_are_shared_out_and_none_is_lost():
    for order, expected in (("sequential", [(1, 2), (1, 2), (1, 3)]), ("parallel", [(3, 7)]),
                            ("soup", [(1, 2), (1, 2), (1, 3)])):
        heard = []
        several_teachers(net(0), [1, 2, 3], 7, lambda s, t, n, heard=heard: heard.append((len(t), n)), Run(quiet=True),
                         order)
        assert heard == expected
    with pytest.raises(ConfigError, match="sequential, parallel, soup"):
        several_teachers(net(0), [1], 1, lambda *a: None, Run(quiet=True), "choir")


# -------------------------------------------------------------------- what goes in


def test_the_first_phase_is_plain_training_and_counts_as_steps():
    run, student = Run(quiet=True), net(0)
    distill([net(1)], student, pictures(), config=Config(steps=10, batch=8, share=1.0, pretrain=0.4, pretrain_lr=0.2),
            run=run)
    stages = [(line["stage"], line["k"]) for line in run.history]
    assert stages == [("pretraining/supervised", k) for k in range(4)] + [("transfer", k) for k in range(6)]


def test_without_labels_both_sets_are_used_and_labels_never_read():
    labelled, more = pictures(30), pictures(20, seed=1).without("label")
    results = []
    for labels in (labelled.label, labelled.label.flip(0)):
        student = net(0)
        distill([net(1)], student, labelled.with_fields(label=labels), more,
                Config(steps=4, batch=50, lr=0.1, share=1.0, partition="confidence"), Run(quiet=True))
        results.append(state(student))
    assert_same(*results, rtol=0, atol=0)
    alone = net(0)
    distill([net(1)], alone, unlabelled=more, config=Config(steps=2, batch=4, partition="confidence", share=0.5),
            run=Run(quiet=True))


def test_a_share_is_the_same_part_of_every_class():
    seen = set()

    class Watching(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            if self.training:
                seen.update(x[:, 0, 0, 0].tolist())
            return self.model(x)

    data = pictures(60)
    distill([net(1)], Watching(net(0)), data, config=Config(steps=10, batch=6, share=0.2), run=Run(quiet=True))
    where = [i for i, v in enumerate(data.image[:, 0, 0, 0].tolist()) if v in seen]
    assert torch.bincount(data.label[where]).tolist() == [4, 4, 4]


def test_a_set_that_is_read_item_by_item_can_be_shared_too():
    class Items:
        def __len__(self):
            return 30

        def __getitem__(self, i):
            return {"image": pictures(30).image[i], "label": i % 3}

    for partition in ("labels", "confidence"):
        student = net(0)
        before = state(student)
        distill([net(1)], student, Items(), config=Config(steps=2, batch=4, lr=0.1, share=0.5, partition=partition),
                run=Run(quiet=True))
        assert any(not torch.equal(v, before[k]) for k, v in student.state_dict().items())


def test_bad_input_is_named():
    data = pictures()
    with pytest.raises(RoleError, match="at least one teacher"):
        distill([], net(0), data)
    with pytest.raises(DataError, match="labelled or unlabelled"):
        distill([net(1)], net(0))
    with pytest.raises(ConfigError, match="partition='confidence'"):
        distill([net(1)], net(0), unlabelled=data)
    with pytest.raises(RoleError, match=r"teachers\[1\] has 4"):
        distill([net(1), net(1, classes=4)], net(0), data)
    for wrong in ({"partition": "half"}, {"order": "choir"}, {"alpha": 2.0}, {"temperature": 0.0}, {"share": 0.0},
                  {"slow": 1.5}, {"pretrain": -0.1}, {"view": -1.0}, {"slow_every": -1}):
        with pytest.raises(ConfigError):
            Config(**wrong)


# -------------------------------------------------------------------- flips


def test_flips_add_up_to_the_difference_of_accuracies():
    torch.manual_seed(0)
    for n, classes in ((1, 2), (37, 5), (500, 12)):
        s, t, y = torch.randn(n, classes), torch.randn(n, classes), torch.randint(classes, (n,))
        found = flips(s, t, y)
        acc_s, acc_t = ((z.argmax(-1) == y).double().mean().item() for z in (s, t))
        assert acc_t - acc_s == pytest.approx(found.rho_pos - found.rho_neg, abs=1e-12)
        assert found.gains.sum() == found.positive.sum() and not (found.positive & found.negative).any()
    with pytest.raises(DataError, match="for 3 labels"):
        flips(torch.randn(4, 2), torch.randn(4, 2), torch.zeros(3).long())


def test_gains_spread_concentrate_and_resemble():
    even, single = torch.ones(10).double(), F.one_hot(torch.tensor(3), 10).double()
    assert gain_entropy(even) == pytest.approx(1) and gain_entropy(single) == 0
    assert gain_entropy(torch.zeros(10).double()) == 0
    assert gain_concentration(even) == pytest.approx(0.2) and gain_concentration(single) == 1
    gains = torch.tensor([0.0, 5, 1, 7]).double()
    assert top_classes(gains, 0.5).tolist() == [3, 1] and gain_concentration(gains, 0.5) == pytest.approx(12 / 13)
    vectors = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 2]])
    assert gain_similarity(gains, vectors, 0.5) == pytest.approx(1 - 1 / 3)
    assert gain_similarity(torch.ones(4), vectors, 1.0) == pytest.approx(0)
    with pytest.raises(DataError, match="two are needed"):
        gain_similarity(gains, vectors, 0.2)


def test_scores_of_a_transfer():
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    before, teacher, after = (F.one_hot(torch.tensor(c), 3).double() for c in
                              ([0, 1, 0, 1, 0, 1], [1, 1, 2, 0, 1, 0], [0, 0, 2, 0, 0, 2]))
    scores = transfer_scores(before, after, teacher, y, top=0.34)
    assert scores == pytest.approx({"delta": 4 / 6 - 2 / 6, "transferred": 2 / 3, "transferred, top classes": 1.0,
                                    "forgotten": 1 / 2})
    assert success_rate([0.1, 0.0, -0.2, 0.3]) == 0.5
    with pytest.raises(DataError):
        success_rate([])


# -------------------------------------------------------------------- real classes


def test_real_classes_from_folders_of_transformers(tmp_path):
    """A ViT, a ConvNeXt and a ResNet as transformers has them, each with its own normalisation of the same pictures."""
    transformers = pytest.importorskip("transformers")
    from stillhouse.hub.models import resolve_model
    from stillhouse.protocols import Classifier

    torch.manual_seed(0)
    models = {
        "vit": transformers.ViTForImageClassification(transformers.ViTConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16,
            patch_size=8, num_labels=3)),
        "convnext": transformers.ConvNextForImageClassification(transformers.ConvNextConfig(
            num_channels=3, hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, num_labels=3)),
        "resnet": transformers.ResNetForImageClassification(transformers.ResNetConfig(
            embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3)),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.1] * 3,
                                               image_std=[0.3] * 3)
    processor.save_pretrained(tmp_path / "vit")
    loaded = {name: resolve_model(f"hf:{tmp_path / name}", Classifier) for name in models}
    assert loaded["vit"].mean.flatten()[0] == pytest.approx(0.1) != loaded["resnet"].mean.flatten()[0]
    data = TensorSet(image=torch.rand(24, 3, 32, 32) * 2 - 1, label=torch.arange(24) % 3)
    student = loaded["resnet"]
    before = state(student)
    config = Config(steps=4, batch=8, lr=0.05, share=1.0)
    for partition in ("labels", "confidence"):
        distill([loaded["vit"], loaded["convnext"]], student, data,
                config=dataclasses.replace(config, partition=partition), run=Run(quiet=True))
    assert any(not torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert 0 <= accuracy(student, data) <= 1


def test_a_run_is_the_same_twice():
    results = []
    for _ in range(2):
        given = tiny()
        distill(**given, run=Run(quiet=True))
        results.append(state(given["student"]))
    assert_same(*results, rtol=0, atol=0)
