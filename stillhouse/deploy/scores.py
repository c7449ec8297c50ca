"""How good a result is on labelled or held-out data, by the measures of `stillhouse.evaluate`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.data.distilled import DistilledSet
from stillhouse.data.sets import column, fetch
from stillhouse.deploy.predict import class_names, draw, outputs, sort_of
from stillhouse.deploy.targets import About, made_by, networks_of
from stillhouse.errors import ConfigError, DataError, require
from stillhouse.evaluate.classification import calibration_error, per_class_accuracy
from stillhouse.evaluate.clustering import ari, clustering_accuracy, nmi
from stillhouse.evaluate.density import bits_per_dimension
from stillhouse.evaluate.distances import energy_distance
from stillhouse.evaluate.probes import knn_probe
from stillhouse.evaluate.text import language_loss, response_rouge
from stillhouse.parts.packed import QuantizedModel
from stillhouse.recipes import graphs
from stillhouse.recipes.dataset_evaluation import evaluate_dataset
from stillhouse.run import Run, frozen, processes
from stillhouse.run.seeds import derive, preserved, reseed

MOST_SAMPLES = 2048
NETWORKS = 3
STEPS = 1000

MEANING = {
    "accuracy": "share whose most probable class is the label", "calibration_error": "expected calibration error",
    "knn_accuracy": "20 nearest neighbours by cosine: one half of this data labels the other, halves drawn with seed 0",
    "clustering_accuracy": "clusters matched one to one to classes", "nmi": "normalised mutual information",
    "ari": "adjusted Rand index", "loss": "next-token cross-entropy, nats a token", "perplexity": "exp(loss)",
    "rouge_l": "ROUGE-L of greedy answers, over token ids", "nll": "negative log-likelihood, nats a sample",
    "bits_per_dimension": "of dequantised pictures", "std": "deviation over the fresh networks",
    "energy_distance": "between as many samples and this data; 0: alike", "auc": "ROC-AUC",
}
"""What each score is."""


def score(target: Any, about: About, data: Any, *, batch: int = 64, device: torch.device | str = "cpu", seed: int = 0,
          network: Callable[[], nn.Module] | None = None, steps: int = STEPS) -> dict[str, Any]:
    """Scores of a target on `data`: {name: number}, and under `per_class` the accuracy by the name of the class.

    Classifiers: accuracy and calibration error. Encoders: nearest neighbours, one half of `data` (drawn with seed 0)
    labelling the other. Clusterings: accuracy, NMI, ARI. Language models: loss, perplexity, ROUGE-L. Densities: NLL,
    bits per dimension. Samplers: energy distance. A distilled set: the accuracy of fresh networks (of `network`) that
    are trained on it for `steps` steps.

    Raises DataError for data without labels, or with other classes than the model's; ConfigError for a target that has
    no score.
    """
    sort = sort_of(target, about)
    require(len(data) > 0, "there is nothing to evaluate on: the set is empty", DataError)
    for part in networks_of(target):
        part.to(device)
    with preserved():
        reseed(derive("score", seed))
        match sort:
            case "classes":
                return _classes(target, about, data, batch, device)
            case "features" | "speech":
                return {"knn_accuracy": _neighbours(torch.cat(list(outputs(target, about, data, batch, device))),
                                                    labels_of(data))}
            case "clusters":
                return _clusters(target, about, data, batch, device)
            case "text":
                return _text(target, about, data, batch)
            case "density":
                return _density(target, about, data, batch, device)
            case "samples":
                return _samples(target, about, data, batch, device, seed)
            case "data":
                return _fresh(target, data, network, steps, device)
    raise ConfigError(f"a {type(target).__name__} has no score; look at it: still predict")


def labels_of(data: Any, names: Sequence[str] = ()) -> Tensor:
    """The labels of a set. Class subfolders are matched by name to `names`, those of the classes of a model; where none
    is among them they are counted in their order.

    Raises DataError where there are no labels, or the subfolders are not the classes of the model.
    """
    require("label" in getattr(data, "fields", ("label",)), f"evaluation needs labels; the data has "
            f"{', '.join(getattr(data, 'fields', ()))}. Put the pictures of each class into a subfolder named after "
            "it, or give an array 'label'", DataError)
    labels = torch.as_tensor(column(data, "label"))
    own = getattr(data, "classes", ())
    folders, known = ([str(name).replace("_", " ") for name in those] for those in (
        own if isinstance(own, list | tuple) else (), names))
    if not folders or not known or folders == known:
        return labels
    strange = [name for name in folders if name not in known]
    require(not strange or len(strange) == len(folders) == len(known), f"the data has the class "
            f"'{next(iter(strange), '')}', which the model does not know; it knows {len(known)}: "
            f"{', '.join(known[:10])}", DataError)
    return labels if strange else torch.tensor([known.index(name) for name in folders])[labels]


def watcher(about: About, data: Any, student: nn.Module | None = None, batch: int = 64,
            device: torch.device | str = "cpu") -> Callable[[nn.Module], dict[str, float]] | None:
    """The quick scores of a student while it is trained, for `Run(evaluate=…)`; None where there are none.

    Of the models that the stages of a run train, `student` alone is scored (None: all).
    """
    if not _is_student(about):
        return None

    def look(model: nn.Module) -> dict[str, float]:
        if student is not None and model is not student:
            return {}
        if about.kind == "CausalLM":
            return {"loss": language_loss(model, data, batch)}
        found = score(model, about, data, batch=batch, device=device)
        return {name: value for name, value in found.items() if isinstance(value, float)}

    return look


def check_fit(model: Any, about: About, data: Any, device: torch.device | str = "cpu") -> None:
    """Send two samples through a student that will be scored on `data`, before any work; raises DataError like `score`
    does. The model and the generators are left as they were."""
    require(len(data) > 0, "there is nothing to evaluate on: the set is empty", DataError)
    if not isinstance(model, nn.Module) or about.kind == "CausalLM" or not _is_student(about):
        return
    with preserved():
        said = next(outputs(model, about, _Part(data, min(len(data), 2)), 2, device))
    if about.kind.endswith("Encoder"):
        labels_of(data)
    elif about.kind != "Density":
        _same_classes(said, labels_of(data, class_names(model, about, said.shape[-1])))


def _is_student(about: About) -> bool:
    """Whether what a run trains is what it returns, and can be scored as it is."""
    kind = made_by(about)
    return (kind is QuantizedModel or kind is nn.Module) and about.kind in (
        "Classifier", "TextClassifier", "Encoder", "TextEncoder", "CausalLM", "Density")


class _Part:
    """The first samples of a set."""

    def __init__(self, data: Any, n: int):
        self.data, self.n, self.fields = data, n, getattr(data, "fields", ())

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


def _same_classes(logits: Tensor, labels: Tensor) -> None:
    require(labels.dim() == 1 and int(labels.max()) < logits.shape[-1], f"the data has the label {int(labels.max())}, "
            f"but the model knows {logits.shape[-1]} classes (labels 0 to {logits.shape[-1] - 1})", DataError)


def _classes(target: Any, about: About, data: Any, batch: int, device: Any) -> dict[str, Any]:
    logits = torch.cat(list(outputs(target, about, data, batch, device)))
    names = class_names(target, about, logits.shape[-1])
    labels = labels_of(data, names)
    _same_classes(logits, labels)
    each = per_class_accuracy(logits, labels).tolist()
    return {"accuracy": (logits.argmax(-1) == labels).double().mean().item(),
            "calibration_error": calibration_error(logits, labels),
            "per_class": {names[i]: value for i, value in enumerate(each) if not math.isnan(value)}}


def _neighbours(features: Tensor, labels: Tensor) -> float:
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    first, second = order[: len(order) // 2], order[len(order) // 2 :]
    require(len(first) > 0, "nearest neighbours need at least two samples", DataError)
    return knn_probe(features[first], labels[first], features[second], labels[second])


def _clusters(target: Any, about: About, data: Any, batch: int, device: Any) -> dict[str, Any]:
    labels = labels_of(data)
    found = torch.cat([part.argmax(-1) for part in outputs(target, about, data, batch, device)])
    return {"clustering_accuracy": clustering_accuracy(found, labels), "nmi": nmi(found, labels),
            "ari": ari(found, labels)}


def _text(model: Any, about: About, data: Any, batch: int) -> dict[str, Any]:
    require("target_mask" in getattr(data, "fields", ("target_mask",)), "a language model is scored on prompts and "
            f"responses as tokens; the data has {', '.join(getattr(data, 'fields', ()))}. Give --tokenizer", DataError)
    with frozen(model):
        loss = language_loss(model, data, batch)
        scores: dict[str, Any] = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        first = fetch(data, [0])
        if int(first["target_mask"][0][0]) == 0:
            scores["rouge_l"] = response_rouge(model, data, int(about.config.get("max_new_tokens", 128)), batch,
                                               sample=False)
    return scores


def _density(target: Any, about: About, data: Any, batch: int, device: Any) -> dict[str, Any]:
    log_prob = torch.cat(list(outputs(target, about, data, batch, device)))
    scores: dict[str, Any] = {"nll": -log_prob.double().mean().item()}
    levels, x = getattr(target, "levels", 0), data[0]["x"]
    if levels:
        scores["bits_per_dimension"] = bits_per_dimension(log_prob, x.numel(), levels)
    return scores


def _samples(target: Any, about: About, data: Any, batch: int, device: Any, seed: int) -> dict[str, Any]:
    n = min(len(data), MOST_SAMPLES)
    require(n >= 2, "samples are compared with two or more", DataError)
    real = fetch(data, range(n))
    with torch.no_grad(), frozen(*networks_of(target)):
        drawn = draw(target, about, n, seed, real.get("condition"), batch, device)
    return {"energy_distance": energy_distance(drawn, real["x"].float())}


def _fresh(target: Any, data: Any, network: Callable[[], nn.Module] | None, steps: int, device: Any) -> dict[str, Any]:
    if isinstance(target, DistilledSet):
        require(network is not None, "a distilled set is judged by fresh networks; say how to build them: --arch "
                "module:callable")
        assert network is not None
        rate = None if target.lr else 0.01
        found = evaluate_dataset(target, network, data, networks=NETWORKS, steps=steps, lr=rate, device=device)
        return {"accuracy": found["accuracy"], "std": found["std"]}
    from stillhouse.models.gnn import GNN

    require(processes.size() == 1, "fresh graph networks are trained by one process; score the result afterwards: "
            "still eval RUN --data DATA")
    test = graphs.as_graph_set(data)
    require(test.node_classes == target.node_classes, f"the graphs have {test.node_classes} kinds of nodes, the "
            f"distilled ones {target.node_classes}", DataError)
    classes = 1 + int(max(target.label.max(), test.label.max()))
    model = GNN("gcn", target.node_classes, classes, width=32, dropout=0.2)
    graphs.train(model, target, graphs.Config(steps=steps, batch=64), Run(quiet=True, device=str(device)))
    return graphs.scores(model, test, device)
