"""The multi-scale residual quantizer (VAR, arXiv 2404.02905, Algorithms 1 and 2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.errors import UserError
from nextscale.tokenizers.schedule import ScaleSchedule

MAX_DISTANCES = 2**26  # held in memory at a time by the search: 256 MiB


def phi_index(num_scales: int, num_phi: int = 4) -> list[int]:
    """The residual convolution j(k) of each scale k.

    j(k) = argmin_j |t_j - k / (K - 1)| over ticks t_j. Some scales lie exactly half-way between
    two ticks, so that float64 rounding decides: the expression below is the one that reproduces
    the table of the released checkpoints. K = 1, undefined there, uses convolution 0 here.

    Args:
        num_scales: K >= 1.
        num_phi: Number of convolutions; 4 in the release.
    """
    if num_scales == 1:
        return [0]
    edge = 1 / 3 / num_phi if num_phi == 4 else 1 / 2 / num_phi
    ticks = np.linspace(edge, 1 - edge, num_phi)
    return [int(np.argmin(np.abs(ticks - k / (num_scales - 1)))) for k in range(num_scales)]


class PhiConv(nn.Conv2d):
    """phi(h) = (1 - rho) h + rho conv3x3(h)."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__(channels, channels, 3, padding=1)
        self.ratio = ratio

    def forward(self, input: Tensor) -> Tensor:
        """[b, Z, h, w] -> [b, Z, h, w]."""
        return input.mul(1 - self.ratio) + super().forward(input).mul(self.ratio)


@dataclass
class QuantizerOutput:
    """What the training forward returns.

    Attributes:
        f_hat: [B, Z, H, W], straight-through: the value of F_{K-1}, the gradient of f.
        loss: Scalar, (1/K) sum_k beta |sg(F_k) - f|^2 + |F_k - sg(f)|^2, means over elements.
        tokens: [B, L].
        residuals: K tensors [B n_k^2, Z], what each scale quantized, detached.
        f: [B, Z, H, W], the latents in float32, with gradient.
    """

    f_hat: Tensor
    loss: Tensor
    tokens: Tensor
    residuals: list[Tensor]
    f: Tensor


