"""Models by string, on tiny random configurations."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from stillhouse.diffusion.denoise import NetworkDenoiser
from stillhouse.diffusion.process import VPCosine
from stillhouse.diffusion.samplers import FewStepSampler
from stillhouse.errors import ConfigError, DamagedFileError, RoleError, StillError, UnknownNameError
from stillhouse.hub.models import adapt, resolve_model
from stillhouse.protocols import CausalLM, Classifier, Denoiser, Encoder, GraphModel, Network
from stillhouse.store import save_tree

MODULE = """
import torch
from torch import nn

def net(width=3, classes=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.ReLU(), nn.Linear(width, classes))

def number():
    return 3

def breaks():
    raise FileNotFoundError("no such weights")

class Noiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
    def forward(self, x, t, condition=None):
        return self.layer(x)

single = net()
def same():
    return single
def around():
    return nn.Sequential(single)
"""


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A folder with the user's module `mine`, which is the current one."""
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "needy.py").write_text("import a_library_that_is_not_there\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("mine", "needy", "broken"):
        sys.modules.pop(name, None)


# ------------------------------------------------------------------------------------------- module:callable


def test_callable_with_options_is_a_function_of_text_and_seed(user):
    path = list(sys.path)
    model = resolve_model("mine:net:width=5", Classifier)
    assert model[1].out_features == 5 and sys.path == path
    state = torch.get_rng_state()
    again, other = resolve_model("mine:net:width=5", Classifier), resolve_model("mine:net:width=5", Classifier, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model[1].weight, again[1].weight) and not torch.equal(model[1].weight, other[1].weight)


@pytest.mark.parametrize(("text", "error", "says"), [
    ("", UnknownNameError, "no model was named"),
    ("mine:nett", UnknownNameError, "no 'nett'; near to it: net"),
    ("nowhere:net", UnknownNameError, "no module 'nowhere'"),
    ("needy:net", UnknownNameError, "needs 'a_library_that_is_not_there', which is not installed"),
    ("broken:net", RoleError, "importing 'broken'.*ZeroDivisionError"),
    ("mine:number", RoleError, "gives a int, not an nn.Module"),
    ("mine:breaks", RoleError, "building 'mine:breaks' failed: FileNotFoundError"),
    ("mine:single", RoleError, "a module, not a callable"),
    ("mine:net:depth=3", ConfigError, "cannot be called so.*depth"),
    ("mine:net:width", ConfigError, "name=value"),
    ("nothing.here", UnknownNameError, r"no file or folder of that name.*module:callable"),
    ("https://example.org/net", UnknownNameError, "names no model"),
    ("mine.py", UnknownNameError, "no model that can be read"),
])
def test_callables_that_cannot_be_used(user, text, error, says):
    with pytest.raises(error, match=says):
        resolve_model(text, Classifier)


def test_factory_for_the_network_role(user):
    make = resolve_model("mine:net:width=2", Network)
    first, second = make(), make()
    assert first is not second and not torch.equal(first[1].weight, second[1].weight)
    for text, says in (("mine:around", "the same weights"), ("mine:same", "same module, or the same weights"),
                       ("zoo:a", "factory"), ("w.safetensors", "factory"), ("mine:number", "not an nn.Module")):
        with pytest.raises(RoleError, match=says):
            resolve_model(text, Network, zoo={"a": nn.Identity})


def test_embedded_networks_by_name(user):
    small = resolve_model("convnet:width=8,depth=2,image_size=8", Classifier)
    assert small(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
    again = resolve_model("convnet:width=8,depth=2,image_size=8", Classifier)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), again.parameters(), strict=True))
    make = resolve_model("tiny-convnet:classes=3", Network)
    first, second = make(), make()
    assert first(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    assert not torch.equal(first.linear.weight, second.linear.weight)
    save_tree(user / "w.safetensors", dict(small.state_dict()))
    filled = resolve_model("w.safetensors", Classifier, arch="convnet:width=8,depth=2,image_size=8", seed=1)
    assert torch.equal(filled.linear.weight, small.linear.weight)
    for text, kind, error, says in (("convnte", Classifier, UnknownNameError, "did you mean 'convnet'"),
                                    ("convnet:colour=3", Classifier, ConfigError, "colour"),
                                    ("gnn:features=2", GraphModel, ConfigError, "kind"),
                                    ("convnet:image_size=4", Classifier, RoleError, "lower the depth"),
                                    ("lenet", CausalLM, RoleError, "generate")):
        with pytest.raises(error, match=says):
            resolve_model(text, kind)


def test_a_user_module_may_share_an_embedded_name(user):
    (user / "resnet.py").write_text("from torch import nn\ndef build():\n    return nn.Flatten()\n")
    try:
        assert isinstance(resolve_model("resnet:build", Classifier), nn.Flatten)
    finally:
        sys.modules.pop("resnet", None)


# ------------------------------------------------------------------------------------------- weights


def test_weights_of_a_file_or_a_run_folder(user):
    model = resolve_model("mine:net", Classifier, seed=7)
    save_file(model.state_dict(), user / "w.safetensors")
    save_tree(user / "runs" / "a" / "target" / "model.safetensors", dict(model.state_dict()))
    for text in ("w.safetensors", "runs/a", "runs/a/target", str(user / "runs/a/target/model.safetensors")):
        loaded = resolve_model(text, Classifier, arch="mine:net")
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    with pytest.raises(ConfigError, match="--arch module:callable"):
        resolve_model("w.safetensors", Classifier)
    with pytest.raises(RoleError, match=r"1.weight: \(3, 16\) in the file, \(8, 16\) in the network"):
        resolve_model("w.safetensors", Classifier, arch="mine:net:width=8")
    with pytest.raises(UnknownNameError, match="no file nowhere.safetensors"):
        resolve_model("nowhere.safetensors", Classifier, arch="mine:net")
    with pytest.raises(ConfigError, match="brings its own"):
        resolve_model("zoo:a", Classifier, arch="mine:net", zoo={"a": nn.Identity})
    (user / "empty").mkdir()
    with pytest.raises(RoleError, match=r"holds no model\.safetensors"):
        resolve_model("empty", Classifier, arch="mine:net")


def test_tied_weights_need_to_be_there_once(user):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
            self.b.weight = self.a.weight

    sys.modules["mine"] = type(sys)("mine")
    sys.modules["mine"].Tied = Tied
    save_file({"a.weight": torch.ones(2, 2)}, user / "w.safetensors")
    assert resolve_model("w.safetensors", arch="mine:Tied").b.weight.sum() == 4


@pytest.mark.parametrize(("state", "error", "says"), [
    ({"1.weight": torch.zeros(3, 16)}, RoleError, "missing 1.bias, 3.weight"),
    ({"model.1.weight": torch.zeros(3, 16)}, RoleError, "unknown model.1.weight"),
    (b"no such file", DamagedFileError, "damaged"),
    (float("nan"), DamagedFileError, "not finite"),
])
def test_weights_that_do_not_fit(user, state, error, says):
    path = user / "w.safetensors"
    if isinstance(state, bytes):
        path.write_bytes(state)
    elif isinstance(state, float):
        save_file({k: torch.full_like(v, state) for k, v in resolve_model("mine:net").state_dict().items()}, path)
    else:
        save_file(state, path)
    with pytest.raises(error, match=says):
        resolve_model("w.safetensors", Classifier, arch="mine:net")


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.bin", "a.ckpt", "a.PKL"])
def test_pickles_are_refused_unread(user, name):
    class Trap:
        def __reduce__(self):
            return (open, (str(user / "sprung"), "w"))

    torch.save(Trap(), user / name)
    with pytest.raises(RoleError, match=r"can run any program.*safetensors\.torch\.save_file"):
        resolve_model(name, Classifier, arch="mine:net")
    assert not (user / "sprung").exists()


def test_a_saved_few_step_sampler_is_a_denoiser(user):
    network = resolve_model("mine:Noiser", seed=3)
    denoiser = NetworkDenoiser(network, VPCosine(), "v")
    FewStepSampler(denoiser, (1.0, 0.5, 0.0)).save(user / "target")
    loaded = resolve_model("target", Denoiser, arch="mine:Noiser")
    x, t = torch.randn(3, 2), torch.full((3,), 0.4)
    assert torch.equal(loaded(x, t), denoiser(x, t)) and loaded.process == VPCosine()


# ------------------------------------------------------------------------------------------- zoo and roles


def test_zoo_names_with_options():
    zoo = {"plain": lambda width=2: nn.Linear(width, width)}
    assert resolve_model("zoo:plain", zoo=zoo).in_features == 2
    assert resolve_model("zoo:plain:width=3", zoo=zoo).in_features == 3
    with pytest.raises(UnknownNameError, match="did you mean 'zoo:plain'"):
        resolve_model("zoo:plane", zoo=zoo)
    with pytest.raises(UnknownNameError, match="There is nothing"):
        resolve_model("zoo:plain")
    with pytest.raises(ConfigError, match="cannot be called so"):
        resolve_model("zoo:plain:depth=3", zoo=zoo)


def test_models_of_the_wrong_class_for_a_role(user):
    noiser = NetworkDenoiser(nn.Identity(), VPCosine(), "x0")
    zoo = {"net": lambda: nn.Linear(2, 2), "noiser": lambda: noiser, "class": lambda: nn.Linear}
    assert resolve_model("zoo:noiser", Denoiser, zoo=zoo) is noiser
    for text, kind, says in (("zoo:net", Denoiser, "no Denoiser.*`process`"), ("zoo:net", CausalLM, "no `generate`"),
                             ("zoo:noiser", Classifier, "is a Denoiser.*class logits"),
                             ("zoo:noiser", Encoder, "is a Denoiser.*features"), ("zoo:class", None, "call it")):
        with pytest.raises(RoleError, match=says):
            resolve_model(text, kind, zoo=zoo)


# ------------------------------------------------------------------------------------------- adapt


def test_adapt_takes_logits_and_features():
    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 3, 3), nn.Linear(3, 2)

        def forward(self, image):
            return {"logits": self.head(self.conv(image).mean((2, 3))), "other": 1}

    model, image = Backbone(), torch.randn(4, 1, 8, 8)
    fit = adapt(model, logits="logits", encode="conv")
    assert torch.equal(fit(image), model(image)["logits"])
    torch.testing.assert_close(fit.encode(image), model.conv(image).mean((2, 3)))
    assert {id(p) for p in fit.parameters()} == {id(p) for p in model.parameters()}
    assert not model.conv._forward_hooks
    by_hand = adapt(model, logits=lambda out: 2 * out["logits"], encode=lambda m, x: m.conv(x).amax((2, 3)))
    assert torch.equal(by_hand(image), 2 * fit(image)) and by_hand.encode(image).shape == (4, 3)
    with pytest.raises(RoleError, match="returns a dict without 'scores'"):
        adapt(model, logits="scores")(image)
    with pytest.raises(RoleError, match="no inner module 'convs'; it has conv, head"):
        adapt(model, encode="convs")
    with pytest.raises(RoleError, match="without encode"):
        adapt(model).encode(image)
    with pytest.raises(RoleError, match="takes an nn.Module"):
        adapt(lambda x: x)
    assert adapt(nn.LSTM(3, 2), logits=0)(torch.randn(5, 3)).shape == (5, 2)


