"""What a system may ask of a model or a data set, by role.

A protocol here is a promise in words and shapes: `isinstance` proves nothing about it, so `run.check` sends one
real batch through each role before any work starts. `PROBES` says how that batch is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

ROLES = {
    "teacher": "the model whose knowledge is moved; never changed",
    "teachers": "several such models",
    "student": "the model that is trained in place and returned",
    "network": "a factory: called without arguments, it returns a freshly initialised nn.Module",
    "candidates": "several such factories, among which one is chosen",
    "data": "the main training data",
    "perceptual": "a network whose features a distance is taken in; never changed",
    "labelled": "data with labels that the system may read",
    "unlabelled": "data whose labels, if any, are never read",
    "validation": "held-out data",
    "real": "real samples for an adversarial or density term",
    "conditions": "class labels or prompt embeddings without pictures",
    "prompts": "instructions or captions",
    "corpus": "plain text",
    "clients": "one data set per client",
    "classes": "the names of the classes; the position of a name is its label",
    "forget": "data to be unlearned",
    "retain": "data to be kept",
    "scenes": "scenes whose parameters are trained in place",
}
"""The role vocabulary: parameter names of every `distill`."""

FIELDS = {
    "index": "position in the data set, always present",
    "image": "float32 [batch, channels, height, width]",
    "label": "int64 [batch]",
    "x": "float32 [batch, ...]: a sample of a density (pictures or points)",
    "condition": "int64 [batch] or float32 [batch, ...]",
    "input_ids": "int64 [batch, length]",
    "attention_mask": "int64 [batch, length], 1 on real tokens",
    "target_mask": "int64 [batch, length], 1 on the tokens a loss is taken on",
    "graph": "list of torch_geometric Data",
    "target_ids": "int64 [batch, length]: what a Seq2Seq is to write, -100 where nothing is to be learned",
    "audio": "float32 [batch, samples]: mono sound",
    "domain": "int64 [batch]: where a sample comes from",
    "name": "list of texts: what classes are called",
    "other": "float32 [batch, ...]: the same thing in a second modality or view",
}
"""Names of the fields of a batch."""


@runtime_checkable
class Classifier(Protocol):
    """Pictures in, class logits out."""

    def __call__(self, image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]: ...


@runtime_checkable
class Encoder(Protocol):
    """Pictures in, one feature vector per picture out."""

    def __call__(self, image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features"]: ...


@runtime_checkable
class Denoiser(Protocol):
    """A noisy sample and its time in, the estimate of the clean sample x0 out.

    t = 0 is data and t = 1 is noise; `process` gives alpha_t and sigma_t with x_t = alpha_t x + sigma_t eps.
    `condition` is None where the model is unconditional; `null_condition` is what stands for "no condition".
    """

    process: Any
    null_condition: Tensor | None

    def __call__(
        self, x_t: Float[Tensor, "batch ..."], t: Float[Tensor, " batch"], condition: Tensor | None = None
    ) -> Float[Tensor, "batch ..."]: ...


@runtime_checkable
class CausalLM(Protocol):
    """A decoder-only language model with the interface of `transformers`: `.logits` out, and `generate`."""

    def __call__(self, input_ids: Int[Tensor, "batch length"], attention_mask: Tensor | None = None) -> Any: ...

    def generate(self, input_ids: Tensor, **options: Any) -> Tensor: ...


@runtime_checkable
class TopKTeacher(Protocol):
    """A language model of which the k likeliest next tokens are known: an endpoint, or outputs that were kept.

    Position i of `log_p` (temperature 1, falling) and `index` speaks of token i + 1; what is not known there (no token,
    or fewer than k) has log_p = -inf and index 0. `vocabulary` is the number of tokens it chooses from.
    """

    vocabulary: int

    def top_k(
        self, input_ids: Int[Tensor, "batch length"], attention_mask: Tensor | None = None
    ) -> tuple[Float[Tensor, "batch length k"], Int[Tensor, "batch length k"]]: ...


@runtime_checkable
class TextClassifier(Protocol):
    """Token ids in, class logits of each text out."""

    def __call__(
        self, input_ids: Int[Tensor, "batch length"], attention_mask: Tensor | None = None
    ) -> Float[Tensor, "batch classes"]: ...


@runtime_checkable
class TextEncoder(Protocol):
    """Token ids in, one feature vector per text out."""

    def __call__(
        self, input_ids: Int[Tensor, "batch length"], attention_mask: Tensor | None = None
    ) -> Float[Tensor, "batch features"]: ...


@runtime_checkable
class Seq2Seq(Protocol):
    """An encoder-decoder with the interface of `transformers`: `.logits` of the text it is to write out, and
    `generate`. It reads token ids, or sound (`audio`, by keyword)."""

    def __call__(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                 labels: Int[Tensor, "batch length"] | None = None, audio: Tensor | None = None) -> Any: ...

    def generate(self, input_ids: Tensor | None = None, **options: Any) -> Tensor: ...


@runtime_checkable
class DualEncoder(Protocol):
    """Pictures and texts in, vectors of one space out; `scale` times their cosine is a logit (CLIP).

    `prompts` [depth, tokens, width] are learned tokens for the first `depth` layers (`stillhouse.parts.prompts`).
    Calling it encodes pictures. `vision` is the module that does so, without the text encoder; `vision` and `text`
    say the `width` of their tokens and how many `layers` they have, `text.words(text)` gives the embeddings of words.
    """

    vision: nn.Module
    text: nn.Module
    scale: Tensor

    def __call__(self, image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features"]: ...

    def encode_image(
        self, image: Float[Tensor, "batch channels height width"], prompts: Tensor | None = None
    ) -> Float[Tensor, "batch features"]: ...

    def encode_text(self, texts: Sequence[str], prompts: Tensor | None = None) -> Float[Tensor, "texts features"]: ...


@runtime_checkable
class GraphModel(Protocol):
    """Node features, edges, graph index and (optionally) a mask of the nodes to pool in; graph logits out."""

    def __call__(
        self, x: Tensor, edge_index: Tensor, batch: Tensor, pool_mask: Tensor | None = None, **extra: Tensor | None
    ) -> Float[Tensor, "graphs classes"]: ...


@runtime_checkable
class SpeechEncoder(Protocol):
    """Mono sound in, hidden states out, with the interface of `transformers`: `.last_hidden_state`."""

    def __call__(self, audio: Float[Tensor, "batch samples"]) -> Any: ...


@runtime_checkable
class Scene(Protocol):
    """Scenes whose parameters are trained: which of them and through which cameras in, pictures out.

    `stillhouse.models.scenes.SceneSet` is one; flat scenes (points, single pictures) ignore their cameras.
    """

    def __len__(self) -> int: ...

    def render(
        self, which: Int[Tensor, " batch"], cameras: Any = None, size: int = 64, look: Any = "colour",
        jitter: Tensor | None = None,
    ) -> Float[Tensor, "batch ..."]: ...


@runtime_checkable
class Density(Protocol):
    """Samples in, log-densities in nats out (`log_prob`), and samples drawn exactly (`sample`).

    `u` in [0, 1), of the shape of x, dequantises pictures; where it is None it is drawn, where there are none not read.
    """

    def log_prob(self, x: Float[Tensor, "batch ..."], u: Tensor | None = None) -> Float[Tensor, " batch"]: ...

    def sample(self, n: int) -> Float[Tensor, "n ..."]: ...


Network = Callable[[], nn.Module]
"""A factory of freshly initialised networks."""


class DataSet(Protocol):
    """A map-style set of dicts; `OFFERS` says which fields each kind of set has beside `index`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


