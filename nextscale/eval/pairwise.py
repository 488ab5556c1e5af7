"""Metrics over all pairs of features, in tiles: memory grows with N k, not with N M."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nextscale.errors import UserError
from nextscale.eval.frechet import Array, as_float64

TILE = 4096


class Neighbourhoods(NamedTuple):
    """Of `precision_recall`; each in [0, 1] but density, which may pass 1.

    Precision and density are means over the generated points and have a standard error, with the
    reference as given.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    precision_error: float
    density_error: float


def jackknife_error(without: Array) -> float:
    """Standard error of a statistic by its values without each of B equal parts of the data.

    Delete-block jackknife: sqrt((B - 1) / B sum_b (value_b - their mean)^2).
    """
    values = as_float64(without)
    return float(((len(values) - 1) / len(values) * (values - values.mean()).square().sum()).sqrt())


def kernel_distance(x: Array, y: Array) -> float:
    """KID: unbiased squared MMD over the full sets, kernel (a . b / d + 1)^3.

    Binkowski et al., arXiv 1801.01401. Deterministic: no subsets, so none of their noise.

    Args:
        x: Features [n, d].
        y: Features [m, d].

    Returns:
        The estimate (usually reported x 1000); it may lie below 0.

    Raises:
        UserError: For features of other shapes, or fewer than 2 rows.
    """
    x, y = _pair(x, y)
    n, m = len(x), len(y)
    within = _kernel_sum(x, x, diagonal=False) / (n * (n - 1))
    within += _kernel_sum(y, y, diagonal=False) / (m * (m - 1))
    return within - 2 * _kernel_sum(x, y) / (n * m)


def kernel_distance_error(x: Array, y: Array, blocks: int = 20) -> float:
    """Standard error of `kernel_distance` by the delete-block jackknife over `y`; `x` is fixed.

    Args:
        x: Features [n, d] of the reference.
        y: Features [m, d], m at least twice `blocks`; row i is in block i mod `blocks`.
        blocks: How many.
    """
    return _discrepancy_error(x, y, blocks, _kernel_sum)


def kernel_distance_subsets(
    x: Array, y: Array, *, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """KID as papers report it: mean and population standard deviation over random subsets.

    The draws are torch-fidelity's: numpy's RandomState(seed), per subset rows of `x` and then of
    `y`, without replacement. A size above a set's is lowered to it.

    Args:
        x: Features [n, d] of the reference.
        y: Features [m, d].
        subsets: How many.
        subset_size: Rows of each set per subset.
        seed: Of the draws.
    """
    x, y = _pair(x, y)
    random = np.random.RandomState(seed)  # torch-fidelity's stream, which numpy keeps frozen
    size = min(subset_size, len(x), len(y))
    values = []
    for _ in range(subsets):
        rows = [random.choice(len(s), size, replace=False) for s in (x, y)]
        values.append(kernel_distance(x[rows[0]], y[rows[1]]))
    return float(np.mean(values)), float(np.std(values))


def rbf_distance(x: Array, y: Array, *, sigma: float = 10.0) -> tuple[float, float]:
    """Squared MMD with the kernel exp(-|a - b|^2 / (2 sigma^2)): (biased, unbiased).

    CMMD (Jayasumana et al., arXiv 2401.09603) is 1000 times the biased value on L2-normalised
    CLIP embeddings with sigma 10. Sums run over expm1, the kernel less 1, which loses no digits
    where the kernel is nearly 1.

    Args:
        x: Features [n, d].
        y: Features [m, d].
        sigma: Width of the kernel.
    """
    x, y = _pair(x, y)
    n, m = len(x), len(y)
    xx, yy, xy = (_rbf_sum(a, b, sigma) for a, b in ((x, x), (y, y), (x, y)))  # diagonals add 0
    biased = xx / n**2 + yy / m**2 - 2 * xy / (n * m)
    return biased, xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m)


def rbf_distance_error(x: Array, y: Array, blocks: int = 20, *, sigma: float = 10.0) -> float:
    """Standard error of the unbiased `rbf_distance`; see `kernel_distance_error`."""

    def total(a: Tensor, b: Tensor, *, diagonal: bool = True) -> float:
        return _rbf_sum(a, b, sigma)  # the diagonal adds 0 in any case

    return _discrepancy_error(x, y, blocks, total)


