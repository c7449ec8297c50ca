"""Targets as folders of `transformers` and of `datasets`."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

from stillhouse.deploy.formats.adapters import has_adapters, merged
from stillhouse.deploy.formats.views import Job, Made, compare, deviation, view_of
from stillhouse.errors import MissingExtraError, RoleError
from stillhouse.store import write_text

WHERE = "--to onnx, --to torch-export and --to safetensors take it"


def to_hf(job: Job) -> Made:
    """Write a folder for from_pretrained, or of a data set for load_from_disk, and compare what is read from it."""
    if job.row in ("DistilledSet", "GraphSet"):
        return _data_set(job)
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("--to hf needs transformers; install it with: pip install 'stillhouse[hf]'") from error
    model, notes = _model(job)
    if has_adapters(model):
        model = merged(model)
        notes += ("LoRA adapters are merged into the weights; --to peft writes them alone.",)
    inner: Any = model if job.row in ("CausalLM", "SpeechEncoder") else getattr(model, "model", model)
    if not isinstance(inner, transformers.PreTrainedModel):
        raise RoleError(f"{type(inner).__name__} is no model of transformers, so no config.json describes it; {WHERE}")
    features = bool(getattr(model, "features", False)) or job.row in ("SpeechEncoder",)
    kept: Any = inner.base_model if features or not getattr(model, "classes", 1) else inner
    names = [str(name) for name in job.about.classes]
    if names and kept is inner and getattr(model, "classes", 0) == len(names):
        kept.config.id2label = dict(enumerate(names))
        kept.config.label2id = {name: i for i, name in enumerate(names)}
    kept.save_pretrained(job.folder)
    if getattr(model, "mean", None) is not None:
        notes += (_image_processor(model, job),)
    if (job.place / "tokenizer").is_dir():
        tokenizer = transformers.AutoTokenizer.from_pretrained(job.place / "tokenizer", local_files_only=True)
        tokenizer.save_pretrained(job.folder)
    elif job.row in ("CausalLM", "TextClassifier", "TextEncoder"):
        notes += ("No tokenizer was saved with the run; put the one that the data was made with beside the weights.",)
    auto = _auto_class(job.row, kept)
    again = getattr(transformers, auto).from_pretrained(job.folder, local_files_only=True, use_safetensors=True,
                                                        dtype=torch.float32).eval()
    checks = compare(_view(job, _model(job)[0]), _view(job, _around(model, again, job.row)))
    code = f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained(".")'
    if getattr(model, "mean", None) is not None:
        code = code.replace(f"import {auto}", f"import AutoImageProcessor, {auto}") + (
            '\nprocessor = AutoImageProcessor.from_pretrained(".")')
    if (job.place / "tokenizer").is_dir():
        code = code.replace("import Auto", "import AutoTokenizer, Auto", 1) + (
            '\ntokenizer = AutoTokenizer.from_pretrained(".")')
    return Made(checks, 1e-5, code, notes)


def _model(job: Job) -> tuple[Any, tuple[str, ...]]:
    """The model whose weights are written, and what of the target is left out."""
    if job.row == "QuantizedModel":
        return job.target.model, ("Weights are written decoded, in float32: no configuration of transformers describes "
                                  "their code. The packed ones are in the safetensors export.",)
    if job.row == "Projected":
        return job.target.encoder, ("It is the encoder alone; the projection head is in the safetensors export.",)
    return job.target, ()


def _view(job: Job, model: Any) -> Any:
    row = {"QuantizedModel": job.about.kind or "Classifier", "Projected": "Encoder"}.get(job.row, job.row)
    return view_of(model, row, job.about)


def _around(model: Any, again: nn.Module, row: str) -> nn.Module:
    """What was read, in an adapter like that of `model`."""
    if row in ("CausalLM", "SpeechEncoder"):
        return again
    if type(model).__name__ == "ImageModel":
        return type(model)(again, model.mean.flatten().tolist(), model.std.flatten().tolist(), model.size,
                           model.features, model.pooled).eval()
    if type(model).__name__ == "TextModel":
        return type(model)(again, model.pooling, model.features).eval()
    return again


def _auto_class(row: str, kept: nn.Module) -> str:
    name = type(kept).__name__
    for part, auto in (("ForImageClassification", "AutoModelForImageClassification"),
                       ("ForSequenceClassification", "AutoModelForSequenceClassification")):
        if part in name:
            return auto
    return "AutoModelForCausalLM" if row == "CausalLM" else "AutoModel"


def _image_processor(model: Any, job: Job) -> str:
    settings: dict[str, Any] = {
        "image_processor_type": "ViTImageProcessor", "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": model.mean.flatten().tolist(), "image_std": model.std.flatten().tolist(),
        "do_resize": model.size is not None, "resample": 2}
    if model.size is not None:
        settings["size"] = {"height": int(model.size[0]), "width": int(model.size[1])}
    write_text(job.folder / "preprocessor_config.json", json.dumps(settings, indent=1))
    return ("preprocessor_config.json has the mean, standard deviation and size that the student used, for pictures of "
            "bytes. A picture that has to be resized is resized by the processor's own method, which rounds to bytes: "
            "there its output differs a little from the student's.")


# ---------------------------------------------------------------------------------- data sets


def _data_set(job: Job) -> Made:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("data sets of Hugging Face need datasets; install it with: pip install "
                                "'stillhouse[data]'") from error
    columns, features, notes = (_pictures if job.row == "DistilledSet" else _graphs)(job, datasets)
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).save_to_disk(str(job.folder / "data"))
    again = datasets.load_from_disk(str(job.folder / "data"))
    checks = {}
    for name, wanted in columns.items():
        if name != "picture":
            pairs = list(zip(again.with_format(None)[name], wanted, strict=True))
            checks[name] = max(deviation(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs)
    code = 'from datasets import load_from_disk\n\ndata = load_from_disk("data")'
    return Made(checks, 0.0, code, notes)


def _pictures(job: Job, datasets: Any) -> tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]:
    held = job.target
    shape = tuple(held.images.shape[1:])
    hard = held.labels.argmax(1) if held.labels.dim() == 2 else held.labels
    names = [str(name) for name in job.about.classes] or [str(i) for i in range(held.classes)]
    columns: dict[str, Any] = {"image": held.images.float().tolist(), "label": hard.tolist(),
                               "picture": [_png(p) for p in _scaled(held.pictures())]}
    features: dict[str, Any] = {"image": datasets.Array3D(shape, "float32"), "label": datasets.ClassLabel(names=names),
                                "picture": datasets.Image()}
    notes = ["`image` [channels, height, width] is what networks are trained on, exactly; `picture` is the same to "
             "look at, on a common scale."]
    if held.labels.dim() == 2:
        columns["soft_label"] = held.labels.float().tolist()
        features["soft_label"] = datasets.Sequence(datasets.Value("float32"), length=held.labels.shape[1])
        notes.append("`soft_label` holds the probabilities of the classes, `label` the likeliest.")
    if held.whitening is not None:
        notes.append("Pictures are whitened: real ones must go through the transform in the safetensors export first.")
    if held.lr is not None:
        notes.append(f"They were made for training with SGD at a learning rate of {held.lr:.6g}.")
    if held.tile is not None:
        notes.append(f"They are textures: training pictures are windows of {held.tile[0]} x {held.tile[1]} that wrap.")
    return columns, features, tuple(notes)


def _scaled(pictures: Any) -> Any:
    colour = pictures if pictures.shape[1] == 3 else pictures.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    low, high = colour.amin(), colour.amax()
    return (255 * (colour - low) / (high - low).clamp_min(1e-8)).round().to(torch.uint8).permute(0, 2, 3, 1)


def _png(picture: Any) -> Any:
    from PIL import Image

    return Image.fromarray(picture.numpy())


def _graphs(job: Job, datasets: Any) -> tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]:
    held: Any = job.target.data
    integers = datasets.Sequence(datasets.Value("int64"))
    names = [str(name) for name in job.about.classes] or [str(i) for i in range(job.target.classes)]
    columns = {"node_label": [v.tolist() for v in held["node_label"]],
               "edge_index": [v.tolist() for v in held["edge_index"]],
               "edge_label": [v.tolist() for v in held["edge_label"]], "y": [int(v) for v in held["label"]]}
    features = {"node_label": integers, "edge_index": datasets.Sequence(integers), "edge_label": integers,
                "y": datasets.ClassLabel(names=names)}
    return columns, features, ("One row a graph: node_label [nodes], edge_index [2, edges], edge_label [edges], y.",)
