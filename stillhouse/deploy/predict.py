"""What a result says about data, or draws: written to one file of a common format."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from stillhouse import protocols
from stillhouse.data.distilled import DistilledSet
from stillhouse.data.graphs import GraphSet
from stillhouse.data.readers import read_data, takes_columns
from stillhouse.data.sets import TensorSet, column, fetch
from stillhouse.data.text import pack_ids, response_ids
from stillhouse.deploy.targets import About, made_by, networks_of
from stillhouse.diffusion.samplers import FewStepSampler, SamplerLadder
from stillhouse.errors import ConfigError, DataError, StillError, StoreError, require
from stillhouse.hub.dual_encoders import VectorClassifier
from stillhouse.models.cameras import Cameras
from stillhouse.models.language import check_room, respond, special_tokens
from stillhouse.models.scenes import SceneSet
from stillhouse.parts.heads import Projected
from stillhouse.parts.packed import QuantizedModel
from stillhouse.run import frozen
from stillhouse.run.pictures import grid, scatter
from stillhouse.run.reading import to_device
from stillhouse.run.seeds import derive, preserved, reseed
from stillhouse.store import write_text

TOP = 3
FILES = {"classes": "predictions.csv", "clusters": "clusters.csv", "features": "features.safetensors",
         "speech": "features.safetensors", "text": "answers.jsonl", "samples": "samples.safetensors",
         "density": "samples.safetensors", "scenes": "pictures.safetensors"}
"""The sorts of targets, and the file that their predictions are written to where none is named."""


def sort_of(target: Any, about: About) -> str:
    """What a target is good for: one of `FILES`, or "data" for a distilled set. Raises ConfigError for none of them."""
    for kinds, sort in (((DistilledSet, GraphSet), "data"), (SceneSet, "scenes"), (VectorClassifier, "classes"),
                        ((FewStepSampler, SamplerLadder), "samples"), (Projected, "features")):
        if isinstance(target, kinds):
            return sort
    if hasattr(target, "log_prob") and hasattr(target, "sample"):
        return "density"
    if hasattr(target, "predict") and not isinstance(target, nn.Module):
        return "clusters"
    sorts = {"Classifier": "classes", "TextClassifier": "classes", "Encoder": "features", "TextEncoder": "features",
             "CausalLM": "text", "SpeechEncoder": "speech"}
    require(about.kind in sorts, f"a {type(target).__name__} that was trained as {about.kind or 'nothing known'} "
            "cannot be used from here; in Python: stillhouse.load(folder)")
    return sorts[about.kind]


def data_kind(about: About, labelled: bool = False) -> Any:
    """The data protocol that a target's predictions, or its scores (`labelled`), are made on; None for none."""
    pictures = protocols.LabelledImages if labelled else protocols.Images
    texts = protocols.LabelledTexts if labelled else protocols.Texts
    made = made_by(about)
    whole = {DistilledSet: pictures, GraphSet: protocols.Graphs, SceneSet: None, FewStepSampler: protocols.Samples,
             SamplerLadder: protocols.Samples}
    if made in whole:
        return whole[made]
    if made is not nn.Module and made is not QuantizedModel:
        return pictures
    return {"Classifier": pictures, "Encoder": pictures, "TextClassifier": texts, "TextEncoder": texts,
            "CausalLM": protocols.TokenPairs if labelled else None, "SpeechEncoder": protocols.SpeechData,
            "Density": protocols.Samples}.get(about.kind)


