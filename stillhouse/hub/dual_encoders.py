"""Dual encoders of `transformers` (CLIP, SigLIP) that take learned prompts, and classifiers on their pictures' side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.errors import DamagedFileError, RoleError, require
from stillhouse.hub.refusals import read_json
from stillhouse.hub.transformers import (
    ImageModel,
    _check_loaded,
    _check_options,
    _config,
    _flag,
    _library,
    _made,
    _pictures,
    _safely,
)
from stillhouse.parts.class_vectors import cosine_logits
from stillhouse.parts.heads import mlp
from stillhouse.parts.prompts import DeepPrompts, appended, replaced
from stillhouse.store import load_tree, save_tree, write_text

VISION = {"clip_vision_model": "CLIPVisionModel", "siglip_vision_model": "SiglipVisionModel"}
"""Configurations of the pictures' side, and their classes."""

TEXT = {"clip_text_model": "CLIPTextModel", "siglip_text_model": "SiglipTextModel"}
"""Configurations of the texts' side, and their classes."""

TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "spiece.model")
"""Files one of which a folder with a tokenizer has."""


class VisionTower(ImageModel):
    """The pictures' side of a dual encoder, on pictures in [-1, 1]: features before they are normalised."""

    def __init__(self, model: Any, projection: nn.Linear | None, mean: list[float], std: list[float],
                 size: tuple[int, int] | None):
        super().__init__(model, mean, std, size)
        self.projection = projection

    @property
    def layers(self) -> list[nn.Module]:
        return list(self.model.encoder.layers)

    @property
    def width(self) -> int:
        return int(self.model.config.hidden_size)

    def forward(self, image: Float[Tensor, "batch channels height width"],
                prompts: Float[Tensor, "depth count width"] | None = None) -> Float[Tensor, "batch features"]:
        """With `prompts`, behind the class token and the patches of the first layers."""
        with appended(prompts, self.layers, getattr(self.model, "pre_layrnorm", None)):
            pooled = self.model(pixel_values=self.prepared(image)).pooler_output
        return pooled if self.projection is None else self.projection(pooled)

    def spec(self) -> dict[str, Any]:
        """All but the weights, for JSON."""
        features = None if self.projection is None else self.projection.weight.shape[0]
        return {"config": self.model.config.to_dict(), "features": features, "mean": self.mean.flatten().tolist(),
                "std": self.std.flatten().tolist(), "size": self.size}

    @classmethod
    def of(cls, spec: dict[str, Any]) -> VisionTower:
        """The tower that `spec` describes, with weights that are still to be loaded."""
        hf = _library()
        model, projection = _side(hf, spec, VISION)
        return cls(model, projection, spec["mean"], spec["std"], None if spec["size"] is None else tuple(spec["size"]))


def _side(hf: Any, spec: dict[str, Any], classes: dict[str, str]) -> tuple[Any, nn.Linear | None]:
    """One side of a dual encoder as `spec` describes it, with fresh weights, and its projection."""
    config = dict(spec["config"])
    kind = config.pop("model_type", None)
    require(kind in classes, f"one side is a '{kind}'; understood are {', '.join(classes)}", RoleError)
    model = getattr(hf, classes[kind])(hf.AutoConfig.for_model(kind, **config))
    features = spec["features"]
    return model, None if features is None else nn.Linear(model.config.hidden_size, features, bias=False)


