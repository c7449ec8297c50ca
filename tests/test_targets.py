"""Results saved with all that is needed to use them again."""

import json

import pytest
import torch

import stillhouse
from stillhouse import store
from stillhouse.cli import main
from stillhouse.deploy.targets import About, about_run, read_about, save
from stillhouse.errors import ConfigError, DamagedFileError, StoreError
from stillhouse.hub.models import resolve_model
from stillhouse.models.convnets import TinyConvNet
from stillhouse.parts.heads import Projected, mlp, normed_projector, predictor, projector

RUN = ["run", "ssld", "--teacher", "tiny-convnet", "--student", "tiny-convnet", "--data", "digits16:test",
       "--config.steps", "2", "--config.batch", "16", "--quiet"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_finished_run_is_loaded_from_its_folder_alone(here, capsys):
    main([*RUN, "--out", "done"])
    assert "stillhouse.load('done')" in capsys.readouterr().out
    about = read_about("done")
    assert (about.system, about.kind, about.network) == ("ssld", "Classifier", {"text": "tiny-convnet"})
    assert about.example["image"] == [1, 16, 16] and about.made_from["data"] == "digits16:test"
    model, again = stillhouse.load("done"), resolve_model("done")
    x = torch.randn(3, 1, 16, 16)
    assert not model.training
    torch.testing.assert_close(model(x), again.eval()(x), rtol=0, atol=0)
    weights = store.load_tree(here / "done" / "target" / "model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_code_that_a_file_names_is_not_run(here):
    (here / "nets_of_targets.py").write_text("import pathlib\nfrom torch import nn\n\npathlib.Path('ran').touch()\n\n"
                                      "def net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(4, 2))\n")
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    save(net, "saved", About("ssld", kind="Classifier", network={"text": "nets_of_targets:net"}))
    for read in (stillhouse.load, resolve_model):
        with pytest.raises(ConfigError, match="arch='nets_of_targets:net'"):
            read("saved")
    assert not (here / "ran").exists()
    x = torch.randn(2, 1, 2, 2)
    torch.testing.assert_close(stillhouse.load("saved", arch="nets_of_targets:net")(x), net(x))


@pytest.mark.parametrize("network", [{"text": "os:system:command=touch ran"}, {"text": "mlp:evil"}])
def test_words_other_than_those_of_embedded_networks_are_refused(here, network):
    save(torch.nn.Linear(2, 2), "saved", About("ssld", kind="Classifier", network=network))
    with pytest.raises(ConfigError, match="not run"):
        stillhouse.load("saved")
    assert not (here / "ran").exists()


@pytest.mark.parametrize("network", [{"adapter": "Popen", "spec": {}}, {"transformers": "Trainer", "config": {}},
                                     {"transformers": "AutoConfig", "config": {}}, {}, [], {"denoiser": 3}])
def test_a_description_that_is_none_is_damage(here, network):
    save(torch.nn.Linear(2, 2), "saved", About("ssld", kind="Classifier"))
    said = json.loads((here / "saved" / "target.json").read_text())
    (here / "saved" / "target.json").write_text(json.dumps({**said, "network": network}))
    with pytest.raises((DamagedFileError, ConfigError)):
        stillhouse.load("saved")


def test_an_unfinished_run_and_no_folder_at_all_are_told_apart(here):
    for name, run, says in (("other", None, "no folder of a run"), ("half", {"system": "ssld", "fingerprint": {
            "data": "ab"}}, "not finished. Go on with: still run ssld --resume half"), ("shown", {
            "system": "ssld", "fingerprint": {}}, "embedded experiment.*still run ssld --help")):
        (here / name).mkdir()
        if run is not None:
            (here / name / "run.json").write_text(json.dumps(run))
        with pytest.raises(StoreError, match=says):
            stillhouse.load(name)
    with pytest.raises(StoreError, match="no such folder"):
        stillhouse.load("nowhere")


def test_a_network_built_in_python_is_saved_and_loaded(here):
    """What a Python user does, without the command line."""
    from stillhouse.data.digits import digits
    from stillhouse.models.convnets import ConvEncoder
    from stillhouse.run import Run
    from stillhouse.systems.adaptation import fedx

    config = fedx.Config(rounds=1, epochs=1, hidden=6, out=5)
    given = {"network": lambda: ConvEncoder(width=4, depth=1), "clients": [digits(8, "labelled")]}
    target = fedx.distill(**given, config=config, run=Run(quiet=True))
    save(target, "saved", about_run("fedx", given, config))
    with pytest.raises(ConfigError, match="--arch"):
        stillhouse.load("saved")
    loaded = stillhouse.load("saved", arch="conv-encoder:width=4,depth=1")
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), target.eval()(x), rtol=0, atol=0)
        torch.testing.assert_close(loaded.predict(loaded(x)), target.predict(target(x)), rtol=0, atol=0)
    with pytest.raises(StoreError, match="other weights|does not have the weights"):
        stillhouse.load("saved", arch="conv-encoder:width=8,depth=1")


def test_loading_leaves_the_generators_alone(here):
    save(TinyConvNet(), "saved", About("ssld", kind="Classifier", network={"text": "tiny-convnet"}))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    stillhouse.load("saved")
    assert torch.equal(torch.rand(3), expected)


def test_heads_of_all_kinds_are_rebuilt(here):
    for i, head in enumerate((projector(4, 6, 3, norm=True), normed_projector(4, 3), mlp(4, 3, last_norm=True))):
        model = Projected(torch.nn.Flatten(), head, None if i else predictor(3, 5)).eval()
        model(torch.randn(8, 4))
        model.save(here / str(i))
        again = Projected.load(here / str(i), torch.nn.Flatten())
        x = torch.randn(5, 4)
        torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
        assert (again.predictor is None) == (model.predictor is None)
    with pytest.raises(StoreError, match="GELU"):
        Projected(torch.nn.Flatten(), torch.nn.Sequential(torch.nn.GELU())).save(here / "other")
    tree = store.load_tree(here / "0" / "heads.safetensors")
    tree["projector"]["layers"][0][0] = "conv"
    store.save_tree(here / "0" / "heads.safetensors", tree)
    with pytest.raises(DamagedFileError, match="heads"):
        Projected.load(here / "0", torch.nn.Flatten())


def test_a_student_of_features_alone_is_an_encoder():
    from stillhouse.systems.compression import wcord

    roles = {"teacher": TinyConvNet(), "student": TinyConvNet()}
    assert about_run("wcord", roles, wcord.Config()).kind == "Classifier"
    assert about_run("wcord", roles, wcord.Config(ce=0.0)).kind == "Encoder"
    assert about_run("wcord", roles, wcord.Config(ce=0.0, kd=1.0)).kind == "Classifier"
