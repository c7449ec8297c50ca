import copy

import pytest
import torch
from torch import nn

from stillhouse.errors import ConfigError, DamagedFileError, RoleError, StoreError, UnknownNameError
from stillhouse.hub.architectures import describe, rebuild, remember
from stillhouse.hub.models import built, resolve_model
from stillhouse.models.convnets import MLP, SmallResNet, SmallVGG, TinyConvNet
from stillhouse.models.vit import SmallMixer, SmallViT
from stillhouse.parts.experts import CosineLinear, Experts, branched, branching_of

X = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
NETWORKS = {
    "tiny-convnet": (TinyConvNet, "body.2", ("body.4", "linear")),
    "resnet": (lambda: SmallResNet(width=4), "body.2", ("body.3", "linear")),
    "vgg": (lambda: SmallVGG(width=4, image_size=16), "body.1", ("body.3", "body.4", "linear")),
    "vit": (lambda: SmallViT(width=8, heads=2), "blocks.2", ("blocks.3", "norm", "head")),
    "mixer": (lambda: SmallMixer(width=8), "blocks.2", ("blocks.3", "norm", "head")),
}


def made(name="resnet", seed=0):
    torch.manual_seed(seed)
    return NETWORKS[name][0]()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_last_stage_and_head_of_any_classifier_are_copied(name):
    found = branching_of(made(name), X)
    assert (found.split, found.copied) == NETWORKS[name][1:] and found.head == found.copied[-1]


@pytest.mark.parametrize("name", NETWORKS)
def test_three_equal_experts_give_what_one_gives_and_their_mean_is_the_same(name):
    model = made(name).double().eval()
    x = X.double()
    experts = branched(model, x, 3, fresh=False).eval()
    each = experts.logits(x)
    assert each.shape == (3, 4, 10)
    assert all(torch.allclose(z, model(x), atol=1e-12) for z in each)
    assert torch.allclose(experts(x), model(x), atol=1e-12)


def test_the_student_is_trunk_and_first_expert_and_stays_a_classifier_of_its_own():
    model = made().eval()
    before = model(X)
    experts = branched(model, X, 3).eval()
    assert torch.equal(model(X), before) and torch.allclose(experts.logits(X)[0], before, atol=1e-6)
    own = {id(p) for p in model.parameters()}
    assert own <= {id(p) for p in experts.parameters()}
    last = sum(p.numel() for n in ("body.3", "linear") for p in model.get_submodule(n).parameters())
    total = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in experts.parameters()) == total + 2 * last
    assert not torch.allclose(experts.logits(X)[1], before, atol=1e-3)


def test_each_expert_has_batch_statistics_of_its_own_and_the_trunk_runs_once():
    model = made("tiny-convnet")
    experts = branched(model, X, 3, fresh=False).train()
    calls = []
    model.body[2].register_forward_hook(lambda *_: calls.append(1))
    experts.logits(X)
    assert calls == [1]
    tracked = {n: int(b) for n, b in experts.named_buffers() if "num_batches" in n}
    assert len(tracked) == 5 and set(tracked.values()) == {1}


