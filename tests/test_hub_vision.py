"""Models of timm and torchvision by string: what can be tested without the libraries, then with them where they are."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from stillhouse.deploy import targets
from stillhouse.errors import ConfigError, MissingExtraError, RoleError, UnknownNameError
from stillhouse.hub.architectures import describe, rebuild
from stillhouse.hub.models import resolve_model
from stillhouse.protocols import CausalLM, Classifier, Encoder, Network

MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
LIBRARIES = pytest.mark.parametrize("library", ["timm", "torchvision"])


class Net(nn.Module):
    """What both libraries' classifiers have in common, small: features, then the layer of classes named `fc`."""

    def __init__(self, classes):
        super().__init__()
        self.num_classes, self.body = classes, nn.Conv2d(3, 4, 3, stride=2)
        self.fc = nn.Linear(4, classes)

    def forward_features(self, x):
        return self.body(x).relu()

    def forward_head(self, x, pre_logits=False):
        x = x.mean((2, 3))
        return x if pre_logits else self.fc(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))

    def reset_classifier(self, num_classes):
        assert num_classes == 0
        self.num_classes, self.fc = 0, nn.Identity()


def pretrained(classes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return Net(classes)


def fake(library):
    """A stand-in with the documented functions of a library, and what it was asked for."""
    module, asked = ModuleType(library), []
    if library == "timm":
        def create_model(name, pretrained=False, num_classes=None):
            asked.append((name, pretrained, num_classes))
            if pretrained and name == "nothing_there":
                raise RuntimeError("No pretrained weights exist for nothing_there")
            made = globals()["pretrained"](5) if pretrained else Net(num_classes or 5)
            if pretrained and num_classes not in (None, 5):
                made.fc, made.num_classes = nn.Linear(4, num_classes), num_classes
            return made

        module.create_model, module.list_models = create_model, lambda: ["resnet_a", "resnet_b", "nothing_there"]
        module.data = SimpleNamespace(resolve_model_data_config=lambda model: {
            "mean": tuple(MEAN), "std": tuple(STD), "input_size": (3, 12, 16), "interpolation": "bicubic"})
        return module, asked

    def get_state_dict(progress, check_hash, weights_only):
        assert weights_only and check_hash, "a pickle may only be read with weights_only"
        asked.append("weights")
        return pretrained(5).state_dict()

    def get_model(name, weights=None, num_classes=5):
        assert weights is None, "torchvision reads its own files without weights_only"
        asked.append((name, num_classes))
        return Net(num_classes)

    default = SimpleNamespace(meta={"categories": list("abcde")}, get_state_dict=get_state_dict, transforms=lambda: (
        SimpleNamespace(mean=MEAN, std=STD, crop_size=[12])))
    module.models = SimpleNamespace(
        get_model=get_model, list_models=lambda module: ["resnet_a", "resnet_b", "googlenet"],
        get_model_weights=lambda name: SimpleNamespace(DEFAULT=default))
    return module, asked


@pytest.fixture
def libraries(monkeypatch):
    made = {library: fake(library) for library in ("timm", "torchvision")}
    for library, (module, _) in made.items():
        monkeypatch.setitem(sys.modules, library, module)
    return {library: asked for library, (_, asked) in made.items()}


def by_hand(net, image, size):
    image = nn.functional.interpolate(image, size, mode="bilinear", antialias=True)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return net(((image + 1) / 2 - mean) / std)


@LIBRARIES
def test_pretrained_classifiers_and_encoders(libraries, library):
    image, size = torch.rand(2, 3, 20, 20) * 2 - 1, (12, 16) if library == "timm" else (12, 12)
    classifier = resolve_model(f"{library}:resnet_a", Classifier)
    assert classifier.classes == 5 and not classifier.training
    torch.testing.assert_close(classifier(image), by_hand(pretrained(5), image, size))
    encoder = resolve_model(f"{library}:resnet_a", Encoder)
    assert encoder(image).shape == (2, 4) and encoder.classes == 0
    torch.testing.assert_close(encoder(image), classifier.encode(image))
    torch.testing.assert_close(encoder.encode(image), encoder(image))
    assert not classifier.model.fc._forward_pre_hooks
    assert classifier(torch.zeros(1, 1, 8, 8)).shape == (1, 5)
    with pytest.raises(RoleError, match="pictures of 2 channels"):
        classifier(torch.zeros(1, 2, 8, 8))
    for model in (classifier, encoder):
        again = rebuild(describe(model), lambda text: pytest.fail(text))
        again.load_state_dict(model.state_dict())
        assert torch.equal(again.eval()(image), model(image)) and again.size == model.size


@LIBRARIES
def test_a_new_last_layer_and_fresh_weights(libraries, library):
    new = resolve_model(f"{library}:resnet_a:num_classes=3", Classifier)
    assert new.classes == 3 and new(torch.zeros(2, 3, 8, 8)).shape == (2, 3)
    assert torch.equal(new.model.body.weight, pretrained(5).body.weight)
    fresh, again, other = (resolve_model(f"{library}:resnet_a:pretrained=false", Classifier, seed=seed)
                           for seed in (0, 0, 1))
    weights = [m.model.body.weight for m in (fresh, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    make = resolve_model(f"{library}:resnet_a:num_classes=4", Network)
    assert make()(torch.zeros(2, 3, 8, 8)).shape == (2, 4)
    assert not torch.equal(make().model.body.weight, make().model.body.weight)
    with pytest.raises(ConfigError, match="freshly drawn"):
        resolve_model(f"{library}:resnet_a:pretrained=true", Network)


@LIBRARIES
def test_weights_of_ones_own(libraries, library, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = Net(3)
    save_file(own.state_dict(), "own.safetensors")
    image = torch.rand(2, 3, 8, 8)
    text = f"{library}:resnet_a:num_classes=3,weights=own.safetensors"
    loaded = resolve_model(text, Classifier)
    assert torch.equal(loaded.model.fc.weight, own.fc.weight)
    torch.testing.assert_close(resolve_model(text, Encoder)(image), loaded.encode(image))
    assert "weights" not in libraries[library] and not any(call[1] is True for call in libraries[library])
    with pytest.raises(RoleError, match=r"fc.weight: \(3, 4\) in the file, \(5, 4\) in the network"):
        resolve_model(f"{library}:resnet_a:weights=own.safetensors", Classifier)
    save_file(loaded.state_dict(), "saved.safetensors")
    again = resolve_model("saved.safetensors", Classifier, arch=f"{library}:resnet_a:num_classes=3")
    assert torch.equal(again(image), loaded(image))


@LIBRARIES
def test_a_result_that_is_not_what_was_given(libraries, library, tmp_path):
    """As of a search among candidates: the result says what it is, not the teacher."""
    target = resolve_model(f"{library}:resnet_a:num_classes=4", Network)()
    about = targets.About("diswot", kind="Classifier", network={"text": "resnet:width=4"})
    targets.save(target, tmp_path, about)
    again = targets.load(tmp_path)
    image = torch.rand(2, 3, 8, 8)
    assert torch.equal(again(image), target.eval()(image))


@LIBRARIES
@pytest.mark.parametrize(("options", "error", "says"), [
    ("width=3", UnknownNameError, "no option 'width'; it has pretrained, num_classes, weights"),
    ("pretrained=yes", ConfigError, "true or false"), ("num_classes=0", ConfigError, "number of classes"),
    ("num_classes=many", ConfigError, "number of classes"), ("fresh", ConfigError, "name=value"),
    ("weights=own.pth", RoleError, r"own\.pth.*\.safetensors only.*can run any program"),
    ("weights=none.safetensors", UnknownNameError, r"no file none\.safetensors"),
    ("weights=w.safetensors,pretrained=true", ConfigError, "takes the place"),
])
def test_options_that_cannot_be(libraries, library, options, error, says):
    with pytest.raises(error, match=says):
        resolve_model(f"{library}:resnet_a:{options}", Classifier)
    assert not libraries[library]


@LIBRARIES
def test_names_and_roles_that_are_none(libraries, library):
    with pytest.raises(UnknownNameError, match="no classifier 'resnet_c'; near to it: resnet_"):
        resolve_model(f"{library}:resnet_c", Classifier)
    with pytest.raises(UnknownNameError, match="no classifier 'hf-hub'"):
        resolve_model(f"{library}:hf-hub", Classifier)
    with pytest.raises(RoleError, match="this role needs a CausalLM"):
        resolve_model(f"{library}:resnet_a", CausalLM)
    assert not libraries[library]


def test_what_a_description_may_not_name(libraries):
    from stillhouse.errors import DamagedFileError

    spec = {"name": "resnet_a", "classes": 3, "mean": MEAN, "std": STD, "size": [8, 8]}
    for library in ("os", "stillhouse.cli", ""):
        with pytest.raises(DamagedFileError, match="no library of pictures"):
            rebuild({"adapter": "VisionModel", "spec": {**spec, "library": library}}, str)
    for name in ("hf-hub:a/b", "local-dir:/tmp", "../x", "resnet_a.hub/x", "resnet_a.a:b"):
        with pytest.raises(UnknownNameError, match="no classifier"):
            rebuild({"adapter": "VisionModel", "spec": {**spec, "library": "timm", "name": name}}, str)


def test_weights_that_cannot_be_had(libraries):
    with pytest.raises(UnknownNameError, match="could not be fetched, or there are none.*pretrained=false"):
        resolve_model("timm:nothing_there", Classifier)
    with pytest.raises(RoleError, match="more than logits"):
        resolve_model("torchvision:googlenet", Classifier)


@LIBRARIES
def test_without_the_library_the_extra_is_named(monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    for kind in (Classifier, Encoder, Network):
        with pytest.raises(MissingExtraError, match=rf"{library}:… needs {library}.*stillhouse\[vision\]"):
            resolve_model(f"{library}:resnet18", kind)


# ------------------------------------------------------------------------------------------- the libraries themselves


def real(library):
    return pytest.importorskip(library, exc_type=(ImportError, RuntimeError))


REAL = {"timm": ["resnet18", "vit_tiny_patch16_224", "convnext_atto"],
        "torchvision": ["resnet18", "vit_b_16", "convnext_tiny", "mobilenet_v3_small", "efficientnet_b0", "swin_t",
                        "densenet121"]}


@pytest.mark.parametrize(("library", "name"), [(library, name) for library, names in REAL.items() for name in names])
def test_real_models(library, name, tmp_path):
    real(library)
    text = f"{library}:{name}:pretrained=false,num_classes=7"
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    classifier, encoder = resolve_model(text, Classifier).eval(), resolve_model(text, Encoder).eval()
    assert classifier.size == (224, 224) or library == "timm"
    mean = torch.tensor([0.485, 0.456, 0.406])
    assert torch.allclose(classifier.mean.flatten(), mean) or name.startswith("vit_tiny")
    with torch.no_grad():
        logits = classifier(image)
        assert logits.shape == (2, 7) and torch.isfinite(logits).all()
        torch.testing.assert_close(logits, classifier.model(classifier.prepared(image)))
        torch.testing.assert_close(classifier.encode(image), encoder(image))
        for model in (classifier, encoder):
            again = rebuild(describe(model), lambda said: pytest.fail(said))
            again.load_state_dict(model.state_dict())
            torch.testing.assert_close(again.eval()(image), model(image))
        save_file(classifier.model.state_dict(), tmp_path / "own.safetensors")
        own = resolve_model(f"{library}:{name}:num_classes=7,weights={tmp_path / 'own.safetensors'}", Classifier)
        torch.testing.assert_close(own.eval()(image), logits)


@LIBRARIES
def test_real_names(library):
    real(library)
    with pytest.raises(UnknownNameError, match="near to it: .*resnet"):
        resolve_model(f"{library}:resnet19", Classifier)
    if library == "torchvision":
        with pytest.raises(UnknownNameError, match="no classifier 'fcn_resnet50'"):
            resolve_model("torchvision:fcn_resnet50", Classifier)
