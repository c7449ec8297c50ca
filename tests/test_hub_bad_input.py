"""Models that cannot be loaded as they are: partly downloaded, unsafe, mismatched, or out of reach."""

import json
import os
import runpy
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from stillhouse.errors import DamagedFileError, MissingExtraError, RoleError, UnknownNameError
from stillhouse.hub import downloads
from stillhouse.hub.models import resolve_model
from stillhouse.models.dual_encoders import clip, word_tokenizer
from stillhouse.protocols import CausalLM, Classifier, DualEncoder, Seq2Seq, SpeechEncoder, TextClassifier, TextEncoder

hf = pytest.importorskip("transformers")
SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
PARTS = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
         "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "d_model": 8, "decoder_start_token_id": 2, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 20}
TOKENIZER = word_tokenizer(["red circle"], length=12)
SOUND = {**SMALL, "conv_dim": (8,), "conv_kernel": (10,), "conv_stride": (5,), "num_feat_extract_layers": 1,
         "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}

MODELS = {
    Classifier: lambda: hf.ViTForImageClassification(hf.ViTConfig(**SMALL, image_size=16, patch_size=8)),
    CausalLM: lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, vocab_size=20)),
    TextClassifier: lambda: hf.BertForSequenceClassification(hf.BertConfig(**SMALL, vocab_size=20)),
    TextEncoder: lambda: hf.BertModel(hf.BertConfig(**SMALL, vocab_size=20)),
    Seq2Seq: lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(
        num_mel_bins=8, max_source_positions=50, max_target_positions=16, suppress_tokens=None,
        begin_suppress_tokens=None, **PARTS)),
    SpeechEncoder: lambda: hf.HubertModel(hf.HubertConfig(**SOUND)),
    DualEncoder: lambda: clip(TOKENIZER, width=8, layers=1, heads=2, patch=4, image=8, text_layers=1, length=12),
}
KINDS = pytest.mark.parametrize("kind", list(MODELS), ids=lambda kind: kind.__name__)


def saved(kind, folder, **options):
    torch.manual_seed(0)
    MODELS[kind]().save_pretrained(folder, **options)
    if kind is DualEncoder:
        TOKENIZER.save_pretrained(folder)
    if kind is Seq2Seq:
        hf.WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder)
    assert resolve_model(f"hf:{folder}", kind) is not None
    return folder


