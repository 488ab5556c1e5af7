"""Streaming moments of features and the Fréchet distance between two sets of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nextscale.errors import UserError

Array = Tensor | np.ndarray


@dataclass
class Moments:
    """Count, mean and scatter of feature rows in float64; independent of how rows are batched.

    Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances", 1979.

    Attributes:
        count: Rows so far.
        mean: Their mean, [d].
        scatter: Sum of (x - mean)(x - mean)^T, [d, d].
    """

    count: int
    mean: Float[Tensor, " d"]
    scatter: Float[Tensor, "d d"]

    @classmethod
    def empty(cls, dim: int, device: torch.device | str = "cpu") -> Moments:
        """Moments of no rows."""
        zero = torch.zeros(dim, dtype=torch.float64, device=device)
        return cls(0, zero, zero.new_zeros(dim, dim))

    @classmethod
    def of(cls, features: Array) -> Moments:
        """Moments of the rows of [n, d]."""
        rows = as_float64(features)
        if not len(rows):
            return cls.empty(rows.shape[1], rows.device)
        mean = rows.mean(dim=0)
        centred = rows - mean
        return cls(len(rows), mean, centred.T @ centred)

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of rows together."""
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        between = torch.outer(delta, delta) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    def without(self, other: Moments) -> Moments:
        """Moments of the rows that are not among `other`'s, which is a part of these."""
        count = self.count - other.count
        mean = (self.mean * self.count - other.mean * other.count) / count
        delta = other.mean - mean
        between = torch.outer(delta, delta) * (count * other.count / self.count)
        return Moments(count, mean, self.scatter - other.scatter - between)

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """Sample covariance, divisor count - 1.

        Raises:
            UserError: Below two rows.
        """
        if self.count < 2:
            raise UserError(f"a covariance needs 2 images or more, got {self.count}")
        return self.scatter / (self.count - 1)


def frechet_distance(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    """|mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)), the formula of FID.

    Heusel et al., arXiv 1706.08500, equation 6. The last trace is computed without the product
    S1 S2, whose rounding noise peers take the root of, and without adding epsilon to a diagonal.

    Args:
        mu1: Mean [d], tensor or array; everything is cast to float64.
        sigma1: Covariance [d, d], also rank-deficient.
        mu2: Mean of the other set.
        sigma2: Covariance of the other set.

    Returns:
        The distance, 0 or more.

    Raises:
        UserError: For shapes that do not fit, values that are not finite, or matrices that are no
            covariances.
    """
    m1, s1, m2, s2 = (as_float64(value) for value in (mu1, sigma1, mu2, sigma2))
    dim = len(m1)
    if m1.shape != m2.shape or s1.shape != (dim, dim) or s2.shape != (dim, dim):
        shapes = ", ".join(str(tuple(t.shape)) for t in (m1, s1, m2, s2))
        raise UserError(f"means must be [d] and covariances [d, d] of one d, got {shapes}")
    if not all(bool(t.isfinite().all()) for t in (m1, s1, m2, s2)):
        raise UserError("means or covariances hold NaN or infinity; look at the features")
    for s in (s1, s2):
        if not torch.allclose(s, s.T, rtol=0, atol=1e-5 * float(s.abs().max())):
            raise UserError("a covariance is not symmetric, so it is none")
    traces = float(s1.trace() + s2.trace())
    distance = float((m1 - m2).square().sum()) + traces - 2 * _trace_of_root(s1, s2)
    if distance < -1e-8 * traces:
        raise UserError(f"the distance comes out as {distance:.6g}: these are no covariances")
    return max(distance, 0.0)


def _trace_of_root(s1: Tensor, s2: Tensor) -> float:
    """tr((S1 S2)^(1/2)) = sum of the singular values of F^T G for any S1 = F F^T, S2 = G G^T."""
    lower, failed = torch.linalg.cholesky_ex(s1)
    diagonal = lower.diagonal().abs()
    if not failed and diagonal.min() > 1e-4 * diagonal.max():
        squares = torch.linalg.eigvalsh(lower.T @ s2 @ lower)
        noise = torch.finfo(squares.dtype).eps * squares[-1]
        # The root blows the noise of an eigenvalue up by 1 / (2 root): negligible, or not this way.
        if squares[0] > 0:
            roots = squares.sqrt()
            if noise * (0.5 / roots).sum() < 1e-11 * roots.sum():
                return float(roots.sum())
    return float(torch.linalg.svdvals(_factor(s1).T @ _factor(s2)).sum())


def _factor(covariance: Tensor) -> Tensor:
    """F with S = F F^T from the eigenvalues of S that are more than rounding noise."""
    values, vectors = torch.linalg.eigh(covariance)
    if values[0] < -1e-8 * values.abs().max():
        raise UserError(f"a covariance has the eigenvalue {float(values[0]):.6g}, so it is none")
    noise = len(values) * torch.finfo(values.dtype).eps * values[-1]
    kept = values > noise
    return vectors[:, kept] * values[kept].sqrt()


def as_float64(values: Array) -> Tensor:
    """A float64 tensor, on the device where it is."""
    return torch.as_tensor(values).to(torch.float64)
