"""Embedded teachers and the grounds on which systems are compared."""

from collections.abc import Callable
from typing import Any

from stillhouse.zoo.cache import cached


def _digits(size: int = 16) -> Any:
    from stillhouse.zoo.classifiers import digits_teacher

    return digits_teacher(size)


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


MODELS: dict[str, Callable[..., Any]] = {
    "digits-teacher": _digits, "grammar-teacher": _grammar, "gauss2d": _gauss2d, "digits-mixture": _digits_mixture,
}
"""What `zoo:NAME` stands for on the command line."""

__all__ = ["MODELS", "cached"]