def test_gradients_of_one_expert_reach_the_trunk_and_no_other_expert():
    experts = branched(made(), X, 3)
    experts.logits(X)[1].sum().backward()
    got = {n for n, p in experts.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("copies" not in n for n in got)
    assert all("copies.1" in n for n in got if "copies" in n)


def test_a_cosine_classifier_reads_directions_alone():
    head = CosineLinear(nn.Parameter(torch.randn(3, 5, dtype=torch.float64)), 30.0)
    x = torch.randn(7, 5, dtype=torch.float64)
    assert torch.allclose(head(x), head(4 * x), atol=1e-12) and head(x).abs().max() <= 30
    assert torch.allclose(head(head.weight), 30 * torch.cosine_similarity(head.weight[:, None], head.weight, dim=-1))
    model = made()
    experts = branched(model, X, 2, scale=30.0, fresh=False)
    assert sum(isinstance(m, CosineLinear) for m in experts.modules()) == 2
    assert any(p is model.linear.weight for p in experts.parameters())
    assert isinstance(model.linear, nn.Linear)


def test_what_cannot_be_branched_is_refused_clearly():
    with pytest.raises(RoleError, match="name the last shared module as split"):
        branched(MLP(256), X, 2)
    with pytest.raises(UnknownNameError, match="no module 'nowhere'"):
        branched(made(), X, 2, split="nowhere")
    with pytest.raises(RoleError, match="nothing with weights works behind"):
        branched(made(), X, 2, split="linear")
    with pytest.raises(ConfigError, match="at least 1 expert"):
        branched(made(), X, 0)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.between, self.linear = nn.Conv2d(1, 1, 3, 1, 1), nn.ReLU(), nn.Linear(256, 3)

        def forward(self, x):
            return self.linear(self.conv(self.between(self.conv(x))).flatten(1))

    with pytest.raises(RoleError, match="both before and behind"):
        branched(Twice(), X, 2, split="between")
    assert branched(MLP(256, hidden=(8, 8)), X, 2, split="body.1").logits(X).shape == (2, 4, 10)


def test_experts_are_saved_and_read_back_alone_and_by_the_words_of_their_network(tmp_path):
    model = remember(made(), "resnet:width=4")
    experts = branched(model, X, 3, scale=20.0).eval()
    experts.save(tmp_path)
    back = Experts.load(tmp_path, made(seed=1))
    assert torch.equal(back.logits(X), experts.logits(X)) and not back.training
    again = rebuild(describe(experts), built)
    again.load_state_dict(experts.state_dict())
    assert torch.equal(again.eval().logits(X), experts.logits(X))
    with pytest.raises(StoreError, match="not like the one"):
        Experts.load(tmp_path, made("vit"))
    with pytest.raises(StoreError, match="does not have the weights"):
        Experts.load(tmp_path, SmallResNet(width=8))
    (tmp_path / "experts.safetensors").write_bytes(b"nothing")
    with pytest.raises(DamagedFileError):
        Experts.load(tmp_path, made())


def test_a_copy_is_a_copy():
    experts = branched(made(), X, 2).eval()
    other = copy.deepcopy(experts)
    before = experts.logits(X)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert torch.equal(experts.logits(X), before)


@pytest.mark.parametrize("name", ["vit", "resnet", "swin", "convnext"])
def test_models_of_transformers_are_branched(name, tmp_path):
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shared = {"num_channels": 3, "num_labels": 5}
    model = {
        "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(
            hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8, image_size=16,
            patch_size=8, **shared)),
        "resnet": lambda: hf.ResNetForImageClassification(hf.ResNetConfig(
            embedding_size=4, hidden_sizes=[4, 8, 8], depths=[1, 1, 1], layer_type="basic", **shared)),
        "swin": lambda: hf.SwinForImageClassification(hf.SwinConfig(
            image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2, **shared)),
        "convnext": lambda: hf.ConvNextForImageClassification(hf.ConvNextConfig(
            hidden_sizes=[4, 8, 8], depths=[1, 1, 1], num_stages=3, patch_size=2, **shared)),
    }[name]()
    model.save_pretrained(tmp_path / name)
    from stillhouse.protocols import Classifier

    student = resolve_model(f"hf:{tmp_path / name}", Classifier)
    x = torch.randn(3, 3, 16, 16).clamp(-1, 1)
    experts = branched(student, x, 3, scale=0.0, fresh=False).eval()
    assert torch.allclose(experts(x), student.eval()(x), atol=1e-5)
    assert len(experts.branching.copied) >= 2
    again = rebuild(describe(experts), built)
    again.load_state_dict(experts.state_dict())
    assert torch.allclose(again.eval()(x), experts(x), atol=1e-6)
