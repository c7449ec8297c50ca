"""Topic models: a matrix of word frequencies as topics times their shares, Q = C W.

Q [m, r] holds in column d the distribution of document d over m words, C [m, k] that of each topic, W [k, r] the shares
of the topics in each document: all columns sum to 1. A word that only one topic uses is an anchor word of that topic.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from stillhouse.errors import DataError, require

Matrix = Float[Tensor, "rows columns"]


def frequencies(words: Int[Tensor, " n"], documents: Int[Tensor, " n"], m: int, r: int) -> Float[Tensor, "m r"]:
    """Q: which part of each document's samples is each word, in float64. Raises DataError for an empty document."""
    table = torch.zeros(m, r, dtype=torch.double)
    table.index_put_((words.cpu(), documents.cpu()), torch.ones(len(words), dtype=torch.double), accumulate=True)
    empty = (table.sum(0) == 0).nonzero().flatten().tolist()
    require(not empty, f"document {empty[0] if empty else ''} has no samples", DataError)
    return table / table.sum(0)


def normalised(C: Matrix, W: Matrix) -> tuple[Matrix, Matrix]:
    """The same factors with columns that sum to 1: first C's, the factors moved to W, then W's.

    C W stays what it was if its columns summed to 1. A topic without any word keeps a column of zeros.
    """
    scale = C.sum(0)
    W = W * scale[:, None]
    return C / torch.where(scale > 0, scale, 1.0), W / W.sum(0).clamp_min(1e-300)


def nmf(
    Q: Float[Tensor, "m r"], k: int, starts: int = 5, iterations: int = 2000, tolerance: float = 1e-6, seed: int = 0
) -> tuple[Float[Tensor, "m k"], Float[Tensor, "k r"]]:
    """C and W by non-negative matrix factorisation of Q (scikit-learn, squared error, coordinate descent), the best of
    `starts` random starts, normalised (Roberts et al. 2022, section 5).

    Where every topic has weight in every document the factors are not unique: zero residual proves nothing then.
    """
    from sklearn.decomposition import NMF
    from sklearn.exceptions import ConvergenceWarning

    _check(Q, k)
    require(starts >= 1 and iterations >= 1, f"starts and iterations must be at least 1; got {starts} and {iterations}")
    x = Q.double().cpu().numpy()
    best: tuple[float, np.ndarray, np.ndarray] | None = None
    for start in range(starts):
        model = NMF(k, init="random", max_iter=iterations, tol=tolerance, random_state=(seed + start) % 2**32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            W = model.fit_transform(x.T).T
        if best is None or model.reconstruction_err_ < best[0]:
            best = model.reconstruction_err_, model.components_.T, W
    assert best is not None
    return normalised(torch.from_numpy(best[1].copy()), torch.from_numpy(best[2].copy()))


def anchors(Q: Float[Tensor, "m r"], k: int, smallest: float = 0.0) -> tuple[Float[Tensor, "m k"],
                                                                             Float[Tensor, "k r"], Int[Tensor, " k"]]:
    """C, W and the rows of k anchor words, by successive projection (Arora et al. 2013; Gillis and Vavasis 2014).

    The rows of Q divided by their sums lie in the convex hull of the rows of W divided by theirs, anchor words at its
    corners: the row farthest from the span of those chosen is chosen next. The corners are then scaled so that W's
    columns sum to 1, and C follows by non-negative least squares. Exact for an exact Q with an anchor word per topic.
    Words with less than `smallest` of all the mass are no candidates.
    """
    from scipy.optimize import nnls

    _check(Q, k)
    Q = Q.double().cpu()
    mass = Q.sum(1) / Q.sum()
    rows = Q / Q.sum(1, keepdim=True).clamp_min(1e-300)
    candidate = mass > smallest
    require(int(candidate.sum()) >= k, f"only {int(candidate.sum())} words have more than {smallest} of the mass; "
            f"{k} topics need as many", DataError)
    left = rows * candidate[:, None]
    chosen: list[int] = []
    for _ in range(k):
        distance = left.square().sum(1)
        chosen.append(int(distance.argmax()))
        corner = left[chosen[-1]]
        left = left - (left @ corner / corner.square().sum().clamp_min(1e-300))[:, None] * corner
        left[chosen] = 0.0
    corners = rows[chosen]
    scale = torch.from_numpy(nnls(corners.T.numpy(), np.ones(Q.shape[1]))[0])
    W = corners * scale[:, None]
    C = torch.from_numpy(np.stack([nnls(W.T.numpy(), row)[0] for row in Q.numpy()]))
    C, W = normalised(C, W)
    return C, W, torch.tensor(chosen)


def _check(Q: Tensor, k: int) -> None:
    require(Q.dim() == 2 and bool(torch.isfinite(Q).all()) and bool((Q >= 0).all()),
            "Q must be a matrix of finite numbers of 0 or more", DataError)
    require(1 <= k <= min(Q.shape), f"{k} topics cannot be told apart by {Q.shape[0]} words in {Q.shape[1]} documents; "
            "give at least as many of both", DataError)
