"""Embedded teachers and the grounds on which systems are compared."""

from collections.abc import Callable
from typing import Any

from stillhouse.errors import require
from stillhouse.zoo.cache import cached


def _digits(size: int = 16) -> Any:
    from stillhouse.zoo.classifiers import digits_teacher

    return digits_teacher(size)


def _digits_simclr(size: int = 16, seed: int = 0) -> Any:
    from stillhouse.zoo.encoders import digits_simclr

    return digits_simclr(size, seed)


def _grammar() -> Any:
    from stillhouse.zoo.language import grammar_teacher

    return grammar_teacher()


def _gauss2d() -> Any:
    from stillhouse.diffusion.process import VPCosine
    from stillhouse.zoo.denoisers import gauss2d_teacher

    return gauss2d_teacher(VPCosine())


def _digits_mixture() -> Any:
    from stillhouse.diffusion.process import VPCosine
    from stillhouse.zoo.denoisers import digits_teacher

    return digits_teacher(VPCosine())


def _shapes_clip(size: str = "teacher") -> Any:
    from stillhouse.zoo.dual_encoders import shapes_student, shapes_teacher

    require(size in ("teacher", "student"), f"shapes-clip is 'teacher' or 'student', not {size!r}")
    return shapes_student() if size == "student" else shapes_teacher()


def _tones() -> Any:
    from stillhouse.zoo.speech import tones_teacher

    return tones_teacher()


MODELS: dict[str, Callable[..., Any]] = {
    "shapes-clip": _shapes_clip,
    "digits-simclr": _digits_simclr,
    "digits-teacher": _digits, "grammar-teacher": _grammar, "gauss2d": _gauss2d, "digits-mixture": _digits_mixture,
    "tones-teacher": _tones,
}
"""What `zoo:NAME` stands for on the command line."""

__all__ = ["MODELS", "cached"]