def _discrepancy_error(x: Array, y: Array, blocks: int, total: Callable[..., float]) -> float:
    """Of an unbiased squared MMD; `total` sums its kernel over all pairs of rows."""
    x, y = _pair(x, y)
    parts = [y[block::blocks] for block in range(blocks)]
    sizes = torch.tensor([len(part) for part in parts], dtype=torch.float64)
    between = torch.zeros(blocks, blocks, dtype=torch.float64)
    for a in range(blocks):
        for b in range(a, blocks):
            between[a, b] = between[b, a] = total(parts[a], parts[b], diagonal=a != b)
    # All the leave-out values at once.
    cross = torch.tensor([total(x, part) for part in parts], dtype=torch.float64)
    left = sizes.sum() - sizes
    own = between.sum() - 2 * between.sum(dim=1) + between.diagonal()
    return jackknife_error(own / (left * (left - 1)) - 2 * (cross.sum() - cross) / (len(x) * left))


def precision_recall(real: Array, fake: Array, k: int = 3) -> Neighbourhoods:
    """Improved precision and recall, density and coverage.

    Kynkäänniemi et al., arXiv 1904.06991; Naeem et al., arXiv 2002.09797. The ball of a point
    reaches to its k-th neighbour in its own set, itself excluded; a distance equal to the radius
    is inside (the prdc package says outside, which differs for exact ties alone).

    Args:
        real: Reference features [n, d].
        fake: Generated features [m, d].
        k: Neighbours.

    Returns:
        precision: share of fake points inside any real ball; recall: the reverse; density: mean
        number of real balls around a fake point, over k; coverage: share of real balls that hold
        a fake point.

    Raises:
        UserError: If a set has no more than k points.
    """
    real, fake = _pair(real, fake)
    if min(len(real), len(fake)) <= k:
        raise UserError(f"k = {k} neighbours need more points, got {len(real)} and {len(fake)}")
    same_real, same_fake = _equal_rows(real, fake)
    centre = real.mean(dim=0)
    real, fake = real - centre, fake - centre
    radius_real, radius_fake = _radii(real, k), _radii(fake, k)
    balls = torch.zeros(len(fake), dtype=torch.long, device=fake.device)
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    covered = torch.zeros_like(recalled)
    for rows, columns, squared in _tiles(real, fake):
        # Equal rows are at 0, inside of any ball: a collapsed set needs no exact differences.
        equal = same_real[rows, None] == same_fake[None, columns]
        squared[equal] = -math.inf
        inside_real = _within(squared, radius_real[rows, None], real[rows], fake[columns])
        inside_fake = _within(squared, radius_fake[None, columns], real[rows], fake[columns])
        balls[columns] += inside_real.sum(dim=0)
        recalled[rows] |= inside_fake.any(dim=1)
        covered[rows] |= inside_real.any(dim=1)
    inside, density = (balls > 0).double(), balls.double() / k
    root = len(fake) ** 0.5
    return Neighbourhoods(
        precision=inside.mean().item(),
        recall=recalled.double().mean().item(),
        density=density.mean().item(),
        coverage=covered.double().mean().item(),
        precision_error=inside.std().item() / root,
        density_error=density.std().item() / root,
    )


def vendi_score(features: Array, q: float = 1.0) -> float:
    """Effective number of distinct rows: exp of the Rényi entropy of K / n, K = cosine Gram matrix.

    Friedman and Dieng, arXiv 2210.02410; orders in arXiv 2310.12952.

    Args:
        features: [n, d], no row zero.
        q: Order of the entropy: 1 (Shannon), another positive number, or infinity.

    Returns:
        In [1, n].

    Raises:
        UserError: For a q out of range or a zero row.
    """
    if not q > 0:
        raise UserError(f"q is {q}, but must be above 0 (math.inf for the largest eigenvalue)")
    rows = _unit_rows(features)
    # X X^T and X^T X share their eigenvalues: take the smaller one.
    gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
    return _effective_number(gram / len(rows), q)


def vendi_without(features: Array, blocks: int) -> Iterator[float]:
    """`vendi_score` (q = 1) without each block of rows, for its error; row i is in i mod `blocks`.

    Args:
        features: [n, d], n at least twice `blocks`.
        blocks: How many.
    """
    rows = _unit_rows(features)
    wide = len(rows) <= rows.shape[1]
    gram = rows @ rows.T if wide else rows.T @ rows
    for block in range(blocks):
        part = rows[block::blocks]
        left = len(rows) - len(part)
        if wide:
            kept = torch.arange(len(rows), device=rows.device) % blocks != block
            yield _effective_number(gram[kept][:, kept] / left, 1)
        else:
            yield _effective_number((gram - part.T @ part) / left, 1)


def _unit_rows(features: Array) -> Float[Tensor, "n d"]:
    rows = as_float64(features)
    norms = rows.norm(dim=1, keepdim=True)
    if not bool((norms > 0).all()):
        raise UserError("a feature row is zero and has no direction")
    return rows / norms


def _effective_number(matrix: Float[Tensor, "n n"], q: float) -> float:
    """Exp of the Rényi entropy of the eigenvalues, which sum to 1."""
    p = torch.linalg.eigvalsh(matrix)
    p = p[p > 0]
    if math.isinf(q):
        return float(1 / p.max())
    if q == 1:
        return float(torch.exp(-(p * p.log()).sum()))
    return float(p.pow(q).sum().pow(1 / (1 - q)))


