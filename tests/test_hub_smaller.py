"""Students of their teacher's architecture, with fewer layers or narrower."""

import json

import pytest
import torch

from stillhouse.errors import ConfigError, RoleError, UnknownNameError
from stillhouse.hub.architectures import describe, rebuild
from stillhouse.hub.models import resolve_model
from stillhouse.hub.smaller import by_words, smaller
from stillhouse.protocols import Classifier, TextClassifier

hf = pytest.importorskip("transformers")
TEXT = {"vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 4, "intermediate_size": 24}
IDS = torch.tensor([[3, 4, 5], [6, 7, 8]])
LAYERS = {"vit": "vit.layers", "bert": "bert.encoder.layer", "llama": "model.layers", "qwen2": "model.layers",
          "qwen3": "model.layers", "gpt2": "transformer.h"}


def teacher(kind):
    torch.manual_seed(0)
    model = {
        "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**SMALL, image_size=16, patch_size=8, num_labels=3)),
        "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**SMALL, vocab_size=20, num_labels=3)),
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, **TEXT, num_key_value_heads=2)),
        "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SMALL, **TEXT, num_key_value_heads=2)),
        "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SMALL, **TEXT, num_key_value_heads=2, head_dim=6)),
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_layer=5, n_head=4, **TEXT)),
        "resnet": lambda: hf.ResNetForImageClassification(hf.ResNetConfig(
            embedding_size=4, hidden_sizes=[8, 16], depths=[3, 4], num_labels=3)),
    }[kind]()
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.2)  # norms and biases too, so that every tensor is its own
    return model.eval()


def run(model):
    if model.main_input_name == "pixel_values":
        return model(pixel_values=torch.ones(2, 3, 16, 16)).logits
    return model(input_ids=IDS).logits


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", list(LAYERS))
def test_evenly_spaced_layers_and_all_the_rest_are_inherited(kind):
    big = teacher(kind)
    before = {k: v.clone() for k, v in big.state_dict().items()}
    student, path = smaller(big), LAYERS[kind]
    layers = big.get_submodule(path)
    assert type(student) is type(big) and not student.training
    assert len(student.get_submodule(path)) == 3 and len(layers) == 5
    assert count(student) == count(big) - count(layers[1]) - count(layers[3])
    for mine, its in enumerate((0, 2, 4)):
        ours, theirs = student.get_submodule(f"{path}.{mine}").state_dict(), layers[its].state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())
    rest = [k for k in student.state_dict() if not k.startswith(f"{path}.")]
    assert len(rest) >= 3 and all(torch.equal(student.state_dict()[k], before[k]) for k in rest)
    mine, its = {p.data_ptr() for p in student.parameters()}, {p.data_ptr() for p in big.parameters()}
    assert not mine & its
    run(student).square().sum().backward()
    assert all(p.grad is None for p in big.parameters()) and any(p.grad is not None for p in student.parameters())
    assert all(torch.equal(v, before[k]) for k, v in big.state_dict().items())
    assert big.config.num_hidden_layers == 5
    again = rebuild(json.loads(json.dumps(describe(student))), lambda text: pytest.fail(text))
    again.load_state_dict(student.state_dict())
    torch.testing.assert_close(run(again.eval()), run(student), rtol=0, atol=0)


def test_the_layers_are_those_of_distilbert():
    big = hf.BertModel(hf.BertConfig(hidden_size=8, num_hidden_layers=12, num_attention_heads=2, intermediate_size=8,
                                     vocab_size=20))
    student = smaller(big)
    kept = [next(i for i, layer in enumerate(big.encoder.layer) if torch.equal(
        layer.attention.self.query.weight, own.attention.self.query.weight)) for own in student.encoder.layer]
    assert kept == [0, 2, 4, 7, 9, 11]


