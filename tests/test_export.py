"""`still export`: every kind of result in every format that makes sense, loaded back by the library it is for."""

import json
import sys

import pytest
import torch
from torch import nn

from stillhouse.cli import main
from stillhouse.data.distilled import DistilledSet
from stillhouse.data.graphs import GraphSet
from stillhouse.deploy import export as exporting
from stillhouse.deploy.export import FORMATS, MARK, TABLE, export, row_of, table
from stillhouse.deploy.formats.views import SIZES, deviation, view_of
from stillhouse.deploy.targets import About, load, save
from stillhouse.errors import (
    ConfigError,
    DamagedFileError,
    MissingExtraError,
    RoleError,
    StoreError,
    UnknownNameError,
)
from stillhouse.hub.architectures import describe
from stillhouse.hub.models import resolve_model
from stillhouse.models.scenes import SceneSet
from stillhouse.parts.heads import ClusterNet, Projected, mlp, projector

transformers = pytest.importorskip("transformers")
pytest.importorskip("diffusers")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

NETS = '''
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from stillhouse.models import flows
from stillhouse.models.language import gpt2


def points():
    return flows.point_flow(couplings=2, width=8)


def drawn(model):
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_()
    return model


def injected():
    torch.manual_seed(0)
    return drawn(inject_adapter_in_model(LoraConfig(r=2, target_modules=["c_attn"]), gpt2(32)))


def peft():
    torch.manual_seed(0)
    return drawn(get_peft_model(gpt2(32), LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM")))


def bad(x=None):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 2)

        def forward(self, image):
            x = image.flatten(1)
            return self.layer(x) if x.sum().item() > 0 else self.layer(-x)

    return Net()
'''
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets_to_export.py").write_text(NETS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "nets_to_export", raising=False)
    torch.manual_seed(0)
    return tmp_path


def about(system, kind="", network=None, **more):
    return About(system, kind=kind, network=None if network is None else describe(network), **more)


def vit(kind=None, size=16):
    from stillhouse.hub.transformers import ImageModel

    config = transformers.ViTConfig(**SMALL, image_size=size, patch_size=4, num_labels=2)
    return ImageModel((kind or transformers.ViTForImageClassification)(config), [0.4] * 3, [0.3] * 3, (size, size))


def bert(kind, **more):
    from stillhouse.hub.text import TextModel

    config = transformers.BertConfig(vocab_size=32, **SMALL, max_position_embeddings=32, num_labels=2)
    return TextModel(kind(config), **more)


def hubert():
    return transformers.HubertModel(transformers.HubertConfig(
        **SMALL, conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2))


def denoiser(scheduler=None, **more):
    from diffusers import DDIMScheduler, UNet2DModel

    from stillhouse.hub.diffusers import from_diffusers

    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8),
                       norm_num_groups=4, down_block_types=("DownBlock2D", "DownBlock2D"),
                       up_block_types=("UpBlock2D", "UpBlock2D"), attention_head_dim=4, **more)
    return from_diffusers(unet, scheduler or DDIMScheduler(prediction_type="v_prediction", clip_sample=False))


def sampler(steps, mode="ddim", clip=None, model=None):
    from stillhouse.diffusion.grids import trailing
    from stillhouse.diffusion.samplers import FewStepSampler

    return FewStepSampler(model or denoiser(), trailing(steps, 1000), mode, clip)


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[PAD]", "[UNK]", "a", "b"])}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


