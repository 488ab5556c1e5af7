"""Optional losses of the tokenizer's trainer: LPIPS and a patch discriminator."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nextscale import storage
from nextscale.errors import UserError, missing_extra


class PatchDiscriminator(nn.Sequential):
    """Judges overlapping patches (pix2pix, arXiv 1611.07004): strided 4x4 convolutions.

    Group norm replaces the usual batch norm, so that a score does not depend on the batch.

    Args:
        channels: Width of the first layer, a multiple of 8.
        num_layers: Layers of stride 2.
    """

    def __init__(self, channels: int = 64, num_layers: int = 3) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        width = channels
        for i in range(1, num_layers + 1):
            wider = channels * min(2**i, 8)
            stride = 2 if i < num_layers else 1
            layers += [
                nn.Conv2d(width, wider, 4, stride, 1, bias=False),
                nn.GroupNorm(8, wider),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        super().__init__(*layers, nn.Conv2d(width, 1, 4, 1, 1))


class LPIPS(nn.Module):
    """Perceptual distance on VGG16 features, by torchmetrics (arXiv 1801.03924).

    Args:
        weights: Path of torchvision's VGG16 ImageNet state dict; None: torch's cache or download.

    Raises:
        UserError: If the weights are neither there nor downloadable.
    """

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        try:
            from torchmetrics.functional.image.lpips import _LPIPS  # pyright: ignore
        except ImportError as error:
            raise missing_extra("lpips_weight needs torchmetrics", "eval") from error
        from urllib.error import URLError

        try:
            # `pretrained` are the linear heads (bundled), `pnet_rand` leaves VGG16 to `_load`.
            self.net = _LPIPS(pretrained=True, net="vgg", pnet_rand=weights is not None)
        except (URLError, OSError) as error:
            raise UserError(
                "lpips_weight needs the VGG16 ImageNet weights (vgg16-397923af.pth, from "
                f"download.pytorch.org/models) and they could not be loaded ({error}). Pass the "
                "file with --lpips_weights PATH, or set --lpips_weight 0.",
                exit_code=1,
            ) from error
        if weights is not None:
            self._load(weights)
        self.requires_grad_(False).eval()

    def _load(self, path: str) -> None:
        """Copy torchvision's `features.N` tensors into the sliced network, in order."""
        state = storage.read_pickle(path)
        assert isinstance(state, dict)
        source = [v for k, v in state.items() if k.startswith("features.")]
        target = [p for n, p in self.net.net.named_parameters()]
        if [t.shape for t in source] != [t.shape for t in target]:
            raise UserError(f"{path} does not hold torchvision's VGG16 weights")
        with torch.no_grad():
            for own, given in zip(target, source, strict=True):
                own.copy_(given)

    def forward(
        self, images: Float[Tensor, "b 3 H W"], others: Float[Tensor, "b 3 H W"]
    ) -> Float[Tensor, ""]:
        """Mean distance; both in [-1, 1]."""
        return self.net(images, others).mean()


def adaptive_weight(
    reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor
) -> Tensor:
    """|grad of the reconstruction| / |grad of the adversarial loss| at the decoder's last layer.

    (VQGAN, arXiv 2012.09841, equation 7, delta = 1e-6; clamped to [0, 1e4].)
    """
    (a,) = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)
    (b,) = torch.autograd.grad(adversarial_loss, last_layer, retain_graph=True)
    return (a.norm() / (b.norm() + 1e-6)).clamp(0, 1e4).detach()