def read_for(text: str, about: About, labelled: bool = False, *, size: int | None = None, tokenizer: Any = None,
             **options: Any) -> Any:
    """The data that `text` names, as a target takes it: pictures of a folder or table are brought to the size and
    channels of those trained on, sounds to their length. `options` go to `stillhouse.data.readers.read_data`.

    Raises DataError for what cannot be read or lacks labels, ConfigError where there is nothing to score.
    """
    kind = data_kind(about, labelled)
    require(kind is not None or not labelled, f"a result of {about.system} has no score on data")
    path = Path(text).expanduser()
    if about.kind == "CausalLM" and not labelled and path.is_file() and path.suffix in (".txt", ".jsonl"):
        return read_prompts(path)
    shape = about.example.get("image") or about.example.get("x") or []
    decoded = path.is_dir() or (takes_columns(text) and path.suffix not in (".npz", ".safetensors"))
    if decoded and len(shape) == 3:
        size = size or (shape[1] if shape[1] == shape[2] else None)
        options |= {"channels": shape[0]} if shape[0] in (1, 3) else {}
    if kind is protocols.SpeechData and path.is_dir():
        size = size or next(iter(about.example.get("audio", [])), None)
    if kind is protocols.Samples:
        options["conditional"] = "condition" in about.example
    if tokenizer is not None:
        options["tokenizer"] = tokenizer
    return read_data(text, kind, size=size, **options)


def read_prompts(path: Path) -> TensorSet:
    """`prompt` from a .txt file, one a line, or a .jsonl file of objects with `prompt` or `text`.

    Raises DataError, with the line's number, for a line without.
    """
    prompts: list[str] = []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix == ".jsonl":
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"line {number} of {path} is no JSON: {error}") from error
            said = row.get("prompt", row.get("text")) if isinstance(row, dict) else None
            line = said if isinstance(said, str) else ""
        require(bool(line.strip()), f"line {number} of {path} has no prompt; a line is an object like "
                '{"prompt": "…"}', DataError)
        prompts.append(line)
    require(bool(prompts), f"{path} has no lines", DataError)
    return TensorSet(prompt=prompts)


def read_conditions(text: str) -> Tensor:
    """Class labels as `0,1,2`, or the conditions of the data that `text` names."""
    words = text.split(",")
    if all(word.strip().isdigit() for word in words):
        return torch.tensor([int(word) for word in words])
    return column(read_data(text, protocols.Conditions), "condition")


def predict(target: Any, about: About, data: Any = None, out: Path | str | None = None, *, batch: int = 64,
            device: torch.device | str = "cpu", samples: int = 16, seed: int = 0, conditions: Any = None,
            temperature: float = 0.0, tokens: int | None = None, tokenizer: Any = None, size: int = 64,
            quiet: bool = False) -> Path:
    """Write what `target` says about `data` to `out`; the file is there whole, or not at all. Returns its path.

    - Classifiers (.csv): the most probable classes and their probabilities, clusterings likewise. A line has `index`,
      `item` (the picture's file, or the row) and for the first three label, name and probability.
    - Encoders and speech encoders (.safetensors): `features` [n, width], of sound the mean of the last hidden states.
    - Language models (.jsonl): `prompt` and `response`, greedy or drawn at `temperature`, of at most `tokens` tokens.
      `data` are texts (field `prompt` or `text`) for a `tokenizer`, or a TokenPairs set.
    - Samplers and densities (.safetensors, and a .png beside it): `samples`, as many as asked for, from `seed`, for
      `conditions` (a tensor [k] or [k, …], repeated in turn). A density gets `log_prob` in nats (.csv) of `data`.
    - Scenes: `pictures` [n, channels, size, size], from eight sides each, and a .png.

    Raises ConfigError for a distilled set, which is data itself, and DataError for data that does not fit.
    """
    sort = sort_of(target, about)
    if sort == "data":
        raise ConfigError(f"this result is a set of data ({len(target)} samples), not a model: train on it. Give its "
                          "folder as data, e.g. still run SLUG --labelled FOLDER, or read it in Python: "
                          "stillhouse.load(FOLDER)")
    require(batch >= 1 and samples >= 1 and size >= 1, "batch, samples and size must be at least 1; got "
            f"{batch}, {samples} and {size}")
    require(temperature >= 0, f"temperature must be 0 (greedy) or more, not {temperature}")
    path = Path(out) if out is not None else Path(FILES[sort])
    for network in networks_of(target):
        network.to(device)
    if sort in ("samples", "scenes") or (sort == "density" and data is None):
        with preserved(), torch.no_grad(), frozen(*networks_of(target)):
            reseed(derive("predict", seed))
            drawn = scene_pictures(target, size) if sort == "scenes" else draw(
                target, about, samples, seed, conditions, batch, device, quiet)
        _tensors(path, {"pictures" if sort == "scenes" else "samples": drawn})
        _picture(path.with_suffix(".png"), drawn)
        return path
    require(data is not None and len(data) > 0, "there is nothing to predict on: give data", DataError)
    if sort == "text":
        return _answers(target, about, data, path, batch, temperature, tokens, tokenizer, seed, device, quiet)
    said = outputs(target, about, data, batch, device, quiet)
    if sort in ("features", "speech"):
        return _tensors(path, {"features": torch.cat(list(said))})
    if sort == "density":
        rows = (value for part in said for value in part.tolist())
        return _table(path, ["index", "item", "log_prob"], ([i, _item(data, i), f"{v:.6g}"]
                                                            for i, v in enumerate(rows)))
    return _ranking(target, about, data, said, path, sort)