def _pair(x: Array, y: Array) -> tuple[Tensor, Tensor]:
    first, second = as_float64(x), as_float64(y)
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
        raise UserError(f"features must be [n, d] and [m, d] of one d, got {shapes}")
    if min(len(first), len(second)) < 2:
        raise UserError(f"2 images or more are needed, got {len(first)} and {len(second)}")
    if not bool(first.isfinite().all()) or not bool(second.isfinite().all()):
        raise UserError("features hold NaN or infinity")
    return first, second


def _slices(count: int) -> list[slice]:
    return [slice(start, min(start + TILE, count)) for start in range(0, count, TILE)]


def _kernel_sum(x: Tensor, y: Tensor, *, diagonal: bool = True) -> float:
    """Sum of (a . b / d + 1)^3 over all pairs; without i = j if not `diagonal`."""
    dim, total = x.shape[1], 0.0
    for rows in _slices(len(x)):
        for columns in _slices(len(y)):
            kernel = (x[rows] @ y[columns].T / dim + 1) ** 3
            if not diagonal and rows == columns:
                kernel.fill_diagonal_(0)
            total += kernel.sum().item()
    return total


def _rbf_sum(x: Tensor, y: Tensor, sigma: float) -> float:
    """Sum of exp(-|a - b|^2 / (2 sigma^2)) - 1 over all pairs."""
    return sum(torch.expm1(-d / (2 * sigma**2)).sum().item() for _, _, d in _tiles(x, y))


def _tiles(x: Tensor, y: Tensor) -> Iterator[tuple[slice, slice, Float[Tensor, "a b"]]]:
    """Squared distances, tile by tile."""
    for rows in _slices(len(x)):
        for columns in _slices(len(y)):
            yield rows, columns, _squared(x, y, rows, columns)


def _squared(x: Tensor, y: Tensor, rows: slice, columns: slice) -> Float[Tensor, "a b"]:
    """Squared distances by the matrix product; exact 0 on the diagonal of a set with itself."""
    a, b = x[rows], y[columns]
    d = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1) - 2 * a @ b.T
    if x is y and rows == columns:
        d.fill_diagonal_(0)
    return d.clamp_(min=0)


def _radii(x: Float[Tensor, "n d"], k: int) -> Float[Tensor, " n"]:
    """Squared distance to the k-th neighbour, itself excluded, exact to the last bit."""
    radii = []
    for rows in _slices(len(x)):
        best = x.new_zeros(rows.stop - rows.start, 0)
        which = best.long()
        for columns in _slices(len(x)):
            squared = _squared(x, x, rows, columns)
            if rows == columns:
                squared.fill_diagonal_(math.inf)
            best = torch.cat([best, squared], dim=1)
            index = torch.arange(columns.start, columns.stop, device=x.device)
            which = torch.cat([which, index.expand(len(best), -1)], dim=1)
            best, order = best.topk(min(k, best.shape[1]), dim=1, largest=False)
            which = which.gather(1, order)
        own = torch.arange(rows.start, rows.stop, device=x.device)
        radii.append(_exact(x, own, x, which[:, -1]))
    return torch.cat(radii)


def _exact(x: Tensor, rows: Int[Tensor, " n"], y: Tensor, others: Int[Tensor, " n"]) -> Tensor:
    """Squared distances of pairs from their differences: equal points are at 0."""
    parts = zip(rows.split(TILE), others.split(TILE), strict=True)
    found = [(x[a] - y[b]).square().sum(dim=1) for a, b in parts]
    return torch.cat(found) if found else x.new_zeros(0)


def _equal_rows(x: Tensor, y: Tensor) -> tuple[Int[Tensor, " n"], Int[Tensor, " m"]]:
    """Numbers of the rows of both, the same for equal ones."""
    known: dict[bytes, int] = {}
    numbers = [
        [known.setdefault(row.tobytes(), len(known)) for row in rows.cpu().numpy()]
        for rows in (x, y)
    ]
    first, second = (torch.tensor(found, device=x.device) for found in numbers)
    return first, second


def _within(squared: Tensor, radius: Tensor, x: Tensor, y: Tensor) -> Bool[Tensor, "a b"]:
    """Squared <= radius, decided by exact differences where the product's rounding could matter."""
    inside = squared <= radius
    scale = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    close = (squared - radius).abs() <= 1e-12 * scale
    rows, columns = close.nonzero(as_tuple=True)
    if len(rows):
        inside[rows, columns] = (
            _exact(x, rows, y, columns) <= radius.expand_as(squared)[rows, columns]
        )
    return inside