@KINDS
def test_shards_that_are_missing_are_named(tmp_path, kind):
    saved(kind, tmp_path, max_shard_size="1KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    with pytest.raises(DamagedFileError, match=rf"1 of {len(shards)} shards are missing \({shards[1].name}\)"):
        resolve_model(f"hf:{tmp_path}", kind)


@KINDS
@pytest.mark.parametrize(("content", "says"), [
    (b"", r"model\.safetensors is empty"), (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git-lfs"),
    (None, "damaged or only partly there")])
def test_files_that_are_none(tmp_path, kind, content, says):
    path = saved(kind, tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50] if content is None else content)
    with pytest.raises(DamagedFileError, match=says):
        resolve_model(f"hf:{tmp_path}", kind)


@KINDS
def test_pickled_weights_are_refused_with_the_way_out(tmp_path, kind):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    (saved(kind, tmp_path) / "model.safetensors").unlink()
    torch.save(Trap(), tmp_path / "pytorch_model.bin")
    with pytest.raises(RoleError, match=r"pytorch_model\.bin.*can run any program.*save_pretrained"):
        resolve_model(f"hf:{tmp_path}", kind)
    assert resolve_model(f"hf:{tmp_path}:fresh=true", kind) is not None
    assert not (tmp_path / "sprung").exists()


@KINDS
@pytest.mark.parametrize("change", ["depth", "width"])
def test_a_configuration_of_other_weights(tmp_path, kind, change):
    path = saved(kind, tmp_path) / "config.json"
    config = json.loads(path.read_text())
    if kind is DualEncoder:
        config["text_config"]["num_hidden_layers" if change == "depth" else "intermediate_size"] = 3
    elif kind is Seq2Seq:
        config["encoder_layers" if change == "depth" else "encoder_ffn_dim"] = 3
    else:
        config["num_hidden_layers" if change == "depth" else "intermediate_size"] = 3
    path.write_text(json.dumps(config))
    says = "lack .* tensors.*random numbers" if change == "depth" else "cannot load"
    with pytest.raises(RoleError, match=says):
        resolve_model(f"hf:{tmp_path}", kind)


@KINDS
def test_weights_that_are_not_finite(tmp_path, kind):
    saved(kind, tmp_path)
    model = MODELS[kind]()
    name, value = next((k, v) for k, v in model.named_parameters() if k.endswith(("fc1.weight", "mlp.up_proj.weight",
                       "query.weight", "k_proj.weight")))
    value.data.view(-1)[1] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(DamagedFileError, match=rf"not finite, e\.g\. '{name}'"):
        resolve_model(f"hf:{tmp_path}", kind)


def test_an_index_that_leads_out_of_its_folder(tmp_path):
    saved(TextEncoder, tmp_path / "m", max_shard_size="1KB")
    index = tmp_path / "m" / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    said["weight_map"][next(iter(said["weight_map"]))] = "../other.safetensors"
    index.write_text(json.dumps(said))
    with pytest.raises(RoleError, match=r"outside of its folder: \.\./other\.safetensors"):
        resolve_model(f"hf:{tmp_path / 'm'}", TextEncoder)
    for broken in ('{"weight_map": 3}', "[]", "{"):
        index.write_text(broken)
        with pytest.raises(DamagedFileError, match=r"index\.json"):
            resolve_model(f"hf:{tmp_path / 'm'}", TextEncoder)


@pytest.mark.parametrize(("content", "says"), [("{", "config.json"), ("", "config.json is empty"),
                                               ('{"hidden_size": 8}', "model_type")])
def test_configurations_that_are_none(tmp_path, content, says):
    (saved(TextEncoder, tmp_path) / "config.json").write_text(content)
    with pytest.raises((DamagedFileError, RoleError), match=says):
        resolve_model(f"hf:{tmp_path}", TextEncoder)


def test_an_adapter_is_to_be_merged_first(tmp_path):
    (saved(CausalLM, tmp_path) / "adapter_config.json").write_text('{"base_model_name_or_path": "/etc"}')
    with pytest.raises(RoleError, match=r"holds an adapter.*merge_and_unload"):
        resolve_model(f"hf:{tmp_path}", CausalLM)


# ------------------------------------------------------------------------------------------- code in a folder


def with_code(folder, file, **values):
    said = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    (folder / file).write_text(json.dumps({**said, **values}))
    (folder / "code.py").write_text(
        f"open({str(folder / 'sprung')!r}, 'w').close()\n"
        "import transformers\nclass Config(transformers.BertConfig):\n    model_type = 'unheard-of'\n"
        "class Model(transformers.BertModel):\n    config_class = Config\n"
        "class Tokenizer(transformers.PreTrainedTokenizerFast):\n    pass\n")


@KINDS
@pytest.mark.parametrize("more", [{}, {"trust_remote_code": True, "_trust_remote_code": True}])
def test_code_of_a_model_is_never_run(tmp_path, kind, more):
    """Of an unknown model type it is refused; of a known one the class of the library is taken in its place."""
    saved(kind, tmp_path)
    autos = dict.fromkeys(("AutoModel", "AutoModelForCausalLM", "AutoModelForImageClassification",
                           "AutoModelForSequenceClassification", "AutoModelForSpeechSeq2Seq"), "code.Model")
    with_code(tmp_path, "config.json", auto_map={"AutoConfig": "code.Config", **autos}, **more)
    if kind is DualEncoder:
        with_code(tmp_path, "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]})
    for text in (f"hf:{tmp_path}", f"hf:{tmp_path}:fresh=true"):
        assert resolve_model(text, kind) is not None
    with_code(tmp_path, "config.json", model_type="unheard-of")
    for text in (f"hf:{tmp_path}", f"hf:{tmp_path}:fresh=true"):
        with pytest.raises(RoleError, match="trust_remote_code.*refused.*module:callable"):
            resolve_model(text, kind)
    with pytest.raises(UnknownNameError, match="no option 'trust_remote_code'"):
        saved(kind, tmp_path)
        resolve_model(f"hf:{tmp_path}:trust_remote_code=true", kind)
    assert not (tmp_path / "sprung").exists()
    runpy.run_path(str(tmp_path / "code.py"))
    assert (tmp_path / "sprung").exists(), "the trap works"


# ------------------------------------------------------------------------------------------- names of the hub


def ask(endpoint, name="nobody/nothing"):
    """What a session without HF_HUB_OFFLINE says of a name, and how many seconds it took after the imports."""
    code = ("import time, transformers, huggingface_hub\n"
            "from stillhouse.hub.models import resolve_model\nfrom stillhouse.protocols import CausalLM\n"
            "start = time.monotonic()\n"
            f"try:\n    resolve_model('hf:{name}', CausalLM)\n"
            "except Exception as error:\n    print(type(error).__name__, error)\n"
            "print(time.monotonic() - start)\n")
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and k != "HF_HUB_OFFLINE"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**env, "HF_ENDPOINT": endpoint, "HF_HUB_CACHE": "/nowhere"})
    said, seconds = done.stdout.strip().rsplit("\n", 1)
    return said, float(seconds)


