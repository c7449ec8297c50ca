import copy
import math

import pytest
import torch
from torch import nn

from stillhouse.data.mining import pictures
from stillhouse.data.sets import TensorSet
from stillhouse.errors import ConfigError, DataError, RoleError
from stillhouse.measures.divergences import js, kl
from stillhouse.run import Run
from stillhouse.systems.compression import ssld
from stillhouse.systems.compression.ssld import Config, distill, mine
from stillhouse.testing import check_system


def log(*p):
    return torch.tensor([p], dtype=torch.float64).log()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def trained(**changes):
    given = ssld.tiny()
    given.update(changes)
    return distill(**given, run=Run(quiet=True))


# ---------------------------------------------------------------- the loss


def test_the_loss_lies_between_0_and_ln_2_and_is_symmetric():
    z = 3 * torch.randn(2, 50, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    each = js(z[0], z[1], reduction="none")
    assert (each > 0).all() and (each < math.log(2)).all()
    assert torch.allclose(each, js(z[1], z[0], reduction="none"), atol=1e-14)
    assert js(log(1.0, 0.0), log(0.0, 1.0)).item() == pytest.approx(math.log(2), abs=1e-15)
    leaf = z[0].clone().requires_grad_()
    loss = js(z[0], leaf)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-15) and leaf.grad.abs().max() < 1e-15


def test_near_equality_it_is_a_quarter_of_the_kl():
    p, q = log(0.5, 0.3, 0.2), log(0.501, 0.2995, 0.1995)
    assert (js(p, q) / kl(p, q)).item() == pytest.approx(0.2499945, abs=1e-7)


