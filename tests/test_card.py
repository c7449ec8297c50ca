"""The card of an export: what stands in it, and that nothing does which was not given or measured."""

import json

import pytest
import torch
from safetensors.torch import save_file

from stillhouse import catalog
from stillhouse.data.distilled import DistilledSet
from stillhouse.deploy.card import parameters_in, versions
from stillhouse.deploy.export import export
from stillhouse.deploy.targets import About, save
from stillhouse.hub.architectures import describe
from stillhouse.hub.models import resolve_model


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def card_of(to="safetensors", **more):
    model = resolve_model("tiny-convnet")
    save(model, "run/target", About("ssld", kind="Classifier", network=describe(model), example={"image": [1, 8, 8]},
                                    seed=7, config={"steps": 3}, **more))
    return model, (export("run", to, force=True).folder / "README.md").read_text()


def test_it_says_method_roles_settings_size_check_and_versions(here):
    model, text = card_of(made_from={"teacher": "zoo:digits-teacher", "data": "digits16:train|test"})
    system = catalog.find("ssld")
    for said in (system.title, str(system.year), system.arxiv, system.moves, "`zoo:digits-teacher`", "Seed 7",
                 '"steps": 3', f"{sum(p.numel() for p in model.parameters()):,} parameters", "logits, 3 samples",
                 torch.__version__, 'stillhouse.load(".")'):
        assert said in text
    assert "teacher |" in text and "numbers in its safetensors" not in text


def test_its_front_matter_leaves_the_licence_open(here):
    _, text = card_of()
    front = text.split("---")[1]
    assert "# license: choose one" in front and "\nlicense:" not in front and "- ssld" in front
    assert "Not set" in text.partition("## Licence")[2]


def test_figures_are_those_that_were_measured_and_no_others(here):
    _, text = card_of()
    assert "None were measured" in text
    _, text = card_of(metrics={"accuracy": 0.8125})
    assert "| accuracy | 0.8125 |" in text and "None were measured" not in text
    (here / "run" / "eval.json").write_text(json.dumps({"student": {"ece": 0.25, "note": "x", "ok": True}}))
    _, text = card_of()
    assert "| student ece | 0.25 |" in text and "note" not in text.partition("## Figures")[2].partition("##")[0]


def test_a_broken_eval_file_is_left_out(here):
    (here / "run").mkdir()
    (here / "run" / "eval.json").write_text("{")
    _, text = card_of()
    assert "None were measured" in text


def test_the_size_of_a_teacher_is_read_from_its_files(here):
    (here / "big").mkdir()
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5)}, here / "big" / "model.safetensors")
    assert parameters_in("hf:big") == 17 and parameters_in("big/model.safetensors") == 17
    assert parameters_in("zoo:digits-teacher") is None and parameters_in("nowhere") is None
    (here / "big" / "more.safetensors").write_bytes(b"torn")
    assert parameters_in("big") is None
    (here / "big" / "more.safetensors").unlink()
    _, text = card_of(made_from={"teacher": "hf:big"})
    assert "| teacher | 17 numbers in its safetensors |" in text


def test_a_data_set_has_samples_and_bytes_for_size(here):
    held = DistilledSet(torch.randn(4, 3, 8, 8), torch.arange(4), 0.1)
    save(held, "run/target", About("mtt"))
    text = (export("run", "safetensors").folder / "README.md").read_text()
    assert f"4 samples, {held.bytes:,} bytes" in text and "parameters" not in text.partition("## Size")[2][:200]


def test_versions_are_those_of_the_libraries_that_wrote_it():
    pytest.importorskip("transformers")
    import transformers

    found = versions("hf", "0.0.1")
    assert found["transformers"] == transformers.__version__ and found["stillhouse (the run)"] == "0.0.1"
    assert "onnx" not in found
