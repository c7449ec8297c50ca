"""Exact teachers: densities whose denoiser is a closed form, so nothing has to be trained.

A Gaussian mixture noised by x_t = alpha x + sigma eps stays a mixture, with means alpha m_k and covariances
alpha^2 C_k + sigma^2 I; its denoiser is the responsibility-weighted mean of the components' posterior means.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from stillhouse.diffusion.convert import score_of
from stillhouse.diffusion.process import Process
from stillhouse.errors import DataError, RoleError, require


class GaussianMixture(nn.Module):
    """The exact Denoiser of a Gaussian mixture in any number of dimensions.

    `spread` is one standard deviation per component [components] (isotropic, cheap for thousands of components),
    or full covariances [components, dim, dim]. `labels` [components] names the class of each component: a condition
    then restricts the mixture to one class, and the condition `classes` (the null condition) to none. `shape` is
    that of one sample where it is not a vector, e.g. (1, 8, 8).
    Computes in the dtype of its input, never under autocast. Raises DataError where shapes disagree or a covariance
    is not positive definite.
    """

    means: Tensor
    variances: Tensor
    axes: Tensor
    log_weights: Tensor
    labels: Tensor | None
    null_condition: Tensor | None

    def __init__(
        self,
        process: Process,
        means: Float[Tensor, "components dim"],
        spread: Float[Tensor, " components"] | Float[Tensor, "components dim dim"],
        weights: Float[Tensor, " components"] | None = None,
        labels: Int[Tensor, " components"] | None = None,
        shape: tuple[int, ...] | None = None,
    ):
        super().__init__()
        count, dim = means.shape
        self.process = process
        self.shape = shape or (dim,)
        self.full = spread.ndim == 3
        require(math.prod(self.shape) == dim, f"samples of shape {self.shape} are not {dim} numbers", DataError)
        require(tuple(spread.shape) == ((count, dim, dim) if self.full else (count,)), "spread must be standard "
                f"deviations [{count}] or covariances [{count}, {dim}, {dim}], got {tuple(spread.shape)}", DataError)
        weights = torch.ones(count) if weights is None else weights
        require(len(weights) == count and bool((weights >= 0).all()) and float(weights.sum()) > 0,
                f"weights must be {count} non-negative numbers, not all zero", DataError)
        if self.full:
            variances, axes = torch.linalg.eigh(spread.double())
        else:
            variances, axes = spread.double() ** 2, torch.empty(0, dtype=torch.float64)
        require(bool((variances > 0).all()), "every component needs a positive (definite) spread", DataError)
        self.register_buffer("means", means.double())
        self.register_buffer("variances", variances)
        self.register_buffer("axes", axes)
        self.register_buffer("log_weights", (weights.double() / weights.double().sum()).log())
        self.register_buffer("labels", labels)
        self.classes = 0 if labels is None else int(labels.max()) + 1
        self.register_buffer("null_condition", None if labels is None else torch.tensor(self.classes))

    def forward(
        self, x_t: Float[Tensor, "batch ..."], t: Float[Tensor, " batch"], condition: Tensor | None = None
    ) -> Float[Tensor, "batch ..."]:
        """E[x | x_t]."""
        with torch.autocast(x_t.device.type, enabled=False):
            flat, alpha, sigma = self._flat(x_t), self.process.alpha(t)[:, None], self.process.sigma(t)[:, None]
            shares = self._joint(flat, alpha, sigma, condition).softmax(1)
            means, variances = self.means.to(flat.dtype), self.variances.to(flat.dtype)
            if self.full:
                axes = self.axes.to(flat.dtype)
                total = alpha[..., None] ** 2 * variances + sigma[..., None] ** 2
                inner = torch.einsum("bkd,kde->bke", flat[:, None] - alpha[..., None] * means, axes)
                outer = torch.einsum("bke,kde->bkd", inner * alpha[..., None] * variances / total, axes)
                x0 = torch.einsum("bk,bkd->bd", shares, means + outer)
            else:
                gain = alpha * variances / (alpha**2 * variances + sigma**2)
                x0 = (shares * (1 - alpha * gain)) @ means + (shares * gain).sum(1, keepdim=True) * flat
            return x0.view_as(x_t)

    def log_density(
        self, x_t: Float[Tensor, "batch ..."], t: Float[Tensor, " batch"], condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """log p_t(x_t)."""
        flat = self._flat(x_t)
        joint = self._joint(flat, self.process.alpha(t)[:, None], self.process.sigma(t)[:, None], condition)
        return joint.logsumexp(1) - self._class_log_mass(condition, flat.dtype)

    def score(
        self, x_t: Float[Tensor, "batch ..."], t: Float[Tensor, " batch"], condition: Tensor | None = None
    ) -> Float[Tensor, "batch ..."]:
        """grad log p_t(x_t)."""
        return score_of(self(x_t, t, condition), x_t, self.process.alpha(t), self.process.sigma(t))

    def class_log_probability(
        self, x: Float[Tensor, "batch ..."], t: Float[Tensor, " batch"]
    ) -> Float[Tensor, "batch classes"]:
        """log p(class | x_t), the Bayes rule of the mixture. Raises RoleError on a mixture without labels."""
        if self.labels is None:
            raise RoleError("this mixture has no classes; give it labels")
        joint = self._joint(self._flat(x), self.process.alpha(t)[:, None], self.process.sigma(t)[:, None], None)
        return torch.stack([joint[:, self.labels == c].logsumexp(1) for c in range(self.classes)], 1).log_softmax(1)

    def sample(
        self, n: int, condition: Int[Tensor, " n"] | None = None, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "n ..."], Int[Tensor, " n"]]:
        """n clean samples in float32 and the component each came from."""
        logits = self.log_weights.expand(n, -1) + self._class_mask(condition, self.log_weights.dtype)
        component = torch.multinomial(logits.exp(), 1, generator=generator)[:, 0]
        z = torch.randn(n, self.means.shape[1], generator=generator, device=self.means.device, dtype=torch.float64)
        if self.full:
            x = self.means[component] + torch.einsum(
                "ne,nde->nd", z * self.variances[component].sqrt(), self.axes[component])
        else:
            x = self.means[component] + self.variances[component].sqrt()[:, None] * z
        return x.float().view(n, *self.shape), component

    def _flat(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != tuple(self.shape):
            raise RoleError(f"this mixture is over samples of shape {tuple(self.shape)}, got {tuple(x.shape[1:])}")
        return x.flatten(1)

    def _joint(self, flat: Tensor, alpha: Tensor, sigma: Tensor, condition: Tensor | None) -> Tensor:
        """log of weight_k N(x_t; alpha m_k, alpha^2 C_k + sigma^2 I), minus infinity outside the class asked for."""
        means, variances = self.means.to(flat.dtype), self.variances.to(flat.dtype)
        dim = means.shape[1]
        if self.full:
            total = alpha[..., None] ** 2 * variances + sigma[..., None] ** 2
            inner = torch.einsum("bkd,kde->bke", flat[:, None] - alpha[..., None] * means, self.axes.to(flat.dtype))
            energy, log_scale = (inner**2 / total).sum(-1), total.log().sum(-1)
        else:
            total = alpha**2 * variances + sigma**2
            inner_products = flat @ means.T
            squared = (flat**2).sum(1, keepdim=True) - 2 * alpha * inner_products + alpha**2 * (means**2).sum(1)
            energy, log_scale = squared / total, dim * total.log()
        log_likelihood = -0.5 * (energy + log_scale + dim * math.log(2 * math.pi))
        return log_likelihood + self.log_weights.to(flat.dtype) + self._class_mask(condition, flat.dtype)

    def _class_mask(self, condition: Tensor | None, dtype: torch.dtype) -> Tensor:
        if condition is None:
            return torch.zeros((), dtype=dtype, device=self.means.device)
        if self.labels is None:
            raise RoleError("this mixture has no classes; call it without a condition, or give it labels")
        allowed = (self.labels == condition[:, None]) | (condition[:, None] == self.classes)
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, -math.inf)

    def _class_log_mass(self, condition: Tensor | None, dtype: torch.dtype) -> Tensor:
        mass = self.log_weights.to(dtype).expand(1 if condition is None else len(condition), -1)
        return (mass + self._class_mask(condition, dtype)).logsumexp(1)


def smoothed_data(
    process: Process, x: Float[Tensor, "samples ..."], std: float, labels: Int[Tensor, " samples"] | None = None
) -> GaussianMixture:
    """The exact denoiser of a data set smoothed by N(0, std^2): a softmax-weighted mean of its samples.

    On it, regression of noise onto clean samples blurs as it does on real pictures.
    """
    require(std > 0, f"std must be positive, got {std}")
    return GaussianMixture(process, x.flatten(1), torch.full((len(x),), std), labels=labels, shape=tuple(x.shape[1:]))


def particle_x0(
    particles: Float[Tensor, "particles ..."],
    x_t: Float[Tensor, "batch ..."],
    alpha: Float[Tensor, " batch"],
    sigma: Float[Tensor, " batch"],
) -> Float[Tensor, "batch ..."]:
    """E[x | x_t] where x is one of the particles, each as likely: the exact denoiser of the mixture of
    N(alpha x_i, sigma^2), hence the closed-form score of a set of particles."""
    flat, own = x_t.flatten(1), particles.flatten(1)
    squared = (flat[:, None] - alpha[:, None, None] * own).square().sum(2)
    return ((-0.5 * squared / sigma[:, None] ** 2).softmax(1) @ own).view_as(x_t)


def fit_class_mixture(
    process: Process,
    x: Float[Tensor, "samples ..."],
    labels: Int[Tensor, " samples"],
    components: int = 3,
    ridge: float = 1e-3,
    seed: int = 0,
) -> GaussianMixture:
    """A class-conditional teacher for pictures: `components` full-covariance Gaussians per class, by scikit-learn's EM.

    `ridge` is added to the diagonal of every covariance. Raises DataError where a class has too few samples.
    """
    from sklearn.mixture import GaussianMixture as Fit

    flat, classes = x.flatten(1).double().cpu(), int(labels.max()) + 1
    parts = []
    for c in range(classes):
        own = flat[labels.cpu() == c]
        require(len(own) > components, f"class {c} has {len(own)} samples, too few for {components} components",
                DataError)
        parts.append((Fit(components, reg_covar=ridge, random_state=seed).fit(own.numpy()), len(own) / len(flat)))
    return GaussianMixture(
        process,
        torch.cat([torch.from_numpy(fit.means_) for fit, _ in parts]),
        torch.cat([torch.from_numpy(fit.covariances_) for fit, _ in parts]),
        torch.cat([share * torch.from_numpy(fit.weights_) for fit, share in parts]),
        torch.arange(classes).repeat_interleave(components),
        tuple(x.shape[1:]),
    )