# ------------------------------------------------------------------------------------------- transformers


def hf():
    return pytest.importorskip("transformers")


def vision(name, **options):
    t = hf()
    torch.manual_seed(0)
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
             "image_size": 16, "patch_size": 8}
    config = {
        "vit": lambda: t.ViTConfig(**small, **options),
        "dinov2": lambda: t.Dinov2Config(**small, **options),
        "resnet": lambda: t.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], **options),
        "convnext": lambda: t.ConvNextConfig(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, patch_size=2, **options),
    }[name]()
    return t.AutoModelForImageClassification.from_config(config).eval()


@pytest.mark.parametrize("name", ["vit", "resnet", "convnext", "dinov2"])
def test_image_classifiers(tmp_path, name):
    model = vision(name, num_labels=5)
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "ViTImageProcessor", "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6],
        "size": {"height": 16, "width": 16}}))
    loaded = resolve_model(f"hf:{tmp_path / 'm'}", Classifier).eval()
    image = torch.rand(3, 3, 16, 16) * 2 - 1
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    with torch.no_grad():
        expected = model(pixel_values=((image + 1) / 2 - mean) / std)
        torch.testing.assert_close(loaded(image), expected.logits)
        assert loaded.encode(image).dim() == 2
        encoder = resolve_model(f"hf:{tmp_path / 'm'}", Encoder).eval()
        torch.testing.assert_close(encoder(image), loaded.encode(image))
    grey = torch.rand(2, 1, 8, 8, requires_grad=True)
    assert loaded(grey).shape == (2, 5)
    loaded(grey).sum().backward()
    assert grey.grad is not None and bool(torch.isfinite(grey.grad).all())


