"""Systems on classes of torchvision and timm that their papers use, with fresh weights: a few steps from words that a
user types, a finite result, read back from its folder. `make vision` runs this where both libraries are."""

import numpy as np
import pytest
import torch

import stillhouse
from stillhouse import store
from stillhouse.cli import main
from stillhouse.deploy import targets
from stillhouse.hub import vision
from stillhouse.hub.models import resolve_model
from stillhouse.parts.stages import stages_of
from stillhouse.protocols import Classifier
from stillhouse.testing import target_digest, target_tree

for name in ("torchvision", "timm"):
    pytest.importorskip(name, exc_type=(ImportError, RuntimeError))


def fresh(name, classes=4):
    return f"{name}:pretrained=false,num_classes={classes}"


RESNET, MOBILE = fresh("torchvision:resnet18"), fresh("torchvision:mobilenet_v3_small")
VIT, MIXER, CONVNEXT, RESIDUAL, EFFICIENT = (fresh(f"timm:{name}") for name in (
    "vit_tiny_patch16_224", "mixer_s32_224", "test_convnext", "test_resnet", "test_efficientnet"))
SMALL_VIT, OTHER_VIT = fresh("timm:test_vit"), fresh("timm:test_vit2")
LABELLED, DATA = ["--labelled", "pictures.npz"], ["--data", "pictures.npz"]
UNLABELLED, VALIDATION = ["--unlabelled", "pictures.npz"], ["--validation", "pictures.npz"]
TWO, THREE = (["--config.steps", str(n), "--config.batch", "4"] for n in (2, 3))


def pair(teacher, student):
    return ["--teacher", teacher, "--student", student]


WORDS = {
    "ssld": [*pair(RESIDUAL, MOBILE), *DATA, *TWO, "--config.per-class", "None"],
    "sla": ["--student", RESNET, *LABELLED, *TWO],
    "ofa-kd vit to resnet": [*pair(VIT, RESNET), *LABELLED, *TWO],
    "ofa-kd resnet to mixer": [*pair(RESNET, MIXER), *LABELLED, *TWO],
    "ofa-kd swin to mobilenet": [*pair(fresh("timm:swin_tiny_patch4_window7_224"), MOBILE), *LABELLED, *TWO],
    "nonresidual-kd": [*pair(RESNET, RESNET), *LABELLED, *TWO],
    "nonresidual-kd timm": [*pair(RESNET, fresh("timm:resnet18")), *LABELLED, *TWO],
    "meal-v2": ["--teachers", f"{RESIDUAL},{CONVNEXT}", "--student", RESNET, *DATA, *TWO],
    "mdcs": ["--student", RESNET, *LABELLED, *TWO, "--config.exponents", "-0.5", "2.5"],
    "mdcs timm": ["--student", fresh("timm:resnet18"), *LABELLED, *TWO, "--config.exponents", "-0.5", "2.5"],
    "born-again": ["--network", fresh("torchvision:densenet121"), *LABELLED, *TWO, "--config.generations", "1"],
    "bd-kd": ["--student", MOBILE, "--network", RESNET, *LABELLED, *TWO],
    "msdcrd": [*pair(SMALL_VIT, RESNET), *DATA, *TWO],
    "wcord": [*pair(RESNET, MOBILE), *DATA, *TWO, "--config.negatives", "5", "--config.width", "6"],
    "unic": ["--teachers", f"{SMALL_VIT},{fresh('timm:test_vit3')}", "--student", OTHER_VIT, *DATA, *TWO,
             "--config.hidden", "4", "--config.last-hidden", "4"],
    "quantized-distillation": [*pair(RESNET, RESIDUAL), *LABELLED, *TWO],
    "diswot": ["--teacher", RESIDUAL, *LABELLED, *TWO, "--config.cycles", "3", "--config.population", "2",
               "--config.tournament", "1", "--config.width", "2"],
    "diswot chosen": ["--teacher", RESNET, "--candidates", f"{MOBILE},{RESIDUAL}", *LABELLED, *TWO],
    "simclrv2": [*pair(RESIDUAL, MOBILE), *LABELLED, *UNLABELLED, *TWO, "--config.pretrain", "0.5",
                 "--config.fine-tune", "0.5", "--config.fine-tune-batch", "4", "--config.self-distil", "0"],
    "scan": ["--student", RESIDUAL, *DATA, "--config.pretext-steps", "1", "--config.pretext-batch", "8",
             "--config.scan-epochs", "1", "--config.most-epochs", "1", "--config.label-epochs", "1", "--config.batch",
             "8", "--config.label-batch", "8", "--config.guard", "0", "--config.clusters", "3",
             "--config.neighbours", "2"],
    "lls-ddfa": ["--student", fresh("timm:test_resnet", 8), "--data", "domain-digits:n=80", "--config.classes", "2",
                 "--config.cells", "4", "--config.epochs", "1"],
    "fantastic-gains": ["--teachers", f"{VIT},{CONVNEXT}", "--student", RESIDUAL, *LABELLED, *TWO,
                        "--config.share", "1"],
    "kd-data-pruning": ["--student", RESNET, "--teacher", RESIDUAL, *LABELLED, *TWO, "--config.prune", "random"],
    "rad": [*pair(EFFICIENT, MOBILE), *LABELLED, *UNLABELLED, *VALIDATION, *TWO, "--config.rounds", "1",
            "--config.queries", "4"],
    "guided-self-distillation": ["--network", RESNET, *LABELLED, *VALIDATION, *TWO, "--config.rounds", "2"],
    "sd-label-noise": ["--network", RESNET, *LABELLED, *VALIDATION, *THREE, "--config.xi", "0.5", "1.5"],
    "mekd": [*pair(RESNET, MOBILE), *UNLABELLED, *TWO, "--config.emulation", "0.5", "--config.gan-batch", "4",
             "--config.width", "4"],
    "distillweighted": ["--teachers", f"{fresh('timm:test_resnet', 7)},{CONVNEXT}", "--student",
                        fresh("timm:mobilenetv3_small_050"), *LABELLED, *UNLABELLED, *TWO,
                        "--config.unlabelled-batch", "4"],
    "amd": ["--teacher", SMALL_VIT, *LABELLED, *VALIDATION, *THREE, "--config.scale", "0.5",
            "--config.candidates", "0.7", "0.8", "--config.joint", "0.34", "--config.assistant", "0.34"],
    "kd-survey": [*pair(RESNET, MOBILE), *LABELLED, *TWO, "--config.leaf", "hint"],
    "kd-survey relations": [*pair(SMALL_VIT, RESNET), *LABELLED, *TWO, "--config.leaf", "sp"],
    "mtt": ["--network", fresh("timm:test_efficientnet_gn"), *LABELLED, "--config.steps", "1", "--config.experts", "1",
            "--config.epochs", "2", "--config.student-steps", "1", "--config.expert-epochs", "1",
            "--config.max-start", "1", "--config.batch", "8"],
    "fedx": ["--network", RESIDUAL, "--clients", "pictures.npz,pictures.npz", "--config.rounds", "1",
             "--config.epochs", "1", "--config.batch", "8", "--config.hidden", "6", "--config.out", "5"],
}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Pictures, and convolutional networks that see them at 64 pixels instead of the library's 224."""
    image = np.random.default_rng(0).uniform(-1, 1, (12, 3, 32, 32)).astype("float32")
    np.savez(tmp_path / "pictures.npz", image=image, label=np.arange(12) % 4)
    wrapped = vision._wrapped

    def smaller(*args, **options):
        model = wrapped(*args, **options)
        if not any(fixed in model.name for fixed in ("vit", "mixer", "swin")):
            model.size = (64, 64)
        return model

    monkeypatch.setattr(vision, "_wrapped", smaller)
    monkeypatch.chdir(tmp_path)
    return torch.from_numpy(image)