def outputs(target: Any, about: About, data: Any, batch: int = 64, device: torch.device | str = "cpu",
            quiet: bool = True) -> Iterator[Tensor]:
    """What a target gives for each batch of `data`, on the CPU: logits, probabilities of clusters, features or
    log-densities. Eval mode, no gradient; the target is left as it was. Raises DataError for data that does not fit."""
    give = _giver(target, about)
    with frozen(*networks_of(target)), torch.no_grad():
        for start in tqdm(range(0, len(data), batch), desc="predict", leave=False, disable=quiet or None):
            part = to_device(fetch(data, range(start, min(start + batch, len(data)))), torch.device(device))
            try:
                said = give(part).float().cpu()
            except StillError:
                raise
            except Exception as error:
                shapes = {n: list(v.shape[1:]) for n, v in part.items() if isinstance(v, Tensor) and n != "index"}
                raise DataError(f"the {type(target).__name__} could not process data of {shapes or list(part)}; it was "
                                f"trained on {about.example}. Of pictures give the size (--size) and the channels of "
                                f"those. ({type(error).__name__}: {error})") from error
            require(bool(torch.isfinite(said).all()), f"the {type(target).__name__} gives values that are not finite",
                    DataError)
            yield said


def _giver(target: Any, about: About) -> Callable[[dict[str, Any]], Tensor]:
    sort = sort_of(target, about)
    if sort == "density":
        return lambda part: target.log_prob(part["x"])
    if sort == "clusters":
        give = target.probabilities if hasattr(target, "probabilities") else target.posterior
        return lambda part: give(part["image"])
    if sort == "speech":
        return lambda part: target(part["audio"]).last_hidden_state.mean(1)
    if about.kind.startswith("Text"):
        return lambda part: target(part["input_ids"], part.get("attention_mask"))
    give = target.encode if isinstance(target, Projected) else target
    return lambda part: give(part["image"]).flatten(1)


def class_names(target: Any, about: About, count: int) -> list[str]:
    """The names of `count` classes: those that the target knows, those of the data it was made from, or numbers."""
    inner = target.model if isinstance(target, QuantizedModel) else target
    if isinstance(inner, VectorClassifier):
        return [str(name) for name in inner.names]
    config = getattr(getattr(inner, "model", inner), "config", None)
    labels = getattr(config, "id2label", None) or {}
    own = [str(labels.get(i, labels.get(str(i), ""))) for i in range(count)]
    if all(own) and not all(name == f"LABEL_{i}" for i, name in enumerate(own)):
        return own
    return list(about.classes) if len(about.classes) == count else [str(i) for i in range(count)]