def test_without_a_processor_pictures_stay_as_they_are(tmp_path):
    model = vision("vit", num_labels=3, num_channels=1)
    model.save_pretrained(tmp_path)
    loaded = resolve_model(f"hf:{tmp_path}", Classifier).eval()
    image = torch.rand(2, 1, 16, 16) * 2 - 1
    torch.testing.assert_close(loaded(image), model(pixel_values=image).logits)
    assert loaded(torch.zeros(1, 1, 8, 8)).shape == (1, 3)
    with pytest.raises(RoleError, match="pictures of 3 channels were given to a model of 1"):
        loaded(torch.zeros(1, 3, 16, 16))


def test_what_a_user_types_is_distilled(tmp_path):
    """A folder of pictures, a ViT as teacher and a ResNet as student, through two steps of SSLD."""
    from PIL import Image

    from stillhouse.data.readers import read_data
    from stillhouse.protocols import Images
    from stillhouse.run import Run
    from stillhouse.systems.compression.ssld import Config, distill

    vision("vit", num_labels=4, num_channels=1).save_pretrained(tmp_path / "teacher")
    vision("resnet", num_labels=4, num_channels=1).save_pretrained(tmp_path / "student")
    (tmp_path / "pictures").mkdir()
    for i in range(8):
        Image.effect_noise((20, 16), 30 + i).save(tmp_path / "pictures" / f"{i}.png")
    teacher = resolve_model(f"hf:{tmp_path / 'teacher'}", Classifier)
    student = resolve_model(f"hf:{tmp_path / 'student'}", Classifier)
    data = read_data(str(tmp_path / "pictures"), Images, size=16)
    before = {name: {k: v.clone() for k, v in m.state_dict().items()}
              for name, m in (("teacher", teacher), ("student", student))}
    with Run(quiet=True) as run:
        config = Config(steps=2, batch=4, last_stage=0.0, lr=0.1, warmup=0.0)
        assert distill(teacher, student, data, config=config, run=run) is student
        losses = [line["distance"] for line in run.history if "distance" in line]
    assert losses and all(0 < loss < 1 for loss in losses)
    assert all(torch.equal(v, before["teacher"][k]) for k, v in teacher.state_dict().items())
    moved = [k for k, v in student.named_parameters() if not torch.equal(v, before["student"][k])]
    assert any("classifier" in k for k in moved) and any("embedder" in k for k in moved)