def test_its_gradient_in_the_students_logits():
    z_t, z_s = torch.randn(2, 1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    z_s = z_s.clone().requires_grad_()
    js(z_t, z_s).backward()
    q = z_s.detach().softmax(-1)
    ratio = (q / ((q + z_t.softmax(-1)) / 2)).log()
    assert torch.allclose(z_s.grad, q * (ratio - (q * ratio).sum()) / 2, atol=1e-14)


def test_the_loss_can_be_switched_and_kl_trains_as_ce_does():
    js_, kl_, ce = (trained(config=Config(steps=3, batch=4, lr=0.1, loss=loss)) for loss in ("js", "kl", "ce"))
    assert torch.allclose(kl_[3].weight, ce[3].weight, atol=1e-6)
    assert not torch.allclose(js_[3].weight, kl_[3].weight, atol=1e-6)


# ---------------------------------------------------------------- labels, views, modes, stages


def test_labels_are_never_read():
    given = ssld.tiny()
    n, m = len(given["data"]), len(given["unlabelled"])
    without = trained()
    for seed in (0, 1):
        torch.manual_seed(seed)
        labelled = {"data": given["data"].with_fields(label=torch.randperm(n)),
                    "unlabelled": given["unlabelled"].with_fields(label=torch.randperm(m))}
        assert same(trained(**labelled), without)


class Recorder(nn.Module):
    """Keeps what it is given, and its mode."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen, self.modes = model, [], []

    def forward(self, image):
        self.seen.append(image.detach().clone())
        self.modes.append(self.training)
        return self.model(image)


def test_teacher_and_student_see_the_same_view_and_the_teacher_is_in_eval_mode():
    given = ssld.tiny()
    teacher, student = (Recorder(given[role]).train() for role in ("teacher", "student"))
    norm = nn.BatchNorm2d(1)
    teacher.model = nn.Sequential(norm, teacher.model)
    trained(teacher=teacher, student=student, unlabelled=None)
    assert teacher.training and norm.num_batches_tracked == 0
    pairs = [(t, s) for t, s, mode in zip(teacher.seen, student.seen, student.modes, strict=True) if mode]
    assert len(pairs) == 6 and all(torch.equal(t, s) for t, s in pairs)
    assert not torch.equal(pairs[0][0], pairs[1][0]) and not any(teacher.modes)


def test_each_model_gets_its_own_normalisation_of_the_shared_view():
    given = ssld.tiny()
    teacher, student = Recorder(given["teacher"]), Recorder(given["student"])
    config = Config(steps=2, batch=4, lr=0.1, teacher_mean=(0.5,), teacher_std=(0.25,), student_mean=(0.1,),
                    student_std=(2.0,))
    trained(teacher=teacher, student=student, unlabelled=None, config=config)
    t, s = teacher.seen[-1], student.seen[-1]
    assert torch.allclose(t * 0.25 + 0.5, s * 2.0 + 0.1, atol=1e-6) and not torch.allclose(t, s)


def test_the_last_stage_sees_the_original_pictures_alone():
    given = ssld.tiny()
    student = Recorder(given["student"])
    config = Config(steps=40, batch=4, per_class=100, last_stage=0.5, lr=0.01)
    trained(student=student, validation=None, config=config)
    original = {tuple(x.flatten().tolist()) for x in given["data"].image}
    training = [seen for seen, mode in zip(student.seen, student.modes, strict=True) if mode]
    batches = [{tuple(x.flatten().tolist()) for x in seen} for seen in training]
    assert len(batches) == 40
    assert not set.union(*batches[:20]) <= original and set.union(*batches[20:]) <= original


def test_the_student_approaches_the_teacher():
    given = ssld.tiny()
    x = given["data"].image
    before = js(given["teacher"](x), given["student"](x)).item()
    student = trained(config=Config(steps=200, batch=8, lr=0.3))
    assert js(given["teacher"](x), student(x)).item() < 0.3 * before


# ---------------------------------------------------------------- mining


def test_mining_keeps_at_most_k_of_a_class_and_no_picture_of_the_evaluation_set():
    given, run = ssld.tiny(), Run(quiet=True)
    pool, held_out, teacher = given["unlabelled"], given["validation"], given["teacher"]
    chosen = mine(teacher, pool, held_out, Config(per_class=4), run)
    top1 = teacher(pool.image).argmax(1)
    assert len(chosen) and torch.bincount(top1[chosen]).max() <= 4
    copies = (pool.image[:, None] == held_out.image[None]).flatten(2).all(2).any(1)
    assert copies.sum() == 4 and not copies[chosen].any()
    everything = mine(teacher, pool, None, Config(per_class=1000), run)
    assert copies[everything].sum() == 4
    assert len(mine(teacher, pool, held_out, Config(per_class=None), run)) == len(pool)


def test_mining_takes_the_highest_scores():
    given = ssld.tiny()
    chosen = mine(given["teacher"], given["unlabelled"], None, Config(per_class=2), Run(quiet=True))
    score, label = given["teacher"](given["unlabelled"].image).softmax(1).max(1)
    for c in label.unique():
        inside = [i for i in chosen.tolist() if label[i] == c]
        assert score[inside].min() >= score[[i for i in range(30) if label[i] == c and i not in inside] or inside].max()


def test_pictures_are_read_lazily_from_sets_that_are_not_in_memory():
    class Files:
        def __len__(self):
            return 5

        def __getitem__(self, index):
            return {"image": torch.full((1, 2, 2), float(index)), "label": 1 / 0 if index == 4 else 0}

    memory = TensorSet(image=torch.full((2, 1, 2, 2), 9.0), label=torch.zeros(2))
    mixed = pictures((memory, None), (Files(), torch.tensor([3, 1])))
    assert len(mixed) == 4 and [mixed[i]["image"].mean().item() for i in range(4)] == [9, 9, 3, 1]
    assert set(mixed[0]) == {"index", "image"}
    with pytest.raises(IndexError):
        mixed[4]
    in_memory = pictures((memory, torch.tensor([1])), (memory, None))
    assert isinstance(in_memory, TensorSet) and in_memory.fields == ("image",) and len(in_memory) == 3


# ---------------------------------------------------------------- errors, contract, real models


def test_wrong_input_is_named_before_any_step():
    with pytest.raises(ConfigError, match="loss"):
        Config(loss="l2")
    with pytest.raises(ConfigError, match="student_std"):
        Config(student_mean=(0.5,))
    given = ssld.tiny()
    with pytest.raises(RoleError, match="teacher has 4, student has 3"):
        trained(student=nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    with pytest.raises(DataError, match="image"):
        trained(validation=TensorSet(label=torch.zeros(3)))
    with pytest.raises(DataError, match="empty"):
        trained(unlabelled=given["unlabelled"].select([]))


def test_the_contract():
    check_system(distill, ssld.tiny)


def test_it_runs_on_image_classifiers_of_transformers():
    transformers = pytest.importorskip("transformers")
    from stillhouse.hub.models import fit_role
    from stillhouse.protocols import Classifier

    torch.manual_seed(0)
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        num_channels=1, num_labels=4))
    resnet = transformers.ResNetForImageClassification(transformers.ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=4))
    teacher, student = fit_role(vit, Classifier, "teacher"), fit_role(resnet, Classifier, "student")
    before, start = copy.deepcopy(teacher), copy.deepcopy(student)
    out = trained(teacher=teacher, student=student)
    assert out is student and same(teacher, before) and not same(student, start)
    assert student(torch.rand(2, 1, 8, 8)).shape == (2, 4)


def test_the_student_is_much_smaller_than_the_embedded_teacher():
    from stillhouse.evaluate.cost import parameters
    from stillhouse.models.convnets import SmallResNet, TinyConvNet

    assert parameters(TinyConvNet()) <= 5000 and parameters(SmallResNet()) >= 8 * parameters(TinyConvNet())


def test_the_cluttered_digits_hold_their_digit():
    from stillhouse.data.digits import digits

    source = digits(16, "labelled").select(range(6))
    canvas = ssld.cluttered(source, seed=0)
    assert canvas.image.shape == (6, 1, 24, 24) and torch.equal(canvas.label, source.label)
    for digit, picture in zip(source.image, canvas.image, strict=True):
        windows = picture[0].unfold(0, 16, 1).unfold(1, 16, 1)
        assert ((windows >= digit[0]).all(-1).all(-1)).any()
    assert torch.equal(ssld.cluttered(source, seed=0).image, canvas.image)