def made(name):
    """A fresh target, what is known of it, and its tokenizer."""
    from stillhouse.models import language

    image = {"example": {"image": [1, 8, 8]}}
    tiny = resolve_model("tiny-convnet")
    match name:
        case "Classifier":
            return tiny, about("ssld", "Classifier", tiny, **image, classes=[str(i) for i in range(10)]), None
        case "vit":
            m = vit()
            return m, about("ssld", "Classifier", m, example={"image": [1, 20, 20]}, classes=["no", "yes"]), None
        case "Encoder":
            m = vit(transformers.ViTModel)
            return m, about("wcord", "Encoder", m, example={"image": [3, 16, 16]}), None
        case "TextClassifier":
            m = bert(transformers.BertForSequenceClassification)
            return m, about("ssld", "TextClassifier", m, example={"input_ids": [9]}, classes=["no", "yes"]), tokenizer()
        case "TextEncoder":
            m = bert(transformers.BertModel, pooling="first")
            return m, about("ssld", "TextEncoder", m, example={"input_ids": [9]}), None
        case "CausalLM":
            m = language.gpt2(32)
            return m, about("distillm", "CausalLM", m, example={"input_ids": [9]}), tokenizer()
        case "SpeechEncoder":
            m = hubert()
            return m, about("dphubert", "SpeechEncoder", m, example={"audio": [800]}), None
        case "Pruned":
            from stillhouse.parts.surgeon import cut, layout

            m = hubert()
            masks = {group: torch.tensor([0.0] + [1.0] * (n - 1)) for group, n in layout(m).sizes().items()}
            return cut(m, masks), about("dphubert", "SpeechEncoder", example={"audio": [800]}), None
        case "Denoiser":
            m = denoiser()
            return m, about("ssld", "Denoiser", m, example={"x": [1, 8, 8]}), None
        case "ddim" | "renoise":
            s = sampler(*((2, "ddim", 1.0) if name == "ddim" else (2, "renoise", None)))
            return s, about("dmd2", "Denoiser", s.denoiser, example={"x": [1, 8, 8]}), None
        case "conditional":
            s = sampler(2, model=denoiser(num_class_embeds=4))
            return s, about("dmd2", "Denoiser", s.denoiser, example={"x": [1, 8, 8], "condition": []}), None
        case "consistency":
            from diffusers import CMStochasticIterativeScheduler

            from stillhouse.diffusion.samplers import FewStepSampler

            s = FewStepSampler(denoiser(CMStochasticIterativeScheduler()), (1.0, 0.5, 0.0), "consistency", 1.0)
            return s, about("consistency-models", "Denoiser", s.denoiser, example={"x": [1, 8, 8]}), None
        case "SamplerLadder":
            from stillhouse.diffusion.samplers import SamplerLadder

            ladder = SamplerLadder({n: sampler(n) for n in (2, 1)})
            return ladder, about("progressive-distillation", "Denoiser", ladder[1].denoiser,
                                 example={"x": [1, 8, 8]}), None
        case "Density":
            import nets_to_export

            m = nets_to_export.points()
            return m, About("real-nvp", kind="Density", network={"text": "nets_to_export:points"},
                            example={"x": [2]}), None
        case "Projected":
            e = vit(transformers.ViTModel)
            return (Projected(e, projector(16, 8, 4)).eval(),
                    about("fedx", "Encoder", e, example={"image": [3, 16, 16]}), None)
        case "Clustering":
            from stillhouse.systems.representation.scan import Clustering

            e = resolve_model("conv-encoder")
            return Clustering(ClusterNet(e, 64, 4, 2).eval(), 1), about("scan", "Encoder", e, **image), None
        case "LatentClasses":
            from stillhouse.systems.representation.lls_ddfa import LatentClasses

            found = LatentClasses(tiny, torch.rand(3, 10).softmax(1), torch.rand(5, 3), torch.rand(5, 10))
            return found, about("lls-ddfa", "Classifier", tiny, example={"image": [1, 8, 8], "domain": []}), None
        case "QuantizedModel":
            from stillhouse.parts.packed import QuantizedModel
            from stillhouse.parts.quantizers import encode

            m = vit()
            codes = {n: encode(p.data, 4, None) for n, p in m.named_parameters() if p.dim() > 1}
            return QuantizedModel(m, codes), about("quantized-distillation", "Classifier", m,
                                                   example={"image": [3, 16, 16]}), None
        case "LabelAugmented":
            from stillhouse.models.label_augmented import label_augmented

            m = resolve_model("tiny-convnet:channels_in=3,classes=4")
            found = label_augmented(m, torch.zeros(1, 3, 8, 8), "rotations", "aggregated").eval()
            return found, about("sla", "Classifier", m, example={"image": [3, 8, 8], "label": []}), None
        case "VectorClassifier":
            from stillhouse.hub.dual_encoders import VectorClassifier
            from stillhouse.parts.prompts import DeepPrompts
            from stillhouse.systems.compression import promptkd

            given = promptkd.tiny()
            dual, shape = given["student"], list(given["unlabelled"][0]["image"].shape)
            m = VectorClassifier(dual.vision, torch.randn(3, 5), torch.tensor(2.0), ["a", "b", "c"],
                                 DeepPrompts(1, 2, dual.vision.width), mlp(dual(torch.zeros(1, *shape)).shape[1], 5))
            return m.eval(), about("promptkd", "DualEncoder", dual, example={"image": shape}), None
        case "DistilledSet":
            soft = torch.rand(4, 2).softmax(1)
            return DistilledSet(torch.randn(4, 3, 8, 8), soft, 0.1), About("mtt", classes=["cat", "dog"]), None
        case "GraphSet":
            edges = [torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0], [0]])]
            return GraphSet(node_label=[torch.tensor([0, 1]), torch.tensor([1])], edge_index=edges,
                            label=torch.tensor([0, 1])), About("mirage"), None
        case _:
            return SceneSet.load(name), About("prolificdreamer-vsd"), None