def changed(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_model_that_would_be_partly_random_is_refused(tmp_path):
    model = vision("vit", num_labels=3)
    model.save_pretrained(tmp_path / "deeper")
    changed(tmp_path / "deeper", num_hidden_layers=2)
    with pytest.raises(RoleError, match=r"lack \d+ tensors of ViTForImageClassification \(vit.*random numbers"):
        resolve_model(f"hf:{tmp_path / 'deeper'}", Classifier)
    model.save_pretrained(tmp_path / "wider")
    changed(tmp_path / "wider", hidden_size=16)
    with pytest.raises(RoleError, match="wider"):
        resolve_model(f"hf:{tmp_path / 'wider'}", Classifier)
    model.vit.save_pretrained(tmp_path / "body")
    with pytest.raises(RoleError, match="no trained class layer.*num_labels=N"):
        resolve_model(f"hf:{tmp_path / 'body'}", Classifier)
    assert resolve_model(f"hf:{tmp_path / 'body'}:num_labels=4", Classifier).classes == 4
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    encoder = resolve_model(f"hf:{tmp_path / 'body'}", Encoder).eval()
    with torch.no_grad():
        expected = model.vit(pixel_values=image).last_hidden_state[:, 0]
        torch.testing.assert_close(encoder(image), expected)
    hf().BertForMaskedLM(hf().BertConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                         intermediate_size=8)).save_pretrained(tmp_path / "masked")
    with pytest.raises(RoleError, match="no causal language model"):
        resolve_model(f"hf:{tmp_path / 'masked'}", CausalLM)


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", None])
def test_partial_downloads_are_named(tmp_path, content):
    vision("resnet").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(content or path.read_bytes()[:-50])
    with pytest.raises(DamagedFileError, match="damaged or only partly there.*git-lfs"):
        resolve_model(f"hf:{tmp_path}", Classifier)


