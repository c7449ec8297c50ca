"""DistiLLM: a language model distilled with a skewed KL divergence and with its own answers, used sparingly.

With p the teacher's and q the student's next-token distribution at each response token (mean over tokens):

    SKL_a(p, q)  = KL(p || a p + (1-a) q)        skew KL, a = 0.1: its gradient in q is at most (1-a)/a
    SRKL_a(p, q) = KL(q || (1-a) p + a q)        skew reverse KL
    L = (1-k) CE(response) + k SKL_a(p, q) + lm CE(plain text)

Which sequences a step trains on is decided by r ~ U(0, 1), by the share phi of student-generated answers, which rises
by 0.1 whenever the validation loss exceeds its reference by eps, and by a first-in first-out replay buffer:

    r < lambda_t, or r < phi while the buffer fills   generate with the student, train, push
    r < phi                                           train on answers drawn from the buffer
    otherwise                                         train on the data's own answers

with lambda_t = phi (1 - t/T), the decreasing share.

Both models are always asked about the chosen sequences, and neither one's logits of all positions are held (where a
model's output layer is nothing but a product). The reference is the validation loss before the first step; it moves
only when phi does. The checkpoint with the best validation ROUGE-L is returned.

A teacher of which only the k likeliest tokens are known (an endpoint, a cache) is compared on these and one outcome for
all others together: a lower bound of the divergence, which k = vocabulary makes exact. Positions of which it knows
nothing are left out.

The paper's baselines are settings: word-level KD (`divergence="kl"`, phi_step=0), ImitKD ("kl", phi=0.5, phi_step=0,
replay=0), GKD ("js", phi=0.5, phi_step=0, replay=0), always on-policy (phi=1), fine-tuning (k=0); SeqKD is `fine_tune`
on `answered_by(teacher, …)` of `recipes.language`. MiniLLM (policy gradient) is not here.

Deviations: SRKL is the paper's (the released code mixes the other way round). With k < 1 the cross-entropy is taken on
the data's answers even when the divergence is taken on the student's, where it would teach the student its own errors.
ROUGE-L for the choice of checkpoint is over token ids, as no tokenizer is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillhouse.data.grammar import LONGEST_ANSWER, grammar
from stillhouse.data.text import trimmed, widened
from stillhouse.errors import require
from stillhouse.evaluate.claims import Claim
from stillhouse.evaluate.text import judge_grammar, language_loss, response_rouge
from stillhouse.measures.language import language_cross_entropy, language_divergence
from stillhouse.models.language import (
    check_room,
    check_vocabularies,
    known_tokens,
    next_tokens,
    respond,
    special_tokens,
)
from stillhouse.parts.best import Best
from stillhouse.parts.replay import ReplayBuffer
from stillhouse.protocols import OFFERS, CausalLM, TokenPairs, TopKTeacher
from stillhouse.recipes.language import FineTune, adamw, answered_by, check_pairs, due, fine_tune
from stillhouse.run import Run, begin, frozen, set_lr
from stillhouse.run.check import first_batch
from stillhouse.run.reading import to_device
from stillhouse.run.schedules import cosine
from stillhouse.zoo.language import grammar_model, grammar_teacher

NUMBER = 89
CLAIMS = [
    Claim("DistiLLM answers better than fine-tuning (ROUGE-L)",
          lambda a: a["distillm"]["rouge_l"] - a["sft"]["rouge_l"]),
    Claim("it generates less than 0.6 times the tokens of always on-policy distillation …",
          lambda a: 0.6 * a["on_policy"]["tokens"] - a["distillm"]["tokens"]),
    Claim("… with a ROUGE-L within 2% of it",
          lambda a: a["distillm"]["rouge_l"] - 0.98 * a["on_policy"]["rouge_l"]),
    Claim("the skew KL is at least as good as the KL, within 1% (ROUGE-L, off-line)",
          lambda a: a["skl"]["rouge_l"] - 0.99 * a["kl"]["rouge_l"]),
    Claim("generation and replay both happened",
          lambda a: min(a["distillm"]["fresh"], a["distillm"]["replayed"])),
    Claim("DistiLLM gives more grammatical answers than fine-tuning",
          lambda a: a["distillm"]["grammatical"] - a["sft"]["grammatical"], report=True),
    Claim("the skew KL is strictly better than the KL (ROUGE-L, off-line)",
          lambda a: a["skl"]["rouge_l"] - a["kl"]["rouge_l"], report=True),
    Claim("the student's own answers help: DistiLLM is better than the skew KL alone (ROUGE-L)",
          lambda a: a["distillm"]["rouge_l"] - a["skl"]["rouge_l"], report=True),
    Claim("replay saves tokens against generating afresh each time",
          lambda a: a["no_replay"]["tokens"] - a["distillm"]["tokens"], report=True),
]

Divergence = Literal["kl", "reverse_kl", "js", "jeffreys", "total_variation", "skew_kl", "skew_reverse_kl",
                     "generalized_jsd"]
Share = Literal["decreasing", "constant", "increasing"]


@dataclass(frozen=True)
class Config:
    steps: int = 1787  # T: 20 epochs of Dolly
    batch: int = 128  # sequences a step
    divergence: Divergence = "skew_kl"
    alpha: float = 0.1  # a: weight of the first argument of the KL inside the mixture (beta of generalized_jsd)
    k: float = 1.0  # weight of the divergence against the cross-entropy (1 - k)
    lm: float = 1.0  # weight of the cross-entropy on the plain text of `corpus`
    phi: float = 0.0  # share of student-generated answers at the start
    phi_step: float = 0.1  # rise of phi when validation gets worse, 0: phi stays
    eps: float = 0.1  # nats by which the validation loss must exceed its reference
    replay: int = 1000  # capacity of the buffer in sequences, 0: generate afresh every time
    share: Share = "decreasing"  # lambda_t: phi (1 - t/T), phi/2 or phi t/T
    max_new_tokens: int = 256  # longest generated answer
    validate_every: int = 0  # steps between validations, 0: once an epoch
    select: Literal["rouge", "loss", "last"] = "rouge"  # which checkpoint is returned
    fine_tuning: float = 0.15  # length of the supervised start, as a fraction of `steps` that comes on top
    lr: float = 5e-4  # peak learning rate, cosine to 0
    weight_decay: float = 0.01  # of AdamW
    clip: float = 1.0  # global gradient norm

    def __post_init__(self) -> None:
        require(self.steps >= 1 and self.batch >= 1, f"steps and batch must be at least 1: {self.steps}, {self.batch}")
        require(0 <= self.alpha <= 1, f"alpha must be in [0, 1], not {self.alpha}")
        require(0 <= self.k <= 1, f"k must be in [0, 1], not {self.k}")
        require(0 <= self.phi <= 1 and self.phi_step >= 0, f"phi must be in [0, 1] and phi_step 0 or more, not "
                f"{self.phi} and {self.phi_step}")
        require(self.replay >= 0, f"replay is a number of sequences, 0 or more, not {self.replay}")
        require(self.max_new_tokens >= 1, f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        require(self.fine_tuning >= 0, f"fine_tuning must be 0 or more, not {self.fine_tuning}")


def adapt(phi: float, reference: float, loss: float, eps: float, step: float) -> tuple[float, float]:
    """The share of generated answers and the reference loss after a validation: both stay unless the loss has risen
    to the reference + eps."""
    return (min(phi + step, 1.0), loss) if loss >= reference + eps else (phi, reference)


def generation_share(phi: float, progress: float, kind: Share) -> float:
    """lambda_t: the probability of generating afresh once the buffer is full."""
    return phi * {"decreasing": 1 - progress, "constant": 0.5, "increasing": progress}[kind]


def choose(r: float, phi: float, lam: float, buffer: ReplayBuffer) -> Literal["fresh", "replayed", "fixed"]:
    """Where a step's sequences come from."""
    if r >= phi:
        return "fixed"
    return "fresh" if r < lam or not buffer.full or buffer.capacity == 0 else "replayed"


