"""The recipe of one kind of knowledge, between networks alike and unlike."""

import pytest
import torch

from stillhouse.data.digits import digits
from stillhouse.errors import ConfigError, RoleError, StillError
from stillhouse.models.convnets import MLP, SmallResNet, TinyConvNet
from stillhouse.models.vit import SmallMixer, SmallViT
from stillhouse.recipes import knowledge
from stillhouse.recipes.knowledge import FEATURES, KNOWLEDGE, Config, distill
from stillhouse.run import Run
from stillhouse.testing import check_system

DATA = digits(16, "labelled").select(range(32))


@pytest.mark.parametrize("kind", [*KNOWLEDGE])
@pytest.mark.parametrize("pair", [(SmallResNet, TinyConvNet), (SmallViT, TinyConvNet), (SmallResNet, SmallMixer)])
def test_every_kind_between_every_pair_of_families(kind, pair):
    torch.manual_seed(0)
    teacher, student = pair[0](), pair[1]()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    start = [p.clone() for p in student.parameters()]
    distill(teacher, student, DATA, Config(steps=1, batch=16, kind=kind, lr=0.1, warmup=0.0, ce=0.0,
                                           kd=float(kind == "none")))
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert any(not torch.equal(a, b) for a, b in zip(start, student.parameters(), strict=True))


@pytest.mark.parametrize("kind", list(FEATURES))
def test_a_copy_of_the_teacher_matches_it(kind):
    maps = [torch.randn(6, 4, 8, 8), torch.randn(6, 5, 4, 4)]
    torch.testing.assert_close(FEATURES[kind](maps, maps), torch.tensor(0.0), atol=1e-5, rtol=0)
    assert FEATURES[kind](maps, [torch.randn_like(m) for m in maps]) > 1e-4


def test_contract():
    def inputs():
        torch.manual_seed(0)
        return {"teacher": SmallResNet(width=2), "student": TinyConvNet(),
                "labelled": DATA, "config": Config(steps=3, batch=8, kd=1.0, lr=0.01)}

    check_system(distill, inputs)


def test_bad_input():
    with pytest.raises(RoleError, match="0 in the student"):
        distill(SmallResNet(), MLP(256), DATA, Config(steps=1, batch=8, kind="attention"))
    with pytest.raises(ConfigError, match="kind is one of"):
        Config(kind="magic")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="as many taps"):
        Config(teacher_taps=("a",), student_taps=("a", "b"))
    with pytest.raises(StillError):
        distill(SmallResNet(), TinyConvNet(classes=4), DATA, Config(steps=1, batch=8))


def test_named_taps_are_used():
    run = Run(seed=1).begin()
    config = Config(steps=1, batch=8, teacher_taps=("body.2",), student_taps=("body.2",), lr=0.01)
    assert distill(SmallResNet(), TinyConvNet(), DATA, config, run)
    assert knowledge.KNOWLEDGE["rkd"] == "relation"