def test_without_internet_the_answer_comes_at_once():
    said, seconds = ask("http://127.0.0.1:9")
    assert said.startswith("UnknownNameError") and "there seems to be no internet" in said and "hf download" in said
    assert seconds < 2.0


def test_a_hub_that_does_not_answer_is_not_waited_for():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        said, seconds = ask(f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert said.startswith("UnknownNameError") and "did not answer within 2 seconds" in said
    assert 1.9 < seconds < 3.0


def test_a_look_up_that_hangs_is_not_waited_for(monkeypatch):
    class Session:
        def head(self, url, timeout):
            time.sleep(1)

    monkeypatch.setattr(downloads, "SECONDS", 0.1)
    start = time.monotonic()
    assert not downloads._answers(SimpleNamespace(get_session=Session), "http://nowhere")
    assert time.monotonic() - start < 0.5


def test_names_that_are_none(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name, says in (("nobody/nothing", "not in the cache.*HF_HUB_OFFLINE.*hf download nobody/nothing"),
                       ("no good name!", "no name that a model of the hub can have"),
                       ("./models/teacher", "there is no folder models/teacher"),
                       ("models/my/teacher", "there is no folder models/my/teacher")):
        start = time.monotonic()
        for kind in (CausalLM, DualEncoder, SpeechEncoder):
            with pytest.raises(UnknownNameError, match=says):
                resolve_model(f"hf:{name}", kind)
        assert time.monotonic() - start < 2


def test_a_model_in_the_cache_needs_no_internet(monkeypatch, tmp_path):
    import huggingface_hub

    folder = tmp_path / "models--nobody--tiny"
    saved(TextEncoder, folder / "snapshots" / ("a" * 40))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(downloads, "_answers", lambda hub, url: pytest.fail("the hub was asked"))
    ids = torch.tensor([[3, 4]])
    expected = resolve_model(f"hf:{folder / 'snapshots' / ('a' * 40)}", TextEncoder)(ids)
    assert torch.equal(resolve_model("hf:nobody/tiny", TextEncoder)(ids), expected)
    weights = folder / "snapshots" / ("a" * 40) / "model.safetensors"
    weights.unlink()
    assert resolve_model("hf:nobody/tiny:fresh=true", TextEncoder)(ids).shape == expected.shape
    monkeypatch.setattr(downloads, "_answers", lambda hub, url: False)
    with pytest.raises(UnknownNameError, match="only partly in the cache.*no internet"):
        resolve_model("hf:nobody/tiny", TextEncoder)
    torch.save({}, weights.with_name("pytorch_model.bin"))
    with pytest.raises(RoleError, match="can run any program"):
        resolve_model("hf:nobody/tiny", TextEncoder)


def test_what_is_fetched_are_weights_that_cannot_run(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked = []

    def snapshot(name, local_files_only, **patterns):
        if local_files_only:
            raise FileNotFoundError
        files = ["config.json", "model.safetensors", "pytorch_model.bin", "modeling.py", "onnx/model.safetensors",
                 "tokenizer.json", "vocab.txt", "original/consolidated.00.pth", "consolidated.safetensors"]
        asked.append(list(filter_repo_objects(files, **patterns)))
        return saved(TextEncoder, tmp_path)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(downloads, "_answers", lambda hub, url: url.endswith("/api/models/nobody/tiny"))
    assert resolve_model("hf:nobody/tiny", TextEncoder)(torch.tensor([[3, 4]])).shape == (1, 8)
    resolve_model("hf:nobody/tiny:fresh=true", TextEncoder)
    assert asked == [["config.json", "model.safetensors", "tokenizer.json", "vocab.txt"],
                     ["config.json", "tokenizer.json", "vocab.txt"]]


def test_without_transformers_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for kind in MODELS:
        with pytest.raises(MissingExtraError, match=r"stillhouse\[hf\]"):
            resolve_model(f"hf:{tmp_path}", kind)