class TextTower(nn.Module):
    """The texts' side of a dual encoder, with its tokenizer: features before they are normalised."""

    def __init__(self, model: Any, projection: nn.Linear | None, tokenizer: Any):
        super().__init__()
        self.model, self.projection, self.tokenizer = model, projection, tokenizer
        self.length = int(model.config.max_position_embeddings)
        self.fixed = "siglip" in model.config.model_type
        first = tokenizer("a")["input_ids"][0]
        self.start = int(tokenizer.bos_token_id is not None and first == tokenizer.bos_token_id)

    @property
    def layers(self) -> list[nn.Module]:
        return list(self.model.encoder.layers)

    @property
    def width(self) -> int:
        return int(self.model.config.hidden_size)

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Token ids [texts, length], padded on the right; too long texts are cut."""
        found = self.tokenizer(list(texts), padding="max_length" if self.fixed else True, truncation=True,
                               max_length=self.length, return_tensors="pt")
        return found["input_ids"].to(self.embedding.weight.device)

    def spec(self) -> dict[str, Any] | None:
        """All but the weights, for JSON; None with a tokenizer that is a program instead of a table."""
        tokenizer = getattr(self.tokenizer, "backend_tokenizer", None)
        if tokenizer is None:
            return None
        features = None if self.projection is None else self.projection.weight.shape[0]
        special = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()
                   if name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        return {"config": self.model.config.to_dict(), "features": features, "tokenizer": tokenizer.to_str(),
                "special": special, "longest": self.tokenizer.model_max_length}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> TextTower:
        """A tower as `spec` describes it, with fresh weights."""
        from tokenizers import Tokenizer

        hf = _library()
        model, projection = _side(hf, spec, TEXT)
        tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(spec["tokenizer"]),
                                               model_max_length=spec["longest"], **spec["special"])
        return cls(model, projection, tokenizer)

    @property
    def embedding(self) -> nn.Embedding:
        return self.model.embeddings.token_embedding

    def words(self, text: str) -> Float[Tensor, "tokens width"]:
        """The embeddings of the tokens of a text, without positions, beginning and end."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.embedding.weight[torch.tensor(ids, dtype=torch.long, device=self.embedding.weight.device)].detach()

    def forward(self, texts: Sequence[str],
                prompts: Float[Tensor, "depth count width"] | None = None) -> Float[Tensor, "texts features"]:
        """With `prompts`, in the place of the first words of each text."""
        with replaced(prompts, self.layers, self.embedding, self.start):
            pooled = self.model(input_ids=self.tokens(texts)).pooler_output
        return pooled if self.projection is None else self.projection(pooled)


class CLIPDualEncoder(nn.Module):
    """A CLIP or SigLIP of `transformers` as a DualEncoder; its parts are shared, not copied."""

    def __init__(self, vision: VisionTower, text: TextTower, logit_scale: nn.Parameter):
        super().__init__()
        self.vision, self.text, self.logit_scale = vision, text, logit_scale

    def spec(self) -> dict[str, Any] | None:
        """All but the weights, for JSON, the tokenizer among it; None where its tokenizer cannot be put so."""
        text = self.text.spec()
        return None if text is None else {"vision": self.vision.spec(), "text": text,
                                          "scale": list(self.logit_scale.shape)}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> CLIPDualEncoder:
        """A dual encoder as `spec` describes it, with fresh weights."""
        return cls(VisionTower.of(spec["vision"]), TextTower.from_spec(spec["text"]),
                   nn.Parameter(torch.zeros(spec["scale"])))

    @property
    def scale(self) -> Tensor:
        """exp of the learned logit scale; SigLIP's bias is left out, which moves all logits alike."""
        return self.logit_scale.exp().reshape(())

    def encode_image(self, image: Tensor, prompts: Tensor | None = None) -> Float[Tensor, "batch features"]:
        return self.vision(image, prompts)

    def encode_text(self, texts: Sequence[str], prompts: Tensor | None = None) -> Float[Tensor, "texts features"]:
        return self.text(texts, prompts)

    def forward(self, image: Tensor) -> Float[Tensor, "batch features"]:
        return self.vision(image)


def adapt_dual(model: Any, tokenizer: Any, name: str | None = None) -> CLIPDualEncoder:
    """A DualEncoder that shares the weights of a CLIPModel or SiglipModel; `name` is where its image processor is read.

    Without one, pictures stay in [-1, 1]. Raises RoleError for a model without both sides.
    """
    sides: list[Any] = [getattr(model, side, None) for side in ("vision_model", "text_model")]
    require(all(hasattr(side, "encoder") for side in sides) and hasattr(model, "logit_scale"),
            f"{type(model).__name__} is no CLIP or SigLIP of transformers with a vision_model and a text_model",
            RoleError)
    require(sides[0].config.model_type in VISION, f"the pictures' side is a '{sides[0].config.model_type}'; understood "
            f"are {', '.join(VISION)}", RoleError)
    shown = _pictures(_library(), model.vision_model, name)
    mean, std = shown.mean.flatten().tolist(), shown.std.flatten().tolist()
    vision = VisionTower(model.vision_model, getattr(model, "visual_projection", None), mean, std, shown.size)
    text = TextTower(model.text_model, getattr(model, "text_projection", None), tokenizer)
    return CLIPDualEncoder(vision, text, model.logit_scale)


