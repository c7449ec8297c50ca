"""Models of transformers by string, for every role: as the class itself gives it, fresh, and described and rebuilt."""

import json

import numpy as np
import pytest
import torch

from stillhouse.errors import RoleError, UnknownNameError
from stillhouse.hub.architectures import describe, rebuild
from stillhouse.hub.models import adapt, fit_role, resolve_model
from stillhouse.models.dual_encoders import clip, siglip, word_tokenizer
from stillhouse.protocols import (
    PROBES,
    CausalLM,
    Classifier,
    DualEncoder,
    Encoder,
    Network,
    Seq2Seq,
    SpeechEncoder,
    TextClassifier,
    TextEncoder,
)

hf = pytest.importorskip("transformers")
SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PARTS = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
         "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "d_model": 8, "decoder_start_token_id": 2, **ENDS}


def saved(folder, model):
    model.eval().save_pretrained(folder)
    return model


def made(name, **more):
    torch.manual_seed(0)
    return {
        "ViT": lambda: hf.ViTForImageClassification(hf.ViTConfig(**SMALL, image_size=16, patch_size=8, **more)),
        "Dinov2": lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(
            **SMALL, image_size=16, patch_size=8, **more)),
        "ResNet": lambda: hf.ResNetForImageClassification(hf.ResNetConfig(
            embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], **more)),
        "ConvNeXt": lambda: hf.ConvNextForImageClassification(hf.ConvNextConfig(
            hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, patch_size=2, image_size=16, **more)),
        "Llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, vocab_size=20, num_key_value_heads=1, **ENDS)),
        "Qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SMALL, vocab_size=20, num_key_value_heads=1, **ENDS)),
        "Qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SMALL, vocab_size=20, num_key_value_heads=1, head_dim=4,
                                                            **ENDS)),
        "GPT2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2, **ENDS)),
        "OPT": lambda: hf.OPTForCausalLM(hf.OPTConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, ffn_dim=16, word_embed_proj_dim=8,
            max_position_embeddings=32, **ENDS)),
        "BERT": lambda: hf.BertForSequenceClassification(hf.BertConfig(**SMALL, vocab_size=20, **more)),
        "RoBERTa": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(
            **SMALL, vocab_size=20, **ENDS, **more)),
        "DistilBERT": lambda: hf.DistilBertForSequenceClassification(hf.DistilBertConfig(
            vocab_size=20, dim=8, n_layers=1, n_heads=2, hidden_dim=16, **more)),
        "ModernBERT": lambda: hf.ModernBertForSequenceClassification(hf.ModernBertConfig(
            **SMALL, vocab_size=20, cls_token_id=1, sep_token_id=2, **ENDS, **more)),
        "T5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(
            vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)),
        "BART": lambda: hf.BartForConditionalGeneration(hf.BartConfig(
            vocab_size=20, max_position_embeddings=16, forced_eos_token_id=2, **PARTS)),
        "Marian": lambda: hf.MarianMTModel(hf.MarianConfig(
            vocab_size=20, max_position_embeddings=16, forced_eos_token_id=2, **PARTS)),
        "Whisper": lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(
            vocab_size=20, num_mel_bins=8, max_source_positions=50, max_target_positions=16, suppress_tokens=None,
            begin_suppress_tokens=None, **PARTS)),
        "HuBERT": lambda: hf.HubertModel(hf.HubertConfig(**SOUND)),
        "wav2vec2": lambda: hf.Wav2Vec2Model(hf.Wav2Vec2Config(**SOUND)),
        "WavLM": lambda: hf.WavLMModel(hf.WavLMConfig(**SOUND)),
    }[name]()


