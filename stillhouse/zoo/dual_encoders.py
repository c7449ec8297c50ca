"""Embedded dual encoders of pictures and texts: two small CLIPs that have seen captioned shapes. Extra `hf`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from stillhouse.data.shapes import coloured_names, coloured_shapes
from stillhouse.evaluate.base_novel import base_and_novel, of_classes
from stillhouse.evaluate.probes import few_per_class
from stillhouse.hub.dual_encoders import CLIPDualEncoder, adapt_dual
from stillhouse.measures.contrastive import clip_loss
from stillhouse.models.dual_encoders import clip, word_tokenizer
from stillhouse.parts.class_vectors import TEMPLATES, filled
from stillhouse.parts.prompts import Prompted
from stillhouse.recipes import prompt_tuning
from stillhouse.run import Run, set_lr
from stillhouse.run.schedules import warmup_cosine
from stillhouse.run.seeds import preserved
from stillhouse.zoo.cache import cached

HUE = 25.0
"""Degrees by which the colours of the embedded domain are turned."""

TEACHER = {"version": 2, "width": 128, "layers": 4, "features": 96, "text_width": 64, "text_layers": 2, "steps": 700,
           "pictures": 8000, "groups": 4, "lr": 1e-3, "backgrounds": ("plain", "gradient"), "seed": 0}
STUDENT = {"version": 2, "width": 48, "layers": 4, "features": 48, "text_width": 48, "text_layers": 2, "steps": 400,
           "pictures": 8000, "groups": 4, "lr": 2e-3, "backgrounds": ("plain",), "seed": 1}


def vocabulary() -> list[str]:
    """All that the embedded dual encoders can read: the templates and the class names."""
    return [*(t.format("") for t in TEMPLATES), *coloured_names()]


def shapes_clip(recipe: dict[str, Any]) -> CLIPDualEncoder:
    """A CLIP trained on captioned shapes of 32 pixels, on plain grounds and those of the recipe."""
    tokenizer = word_tokenizer(vocabulary())
    with preserved():
        torch.manual_seed(recipe["seed"])
        dual = adapt_dual(clip(tokenizer, recipe["features"], recipe["width"], recipe["layers"],
                               text_width=recipe["text_width"], text_layers=recipe["text_layers"]), tokenizer)
    dual.load_state_dict(cached("shapes-clip", recipe, lambda: dict(_trained(dual, recipe).state_dict())))
    return dual.eval()


def shapes_teacher() -> CLIPDualEncoder:
    """The larger one: width 128, 4 layers, 96 features; built on first use."""
    return shapes_clip(TEACHER)


def shapes_student() -> CLIPDualEncoder:
    """The smaller one: width 48, 4 layers, 48 features, trained for shorter; built on first use."""
    return shapes_clip(STUDENT)


def _trained(dual: CLIPDualEncoder, recipe: dict[str, Any]) -> CLIPDualEncoder:
    """Contrastive training on groups in which every caption occurs once, so that no negative is in truth a positive."""
    run = Run(seed=recipe["seed"]).begin()
    run.say(f"training a CLIP of width {recipe['width']} on shapes ({recipe['steps']} steps, kept for later runs) …")
    each = recipe["pictures"] // len(recipe["backgrounds"])
    pools = [coloured_shapes(each, 1000 + i, background=background, hue=0.0)
             for i, background in enumerate(recipe["backgrounds"])]
    image, label = torch.cat([p.image for p in pools]), torch.cat([p.label for p in pools])
    names = coloured_names()
    where = [(label == k).nonzero().flatten() for k in range(len(names))]
    optimizer = torch.optim.AdamW(dual.parameters(), lr=recipe["lr"], weight_decay=0.05, betas=(0.9, 0.98))
    dual.train()
    for k in run.loop("clip", steps=recipe["steps"], dual=dual, optimizer=optimizer):
        set_lr(optimizer, recipe["lr"] * warmup_cosine(run.progress, 0.1))
        draws = run.rand(recipe["groups"], len(names)).tolist()
        rows = torch.tensor([[w[int(u * len(w))] for w, u in zip(where, group, strict=True)] for group in draws])
        f = dual.encode_image(image[rows.flatten()]).unflatten(0, rows.shape)
        g = dual.encode_text(filled(TEMPLATES[k % len(TEMPLATES)], names))
        run.update(optimizer, clip=1.0, loss=torch.stack([clip_loss(part, g, dual.scale) for part in f]).mean())
    return dual.eval()


# -------------------------------------------------------------------- a domain of their own to be adapted to


@dataclass(frozen=True)
class Domain:
    """What there is of the new domain: `labelled`, a few pictures of each base class; `unlabelled`, pictures of all
    classes (their labels are there to pick classes by, not to learn from); `test`; the class names."""

    labelled: Any
    unlabelled: Any
    test: Any
    names: list[str]
    base: list[int]
    novel: list[int]


def shapes_domain(seed: int = 0, shots: int = 4, unlabelled: int = 1280, test: int = 800) -> Domain:
    """Coloured shapes on textured grounds, their colours turned, freshly drawn for every seed; the first eight classes
    are base."""
    names = coloured_names()
    base, novel = base_and_novel(len(names))
    pool = coloured_shapes(shots * 64, 3 * seed + 100_001, hue=HUE)
    pool = pool.select(of_classes(pool.label, base))
    few = pool.select(few_per_class(pool.label, shots, seed))
    return Domain(few, coloured_shapes(unlabelled, 3 * seed + 100_002, hue=HUE),
                  coloured_shapes(test, 3 * seed + 100_003, hue=HUE), names, base, novel)


def tuned_teacher(seed: int, config: prompt_tuning.Config) -> Prompted:
    """The embedded teacher with prompts learned on the labelled pictures of `shapes_domain(seed)`; built on first use.
    """
    teacher: Any = shapes_teacher()

    def build() -> dict[str, Any]:
        g = shapes_domain(seed)
        tuned = prompt_tuning.tune(teacher, g.labelled, g.names, config, Run(seed=seed, quiet=True))
        return {"visual": tuned.visual.tokens.detach(), "textual": tuned.textual.tokens.detach()}

    recipe = {"teacher": TEACHER, "seed": seed, "hue": HUE, "tuning": dataclasses.asdict(config), "version": 1}
    saved = cached("shapes-clip-tuned", recipe, build)
    with preserved():
        tuned = prompt_tuning.fresh(teacher, config)
    with torch.no_grad():
        tuned.visual.tokens.copy_(saved["visual"])
        tuned.textual.tokens.copy_(saved["textual"])
    return tuned.eval()