class Images(DataSet, Protocol):
    """Pictures; labels, if present, are not read."""


class LabelledImages(DataSet, Protocol):
    """Pictures with labels."""


class AnyImages(DataSet, Protocol):
    """Pictures, with labels (`label`) and a second modality or view (`other`) where the settings ask for them."""


class DomainImages(DataSet, Protocol):
    """Pictures and where each comes from; labels, if present, are not read."""


class Samples(DataSet, Protocol):
    """Samples of a density, with `condition` where the model is conditional."""


class Conditions(DataSet, Protocol):
    """Conditions without samples."""


class TokenPairs(DataSet, Protocol):
    """Prompt and response in one sequence; `target_mask` is 1 on the response."""


class Texts(DataSet, Protocol):
    """Texts as token ids; labels, if present, are not read."""


class LabelledTexts(DataSet, Protocol):
    """Texts as token ids, with labels."""


class SourceTargets(DataSet, Protocol):
    """Texts as token ids and what is to be written for each."""


class ClassNames(DataSet, Protocol):
    """The names of classes, in the order of their labels."""


class Graphs(DataSet, Protocol):
    """Graphs with discrete node labels and a class."""


class SpeechData(DataSet, Protocol):
    """Mono sound of one length; what is said, and by whom, is not read."""


OFFERS: dict[Any, tuple[str, ...]] = {
    Images: ("image",),
    LabelledImages: ("image", "label"),
    AnyImages: ("image",),
    DomainImages: ("image", "domain"),
    Samples: ("x",),
    Conditions: ("condition",),
    TokenPairs: ("input_ids", "attention_mask", "target_mask"),
    Texts: ("input_ids", "attention_mask"),
    LabelledTexts: ("input_ids", "attention_mask", "label"),
    SourceTargets: ("input_ids", "attention_mask", "target_ids"),
    ClassNames: ("name",),
    Graphs: ("graph", "label"),
    SpeechData: ("audio",),
}
"""Which fields the items of each kind of data set must have."""