def saved(name):
    target, said, words = made(name)
    save(target, "run/target", said, words)
    return target, said


ARCH = {"Density": "nets_to_export:points"}
SAFE = ["Classifier", "vit", "TextClassifier", "CausalLM", "SpeechEncoder", "Pruned", "Denoiser", "Density",
        "Projected", "VectorClassifier", "LabelAugmented", "QuantizedModel", "ddim", "SamplerLadder", "LatentClasses",
        "Clustering", "DistilledSet", "GraphSet", "points:count=4", "pictures:count=2,channels=1,size=8",
        "nerf:count=1,samples=4", "mesh:count=1"]
CELLS = [
    *((name, "safetensors") for name in SAFE),
    *((name, "onnx") for name in ("vit", "CausalLM", "Clustering", "LatentClasses", "VectorClassifier", "renoise")),
    *((name, "torch-export") for name in ("Encoder", "TextClassifier", "TextEncoder", "SpeechEncoder", "Pruned",
                                          "Denoiser", "Density", "Projected", "LabelAugmented", "QuantizedModel",
                                          "SamplerLadder")),
    *((name, "hf") for name in ("vit", "Encoder", "TextClassifier", "TextEncoder", "CausalLM", "SpeechEncoder",
                                "Projected", "QuantizedModel", "DistilledSet", "GraphSet")),
    *((name, "diffusers") for name in ("ddim", "renoise", "SamplerLadder", "conditional", "consistency")),
]


@pytest.mark.parametrize(("name", "to"), CELLS)
def test_what_is_written_is_what_the_result_gives(name, to, here, monkeypatch):
    saved(name)
    found = export("run", to, arch=ARCH.get(name))
    assert found.folder == type(here)("run") / f"export-{to}" and found.checks
    said = json.loads((found.folder / MARK).read_text())
    assert said["deviations"] == found.checks and all(v <= found.tolerance for v in found.checks.values())
    assert not list((here / "run").glob(".export*"))
    text = (found.folder / "README.md").read_text()
    monkeypatch.chdir(found.folder)
    names = {}
    exec(text.partition("```python\n")[2].partition("```")[0], names)
    assert set(names) - {"__builtins__"}


def test_every_row_of_the_table_is_exported_and_saved_here():
    rows = {row_of(About("ssld", target=type(target).__name__, kind=said.kind))
            for target, said, _ in (made(name) for name in {*SAFE, "Encoder", "TextEncoder"})}
    assert rows == set(TABLE)
    for to in FORMATS:
        assert sum(cell[1] == to for cell in CELLS) >= 2 or to == "peft"
    assert set(exporting.WRITERS) == set(FORMATS)


@pytest.mark.parametrize("row", TABLE)
def test_senseless_cells_are_refused_with_the_reason_and_the_sensible_ones(row, here):
    for to, cell in TABLE[row].items():
        if cell.works:
            exporting.refuse_senseless(row, to)
            continue
        with pytest.raises(RoleError) as refused:
            exporting.refuse_senseless(row, to)
        assert cell.text in str(refused.value) and "safetensors" in str(refused.value)