def test_a_resnet_keeps_a_part_of_every_stage():
    big = teacher("resnet")
    student = smaller(big, fraction=0.5)
    assert student.config.depths == [2, 2] and big.config.depths == [3, 4]
    stages = big.resnet.encoder.stages
    dropped = [stages[0].layers[1], stages[1].layers[1], stages[1].layers[2]]
    assert count(student) == count(big) - sum(map(count, dropped))
    for stage, (mine, its) in ((0, (1, 2)), (1, (0, 0)), (1, (1, 3))):
        ours = student.resnet.encoder.stages[stage].layers[mine].state_dict()
        theirs = stages[stage].layers[its].state_dict()
        assert all(torch.equal(v, theirs[k]) for k, v in ours.items())
    assert run(student).shape == (2, 3)
    narrow = smaller(big, fraction=1, width=8)
    assert narrow.config.hidden_sizes == [4, 8] and narrow.config.embedding_size == 2 and run(narrow).shape == (2, 3)
    with pytest.raises(ConfigError, match="stand in stages"):
        smaller(big, layers=2)
    for width, says in ((6, "multiple of 4 up to 16"), (4, "4 channels that its bottlenecks need")):
        with pytest.raises(ConfigError, match=says):
            smaller(big, width=width)


@pytest.mark.parametrize("kind", list(LAYERS))
def test_narrower_means_fresh_weights(kind):
    big = teacher(kind)
    student = smaller(big, layers=2, width=8)
    config = student.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (8, 2, 2)
    if kind != "gpt2":
        assert config.intermediate_size == 12
    assert getattr(config, "num_key_value_heads", 1) == 1
    assert run(student).shape == run(big).shape and count(student) < count(big) / 3
    with pytest.raises(ConfigError, match="width must be a multiple of (4|8) up to 16"):
        smaller(big, width=6)


def test_without_inheritance_all_weights_are_fresh():
    big = teacher("vit")
    student = smaller(big, layers=2, inherit=False)
    own = student.state_dict()
    assert not any(torch.equal(v, big.state_dict()[k]) for k, v in own.items() if k in big.state_dict())


@pytest.mark.parametrize(("options", "says"), [
    ({"fraction": 0}, r"in \(0, 1\]"), ({"fraction": 1.5}, r"in \(0, 1\]"), ({"fraction": 1}, "not smaller"),
    ({"layers": 6}, "has 5 layers; 6 are more"), ({"layers": 0}, "at least 1"), ({"layers": True}, "at least 1"),
    ({"layers": 5}, "not smaller"), ({"width": 32, "layers": 5}, "up to 16"),
    ({"width": 16, "layers": 5}, "not smaller"),
])
def test_impossible_sizes(options, says):
    with pytest.raises(ConfigError, match=says):
        smaller(teacher("vit"), **options)


def test_classes_that_are_not_in_the_list():
    convnext = hf.ConvNextForImageClassification(hf.ConvNextConfig(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2))
    for other in (convnext, torch.nn.Linear(2, 2)):
        with pytest.raises(RoleError, match=r"cannot be made smaller.*ViT, ResNet, BERT, Llama, GPT-2, Qwen2, Qwen3"):
            smaller(other)


def test_adapters_are_kept_and_words_are_read(tmp_path):
    teacher("vit").save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "ViTImageProcessor", "image_mean": [0.1] * 3, "image_std": [0.4] * 3,
        "size": {"height": 16, "width": 16}}))
    big = resolve_model(f"hf:{tmp_path / 'vit'}", Classifier).eval()
    student = by_words("smaller:layers=1", big)
    assert type(student) is type(big) and torch.equal(student.mean, big.mean) and student.size == (16, 16)
    assert student(torch.zeros(2, 1, 8, 8)).shape == (2, 3) and len(student.model.vit.layers) == 1
    teacher("bert").save_pretrained(tmp_path / "bert")
    text = resolve_model(f"hf:{tmp_path / 'bert'}:pooling=first,num_labels=3", TextClassifier)
    assert by_words("smaller:fraction=0.25", text).pooling == "first"
    assert len(by_words("smaller:fraction=0.25", text).model.bert.encoder.layer) == 1
    state = torch.get_rng_state()
    first, again, other = (by_words("smaller:inherit=false", big, seed).model.vit.layers[0].mlp.fc1.weight
                           for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again) and not torch.equal(first, other)
    for words, error, says in (("smaller:depth=3", UnknownNameError, "no option 'depth'.*fraction, layers"),
                               ("smaller:inherit=no", ConfigError, "true or false"),
                               ("smaller:fraction=x", ConfigError, "a number"),
                               ("smaller:layers=x", ConfigError, "whole number"),
                               ("smaller:3", ConfigError, "name=value")):
        with pytest.raises(error, match=says):
            by_words(words, big)