def _probe_image(model: Any, batch: Mapping[str, Any]) -> Tensor:
    return model(batch["image"])


def _probe_denoiser(model: Any, batch: Mapping[str, Any]) -> Tensor:
    x = batch["x"]
    t = torch.full((len(x),), 0.5, device=x.device)
    return model(x, t, batch.get("condition"))


def _probe_causal_lm(model: Any, batch: Mapping[str, Any]) -> Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits


def _probe_top_k(model: Any, batch: Mapping[str, Any]) -> Tensor:
    return model.top_k(batch["input_ids"], batch.get("attention_mask"))[0].exp()


def _probe_text(model: Any, batch: Mapping[str, Any]) -> Tensor:
    return model(batch["input_ids"], batch.get("attention_mask"))


def _probe_seq2seq(model: Any, batch: Mapping[str, Any]) -> Tensor:
    if "audio" in batch:
        return model(audio=batch["audio"], labels=batch["target_ids"]).logits
    return model(batch["input_ids"], batch.get("attention_mask"), labels=batch["target_ids"]).logits


def _probe_dual_encoder(model: Any, batch: Mapping[str, Any]) -> Tensor:
    if not (hasattr(model, "encode_text") and hasattr(model, "scale")):
        raise TypeError("it has no encode_text or no scale")
    return model.encode_image(batch["image"])


def _probe_speech_encoder(model: Any, batch: Mapping[str, Any]) -> Tensor:
    return model(batch["audio"]).last_hidden_state


def _probe_density(model: Any, batch: Mapping[str, Any]) -> Tensor:
    if not hasattr(model, "sample"):
        raise TypeError("it has no sample")
    return model.log_prob(batch["x"])[:, None]


def _probe_graphs(model: Any, batch: Mapping[str, Any]) -> Tensor:
    from torch_geometric.data import Batch

    whole = Batch.from_data_list(list(batch["graph"]))
    extra = {name: whole[name] for name in ("edge_attr", "degree") if name in whole}
    return model(whole.x, whole.edge_index, whole.batch, None, graphs=len(batch["graph"]), **extra)


PROBES: dict[Any, Callable[[Any, Mapping[str, Any]], Tensor]] = {
    Classifier: _probe_image,
    Encoder: _probe_image,
    Denoiser: _probe_denoiser,
    Density: _probe_density,
    CausalLM: _probe_causal_lm,
    TopKTeacher: _probe_top_k,
    TextClassifier: _probe_text,
    TextEncoder: _probe_text,
    Seq2Seq: _probe_seq2seq,
    SpeechEncoder: _probe_speech_encoder,
    DualEncoder: _probe_dual_encoder,
    GraphModel: _probe_graphs,
}
"""How one batch is sent through a model of each protocol."""

NEEDS: dict[Any, tuple[str, ...]] = {
    Classifier: ("image",),
    Encoder: ("image",),
    Denoiser: ("x",),
    Density: ("x",),
    CausalLM: ("input_ids",),
    TopKTeacher: ("input_ids",),
    TextClassifier: ("input_ids",),
    TextEncoder: ("input_ids",),
    Seq2Seq: ("target_ids",),
    SpeechEncoder: ("audio",),
    DualEncoder: ("image",),
    GraphModel: ("graph",),
}
"""Which batch fields the probe of a protocol reads."""


def modules_of(*objects: Any) -> Iterator[nn.Module]:
    """The nn.Modules among `objects`, looking into lists, tuples and dicts."""
    for item in objects:
        if isinstance(item, nn.Module):
            yield item
        elif isinstance(item, Mapping):
            yield from modules_of(*item.values())
        elif isinstance(item, list | tuple):
            yield from modules_of(*item)