@pytest.mark.parametrize("net", ["injected", "peft"])
def test_adapters_go_alone_to_peft_and_merged_to_transformers(net, here):
    pytest.importorskip("peft")
    import nets_to_export
    from peft import PeftModel

    from stillhouse.models.language import gpt2

    model, words = getattr(nets_to_export, net)().eval(), f"nets_to_export:{net}"
    save(model, "run/target", About("distillm", kind="CausalLM", network={"text": words}, example={"input_ids": [9]}))
    export("run", "peft", arch=words)
    names = {p.name for p in (here / "run/export-peft").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names and "model.safetensors" not in names
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(gpt2(32), "run/export-peft").eval()
    ids = torch.randint(0, 32, (2, 7))
    torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)
    export("run", "hf", arch=words)
    merged = transformers.AutoModelForCausalLM.from_pretrained("run/export-hf").eval()
    torch.testing.assert_close(merged(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_the_onnx_graph_names_its_fields_and_keeps_batch_and_length_open(here):
    import onnxruntime

    target, _ = saved("CausalLM")
    export("run", "onnx", opset=20)
    session = onnxruntime.InferenceSession("run/export-onnx/model.onnx")
    assert {i.name: i.shape for i in session.get_inputs()} == {
        name: ["batch", "length"] for name in ("input_ids", "attention_mask")}
    assert session.get_outputs()[0].name == "logits" and session.get_outputs()[0].shape == ["batch", "length", 32]
    ids = torch.randint(0, 32, (7, 13))
    mask = torch.ones_like(ids)
    mask[2, :4] = 0
    found = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]
    wanted = target.eval()(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(torch.from_numpy(found)[mask.bool()], wanted, rtol=1e-4, atol=1e-5)


def test_a_classifier_of_transformers_keeps_names_mean_and_size(here):
    import numpy as np

    target, _ = saved("vit")
    export("run", "hf")
    again = transformers.AutoModelForImageClassification.from_pretrained("run/export-hf").eval()
    assert again.config.id2label == {0: "no", 1: "yes"}
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    shown = transformers.AutoImageProcessor.from_pretrained("run/export-hf")(picture, return_tensors="pt")
    image = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
    torch.testing.assert_close(again(**shown).logits, target.eval()(image), rtol=1e-4, atol=1e-5)
    loaded = resolve_model("hf:run/export-hf", None)
    torch.testing.assert_close(loaded.eval()(image), target(image))


def test_a_data_set_has_class_names_and_soft_labels(here):
    from datasets import ClassLabel, load_from_disk

    target, _ = saved("DistilledSet")
    export("run", "hf")
    data = load_from_disk("run/export-hf/data")
    assert data.features["label"] == ClassLabel(names=["cat", "dog"]) and data[0]["picture"].size == (8, 8)
    assert torch.equal(torch.tensor(data["soft_label"][:]), target.labels)
    assert torch.equal(data.with_format("torch")["image"][:], target.images)


def test_the_steps_of_a_ladder_are_chosen(here):
    saved("SamplerLadder")
    assert export("run", "safetensors", steps=2).folder.name == "export-safetensors-2"
    assert load("run/export-safetensors-2").rungs == (2,)
    with pytest.raises(ConfigError, match="no sampler of 8 steps.*2, 1"):
        export("run", "diffusers", steps=8)


# ---------------------------------------------------------------- the check, and what is there already


def test_a_check_that_fails_leaves_everything_as_it_was(here, monkeypatch):
    from stillhouse.deploy.formats import graphs

    saved("Classifier")
    export("run", "torch-export")
    before = (here / "run/export-torch-export/model.pt2").read_bytes()
    traced = graphs.trace

    kept = graphs.torch.export.save
    monkeypatch.setattr(graphs.torch.export, "save", lambda program, path: kept(traced(wrong_view()), path))

    def wrong_view():
        model = load("run").train(False)
        with torch.no_grad():
            next(model.parameters()).add_(0.1)
        return view_of(model, "Classifier", made("Classifier")[1])

    with pytest.raises(DamagedFileError, match="does not give what the result gives.*logits, 1 samples"):
        export("run", "torch-export", force=True)
    assert (here / "run/export-torch-export/model.pt2").read_bytes() == before
    assert not list((here / "run").glob(".export*"))


def test_nothing_is_overwritten_unasked_and_nothing_but_exports_at_all(here):
    saved("Classifier")
    export("run", "safetensors")
    with pytest.raises(StoreError, match="--force"):
        export("run", "safetensors")
    export("run", "safetensors", force=True)
    (here / "mine").mkdir()
    (here / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(StoreError, match="no earlier export"):
        export("run", "safetensors", out="mine", force=True)
    assert (here / "mine" / "thesis.txt").exists()


def test_deviation_is_infinite_for_other_shapes_and_nan_for_nan():
    assert deviation(torch.ones(2), torch.ones(3)) == float("inf")
    assert deviation(torch.tensor([float("nan")]), torch.ones(1)) != 0
    assert deviation(torch.tensor([2.0]), torch.tensor([4.0])) == 0.5 and len(set(SIZES)) > 1


# ---------------------------------------------------------------- bad input


def test_bad_input_is_answered_before_any_work(here, capsys):
    saved("Classifier")
    with pytest.raises(UnknownNameError, match="Did you mean onnx"):
        export("run", "onx")
    (here / "half").mkdir()
    (here / "half" / "run.json").write_text(json.dumps({"system": "ssld", "fingerprint": {"data": "1"}}))
    with pytest.raises(StoreError, match="not finished"):
        export("half", "onnx")
    with pytest.raises(ConfigError, match="--opset is for"):
        export("run", "hf", opset=18)
    with pytest.raises(ConfigError, match="between 18 and 23"):
        export("run", "onnx", opset=3)
    with pytest.raises(ConfigError, match="ladder"):
        export("run", "onnx", steps=2)
    with pytest.raises(RoleError, match="no model of transformers"):
        export("run", "hf")
    with pytest.raises(RoleError, match="no LoRA adapter"):
        export("run", "peft")
    with pytest.raises(SystemExit) as left:
        main(["export", "run", "--to", "onx"])
    assert left.value.code == 2 and "Did you mean onnx" in capsys.readouterr().err
    assert not list((here / "run").glob("*export*"))


def test_a_result_without_example_or_kind_is_told(here):
    target, said, _ = made("Classifier")
    said.example = {}
    save(target, "run/target", said)
    with pytest.raises(DamagedFileError, match="one sample of 'image'"):
        export("run", "onnx")
    with pytest.raises(RoleError, match="not known what a Thing"):
        row_of(About("ssld", target="Thing"))


def test_a_network_whose_path_depends_on_values_is_told_so(here):
    import nets_to_export

    save(nets_to_export.bad(), "run/target", About("ssld", kind="Classifier", network={"text": "nets_to_export:bad"},
                                                    example={"image": [1, 2, 2]}))
    with pytest.raises(RoleError, match="cannot be traced.*safetensors"):
        export("run", "torch-export", arch="nets_to_export:bad")
    with pytest.raises(ConfigError, match="--arch nets_to_export:bad"):
        export("run", "safetensors")


@pytest.mark.parametrize(("name", "to", "library"), [("Classifier", "onnx", "onnx"), ("vit", "hf", "transformers"),
                                                     ("GraphSet", "hf", "datasets")])
def test_a_missing_library_is_named_with_its_extra(name, to, library, here, monkeypatch):
    target, _ = saved(name)
    monkeypatch.setattr(exporting, "load", lambda place, arch: target)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match="pip install 'stillhouse"):
        export("run", to)


def test_the_command_says_where_it_is_and_how_far_off(here, capsys):
    saved("Classifier")
    main(["export", "run", "--to", "safetensors", "--out", "there"])
    out = capsys.readouterr().out
    assert "exported to there" in out and "largest difference 0" in out and (here / "there" / "README.md").exists()
    assert isinstance(load("there"), nn.Module)


def test_the_guide_has_the_table():
    from pathlib import Path

    page = Path(exporting.__file__).parents[2] / "docs" / "guide" / "exports.md"
    assert table() in page.read_text(encoding="utf-8"), "put the output of stillhouse.deploy.export.table() there"
