"""Remedies against codebook collapse: the parts that the tokenizer's trainer puts together."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import islice
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.tokenizers.quantizer import MultiscaleQuantizer, QuantizerOutput
from nextscale.tokenizers.schedule import ScaleSchedule

logger = logging.getLogger(__name__)

USAGE_DECAY = 0.99
KMEANS_VECTORS = 2**17  # of a scale, at most; k-means draws from them


def codebook_perplexity(counts: Tensor) -> float:
    """Perplexity, exp of the entropy in nats of the code histogram: V if all are used equally."""
    return float(_perplexity(counts))


def usage_metrics(quantizer: MultiscaleQuantizer) -> dict[str, float]:
    """Per scale k from `quantizer.usage`: `usage_k`, share of codes used lately, `perplexity_k`.

    Used lately is what has over 1 % of uniform usage. Empty before the first `record_usage`.
    """
    usage = quantizer.usage
    rows = torch.stack([(usage > 0.01).float().mean(dim=1), _perplexity(usage)]).T.tolist()
    if not any(share for share, _ in rows):
        return {}
    return {
        f"{name}_{k}": value
        for k, row in enumerate(rows)
        for name, value in zip(("usage", "perplexity"), row, strict=True)
    }


def _perplexity(counts: Tensor) -> Tensor:
    share = counts.float() / counts.sum(dim=-1, keepdim=True)
    return torch.exp(-(share * share.clamp_min(1e-12).log()).sum(dim=-1))


@torch.no_grad()
def record_usage(quantizer: MultiscaleQuantizer, schedule: ScaleSchedule, tokens: Tensor) -> None:
    """Update `quantizer.usage` [K, V]: moving average of counts relative to uniform usage (= 1)."""
    size = quantizer.codebook_size
    counts = torch.stack(
        [torch.bincount(t.flatten(), minlength=size) for t in schedule.split(tokens)]
    )
    counts = _sum_over_processes(counts.float())
    share = counts * size / counts.sum(dim=1, keepdim=True)
    first = not bool(quantizer.usage.any())
    quantizer.usage.lerp_(share, 1.0 if first else 1 - USAGE_DECAY)


@torch.no_grad()
def revive(
    quantizer: MultiscaleQuantizer,
    residuals: Sequence[Tensor],
    threshold: float,
    generator: torch.Generator,
    optimizer: torch.optim.Optimizer | None = None,
) -> int:
    """Move codes that no scale uses onto vectors of the batch; returns how many.

    They go to the scales that use the fewest different codes: without that the coarse scales, with
    few tokens per image, starve.

    Args:
        quantizer: Its codebook and usage change in place.
        residuals: What each scale quantized, K tensors [b n_k^2, Z].
        threshold: A code is dead if its usage is below this at every scale (1 = uniform).
        generator: CPU generator, the same on every process.
        optimizer: Its moments of the moved codes are set to zero.
    """
    usage = quantizer.usage
    share = (usage > threshold / 10).float().mean(dim=1).cpu()
    weights = (1 - share).square() + 1e-3
    dead = torch.nonzero(usage.amax(dim=0) < threshold).flatten()
    if not len(dead):
        return 0
    chosen = torch.multinomial(weights, len(dead), replacement=True, generator=generator)
    picks = torch.rand(len(dead), generator=generator)
    vectors = torch.stack(
        [
            residuals[k][int(u * len(residuals[k]))]
            for k, u in zip(chosen.tolist(), picks, strict=True)
        ]
    )
    vectors = _from_main_process(vectors)
    weight = quantizer.codebook.weight
    weight[dead] = vectors.to(weight)
    usage[:, dead] = 0
    usage[chosen.to(dead.device), dead] = 1.0  # a grace period
    state = optimizer.state.get(weight, {}) if optimizer is not None else {}
    for name in ("exp_avg", "exp_avg_sq"):
        if name in state:
            state[name][dead] = 0
    return len(dead)


@torch.no_grad()
def refit(
    quantizer: MultiscaleQuantizer,
    schedule: ScaleSchedule,
    latents: Tensor,
    share: float,
    generator: torch.Generator,
) -> list[int]:
    """Give every scale that uses less than `share` of the codebook that many codes of its own.

    Its new codes are k-means centres of what it quantizes; the places are those that the other
    scales use least. Moving single codes onto single vectors (`revive`) cannot do this: in many
    dimensions a vector is farther from its neighbours than the centre of them all.

    A scale's codes stay as they were where new ones would more than double the quantization error:
    a phi that has learnt to amplify few small codes makes far too much of true centres.

    Args:
        quantizer: Its codebook changes in place.
        schedule: Scales.
        latents: [b, Z, h, w] of many images, several times V.
        share: In [0, 1].
        generator: CPU generator, the same on every process.

    Returns:
        The scales that got new codes.
    """
    weight = quantizer.codebook.weight
    size, refitted = len(weight), []
    for k in range(schedule.num_scales):
        steps = list(quantizer.residuals(latents, schedule))
        counts = torch.stack([torch.bincount(t.flatten(), minlength=size) for _, t, _ in steps])
        vectors = steps[k][0]
        wanted = round(share * min(size, len(vectors)))
        if int((counts[k] > 0).sum()) >= wanted:
            continue
        elsewhere = counts.sum(dim=0) - counts[k]
        places = elsewhere.argsort()[:wanted]
        before, old = _error(latents, steps), weight[places].clone()
        weight[places] = _from_main_process(_kmeans(vectors, wanted, generator, 20)).to(weight)
        after = _error(latents, list(quantizer.residuals(latents, schedule)))
        if after > 2 * before:
            logger.warning(
                "refit left scale %d alone: its phi amplifies codes, the quantization error would "
                "go from %.3g to %.3g. num_phi 0 avoids this.", k, before, after
            )  # fmt: skip
            weight[places] = old
            continue
        refitted.append(k)
    return refitted


def _error(latents: Tensor, steps: Sequence[tuple[Tensor, Tensor, Tensor]]) -> float:
    """Mean squared difference of latents and the sum of what the scales contribute."""
    return float((latents - sum(h for *_, h in steps)).square().mean())


@torch.no_grad()
def ema_update(
    quantizer: MultiscaleQuantizer, tokens: Tensor, residuals: Sequence[Tensor], decay: float
) -> None:
    """Move each code towards the mean of the vectors that chose it (van den Oord et al. 2017, A.1).

    Ours differs in that the running counts are not kept: a code used in this step moves by
    1 - decay towards the mean of this step's vectors, all scales together.

    Args:
        quantizer: Its codebook changes in place.
        tokens: [B, L].
        residuals: What each scale quantized, K tensors [B n_k^2, Z].
        decay: Share of the old code that stays.
    """
    weight = quantizer.codebook.weight
    lengths = [len(r) // len(tokens) for r in residuals]
    # In the order of the vectors: scale by scale, image by image.
    tokens = torch.cat([part.reshape(-1) for part in tokens.split(lengths, dim=1)])
    vectors = torch.cat(list(residuals))
    counts = torch.bincount(tokens, minlength=len(weight)).float()
    sums = torch.zeros_like(weight).index_add_(0, tokens, vectors)
    counts, sums = _sum_over_processes(counts), _sum_over_processes(sums)
    used = counts > 0
    weight[used] = torch.lerp(weight[used], sums[used] / counts[used, None], 1 - decay)


def entropy_loss(
    quantizer: MultiscaleQuantizer,
    quantized: QuantizerOutput,
    schedule: ScaleSchedule,
    temperature: float = 0.01,
) -> Tensor:
    """Mean over scales of E[H(p)] - H(E[p]), p = softmax(-|z - e|^2 / (temperature mean|e|^2)).

    (MAGVIT-v2, arXiv 2310.05737, equation 5, applied to each scale apart.) Gradients reach the
    latents through A_k(f) with the coarser scales' contributions held fixed. A scale with n < V
    tokens in the batch counts n / V: so few samples look even when they share a handful of codes,
    and the first term then draws them together (it collapsed scale 0 without this weight).
    """
    codes = quantizer.codebook.weight
    sharpness = 1 / (temperature * codes.detach().square().sum(1).mean().clamp_min(1e-6))
    total = codes.new_zeros(())
    for fixed, side in zip(quantized.residuals, schedule.sides, strict=True):
        pooled = F.interpolate(quantized.f, size=side, mode="area")
        live = pooled.permute(0, 2, 3, 1).reshape(fixed.shape)
        z = (fixed + live - live.detach())[:2048]
        log_p = F.log_softmax(-torch.cdist(z, codes).square() * sharpness, dim=1)
        mean = log_p.exp().mean(dim=0)
        sample = -(log_p.exp() * log_p).sum(dim=1).mean()
        term = sample + (mean * mean.clamp_min(1e-12).log()).sum()
        total = total + min(1.0, len(z) / len(codes)) * term
    return total / schedule.num_scales


@torch.no_grad()
def kmeans_start(
    quantizer: MultiscaleQuantizer,
    schedule: ScaleSchedule,
    latents: Tensor,
    generator: torch.Generator,
    iterations: int = 10,
) -> None:
    """Fill the codebook scale by scale with k-means centres of what that scale has to quantize.

    Scale k gets its share of the codes (V / K each, the rest to the last); its residuals are those
    that the codes of the coarser scales leave.

    Args:
        quantizer: Its codebook changes in place.
        schedule: Scales.
        latents: [N, Z, h, w] of images in random order: a scale with many cells sees the first
            ones only.
        generator: CPU generator.
        iterations: Rounds of k-means per scale.
    """
    weight = quantizer.codebook.weight
    size, scales = len(weight), schedule.num_scales
    filled = 0
    for k in range(scales):
        end = size if k == scales - 1 else (k + 1) * size // scales
        if end == filled:  # fewer codes than scales
            continue
        some = latents[: -(-KMEANS_VECTORS // prod(schedule.sides[k]))]
        vectors, _, _ = next(islice(quantizer.residuals(some, schedule), k, None))
        weight[filled:end] = _kmeans(vectors, end - filled, generator, iterations)
        weight[end:] = weight[filled]  # unreachable duplicates until their turn
        filled = end
    weight.copy_(_from_main_process(weight.clone()))


def _kmeans(
    vectors: Tensor, count: int, generator: torch.Generator, iterations: int, limit: int = 20_000
) -> Tensor:
    """Lloyd's algorithm from random distinct starts; empty clusters keep their old centre."""
    order = torch.randperm(len(vectors), generator=generator)[:limit].to(vectors.device)
    points = vectors[order]
    centers = points[torch.arange(count, device=points.device) % len(points)].clone()
    for _ in range(iterations):
        nearest = torch.cdist(points, centers).argmin(dim=1)
        sums = torch.zeros_like(centers).index_add_(0, nearest, points)
        counts = torch.bincount(nearest, minlength=count).to(points)
        used = counts > 0
        centers[used] = sums[used] / counts[used, None]
    return centers


def _sum_over_processes(tensor: Tensor) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor


def _from_main_process(tensor: Tensor) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast(tensor, src=0)
    return tensor
