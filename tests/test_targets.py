"""Results saved with all that is needed to use them again."""

import json

import pytest
import torch

import stillhouse
from stillhouse import store
from stillhouse.cli import main
from stillhouse.deploy.targets import About, read_about, save
from stillhouse.errors import ConfigError, DamagedFileError, StoreError
from stillhouse.hub.models import resolve_model

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
    (here / "half").mkdir()
    with pytest.raises(StoreError, match="not finished"):
        stillhouse.load("half")
    with pytest.raises(StoreError, match="no such folder"):
        stillhouse.load("nowhere")