@pytest.mark.parametrize("case", WORDS)
def test_a_system_on_real_classes(case, small, monkeypatch):
    kept, save = [], targets.save
    monkeypatch.setattr(targets, "save", lambda target, *rest: (kept.append(target), save(target, *rest))[1])
    main(["run", case.split()[0], *WORDS[case], "--quiet", "--out", "done"])
    loaded = stillhouse.load("done")
    assert [type(loaded)] == [type(target) for target in kept]
    assert target_digest(loaded) == target_digest(kept[0])
    assert all(torch.isfinite(x).all() for x in store.pack(target_tree(loaded))[1].values())
    answer = {"Clustering": "probabilities", "LatentClasses": "posterior"}.get(type(loaded).__name__, "__call__")
    if type(loaded).__name__ != "DistilledSet":
        with torch.no_grad():
            said = getattr(loaded, answer)(small[:2])
        assert torch.isfinite(said).all() and len(said) == 2


STAGES = {
    "torchvision:resnet18": [(64, 16), (128, 8), (256, 4), (512, 2)],
    "timm:resnet18": [(64, 16), (128, 8), (256, 4), (512, 2)],
    "torchvision:mobilenet_v3_small": [(16, 16), (24, 8), (48, 4), (576, 2)],
    "torchvision:shufflenet_v2_x0_5": [(24, 16), (48, 8), (96, 4), (1024, 2)],
    "torchvision:convnext_tiny": [(96, 16), (192, 8), (384, 4), (768, 2)],
    "torchvision:efficientnet_b0": [(24, 16), (40, 8), (112, 4), (1280, 2)],
    "timm:test_convnext": [(24, 16), (32, 8), (48, 4), (64, 2)],
    "timm:test_mambaout": [(16, 16), (32, 8), (48, 4), (64, 2)],
}


@pytest.mark.parametrize("name", STAGES)
def test_stages_of_real_classes(name, small):
    model = resolve_model(fresh(name), Classifier)
    assert list(stages_of(model, small[:2]).values()) == [(c, side, side) for c, side in STAGES[name]]


@pytest.mark.parametrize(("name", "first"), [
    ("timm:swin_tiny_patch4_window7_224", (96, 56, 56)), ("timm:mixer_s32_224", (49, 512)),
    ("timm:vit_tiny_patch16_224", (197, 192))])
def test_stages_at_the_size_of_a_transformer(name, first, small):
    assert next(iter(stages_of(resolve_model(fresh(name), Classifier), small[:2]).values())) == first