def remember(run: Run, buffer: ReplayBuffer, batch: Mapping[str, Tensor], width: int, pad: int) -> int:
    """Push the generated sequences of all processes; the number of tokens that were generated."""
    everyone = {name: run.gather(value) for name, value in widened(batch, width, pad).items()}
    buffer.push(everyone)
    return int(everyone["target_mask"].sum())


def recall(run: Run, buffer: ReplayBuffer, n: int) -> dict[str, Tensor]:
    """`n` sequences of the buffer, drawn with replacement."""
    drawn = buffer.take(run.randint(0, len(buffer), n))
    return {name: value.to(run.device) for name, value in trimmed(drawn).items()}


def distill(
    teacher: CausalLM | TopKTeacher,
    student: CausalLM,
    data: TokenPairs,
    validation: TokenPairs,
    corpus: TokenPairs | None = None,
    config: Config = Config(),
    run: Run | None = None,
) -> nn.Module:
    """Distil `teacher` into `student` on prompts and responses of one shared vocabulary; the student is returned.

    Without `fine_tuning` (0), the student must have been fine-tuned already. Raises RoleError (vocabularies that
    differ, no end-of-sequence token) and DataError before any step.
    """
    run = begin(run)
    run.check(CausalLM, data, student=student)
    run.check(CausalLM, data, teacher=None if hasattr(teacher, "top_k") else teacher)
    check_vocabularies(teacher, student, to_device(first_batch(data, OFFERS[TokenPairs]), run.device))
    for role, pairs in {"data": data, "validation": validation, "corpus": corpus}.items():
        if pairs is not None:
            check_pairs(role, pairs)
            run.check(CausalLM, pairs, student=student)
    assert isinstance(student, nn.Module)
    check_room("student", student, data, config.max_new_tokens)
    check_room("student", student, validation, config.max_new_tokens)
    eos, pad = special_tokens(student)
    if config.fine_tuning > 0:
        supervised = FineTune(max(1, round(config.fine_tuning * config.steps)), config.batch, config.lr,
                              config.weight_decay, config.clip, config.validate_every)
        with run.scope("start"):
            fine_tune(student, data, validation, supervised, run)
    student.train()
    optimizer = adamw(student, config.lr, config.weight_decay)
    buffer, best = ReplayBuffer(config.replay), Best()
    with run.aside("reference", student):
        reference = run.once("reference", lambda: language_loss(student, validation, whole_logits=False))
    s: Any = run.state(phi=config.phi, reference=reference, tokens=0, fresh=0, replayed=0, fixed=0)

    with frozen(teacher):
        for pairs in run.loop("distil", data, batch=config.batch, steps=config.steps, student=student,
                              optimizer=optimizer, buffer=buffer, best=best, state=s):
            set_lr(optimizer, config.lr * cosine(run.progress))
            source = choose(run.shared_rand(), s.phi, generation_share(s.phi, run.progress, config.share), buffer)
            chosen: Mapping[str, Tensor] = pairs
            if source == "fresh":
                chosen = respond(student, pairs, config.max_new_tokens, eos=eos, pad=pad)
                s.tokens += remember(run, buffer, chosen, pairs["input_ids"].shape[1] + config.max_new_tokens, pad)
            elif source == "replayed":
                chosen = recall(run, buffer, len(pairs["index"]))
            setattr(s, source, getattr(s, source) + 1)

            said = next_tokens(student, chosen)
            terms = {}
            if config.k > 0:
                with torch.no_grad():
                    target = known_tokens(teacher, chosen)
                terms["kd"] = config.k * run.mean(*language_divergence(target, said, chosen["target_mask"],
                                                                       config.divergence, config.alpha))
            if config.k < 1:
                on_data = said if source == "fixed" else next_tokens(student, pairs)
                terms["ce"] = (1 - config.k) * run.mean(*language_cross_entropy(on_data, pairs["input_ids"],
                                                                                pairs["target_mask"]))
            if corpus is not None and config.lm > 0:
                text = run.draw(corpus, config.batch)
                terms["lm"] = config.lm * run.mean(*language_cross_entropy(
                    next_tokens(student, text), text["input_ids"], text["target_mask"]))
            run.update(optimizer, clip=config.clip, **terms)

            if due(run, config.validate_every):
                with run.aside("validate", student):
                    loss = language_loss(student, validation, whole_logits=False)
                    score = -loss if config.select == "loss" else float(run.k)
                    if config.select == "rouge":
                        score = response_rouge(student, validation, config.max_new_tokens)
                s.phi, s.reference = adapt(s.phi, s.reference, loss, config.eps, config.phi_step)
                best.offer(score, student)
                run.log(validation=loss, score=score, phi=s.phi)
    best.restore(student)
    run.log(tokens=s.tokens, fresh=s.fresh, replayed=s.replayed, fixed=s.fixed, phi=s.phi)
    return student


