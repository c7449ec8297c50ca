"""What a step costs within Stillhouse against a bare PyTorch loop of the same mathematics.

Both loops go on in one process, a step of the one after a step of the other, on the same batches from equal weights; so
both end with the same weights, which a test checks. A bare loop is what one would write in a script: it indexes its
tensors, computes, steps; it saves nothing, logs nothing and checks nothing.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.data.grammar import LENGTH, VOCABULARY, grammar
from stillhouse.data.sets import TensorSet
from stillhouse.diffusion.denoise import NetworkDenoiser
from stillhouse.diffusion.process import VE
from stillhouse.models import language
from stillhouse.models.convnets import ConvEncoder, ConvNet
from stillhouse.models.denoisers import MLPDenoiser
from stillhouse.parts.heads import Projected
from stillhouse.recipes import kd, simclr
from stillhouse.run import Run
from stillhouse.run.reading import Order
from stillhouse.run.schedules import cosine, warmup_cosine
from stillhouse.systems.compression import bd_kd, meal_v2
from stillhouse.systems.diffusion import dmd2
from stillhouse.systems.language import distillm

STEPS = 200
WARM = 10


class Pair(NamedTuple):
    """A system's `distill` as a function of a run, the bare step as one of its number and the indices of its batch,
    what both train, and how the run names the stage and cuts its batches."""

    distill: Callable[[Run], Any]
    bare: Callable[[int, list[int]], None]
    trained: tuple[nn.Module, nn.Module]
    stage: str
    order: tuple[int, int]
    note: str


class Alternating(Run):
    """A run that makes a step of a bare loop after each step of its own, and times both in milliseconds."""

    def __init__(self, pair: Pair):
        super().__init__(quiet=True)
        self.pair, self.ours, self.bare = pair, [], []
        self.draws: list[Tensor] = []
        self._order = Order(*pair.order, self.seed, pair.stage, drop_last=True)
        self._began: float | None = None

    def _after_step(self, stage: Any, count: int, elapsed: float) -> None:
        super()._after_step(stage, count, elapsed)
        now = time.perf_counter()
        if self._began is not None:
            self.ours.append(1e3 * (now - self._began))
        chosen, _ = self._order.samples(stage.k)
        start = time.perf_counter()
        self.pair.bare(stage.k, chosen)
        if self._began is not None:
            self.bare.append(1e3 * (time.perf_counter() - start))
        self.draws.clear()
        self._began = time.perf_counter()


def distillation(steps: int, small: bool = False) -> Pair:
    """`recipes.kd`: a ConvNet of width 32 taught by one of width 64, 64 pictures of 32x32 a step."""
    torch.manual_seed(0)
    n, batch, width = (16, 8, 4) if small else (1024, 64, 32)
    x, y = torch.randn(n, 3, 32, 32), torch.arange(n) % 10
    teacher, student = ConvNet(3, 10, 2 * width), ConvNet(3, 10, width)
    ours, teacher = copy.deepcopy(student), teacher.eval().requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    config = kd.Config(steps=steps, batch=batch)

    def bare(k: int, chosen: list[int]) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * warmup_cosine(k / steps, config.warmup)
        image, label = x[chosen], y[chosen]
        with torch.no_grad():
            target = teacher(image)
        logits = student(image)
        loss = 0.1 * F.cross_entropy(logits, label) + 0.9 * 16 * F.kl_div(
            F.log_softmax(logits / 4, 1), F.log_softmax(target / 4, 1), reduction="batchmean", log_target=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    data = TensorSet(image=x, label=y)
    return Pair(lambda run: kd.distill(teacher, ours, data, config, run), bare, (ours, student), "kd", (n, batch),
                "recipes.kd, ConvNets of width 64 and 32, 64 pictures of 32x32 a step")


def contrast(steps: int, small: bool = False) -> Pair:
    """`recipes.simclr`: two views of 64 pictures of 32x32 a step, a ConvNet of width 32."""
    torch.manual_seed(0)
    n, batch, width = (16, 8, 4) if small else (1024, 64, 32)
    x = torch.randn(n, 3, 32, 32)
    student = Projected(ConvEncoder(3, 32, width, 3, 32), nn.Linear(32, 32)).train()
    ours = copy.deepcopy(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    config = simclr.Config(steps=steps, batch=batch)
    turn = iter(range(2 * steps))

    def view(image: Tensor, odd: bool | None = None) -> Tensor:
        """The pictures as they are, then mirrored, in turn."""
        return image.flip(-1) if (next(turn) % 2 if odd is None else odd) else image.clone()

    def bare(k: int, chosen: list[int]) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * warmup_cosine(k / steps, config.warmup)
        image = x[chosen]
        z = F.normalize(torch.cat([student(view(image, False)), student(view(image, True))]), dim=-1)
        logits = (z @ z.T / 0.1).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
        loss = F.cross_entropy(logits, torch.arange(len(z)).roll(len(image)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    data = TensorSet(image=x)
    return Pair(lambda run: simclr.train(ours, data, view, config, run), bare, (ours, student), "simclr", (n, batch),
                "recipes.simclr, a ConvNet of width 32, two views of 64 pictures of 32x32 a step")


def toy_language(steps: int, small: bool = False) -> Pair:
    """`distillm` off-line on the toy grammar's 36 words, 32 sequences a step."""
    n, batch, width = (16, 8, 16) if small else (512, 32, 96)
    return _language(steps, grammar("train", n), grammar("validation", 4), len(VOCABULARY), LENGTH, batch, width)