def test_a_role_kind_that_loads_itself(tmp_path):
    from stillhouse.recipes.trajectories import Trajectories

    Trajectories([torch.randn(3, 4)]).save(tmp_path / "experts")
    assert len(resolve_model(tmp_path / "experts", Trajectories).experts) == 1


def test_a_new_last_layer_and_a_factory(tmp_path):
    model = vision("resnet", num_labels=3)
    model.save_pretrained(tmp_path)
    text = f"hf:{tmp_path}:num_labels=7"
    loaded = resolve_model(text, Classifier)
    own, other = dict(loaded.model.named_parameters()), dict(model.named_parameters())
    assert loaded(torch.zeros(1, 3, 16, 16)).shape == (1, 7)
    assert [k for k in own if own[k].shape != other[k].shape or not torch.equal(own[k], other[k])] == [
        "classifier.1.weight", "classifier.1.bias"]
    make = resolve_model(text, Network)
    assert make()(torch.zeros(1, 3, 16, 16)).shape == (1, 7) and make() is not make()
    save_file(loaded.state_dict(), tmp_path / "w.safetensors")
    again = resolve_model(tmp_path / "w.safetensors", Classifier, arch=text)
    assert torch.equal(again.model.classifier[1].weight, loaded.model.classifier[1].weight)
    with pytest.raises(UnknownNameError, match="no option 'classes'.*num_labels"):
        resolve_model(f"hf:{tmp_path}:classes=7", Classifier)


def test_models_of_transformers_built_in_python(user):
    (user / "mine.py").write_text("import transformers as t\n"
                                  "def vit():\n    return t.ViTForImageClassification(t.ViTConfig(hidden_size=8, "
                                  "num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16, "
                                  "patch_size=8))\n"
                                  "def body():\n    return vit().vit\n"
                                  "def text():\n    return t.GPT2LMHeadModel(t.GPT2Config(n_embd=8, n_layer=1, "
                                  "n_head=2, vocab_size=8))\n")
    hf()
    assert resolve_model("mine:vit", Classifier)(torch.zeros(2, 1, 8, 8)).shape == (2, 2)
    assert resolve_model("mine:body", Encoder)(torch.zeros(2, 1, 8, 8)).shape == (2, 8)
    with pytest.raises(RoleError, match="has no classes"):
        resolve_model("mine:body", Classifier)
    with pytest.raises(RoleError, match="no model of pictures"):
        resolve_model("mine:text", Classifier)
    assert type(resolve_model("mine:text", CausalLM)).__name__ == "GPT2LMHeadModel"


def language(folder, **options):
    from stillhouse.models.language import gpt2

    hf()
    torch.manual_seed(0)
    model = gpt2(11, width=8).eval()
    model.save_pretrained(folder, **options)
    return model