def _ranking(target: Any, about: About, data: Any, said: Iterator[Tensor], path: Path, sort: str) -> Path:
    word = "label" if sort == "classes" else "cluster"
    names: list[str] = []
    lines: list[list[Any]] = []
    top, index = TOP, 0
    for part in said:
        probability = part.softmax(-1) if sort == "classes" else part
        top = min(TOP, probability.shape[-1])
        names = names or (class_names(target, about, probability.shape[-1]) if sort == "classes" else
                          [str(i) for i in range(probability.shape[-1])])
        values, labels = probability.topk(top)
        for row, which in zip(values.tolist(), labels.tolist(), strict=True):
            lines.append([index, _item(data, index), *(v for p, label in zip(row, which, strict=True)
                                                       for v in (label, names[label], f"{p:.6g}"))])
            index += 1
    heads = [f"{name}{'' if i == 1 else f'_{i}'}" for i in range(1, top + 1) for name in (word, "name", "probability")]
    return _table(path, ["index", "item", *heads], lines)


def _item(data: Any, index: int) -> Any:
    return str(data.paths[index]) if hasattr(data, "paths") else index


# ---------------------------------------------------------------------------------- samples and scenes


def draw(target: Any, about: About, n: int, seed: int = 0, conditions: Any = None, batch: int = 64,
         device: torch.device | str = "cpu", quiet: bool = True) -> Tensor:
    """`n` samples of a sampler or a density, on the CPU; the global generators must have been seeded.

    Raises ConfigError where the shape of a sample is not known, or conditions are missing or do not fit.
    """
    if hasattr(target, "log_prob"):
        return target.sample(n).float().cpu()
    shape = about.example.get("x") or about.example.get("image") or about.config.get("shape")
    require(bool(shape), "it is not known what one sample looks like: the run had no data. Draw in Python: "
            "stillhouse.load(FOLDER)(torch.randn(n, …))")
    generator = torch.Generator().manual_seed(derive("samples", seed))
    z = torch.randn(n, *[int(s) for s in shape or ()], generator=generator)
    given: Tensor | None = None
    if conditions is not None:
        kinds = torch.as_tensor(conditions)
        require(kinds.dim() >= 1 and len(kinds) > 0, "conditions must be at least one", DataError)
        given = kinds[torch.arange(n) % len(kinds)]
    parts = []
    for start in tqdm(range(0, n, batch), desc="draw", leave=False, disable=quiet or None):
        condition = None if given is None else given[start : start + batch].to(device)
        try:
            parts.append(target(z[start : start + batch].to(device), condition).float().cpu())
        except StillError:
            raise
        except Exception as error:
            what = "no conditions" if given is None else f"conditions of shape {list(given.shape[1:])}"
            raise ConfigError(f"the sampler could not draw samples of {list(z.shape[1:])} with {what}: "
                              f"{type(error).__name__}: {error}. A conditional one needs --conditions") from error
    return torch.cat(parts)


def scene_pictures(scenes: SceneSet, size: int = 64, views: int = 8) -> Tensor:
    """Flat scenes as they are; others rendered from `views` sides, [scenes x views, 3, size, size]."""
    which = torch.arange(len(scenes), device=next(scenes.parameters()).device)
    if scenes.flat:
        return scenes.render(which).float().cpu()
    turn = torch.arange(views, device=which.device) * (2 * math.pi / views)
    full = torch.ones(views, device=which.device)
    around = Cameras(math.radians(15) * full, turn, 1.25 * scenes.scenes[0].field.radius * full,
                     math.radians(55) * full)
    return torch.cat([scenes.render(i.expand(views), around, size) for i in which]).float().cpu()