def words_language(steps: int, small: bool = False) -> Pair:
    """`distillm` off-line on random text of 4,000 words, 8 sequences of 48 tokens a step."""
    torch.manual_seed(0)
    n, batch, width, words = (16, 8, 16, 50) if small else (256, 8, 96, 4000)

    def pairs(count: int) -> TensorSet:
        ids = torch.randint(4, words, (count, 48))
        mask = torch.ones_like(ids)
        return TensorSet(input_ids=ids, attention_mask=mask, target_mask=mask * (torch.arange(48) >= 16))

    return _language(steps, pairs(n), pairs(4), words, 64, batch, width)


def _language(steps: int, data: Any, few: Any, words: int, length: int, batch: int, width: int) -> Pair:
    """Skew KL between Llamas of `width` and half of it, without generation."""
    torch.manual_seed(0)
    teacher, student = (language.llama(words, w, depth, 2, length).train()
                        for w, depth in ((width, 4), (width // 2, 2)))
    ours = copy.deepcopy(student)
    teacher.eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3, weight_decay=0.01)
    config = distillm.Config(steps=steps, batch=batch, phi=0.0, phi_step=0.0, fine_tuning=0.0, select="last", lr=1e-3,
                             max_new_tokens=4, validate_every=10 * steps)
    whole = {name: data.data[name] for name in ("input_ids", "attention_mask", "target_mask")}

    def bare(k: int, chosen: list[int]) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * cosine(k / steps)
        ids, mask, target = (part[chosen] for part in whole.values())
        with torch.no_grad():
            known = teacher(input_ids=ids, attention_mask=mask).logits
        logits = student(input_ids=ids, attention_mask=mask).logits
        where = target[:, 1:].bool()
        log_p, log_q = (z[:, :-1][where].log_softmax(-1) for z in (known, logits))
        p = log_p.exp()
        loss = (p * (log_p - (0.1 * p + 0.9 * log_q.exp()).log())).sum() / where.sum()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Pair(lambda run: distillm.distill(teacher, ours, data, few, config=config, run=run), bare, (ours, student),
                "distil", (len(data), batch), f"systems.language.distillm off-line, Llamas of width {width} and "
                f"{width // 2} over {words} words, {batch} sequences a step")


def generators(steps: int, small: bool = False) -> Pair:
    """`dmd2`: one generator and one fake-score update a step, MLPs of width 512 and depth 4, 512 points."""
    torch.manual_seed(0)
    batch, width = (8, 16) if small else (512, 512)
    process = VE(0.05, 5.0, rho=0)
    x = torch.randn(4 * batch, 2)
    teacher, student = (NetworkDenoiser(MLPDenoiser((2,), width, 4), process, "edm").eval() for _ in range(2))
    ours, fake = copy.deepcopy(student), copy.deepcopy(teacher)
    student.load_state_dict(fake.state_dict())
    teacher.requires_grad_(False)
    made, scored = (torch.optim.AdamW(m.parameters(), lr=1e-3, weight_decay=0.0) for m in (student, fake))
    config = dmd2.Config(steps=steps, ratio=1, batch=batch, gan=0.0, lr=1e-3, fake_lr=1e-3, decay=0.0)
    runs: list[Run] = []

    def drawn(make: Callable[[], Tensor]) -> Tensor:
        """A draw of the library's own step where they were kept, so that both arms see the same noise."""
        made_now = make()
        return runs[0].draws.pop(0) if runs and getattr(runs[0], "draws", None) else made_now

    def noised(x0: Tensor, low: int, high: int) -> tuple[Tensor, Tensor, Tensor]:
        t = drawn(lambda: torch.randint(low, high + 1, (batch,))) / 999
        sigma = (0.05 * 100.0**t)[:, None]
        return x0 + sigma * drawn(lambda: torch.randn(batch, 2)), t, sigma

    def bare(k: int, chosen: list[int]) -> None:
        noise = drawn(lambda: torch.randn(batch, 2))
        one = torch.ones(batch)
        out = student(5.0 * noise, one)
        with torch.no_grad():
            x_s, s, _ = noised(out, 20, 980)
            real, false = teacher(x_s, s), fake(x_s, s)
            direction = (false - real) / (out - real).abs().mean(1, keepdim=True)
        (0.5 * (out - (out - direction).detach()).square().mean(1)).mean().backward()
        nn.utils.clip_grad_norm_(student.parameters(), 10.0)
        made.step()
        made.zero_grad(set_to_none=True)
        out = out.detach()
        x_s, s, sigma = noised(out, 0, 999)
        weight = 1 / sigma[:, 0].square() + 1
        (weight * (fake(x_s, s) - out).square().mean(1)).mean().backward()
        nn.utils.clip_grad_norm_(fake.parameters(), 10.0)
        scored.step()
        scored.zero_grad(set_to_none=True)

    def distill(run: Run) -> Any:
        runs[:] = [run]
        return dmd2.distill(teacher, ours, TensorSet(x=x), config=config, run=run)

    return Pair(distill, bare, (ours, student), "distil", (len(x), batch),
                "systems.diffusion.dmd2, MLPs of width 512, an update of generator and fake score on 512 points a step")


def ensemble(steps: int, small: bool = False) -> Pair:
    """`meal-v2` without its game: the mean probabilities of two ConvNets of width 64 for one of width 32."""
    torch.manual_seed(0)
    n, batch, width = (16, 8, 4) if small else (1024, 64, 32)
    x = torch.randn(n, 3, 32, 32)
    teachers = [ConvNet(3, 10, 2 * width).eval().requires_grad_(False) for _ in range(2)]
    student = ConvNet(3, 10, width)
    ours = copy.deepcopy(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
    config = meal_v2.Config(steps=steps, batch=batch, adversarial=0.0, crop=1.0, flip=False, drop=1.0)

    def bare(k: int, chosen: list[int]) -> None:
        image = x[chosen]
        with torch.inference_mode():
            target = torch.stack([teacher(image).softmax(1) for teacher in teachers]).mean(0)
        loss = -(target.clone() * student(image).log_softmax(1)).sum(1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Pair(lambda run: meal_v2.distill(teachers, ours, TensorSet(image=x), config=config, run=run), bare,
                (ours, student), "distil", (n, batch),
                "systems.compression.meal_v2 without the game, two ConvNets of width 64 and one of 32, 64 pictures of "
                "32x32 a step")


def together(steps: int, small: bool = False) -> Pair:
    """`bd-kd`: ConvNets of width 32 and 64 that learn from each other, 64 pictures of 32x32 a step."""
    torch.manual_seed(0)
    n, batch, width = (16, 8, 4) if small else (1024, 64, 32)
    x, y = torch.randn(n, 3, 32, 32), torch.arange(n) % 10
    student, large = ConvNet(3, 10, width), ConvNet(3, 10, 2 * width)
    ours, ours_large = copy.deepcopy(student), copy.deepcopy(large)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4) for m in (student, large)]
    config = bd_kd.Config(steps=steps, batch=batch, lr=0.1, temperature=4.0)

    def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_p.exp() * (log_p - log_q)).sum(1)

    def bare(k: int, chosen: list[int]) -> None:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * warmup_cosine(k / steps, config.warmup)
        image, label = x[chosen], y[chosen]
        z_s, z_t = student(image), large(image)
        log_s, log_t = (z.div(4).log_softmax(1) for z in (z_s, z_t))
        fixed_s, fixed_t = log_s.detach(), log_t.detach()
        flatter = -(fixed_t.exp() * fixed_t).sum(1) > -(fixed_s.exp() * fixed_s).sum(1)
        w, v = torch.where(flatter, 2.0, 1.0), torch.where(flatter, 1.0, 2.0)
        balanced = 16 * (w * kl(fixed_t, log_s) + v * kl(log_s, fixed_t)).mean()
        loss = F.cross_entropy(z_s, label) + balanced + F.cross_entropy(z_t, label) + 16 * kl(fixed_s, log_t).mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    data = TensorSet(image=x, label=y)
    return Pair(lambda run: bd_kd.distill(ours, lambda: ours_large, data, config, run), bare, (ours, student), "bd-kd",
                (n, batch), "systems.compression.bd_kd, ConvNets of width 32 and 64, 64 pictures of 32x32 a step")


PAIRS: dict[str, Callable[..., Pair]] = {
    "kd": distillation, "simclr": contrast, "meal-v2": ensemble, "bd-kd": together, "distillm": words_language,
    "distillm on the toy grammar": toy_language, "dmd2": generators}


class Recording(Alternating):
    """Keeps the draws of a step for the bare loop, which then computes the same numbers."""

    def randn(self, n: int, *shape: int) -> Tensor:
        self.draws.append(super().randn(n, *shape))
        return self.draws[-1]

    def randint(self, low: int, high: int, n: int, *shape: int) -> Tensor:
        self.draws.append(super().randint(low, high, n, *shape))
        return self.draws[-1]


def measure(names: tuple[str, ...] = tuple(PAIRS), steps: int = STEPS, small: bool = False) -> list[dict[str, Any]]:
    """Milliseconds a step of both loops, without the first few steps."""
    results = []
    for name in names:
        pair = PAIRS[name](steps + WARM, small)
        with Alternating(pair) as run:
            pair.distill(run)
        skipped = min(WARM, len(run.ours) // 2)
        results.append({"name": f"a step of {name}", "unit": "ms", "note": pair.note,
                        "arms": {"ours": run.ours[skipped:], "bare": run.bare[skipped:]}})
    return results


def both(name: str, steps: int, small: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    """The weights that both loops end with, of the library's step and of the bare one."""
    pair = PAIRS[name](steps, small)
    with Recording(pair) as run:
        pair.distill(run)
    ours, bare = pair.trained
    return [p.detach() for p in ours.parameters()], [p.detach() for p in bare.parameters()]