def test_language_models(tmp_path):
    model = language(tmp_path)
    ids = torch.randint(11, (2, 5))
    for kind in (CausalLM, None):
        loaded = resolve_model(f"hf:{tmp_path}", kind)
        assert loaded.dtype == torch.float32
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    for kind, says in ((Classifier, "no model of pictures"), (Denoiser, "diffusers:FOLDER"),
                       (GraphModel, "GraphModel")):
        with pytest.raises(RoleError, match=says):
            resolve_model(f"hf:{tmp_path}", kind)
    with pytest.raises(RoleError, match=f"saved by transformers; write hf:{tmp_path}"):
        resolve_model(tmp_path, CausalLM)
    vision("resnet").save_pretrained(tmp_path / "v")
    with pytest.raises(RoleError, match="no causal language model"):
        resolve_model(f"hf:{tmp_path / 'v'}", CausalLM)


def test_transformers_that_are_refused(tmp_path):
    model = language(tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "a" / "pytorch_model.bin")
    with pytest.raises(RoleError, match=r"pytorch_model\.bin.*can run any program.*save_pretrained"):
        resolve_model(f"hf:{tmp_path / 'a'}", CausalLM)
    (tmp_path / "a" / "pytorch_model.bin").unlink()
    with pytest.raises(StillError, match="safetensors"):
        resolve_model(f"hf:{tmp_path / 'a'}", CausalLM)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.json").write_text(json.dumps({
        "model_type": "unheard-of", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}))
    (tmp_path / "c" / "code.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    with pytest.raises(RoleError, match="trust_remote_code.*refused.*module:callable"):
        resolve_model(f"hf:{tmp_path / 'c'}", CausalLM)
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(RoleError, match=r"no config\.json"):
        (tmp_path / "d").mkdir()
        resolve_model(f"hf:{tmp_path / 'd'}", CausalLM)


def test_offline_names_are_explained(monkeypatch, tmp_path):
    hf()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UnknownNameError, match="no folder here.*not in the cache.*hf download nobody/nothing"):
        resolve_model("hf:nobody/nothing", CausalLM)


# ------------------------------------------------------------------------------------------- diffusers


def test_diffusers_folders(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4,
                                 block_out_channels=(8,), down_block_types=("DownBlock2D",),
                                 up_block_types=("UpBlock2D",)).eval()
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=50)
    unet.save_pretrained(tmp_path / "a" / "unet")
    scheduler.save_pretrained(tmp_path / "a" / "scheduler")
    from stillhouse.hub.diffusers import from_diffusers

    loaded = resolve_model(f"diffusers:{tmp_path / 'a'}", Denoiser)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 1.0])
    with torch.no_grad():
        torch.testing.assert_close(loaded(x, t), from_diffusers(unet, scheduler)(x, t))
    with pytest.raises(RoleError, match="saved by diffusers; write diffusers:"):
        resolve_model(tmp_path / "a", Denoiser)
    with pytest.raises(RoleError, match="is a Denoiser"):
        resolve_model(f"diffusers:{tmp_path / 'a'}", Classifier)
    with pytest.raises(UnknownNameError, match="no folder.*hf download"):
        resolve_model("diffusers:nobody/nothing", Denoiser)
    weights = tmp_path / "a" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(StillError):
        resolve_model(f"diffusers:{tmp_path / 'a'}", Denoiser)
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(RoleError, match=r"\.bin.*can run any program"):
        resolve_model(f"diffusers:{tmp_path / 'a'}", Denoiser)
    (tmp_path / "a" / "unet" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(RoleError, match="holds a AutoencoderKL"):
        resolve_model(f"diffusers:{tmp_path / 'a'}", Denoiser)
    (tmp_path / "a" / "unet" / "config.json").write_text("{")
    with pytest.raises(DamagedFileError, match=r"config\.json"):
        resolve_model(f"diffusers:{tmp_path / 'a'}", Denoiser)


def test_the_resolver_needs_no_extra():
    code = "import sys, stillhouse.hub.models; print([m for m in ('transformers', 'diffusers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