def load_dual(name: str, **options: Any) -> CLIPDualEncoder:
    """The CLIP or SigLIP `name` of the hub, or in a folder, with its tokenizer and image processor.

    `fresh=True` draws new weights for its configuration. Weights come from safetensors alone. Raises RoleError for
    another kind of model or a folder without a tokenizer, UnknownNameError where nothing is found.
    """
    hf = _library()
    fresh = _flag(options, "fresh")
    _check_options(options, "dual encoder", name)
    folder, config = _config(hf, name, {}, fresh)
    require(config.model_type in ("clip", "siglip"), f"'{name}' ({config.model_type}) is no CLIP or SigLIP, which this "
            "role needs", RoleError)
    model, found = _made(hf, hf.AutoModel, folder, config, name, fresh)
    _check_loaded(model, found, "dual", name, new_head=False)
    require(any((folder / file).is_file() for file in TOKENIZERS), f"'{name}' comes without its tokenizer, with which "
            "a dual encoder reads texts; save it beside the model: tokenizer.save_pretrained(folder)", RoleError)
    tokenizer = _safely(name, folder, lambda: hf.AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    return adapt_dual(model.eval(), tokenizer, str(folder))


class VectorClassifier(nn.Module):
    """Pictures by the cosine of their features with class vectors: z = s h(v(x)) W^T, both sides at length 1.

    `vision` is called with the tokens of `prompts` where there are any; `projector` h brings its features to the width
    of `W` [classes, features]; `names` are those of the classes. No text encoder is needed.
    """

    W: Tensor
    scale: Tensor

    def __init__(self, vision: nn.Module, W: Float[Tensor, "classes features"], scale: Tensor, names: Sequence[str],
                 prompts: DeepPrompts | None = None, projector: nn.Module | None = None):
        super().__init__()
        require(len(names) == len(W), f"{len(names)} names were given for {len(W)} class vectors", RoleError)
        self.vision, self.prompts, self.projector, self.names = vision, prompts, projector, tuple(names)
        self.register_buffer("W", W.detach().clone())
        self.register_buffer("scale", torch.as_tensor(scale).detach().clone())

    def features(self, image: Tensor) -> Float[Tensor, "batch features"]:
        """What is compared with the class vectors, before it is normalised."""
        v = self.vision(image) if self.prompts is None else self.vision(image, self.prompts())
        return v if self.projector is None else self.projector(v)

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        return cosine_logits(self.features(image), self.W, self.scale)

    def save(self, folder: Path | str) -> Path:
        """Write weights and class vectors (safetensors) and what they belong to (JSON) into `folder`."""
        folder = Path(folder)
        widths = None if self.projector is None else [m.weight.shape for m in self.projector.modules()
                                                      if isinstance(m, nn.Linear)]
        spec = getattr(self.vision, "spec", lambda: None)()
        save_tree(folder / "model.safetensors", dict(self.state_dict()))
        write_text(folder / "classifier.json", json.dumps({
            "vision": spec, "names": self.names,
            "projector": None if not widths else [widths[0][1], *(out for out, _ in widths)],
            "prompts": None if self.prompts is None else list(self.prompts.tokens.shape)}, indent=1))
        return folder

    @classmethod
    def load(cls, folder: Path | str, vision: nn.Module | None = None) -> VectorClassifier:
        """Read what `save` wrote, in eval mode; `vision` is needed where it is no tower of CLIP or SigLIP.

        Raises DamagedFileError for a file that is not as it was written, RoleError where `vision` is needed.
        """
        folder = Path(folder)
        spec = read_json(folder / "classifier.json")
        state = load_tree(folder / "model.safetensors")
        require(vision is not None or spec.get("vision") is not None, f"the pictures' side of {folder} is of your own "
                "making; give load(folder, vision=…)", RoleError)
        try:
            prompts = None if spec["prompts"] is None else DeepPrompts(*spec["prompts"])
            projector = None if spec["projector"] is None else mlp(*spec["projector"], norm=True)
            made = cls(VisionTower.of(spec["vision"]) if vision is None else vision, state["W"], state["scale"],
                       spec["names"], prompts, projector)
            made.load_state_dict(state)
        except (KeyError, TypeError, RuntimeError) as error:
            raise DamagedFileError(f"{folder} does not hold a classifier that fits its description: {error}") from error
        return made.eval()