def _picture(path: Path, drawn: Tensor) -> None:
    """A PNG of samples that are pictures or points in the plane; nothing for others (latents)."""
    import matplotlib.image

    buffer = io.BytesIO()
    if drawn.dim() == 4 and drawn.shape[1] in (1, 3):
        pixels = grid(drawn)
        scale = max(1, 320 // max(pixels.shape[:2]))
        large = pixels.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
        matplotlib.image.imsave(buffer, large.numpy(), vmin=0, vmax=1, format="png")
    elif drawn.dim() == 2 and drawn.shape[1] == 2:
        scatter(samples=drawn).savefig(buffer, dpi=120, bbox_inches="tight", format="png")
    else:
        return
    _bytes(path, buffer.getvalue())


# ---------------------------------------------------------------------------------- text


def packed(data: Any, tokenizer: Any) -> Any:
    """A TokenPairs set of the prompts (field `prompt` or `text`) of `data`; one that is packed already as it is.

    Raises ConfigError without the tokenizer that texts need, DataError for a prompt without tokens.
    """
    fields = getattr(data, "fields", ())
    if "input_ids" in fields:
        return data
    name = next((n for n in ("prompt", "text") if n in fields), "")
    require(bool(name), f"a language model answers texts; the data has {', '.join(fields) or 'no fields'}, not "
            "'prompt'", DataError)
    require(tokenizer is not None, "this result was saved without a tokenizer, which texts need; give --tokenizer "
            "FOLDER, that of the model it was made from")
    eos, rows = tokenizer.eos_token_id, []
    for i, text in enumerate(getattr(data, name)):
        ids = [int(t) for t in tokenizer(text)["input_ids"]]
        ids = ids[:-1] if ids and ids[-1] == eos else ids
        require(bool(ids), f"prompt {i} has no tokens", DataError)
        rows.append((ids, [eos if eos is not None else 0]))
    pad = tokenizer.pad_token_id
    return pack_ids(rows, pad if pad is not None else eos or 0)


def _answers(model: Any, about: About, data: Any, path: Path, batch: int, temperature: float, tokens: int | None,
             tokenizer: Any, seed: int, device: torch.device | str, quiet: bool) -> Path:
    eos, pad = special_tokens(model, "the result")
    most = tokens if tokens is not None else int(about.config.get("max_new_tokens", 128))
    require(most >= 1, f"tokens must be at least 1, not {most}")
    pairs = packed(data, tokenizer)
    check_room("the result", model, pairs, most)

    def words(ids: Sequence[int]) -> Any:
        return list(ids) if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=True).strip()

    texts = getattr(data, "prompt", None) if "prompt" in data.fields else getattr(data, "text", None) if (
        "text" in data.fields) else None
    lines: list[str] = []
    with preserved():
        reseed(derive("predict", seed))
        for start in tqdm(range(0, len(pairs), batch), desc="predict", leave=False, disable=quiet or None):
            part = to_device(fetch(pairs, range(start, min(start + batch, len(pairs)))), torch.device(device))
            given = respond(model, part, most, eos=eos, pad=pad, sample=temperature > 0,
                            temperature=temperature or 1.0)
            before = {**part, "target_mask": part["attention_mask"] - part["target_mask"]}
            for prompt, answer in zip(response_ids(before), response_ids(given, eos), strict=True):
                said = {"prompt": words(prompt) if texts is None else texts[len(lines)], "response": words(answer)}
                lines.append(json.dumps(said, ensure_ascii=False))
    return write_text(path, "\n".join(lines) + "\n")


# ---------------------------------------------------------------------------------- files


def _table(path: Path, head: list[str], rows: Any) -> Path:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return write_text(path, text.getvalue())


def _tensors(path: Path, tensors: dict[str, Tensor]) -> Path:
    from safetensors.torch import save

    return _bytes(path, save({name: value.contiguous() for name, value in tensors.items()}))


def _bytes(path: Path, content: bytes) -> Path:
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(content)
        aside.replace(path)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error}") from error
    finally:
        aside.unlink(missing_ok=True)
    return path