class MultiscaleQuantizer(nn.Module):
    """Greedy residual quantization, coarse to fine, with one codebook for all scales.

    All arithmetic is float32, whatever autocast says.

    Args:
        codebook_size: V.
        codebook_dim: Z, latent channels.
        num_phi: Number of phi convolutions shared among the scales; 0 makes phi the identity.
        phi_ratio: rho in [0, 1].
        commitment_weight: beta of the training loss.
        num_scales: K, rows of the usage statistics.
        cosine: Compare l2-normalised vectors when searching; the raw code is still what is added.
    """

    def __init__(
        self,
        *,
        codebook_size: int,
        codebook_dim: int,
        num_phi: int = 4,
        phi_ratio: float = 0.5,
        commitment_weight: float = 0.25,
        num_scales: int = 1,
        cosine: bool = False,
    ) -> None:
        super().__init__()
        self.commitment_weight, self.cosine = commitment_weight, cosine
        # Moving average of how often scale k chose code v, written by the trainer.
        self.usage: Tensor
        self.register_buffer("usage", torch.zeros(num_scales, codebook_size))
        self.codebook = nn.Embedding(codebook_size, codebook_dim)
        self.phi = nn.ModuleList(PhiConv(codebook_dim, phi_ratio) for _ in range(num_phi))

    @property
    def codebook_size(self) -> int:
        """V."""
        return self.codebook.num_embeddings

    def lookup(self, tokens: Int[Tensor, "*n"]) -> Float[Tensor, "*n c"]:
        """Code vectors of token indices."""
        return self.codebook(tokens)

    @torch.no_grad()
    def nearest(self, vectors: Float[Tensor, "n c"]) -> Int[Tensor, " n"]:
        """Index of the nearest code, squared Euclidean distance, ties to the lowest index."""
        rows = max(1, MAX_DISTANCES // self.codebook_size)
        return torch.cat([self._nearest(part) for part in vectors.split(rows)])

    def _nearest(self, vectors: Tensor) -> Tensor:
        codes = self.codebook.weight
        if self.cosine:
            return torch.argmax(F.normalize(vectors, dim=-1) @ F.normalize(codes, dim=-1).T, dim=1)
        distance = vectors.square().sum(1, keepdim=True) + codes.square().sum(1)
        return torch.argmin(distance.addmm_(vectors, codes.T, alpha=-2), dim=1)

    def contribution(
        self, codes: Float[Tensor, "b c n m"], k: int, schedule: ScaleSchedule
    ) -> Float[Tensor, "b c h w"]:
        """h_k = phi_{j(k)}(bicubic upsampling of the code map of scale k)."""
        last = k == schedule.num_scales - 1
        grown = codes if last else F.interpolate(codes, size=schedule.grid, mode="bicubic")
        if not self.phi:
            return grown
        phi = self.phi[phi_index(schedule.num_scales, len(self.phi))[k]]
        with torch.autocast(grown.device.type, enabled=False):
            return phi(grown)

    def code_map(self, tokens: Int[Tensor, "b l"], k: int, schedule: ScaleSchedule) -> Tensor:
        """Code vectors of scale k's tokens as a map [b, Z, h_k, w_k]."""
        codes = self.lookup(tokens).transpose(1, 2)
        return codes.reshape(tokens.shape[0], -1, *schedule.sides[k])

    def step(
        self, f_hat: Float[Tensor, "b c h w"], codes: Tensor, k: int, schedule: ScaleSchedule
    ) -> tuple[Tensor, Tensor]:
        """One step of decoding: add scale k, and give the transformer's input of scale k + 1.

        Args:
            f_hat: F_{k-1}, float32; zeros before scale 0.
            codes: Code map of scale k, [b, Z, h_k, w_k].
            k: Scale.
            schedule: Scales.

        Returns:
            (F_k, A_{k+1}(F_k)); the second is F_k itself at the last scale.
        """
        f_hat = f_hat + self.contribution(codes, k, schedule)
        if k == schedule.num_scales - 1:
            return f_hat, f_hat
        return f_hat, F.interpolate(f_hat, size=schedule.sides[k + 1], mode="area")

    def accumulate(
        self, tokens: Int[Tensor, "b t"], schedule: ScaleSchedule
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (F_k, A_{k+1}(F_k)) for k = 0..K-1 from all tokens."""
        weight = self.codebook.weight
        f_hat = weight.new_zeros(tokens.shape[0], weight.shape[1], *schedule.grid)
        for k, part in enumerate(schedule.split(tokens.to(weight.device))):
            f_hat, following = self.step(f_hat, self.code_map(part, k, schedule), k, schedule)
            yield f_hat, following

    def residuals(
        self, f: Float[Tensor, "b c h w"], schedule: ScaleSchedule
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The greedy search: yield (z_k as [b n_k^2, Z], tokens [b, n_k^2], h_k) per scale.

        Raises:
            UserError: If the latent grid is not the schedule's last scale.
        """
        if tuple(f.shape[-2:]) != schedule.grid:
            raise UserError(
                f"the latent grid {tuple(f.shape[-2:])} does not match the last scale "
                f"{schedule.grid} of the schedule {schedule}; resize the image or pass other scales"
            )
        rest = f.detach().float()
        for k, side in enumerate(schedule.sides):
            last = k == schedule.num_scales - 1
            z = rest if last else F.interpolate(rest, size=side, mode="area")
            vectors = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
            tokens = self.nearest(vectors).view(f.shape[0], -1)
            h = self.contribution(self.code_map(tokens, k, schedule), k, schedule)
            rest = rest - h.detach()
            yield vectors, tokens, h

    @torch.no_grad()
    def encode(self, f: Float[Tensor, "b c h w"], schedule: ScaleSchedule) -> Int[Tensor, "b t"]:
        """Tokens of a latent, all scales concatenated."""
        with torch.autocast(f.device.type, enabled=False):
            return torch.cat([tokens for _, tokens, _ in self.residuals(f, schedule)], dim=1)

    def forward(
        self,
        f: Float[Tensor, "b c h w"],
        schedule: ScaleSchedule,
        *,
        num_scales: Int[Tensor, " b"] | None = None,
    ) -> QuantizerOutput:
        """Training forward (next-scale.md 1.5).

        Args:
            f: Latents with gradient.
            schedule: Scales.
            num_scales: Scale dropout (an option of ours): int [b], sample i keeps its first
                num_scales[i] scales in the output; the per-scale losses stay.
        """
        with torch.autocast(f.device.type, enabled=False):
            f = f.float()
            f_hat, kept = torch.zeros_like(f), torch.zeros_like(f)
            loss = f.new_zeros(())
            all_tokens, all_vectors = [], []
            for k, (vectors, tokens, h) in enumerate(self.residuals(f, schedule)):
                f_hat = f_hat + h
                if num_scales is not None:
                    kept = kept + h * (num_scales > k).view(-1, 1, 1, 1)
                loss = loss + self.commitment_weight * F.mse_loss(f_hat.detach(), f)
                loss = loss + F.mse_loss(f_hat, f.detach())
                all_tokens.append(tokens)
                all_vectors.append(vectors)
            value = f_hat if num_scales is None else kept
            return QuantizerOutput(
                f_hat=f + (value - f).detach(),
                loss=loss / schedule.num_scales,
                tokens=torch.cat(all_tokens, dim=1),
                residuals=all_vectors,
                f=f,
            )