EMBEDDED = Config(steps=600, batch=16, replay=160, max_new_tokens=LONGEST_ANSWER, validate_every=20, eps=0.02,
                  select="last", fine_tuning=0.0, lr=2e-3)


def experiment(run: Run) -> dict[str, dict[str, float]]:
    """Seven arms (twelve in a full run) of equally many updates, from one fine-tuned student of a single layer, on 800
    pairs of the toy grammar.

    As in the paper the student first reaches its best validation loss by fine-tuning. The fresh learning rate then
    raises that loss for a while, and phi with it: by less than the published eps here, hence 0.02. The buffer is scaled
    with the run. All arms keep their last checkpoint, as the ROUGE-L of 100 samples is too noisy to choose by.
    """
    teacher: Any = grammar_teacher()
    data: Any = grammar("train", 800, seed=run.seed)
    validation: Any = grammar("validation", 100, seed=run.seed)
    test = grammar("test", 1000, seed=run.seed)
    start: Any = grammar_model(32, 1, 2)
    fine_tune(start, data, validation, FineTune(1000, 16, 2e-3, validate_every=50), run)

    def arm(pairs: Any = data, **settings: Any) -> dict[str, float]:
        student = deepcopy(start)
        distill(teacher, student, pairs, validation, config=replace(EMBEDDED, **settings), run=run)
        account = run.history[-1]
        with run.aside("judge", student):
            return {**judge_grammar(student, teacher, test),
                    **{name: account[name] for name in ("tokens", "fresh", "replayed", "fixed", "phi")}}

    offline: dict[str, Any] = {"phi": 0.0, "phi_step": 0.0}
    fresh: dict[str, Any] = {"phi_step": 0.0, "replay": 0}
    return run.arms(
        {
            "sft": lambda: arm(k=0.0, **offline),
            "kl": lambda: arm(divergence="kl", **offline),
            "reverse_kl": lambda: arm(divergence="reverse_kl", **offline),
            "skl": lambda: arm(**offline),
            "on_policy": lambda: arm(divergence="js", phi=1.0, **fresh),
            "distillm": lambda: arm(),
            "no_replay": lambda: arm(replay=0),
        },
        extended={
            "srkl": lambda: arm(divergence="skew_reverse_kl"),
            "seqkd": lambda: arm(answered_by(teacher, data, LONGEST_ANSWER, run), k=0.0, **offline),
            "fixed_phi": lambda: arm(phi=0.5, phi_step=0.0),
            "gkd": lambda: arm(divergence="js", phi=0.5, **fresh),
            "on_policy_skl": lambda: arm(phi=1.0, **fresh),
        },
    )


def tiny() -> dict[str, Any]:
    """Inputs for the contract test: fine-tuning, generation, replay, a corpus and a changing phi within a few steps."""
    torch.manual_seed(0)
    return {
        "teacher": grammar_model(16, 1, 2), "student": grammar_model(8, 1, 2),
        "data": grammar("train", 24), "validation": grammar("validation", 8), "corpus": grammar("train", 12, seed=7),
        "config": Config(steps=8, batch=6, k=0.7, phi=0.7, eps=-1.0, replay=10, max_new_tokens=5, validate_every=3,
                         fine_tuning=0.25, lr=1e-2),
    }
