"""`check_system` accepts a right system and names what is broken in a wrong one."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from stillhouse.data.sets import TensorSet
from stillhouse.errors import StillError
from stillhouse.protocols import Classifier, Images
from stillhouse.run import Run, begin, frozen
from stillhouse.testing import check_system


@dataclass(frozen=True)
class Config:
    steps: int = 100
    batch: int = 8


def make(fault=None):
    def distill(teacher: Classifier, student: Classifier, data: Images, config: Config = Config(),
                run: Run | None = None):
        run = begin(run)
        if fault != "no check":
            run.check(Classifier, data, teacher=teacher, student=student)
        optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
        average = [p.detach().clone() for p in student.parameters()]
        held = {} if fault == "optimizer not held" else {"optimizer": optimizer}
        with frozen(teacher):
            for batch in run.loop("x", data, batch=config.batch, steps=config.steps, student=student, average=average,
                                  **held):
                target = teacher(batch["image"])
                loss = (student(batch["image"]) - target).square().mean()
                if fault == "local variable":
                    average = [a.lerp(p.detach(), 0.5) for a, p in zip(average, student.parameters(), strict=True)]
                    loss = loss + (student[1].weight - average[0]).square().sum()
                if fault == "loss":
                    loss = loss / 0.0
                run.update(optimizer, mse=loss)
        if fault == "teacher":
            teacher[1].weight.data += 1
        if fault == "mode":
            teacher.eval()
        if fault == "hook":
            teacher.register_forward_hook(lambda *_: None)
        if fault == "gradient":
            student(data.image).sum().backward()
        if fault == "data":
            data.image[0] += 1
        return student if fault != "copy" else nn.Sequential(student)
    return distill


def test_a_right_system_passes():
    check_system(make())


@pytest.mark.parametrize("fault, message", [
    ("optimizer not held", "resumed after every step"),
    ("local variable", "resumed after every step"),
    ("teacher", "weights or buffers changed"),
    ("mode", "train/eval flags changed"),
    ("hook", "hooks changed"),
    ("gradient", "gradients are left on 'student'"),
    ("data", "data set 'data' was changed"),
    ("copy", "trained in place"),
    ("no check", "that is not finite was"),
])
def test_what_is_broken_is_named(fault, message):
    with pytest.raises(AssertionError, match=message):
        check_system(make(fault))


def test_a_loss_that_is_not_finite_is_found():
    with pytest.raises((AssertionError, StillError), match=r"inf|nan"):
        check_system(make("loss"))


def test_own_inputs_can_be_given():
    def inputs():
        torch.manual_seed(0)
        return {"teacher": nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), "config": Config(steps=3, batch=4),
                "student": nn.Sequential(nn.Flatten(), nn.Linear(4, 2)),
                "data": TensorSet(image=torch.randn(9, 1, 2, 2))}

    check_system(make(), inputs)


def test_inputs_that_cannot_be_built_are_named():
    def distill(gizmo: int, run=None):
        return None

    with pytest.raises(StillError, match="cannot build a tiny 'gizmo'"):
        check_system(distill)
