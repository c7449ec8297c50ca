"""Whole runs of built systems on saved models of transformers, as a user types them."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

import stillhouse
from stillhouse.cli import main
from stillhouse.cli.resolving import resolve_roles
from stillhouse.deploy.targets import read_about
from stillhouse.hub.models import resolve_model
from stillhouse.protocols import CausalLM, Classifier
from stillhouse.systems.compression import ssld

hf = pytest.importorskip("transformers")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return tmp_path


@pytest.fixture
def pictures(here):
    from PIL import Image

    (here / "pictures").mkdir()
    for i in range(8):
        Image.effect_noise((16, 16), 30 + i).convert("RGB").save(here / "pictures" / f"{i}.png")
    small = {"hidden_sizes": [4, 8], "num_labels": 4}
    hf.ConvNextForImageClassification(hf.ConvNextConfig(
        **small, depths=[1, 1], num_stages=2, patch_size=2, image_size=16)).save_pretrained(here / "teacher")
    hf.ResNetForImageClassification(hf.ResNetConfig(**small, embedding_size=4, depths=[2, 2])).save_pretrained(
        here / "student")
    hf.ViTForImageClassification(hf.ViTConfig(
        hidden_size=8, num_hidden_layers=4, num_attention_heads=2, intermediate_size=8, image_size=16, patch_size=8,
        num_labels=4)).save_pretrained(here / "vit")
    return here


SSLD = ["run", "ssld", "--data", "pictures", "--config.steps", "2", "--config.batch", "4", "--config.lr", "0.1",
        "--config.warmup", "0", "--quiet", "--out", "done"]


@pytest.mark.parametrize("student", ["hf:student", "hf:student:fresh=true,num_labels=4"])
def test_a_convnext_teaches_a_resnet(pictures, student):
    main([*SSLD, "--teacher", "hf:teacher", "--student", student])
    about, model = read_about("done"), stillhouse.load("done")
    assert about.kind == "Classifier" and about.network["spec"]["class"] == "ResNetForImageClassification"
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    again = resolve_model("done", Classifier).eval()
    torch.testing.assert_close(model(image), again(image), rtol=0, atol=0)
    before = resolve_model(student, Classifier, seed=0).state_dict()
    assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items() if "convolution.weight" in k)


def test_a_smaller_student_of_the_teachers_own_architecture(pictures):
    main([*SSLD, "--student", "smaller", "--teacher", "hf:vit"])
    assert len(stillhouse.load("done").model.vit.layers) == 2
    assert read_about("done").network["spec"]["config"]["num_hidden_layers"] == 2
    options = SimpleNamespace(arch=None, seed=0, columns=None)
    roles = resolve_roles(ssld, {}, {"student": "smaller", "teacher": "hf:vit"}, options)
    assert len(roles["student"].model.vit.layers) == 2 and len(roles["teacher"].model.vit.layers) == 4
    main([*SSLD[:-1], "one", "--teacher", "hf:vit", "--student", "smaller:layers=1"])
    assert len(resolve_model("one", Classifier).model.vit.layers) == 1


@pytest.mark.parametrize(("words", "says"), [
    (["--teacher", "hf:teacher", "--student", "smaller"], "ConvNext.*cannot be made smaller.*ViT, ResNet"),
    (["--teacher", "hf:vit", "--student", "smaller:depth=2"], "no option 'depth'"),
    (["--teacher", "smaller", "--student", "hf:vit"], "--teacher smaller.*give --teacher as one model"),
    (["--teacher", "hf:vit", "--student", "hf:vit:depth=2"], "no option 'depth'"),
])
def test_students_that_cannot_be_made(pictures, capsys, words, says):
    with pytest.raises(SystemExit) as stopped:
        main([*SSLD, *words])
    captured = capsys.readouterr()
    said = " ".join((captured.out + captured.err).split())
    assert stopped.value.code and re.search(says, said), said
    assert not (pictures / "done").exists()


def tokenizer():
    """A byte-level BPE, trained on the spot."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator(["say one", "say two", "one two three"], trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>")


@pytest.mark.parametrize(("teacher", "student"), [
    ("hf:teacher", "hf:student"), ("hf:teacher:fresh=true", "hf:student:fresh=true"),
    ("hf:teacher", "smaller:layers=1")])
def test_a_qwen_teaches_a_gpt2_of_the_same_tokenizer(here, teacher, student):
    words = tokenizer()
    ids = {"vocab_size": len(words), "pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id,
           "bos_token_id": words.eos_token_id}
    hf.Qwen2ForCausalLM(hf.Qwen2Config(**ids, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
                                       num_key_value_heads=1, intermediate_size=16)).save_pretrained(here / "teacher")
    hf.GPT2LMHeadModel(hf.GPT2Config(**ids, n_embd=8, n_layer=2, n_head=2, n_positions=64)).save_pretrained(
        here / "student")
    for folder in ("teacher", "student"):
        words.save_pretrained(here / folder)
    (here / "pairs.jsonl").write_text("".join(
        json.dumps({"prompt": f"say {word}", "response": word}) + "\n"
        for word in ["one", "two", "three", "one two"] * 2))
    main(["run", "distillm", "--teacher", teacher, "--student", student, "--data", "pairs.jsonl", "--validation",
          "pairs.jsonl", "--config.steps", "2", "--config.batch", "4", "--config.fine_tuning", "0.5",
          "--config.max_new_tokens", "2", "--config.phi", "0.5", "--quiet", "--out", "done"])
    model, about = stillhouse.load("done"), read_about("done")
    wanted = "Qwen2ForCausalLM" if student.startswith("smaller") else "GPT2LMHeadModel"
    assert type(model).__name__ == about.network["transformers"] == wanted and about.kind == "CausalLM"
    given = words("say one", return_tensors="pt")
    again = resolve_model("done", CausalLM).eval()
    torch.testing.assert_close(model(**{k: given[k] for k in ("input_ids", "attention_mask")}).logits,
                               again(given["input_ids"], attention_mask=given["attention_mask"]).logits)
    assert model.generate(given["input_ids"], max_new_tokens=2, do_sample=False).shape[1] <= given[
        "input_ids"].shape[1] + 2