SOUND = {**SMALL, "conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_conv_pos_embeddings": 4,
         "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2}


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def rebuilt(model, batch, kind):
    """The model described in JSON, built anew and given its weights; both must give the same."""
    again = rebuild(json.loads(json.dumps(describe(model))), lambda text: pytest.fail(f"built from words: {text}"))
    assert type(again) is type(model)
    fresh = again.state_dict()
    assert list(fresh) == list(model.state_dict())
    assert any(not torch.equal(v, fresh[k]) for k, v in model.state_dict().items()), "the test must be able to fail"
    again.load_state_dict(model.state_dict())
    same(PROBES[kind](again.eval(), batch), PROBES[kind](model, batch))
    return again


IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


# ------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("name", ["ViT", "ResNet", "ConvNeXt", "Dinov2"])
def test_pictures(tmp_path, name):
    model = saved(tmp_path, made(name, num_labels=3))
    text, image = f"hf:{tmp_path}", torch.rand(2, 3, 16, 16) * 2 - 1
    classifier, encoder = resolve_model(text, Classifier).eval(), resolve_model(text, Encoder).eval()
    same(classifier(image), model(pixel_values=image).logits)
    same(encoder(image), classifier.encode(image))
    for adapted, kind in ((classifier, Classifier), (encoder, Encoder)):
        rebuilt(adapted, {"image": image}, kind)
    assert str(tmp_path) not in json.dumps(describe(classifier))


def test_fresh_weights_of_a_configuration_alone(tmp_path):
    made("ViT", num_labels=3).config.save_pretrained(tmp_path)
    image = torch.rand(2, 3, 16, 16)
    first, again = (resolve_model(f"hf:{tmp_path}:fresh=true,num_labels=5", Classifier) for _ in range(2))
    other = resolve_model(f"hf:{tmp_path}:fresh=true,num_labels=5", Classifier, seed=1)
    assert first(image).shape == (2, 5)
    weights = [m.model.vit.layers[0].mlp.fc1.weight for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    with pytest.raises(RoleError, match="no weights as safetensors.*:fresh=true"):
        resolve_model(f"hf:{tmp_path}", Classifier)


@pytest.mark.parametrize(("name", "kind"), [("ResNet", Classifier), ("GPT2", CausalLM), ("BERT", TextClassifier),
                                            ("T5", Seq2Seq), ("HuBERT", SpeechEncoder)])
def test_fresh_weights_are_not_those_of_the_file(tmp_path, name, kind):
    model = saved(tmp_path, made(name))
    loaded, fresh = resolve_model(f"hf:{tmp_path}", kind), resolve_model(f"hf:{tmp_path}:fresh=true", kind)
    names = [k for k, v in loaded.state_dict().items() if v.is_floating_point() and v.dim() > 1]
    assert len(names) > 4 and len(model.state_dict()) == len(loaded.state_dict()) == len(fresh.state_dict())
    equal = [k for k in names if torch.equal(loaded.state_dict()[k], fresh.state_dict()[k])]
    assert len(equal) <= 1, equal  # token types and the like may start at zero
    assert {p.dtype for p in fresh.parameters()} == {torch.float32}


# ------------------------------------------------------------------------------------------- language models


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3", "GPT2", "OPT"])
def test_causal_language_models(tmp_path, name):
    model = made(name)
    model.generation_config.eos_token_id = [2, 5]
    saved(tmp_path, model)
    loaded = resolve_model(f"hf:{tmp_path}", CausalLM)
    assert type(loaded) is type(model)
    same(loaded(input_ids=IDS, attention_mask=MASK).logits, model(input_ids=IDS, attention_mask=MASK).logits)
    again = rebuilt(loaded, {"input_ids": IDS, "attention_mask": MASK}, CausalLM)
    assert again.generation_config.eos_token_id == [2, 5]
    options = {"attention_mask": MASK[:1], "max_new_tokens": 3, "do_sample": False, "max_length": None}
    same(again.generate(IDS[:1], **options), model.generate(IDS[:1], **options))


# ------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("name", ["BERT", "RoBERTa", "DistilBERT", "ModernBERT"])
def test_text_classifiers_and_encoders(tmp_path, name):
    model = saved(tmp_path, made(name, num_labels=3))
    text = f"hf:{tmp_path}"
    classifier = resolve_model(text, TextClassifier).eval()
    same(classifier(IDS, MASK), model(input_ids=IDS, attention_mask=MASK).logits)
    hidden = model.base_model(input_ids=IDS, attention_mask=MASK).last_hidden_state
    mean = resolve_model(text, TextEncoder).eval()
    torch.testing.assert_close(mean(IDS, MASK), torch.stack([hidden[0].mean(0), hidden[1, :2].mean(0)]))
    same(mean(IDS, MASK), classifier.encode(IDS, MASK))
    first = resolve_model(f"{text}:pooling=first", TextEncoder).eval()
    same(first(IDS, MASK), hidden[:, 0])
    same(first(IDS), model.base_model(input_ids=IDS).last_hidden_state[:, 0])
    batch = {"input_ids": IDS, "attention_mask": MASK}
    for adapted, kind in ((classifier, TextClassifier), (mean, TextEncoder), (first, TextEncoder)):
        rebuilt(adapted, batch, kind)
    wider = resolve_model(f"{text}:num_labels=7", TextClassifier)
    assert wider(IDS, MASK).shape == (2, 7)
    same(wider.eval().encode(IDS, MASK), mean(IDS, MASK))


def test_padding_does_not_change_the_features_of_a_text(tmp_path):
    saved(tmp_path, made("BERT"))
    for text in (f"hf:{tmp_path}", f"hf:{tmp_path}:pooling=first"):
        encoder = resolve_model(text, TextEncoder).eval()
        torch.testing.assert_close(encoder(IDS, MASK)[1:], encoder(IDS[1:, :2], MASK[1:, :2]))
    left = torch.tensor([[0, 0, 7, 8]]), torch.tensor([[0, 0, 1, 1]])
    hidden = encoder.model.base_model(input_ids=left[0], attention_mask=left[1]).last_hidden_state
    same(encoder(*left), hidden[:, 2])


def test_text_models_of_a_masked_language_model(tmp_path):
    saved(tmp_path, hf.BertForMaskedLM(made("BERT").config))
    assert resolve_model(f"hf:{tmp_path}", TextEncoder)(IDS, MASK).shape == (2, 8)
    assert type(resolve_model(f"hf:{tmp_path}")).__name__ == "TextModel"
    with pytest.raises(RoleError, match=r"no trained class layer.*num_labels=N"):
        resolve_model(f"hf:{tmp_path}", TextClassifier)
    with pytest.warns(UserWarning, match="not used"):
        assert resolve_model(f"hf:{tmp_path}:num_labels=4", TextClassifier)(IDS, MASK).shape == (2, 4)
    make = resolve_model(f"hf:{tmp_path}", Network)
    assert make()(IDS, MASK).shape == (2, 8)


def test_text_models_built_in_python_fit_their_roles():
    model = made("BERT", num_labels=3).eval()
    same(fit_role(model, TextClassifier, "mine")(IDS, MASK), model(input_ids=IDS, attention_mask=MASK).logits)
    assert fit_role(model.bert, TextEncoder, "mine")(IDS, MASK).shape == (2, 8)
    for wrong, kind, says in ((model.bert, TextClassifier, "BertModel.*has no classes"),
                              (made("ViT"), TextEncoder, "ViTForImageClassification.*no model of text"),
                              (made("T5"), TextEncoder, "encoder-decoder.*Seq2Seq"),
                              (made("BERT"), Seq2Seq, None), (made("Whisper"), Seq2Seq, "SpeechToText")):
        if says is not None:
            with pytest.raises(RoleError, match=says):
                fit_role(wrong, kind, "mine")
    with pytest.raises(RoleError, match="no encoder-decoder"):
        fit_role(torch.nn.Linear(2, 2), Seq2Seq, "mine")


def test_a_decoder_that_classifies_needs_a_padding_token(tmp_path):
    config = hf.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2, num_labels=3)
    saved(tmp_path / "a", hf.GPT2ForSequenceClassification(config))
    with pytest.raises(RoleError, match="pad_token_id"):
        resolve_model(f"hf:{tmp_path / 'a'}", TextClassifier)
    config.pad_token_id = 0
    model = saved(tmp_path / "b", hf.GPT2ForSequenceClassification(config))
    loaded = resolve_model(f"hf:{tmp_path / 'b'}", TextClassifier).eval()
    same(loaded(IDS, MASK), model(IDS, attention_mask=MASK).logits)


def test_adapt_makes_a_text_model_of_any_module_of_token_ids():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(20, 4), torch.nn.Linear(4, 3)

        def forward(self, input_ids, attention_mask=None):
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            pooled = (self.embed(input_ids) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            return {"logits": self.head(pooled)}

    net = Net()
    fit = adapt(net, logits="logits", encode="embed")
    batch = {"input_ids": IDS, "attention_mask": MASK}
    same(PROBES[TextClassifier](fit, batch), net(IDS, MASK)["logits"])
    assert not torch.equal(fit(IDS), fit(IDS, MASK))
    same(fit.encode(IDS, MASK), net.embed(IDS)[:, 0])
    same(adapt(net, encode="head").encode(IDS, MASK), net(IDS, MASK)["logits"])
    by_hand = adapt(net, logits="logits", encode=lambda m, ids, mask: m.embed(ids).sum(1) * mask.sum(1, keepdim=True))
    same(by_hand.encode(IDS, MASK), net.embed(IDS).sum(1) * MASK.sum(1, keepdim=True))


# ------------------------------------------------------------------------------------------- encoder-decoders

TARGET = torch.tensor([[4, 5, 2], [6, 2, -100]])


@pytest.mark.parametrize("name", ["T5", "BART", "Marian"])
def test_encoder_decoders_of_text(tmp_path, name):
    model = saved(tmp_path, made(name))
    loaded = resolve_model(f"hf:{tmp_path}", Seq2Seq)
    assert type(loaded) is type(model) and type(resolve_model(f"hf:{tmp_path}")) is type(model)
    same(loaded(IDS, MASK, labels=TARGET).logits, model(input_ids=IDS, attention_mask=MASK, labels=TARGET).logits)
    again = rebuilt(loaded, {"input_ids": IDS, "attention_mask": MASK, "target_ids": TARGET}, Seq2Seq)
    options = {"attention_mask": MASK, "max_new_tokens": 4, "do_sample": False, "num_beams": 1}
    same(again.generate(IDS, **options), model.generate(IDS, **options))
    with pytest.raises(RoleError, match="no causal language model"):
        resolve_model(f"hf:{tmp_path}", CausalLM)


def whisper(folder, chunk=1, bins=8):
    model = made("Whisper")
    model.generation_config.eos_token_id = [2, 5]
    saved(folder, model)
    extractor = hf.WhisperFeatureExtractor(feature_size=bins, chunk_length=chunk)
    extractor.save_pretrained(folder)
    return model, extractor


def test_whisper_reads_waveforms(tmp_path):
    model, extractor = whisper(tmp_path)
    loaded = resolve_model(f"hf:{tmp_path}", Seq2Seq).eval()
    audio = torch.randn(2, 9000) * torch.tensor([[0.3], [0.01]])
    expected = extractor(list(audio.numpy()), sampling_rate=16000, return_tensors="pt").input_features
    torch.testing.assert_close(loaded.features(audio), expected, rtol=1e-4, atol=1e-4)
    out = model(input_features=expected, labels=TARGET).logits
    torch.testing.assert_close(loaded(audio=audio, labels=TARGET).logits, out, rtol=1e-3, atol=1e-4)
    again = rebuilt(loaded, {"audio": audio, "target_ids": TARGET}, Seq2Seq)
    assert again.model.generation_config.eos_token_id == [2, 5]
    options = {"max_new_tokens": 4, "do_sample": False}
    same(again.generate(audio=audio, **options), model.generate(expected, **options))
    sound = audio.clone().requires_grad_()
    loaded(audio=sound, labels=TARGET).loss.backward()
    assert torch.isfinite(sound.grad).all() and sound.grad.abs().sum() > 0
    for wrong, says in (({"audio": torch.zeros(1, 16001)}, "16001 samples"), ({"input_ids": IDS}, "reads sound"),
                        ({"audio": torch.zeros(9)}, "batch, samples")):
        with pytest.raises(RoleError, match=says):
            loaded(**wrong, labels=TARGET)


def test_whisper_needs_the_settings_of_its_own_feature_extractor(tmp_path):
    whisper(tmp_path / "a")
    (tmp_path / "a" / "preprocessor_config.json").unlink()
    with pytest.raises(RoleError, match=r"feature extractor \(preprocessor_config.json"):
        resolve_model(f"hf:{tmp_path / 'a'}", Seq2Seq)
    settings = hf.WhisperFeatureExtractor(feature_size=8, chunk_length=1).to_dict()
    (tmp_path / "a" / "processor_config.json").write_text(json.dumps({"feature_extractor": settings}))
    assert resolve_model(f"hf:{tmp_path / 'a'}", Seq2Seq).settings["chunk_length"] == 1
    for folder, options, says in (("b", {"chunk": 2}, "200 frames"), ("c", {"bins": 10}, "10 mel bins")):
        whisper(tmp_path / folder, **options)
        with pytest.raises(RoleError, match=f"{says}.*not of the same Whisper"):
            resolve_model(f"hf:{tmp_path / folder}", Seq2Seq)


def test_the_mel_spectrogram_of_silence_and_of_a_tone(tmp_path):
    whisper(tmp_path)
    loaded = resolve_model(f"hf:{tmp_path}", Seq2Seq)
    assert np.allclose(loaded.features(torch.zeros(1, 100)).numpy(), (-10 + 4) / 4)
    t = torch.arange(16000) / 16000
    low, high = (loaded.features(torch.sin(2 * torch.pi * f * t)[None]).mean((0, 2)).argmax() for f in (200.0, 5000.0))
    assert low == 0 and high >= 6


# ------------------------------------------------------------------------------------------- speech, dual encoders


@pytest.mark.parametrize("name", ["HuBERT", "wav2vec2", "WavLM"])
def test_speech_encoders(tmp_path, name):
    model = saved(tmp_path, made(name))
    audio = torch.randn(2, 400)
    loaded = resolve_model(f"hf:{tmp_path}", SpeechEncoder)
    assert type(loaded) is type(model) and not loaded.training
    same(loaded(audio).last_hidden_state, model(audio).last_hidden_state)
    rebuilt(loaded, {"audio": audio}, SpeechEncoder)


@pytest.mark.parametrize("make", [clip, siglip])
def test_dual_encoders(tmp_path, make):
    tokenizer = word_tokenizer(["a photo of a red blue circle square."], length=12)
    torch.manual_seed(0)
    model = saved(tmp_path, make(tokenizer, width=8, layers=2, heads=2, patch=4, image=8, text_layers=1, length=12))
    tokenizer.save_pretrained(tmp_path)
    dual = resolve_model(f"hf:{tmp_path}", DualEncoder)
    image, texts = torch.rand(2, 3, 8, 8) * 2 - 1, ["a red circle.", "a photo of a blue square"]
    out = model(input_ids=dual.text.tokens(texts), pixel_values=image)
    for ours, theirs in ((dual.encode_image(image), out.image_embeds), (dual.encode_text(texts), out.text_embeds)):
        torch.testing.assert_close(torch.nn.functional.normalize(ours, dim=-1), theirs)
    again = rebuilt(dual, {"image": image}, DualEncoder)
    same(again.encode_text(texts), dual.encode_text(texts))
    assert torch.equal(again.scale, dual.scale) and torch.equal(again.text.words("red circle"), dual.text.words(
        "red circle"))
    fresh = resolve_model(f"hf:{tmp_path}:fresh=true", DualEncoder)
    assert not torch.allclose(fresh.encode_text(texts), dual.encode_text(texts))


def test_a_dual_encoder_needs_its_tokenizer(tmp_path):
    tokenizer = word_tokenizer(["red circle"], length=12)
    saved(tmp_path, clip(tokenizer, width=8, layers=1, heads=2, patch=4, image=8, text_layers=1, length=12))
    with pytest.raises(RoleError, match=r"without its tokenizer.*tokenizer\.save_pretrained"):
        resolve_model(f"hf:{tmp_path}", DualEncoder)


# ------------------------------------------------------------------------------------------- options and roles


@pytest.mark.parametrize(("name", "kind", "options", "says"), [
    ("ViT", Classifier, "pooling=first", "no option 'pooling'.*num_labels, fresh"),
    ("ViT", Encoder, "num_labels=3", "no option 'num_labels'.*fresh"),
    ("ViT", Classifier, "fresh=3", "fresh is true or false"),
    ("ViT", Classifier, "num_labels=many", "number of classes"),
    ("GPT2", CausalLM, "num_labels=3", "no option 'num_labels'.*language model"),
    ("GPT2", CausalLM, "trust_remote_code=true", "no option 'trust_remote_code'"),
    ("BERT", TextEncoder, "pooling=last", "mean or first, not 'last'"),
    ("T5", Seq2Seq, "width=3", "no option 'width'"),
    ("HuBERT", SpeechEncoder, "num_labels=3", "no option 'num_labels'"),
])
def test_options_that_there_are_not(tmp_path, name, kind, options, says):
    saved(tmp_path, made(name))
    with pytest.raises(UnknownNameError, match=says):
        resolve_model(f"hf:{tmp_path}:{options}", kind)


@pytest.mark.parametrize(("name", "kind", "says"), [
    ("ViT", CausalLM, r"\(vit, ViTForImageClassification\) is no causal language model"),
    ("ViT", TextClassifier, "vit, ViTForImageClassification.*no model that reads text"),
    ("ViT", Seq2Seq, "vit, ViT.*no encoder-decoder"),
    ("ViT", SpeechEncoder, "is a ViTForImageClassification.*HubertModel"),
    ("ViT", DualEncoder, "vit.*no CLIP or SigLIP"),
    ("GPT2", Classifier, r"\(gpt2, GPT2LMHeadModel\) is no model of pictures"),
    ("GPT2", Seq2Seq, "gpt2.*no encoder-decoder"),
    ("BERT", Encoder, "bert, BertForSequenceClassification.*no model of pictures"),
    ("T5", TextEncoder, "t5, T5ForConditionalGeneration.*no model that reads text"),
    ("T5", Encoder, "no model of pictures"),
    ("HuBERT", TextEncoder, "hubert, HubertModel.*no model that reads text"),
    ("Whisper", Classifier, "whisper.*no model of pictures"),
    ("Whisper", CausalLM, "whisper.*no causal language model"),
])
def test_the_wrong_model_for_a_role_is_named(tmp_path, name, kind, says):
    saved(tmp_path, made(name))
    with pytest.raises(RoleError, match=says):
        resolve_model(f"hf:{tmp_path}", kind)
