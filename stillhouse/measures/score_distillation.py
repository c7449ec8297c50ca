"""Score distillation as one table: which noise predictions enter the gradient on a picture, and how strongly.

Every method of the family moves x along w(t) sum_k c_k eps_k(x_t, t), where the eps_k are named noise predictions:

    name       prediction
    prompt     the teacher's, under the prompt
    null       the teacher's, without a condition
    negative   the teacher's, under a negative prompt
    noise      the noise that was added to x
    fake       that of the score of the pictures themselves

    row    prompt   null       negative   noise   fake
    SDS    s        1 - s                 -1              Poole et al. 2022, arXiv 2209.14988
    VSD    s        1 - s                         -1      Wang et al. 2023, arXiv 2305.16213
    CSD    w        w_n - w    -w_n                       Yu et al. 2023, arXiv 2310.19415

A method is a row, so what holds between methods is arithmetic: SDS(s) = SDS(1) + CSD(s - 1), VSD whose fake score
says the noise is SDS, and VSD(1) whose fake score is the teacher's null prediction is CSD(1).
"""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from stillhouse.errors import require

Coefficient = float | Tensor
Row = dict[str, Coefficient]


def sds_row(scale: Coefficient) -> Row:
    """Score distillation sampling: the guided prediction null + scale (prompt - null), less the noise."""
    return _row(prompt=scale, null=1 - scale, noise=-1.0)


def vsd_row(scale: Coefficient) -> Row:
    """Variational score distillation: the guided prediction less the fake score's, which is never guided."""
    return _row(prompt=scale, null=1 - scale, fake=-1.0)


def csd_row(weight: Coefficient = 1.0, negative: Coefficient = 0.0) -> Row:
    """Classifier score distillation: `weight` (prompt - null) + `negative` (null - negative)."""
    return _row(prompt=weight, null=negative - weight, negative=-1 * negative)


def score_gradient(
    predictions: Mapping[str, Float[Tensor, "batch ..."]], row: Mapping[str, Coefficient], weight: Coefficient = 1.0
) -> Float[Tensor, "batch ..."]:
    """w sum_k c_k eps_k: the descent gradient on x, without gradient of its own.

    Coefficients and the weight are numbers or one number per sample [batch], e.g. schedules in t. Predictions that the
    row does not name are not read. Raises ConfigError for an empty row or a prediction that is missing.
    """
    require(bool(row), "a row of score distillation needs at least one coefficient")
    absent = [name for name in row if name not in predictions]
    require(not absent, f"the row needs the prediction '{(absent or [''])[0]}'; given are {', '.join(predictions)}")
    like = predictions[next(iter(row))]
    parts = [_fit(c, like) * predictions[name].detach() for name, c in row.items()]
    return _fit(weight, like) * sum(parts[1:], parts[0])


def _row(**coefficients: Coefficient) -> Row:
    """Only what counts: a prediction with coefficient 0 need not be made."""
    return {name: c for name, c in coefficients.items() if isinstance(c, Tensor) or c != 0}


def _fit(value: Coefficient, like: Tensor) -> Coefficient:
    return value.reshape(-1, *[1] * (like.ndim - 1)) if isinstance(value, Tensor) and value.ndim else value
