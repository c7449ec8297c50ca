"""`still cache`: outputs of a teacher kept on disk, to be used as often as wanted."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from stillhouse.errors import ConfigError, DataError, Interrupted, RoleError, require


def cache(
    teacher: Positional[str], data: str, out: str,
    role: Literal["classifier", "encoder", "text-classifier", "text-encoder", "speech-encoder", "causal-lm",
                  "denoiser"] | None = None,
    top_k: int = 32, temperature: float = 1.0, dtype: Literal["float32", "float16", "uint8"] = "float32",
    views: int = 1, flip: bool = False, layers: tuple[int, ...] = (), pairs: int = 8192, ode_steps: int = 32,
    batch: int = 32, device: str = "cpu", arch: str | None = None, size: int | None = None,
    conditional: bool = False, tokenizer: str | None = None, answers: bool = False, max_tokens: int = 256,
    seed: int = 0,
) -> None:
    """Send all data through a teacher once and keep what comes out; `--teacher cache:FOLDER` then stands for it.

    The same command goes on with a cache that was interrupted. A teacher behind an endpoint (api:…) is asked for its
    likeliest tokens, or with --answers for texts, which are written as prompt/response lines that --data reads.

    Args:
        teacher: a model as for `still run --teacher`, or api:BASE_URL:model=NAME,tokenizer=FOLDER
        data: as for `still run --data`; with --answers a .jsonl file with a `prompt` (or `text`) a line
        out: folder of the cache; with --answers the .jsonl file
        role: what the teacher is (by default a classifier; of api:… causal-lm)
        top_k: log-probabilities kept for each token of a causal-lm
        temperature: at which they are taken
        dtype: of what is kept; uint8 for log-probabilities alone
        views: fixed views of every picture, used with with_views(data, K)
        flip: views are mirrored too
        layers: hidden states of a speech-encoder, beside the last
        pairs: of noise and picture, for a denoiser
        ode_steps: Heun steps from noise to picture
        batch: samples at a time
        device: cpu, cuda, mps
        arch: module:callable that builds the network, for weights in a file
        size: side length of pictures
        conditional: labels of pictures become the conditions of a denoiser
        tokenizer: folder of a tokenizer; default: that of the teacher given as hf:
        answers: keep answers to prompts instead of log-probabilities
        max_tokens: longest answer
        seed: of a denoiser's noise
    """
    from stillhouse import protocols
    from stillhouse.hub.models import resolve_model
    from stillhouse.run.caches import KINDS, cache_outputs, cache_pairs
    from stillhouse.zoo import MODELS

    endpoint = teacher.startswith("api:")
    if answers:
        require(endpoint, "--answers asks an endpoint; give api:BASE_URL:model=NAME. Of a model at hand, "
                "recipes.language.answered_by writes them")
        _answers(teacher, data, out, max_tokens)
        return
    role = role or ("causal-lm" if endpoint else "classifier")
    require(not teacher.startswith("cache:"), f"'{teacher}' is a cache already", ConfigError)
    kinds: dict[str, Any] = {"classifier": protocols.Images, "encoder": protocols.Images,
                             "text-classifier": protocols.Texts, "text-encoder": protocols.Texts,
                             "speech-encoder": protocols.SpeechData, "causal-lm": protocols.TokenPairs,
                             "denoiser": protocols.Samples}
    kind = protocols.Denoiser if role == "denoiser" else KINDS[role]
    model = resolve_model(teacher, kind, arch=arch, zoo=MODELS, seed=seed)
    model.to(device)
    samples = _data(data, kinds[role], size, conditional, _tokenizer(teacher, tokenizer, model))
    rows = {"done": 0, "of": 0}

    def progress(done: int, of: int) -> None:
        rows.update(done=done, of=of)
        print(f"\r{done} of {of} kept", end="" if done < of else "\n", flush=True)

    common: dict[str, Any] = {"batch": batch, "device": device, "named": teacher, "progress": progress}
    try:
        if role == "denoiser":
            cache_pairs(model, samples, out, pairs, ode_steps=ode_steps, seed=seed, **common)
        else:
            cache_outputs(model, samples, out, role, top_k=top_k, temperature=temperature, dtype=dtype, layers=layers,
                          views=views, flip=flip, **common)
    except KeyboardInterrupt as stop:
        raise Interrupted(f"{rows['done']} of {rows['of']} rows are kept in {out}; the same command goes on") from stop
    _say(out, role, temperature)


def _say(out: str, role: str, temperature: float) -> None:
    from stillhouse.data.kept import read_manifest

    found = read_manifest(out)
    size = sum(int(b["bytes"]) for b in found["blocks"]) / 1e6
    warm = f":temperature={temperature:g}" if temperature != 1 else ""
    use = f"stillhouse.run.caches.Pairs({out!r})" if role == "denoiser" else f"--teacher cache:{out}{warm}"
    print(f"{found['done']} rows, {size:.1f} MB, largest error of rounding {found['error']:.2g}\nuse it as: {use}")


def _answers(teacher: str, data: str, out: str, max_tokens: int) -> None:
    import json

    from stillhouse.hub.endpoint import load_endpoint, write_answers

    require(Path(out).suffix == ".jsonl", f"--out of answers is a file ending with .jsonl, not {out}")
    path = Path(data).expanduser()
    require(path.suffix == ".jsonl" and path.is_file(), "--data of answers is a .jsonl file with a prompt a line; "
            f"there is no such file {data}", DataError)
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt = row["prompt"] if "prompt" in row else row["text"]
            require(isinstance(prompt, str) and bool(prompt.strip()), "the prompt is empty", DataError)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"line {number} of {data} has no prompt: {error}. Each line is an object like "
                            '{"prompt": "…"}') from error
        prompts.append(prompt)
    endpoint = load_endpoint(teacher.removeprefix("api:"))
    count = write_answers(endpoint, prompts, out, max_tokens)
    print(f"{count} of {len(prompts)} prompts were answered, with {endpoint.sent} requests; use them as: --data {out}")


def _data(text: str, kind: Any, size: int | None, conditional: bool, tokenizer: Any) -> Any:
    from stillhouse.data.readers import read_data

    return read_data(text, kind, size=size, conditional=conditional, tokenizer=tokenizer)


def _tokenizer(teacher: str, named: str | None, model: Any) -> Any:
    from stillhouse.cli.resolving import tokenizer_of

    own = getattr(model, "tokenizer", None)
    if named is None and own is not None:
        return own
    if named is None and not teacher.startswith("hf:"):
        return None
    try:
        return tokenizer_of({"teacher": teacher}, types.SimpleNamespace(tokenizer=named))
    except RoleError:
        if named is not None:
            raise
        return None
