"""Inception-v3 of 2015-12-05, the network of FID, with the taps of every metric in one pass."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from nextscale import storage
from nextscale.errors import UserError, missing_extra
from nextscale.eval.features import exact_convolutions
from nextscale.eval.protocols import Protocol, get_protocol, prepare

TAPS = {"pool": 2048, "spatial": 2023, "logits": 1008}
"""Widths: the pooled features; the ADM suite's spatial ones; logits without the bias."""

# Order of the network's parts up to the last feature map.
_TRUNK = (
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1"),
    *("Conv2d_4a_3x3", "MaxPool_2", "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b"),
    *("Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c"),
)


class Inception:
    """Features of pictures by torch-fidelity's network, read through one protocol.

    Differences from torch-fidelity's own forward pass: channels-last memory and batch norms folded
    into the convolutions (relative difference about 5e-7), resizing as two matrix products.

    Args:
        weights: State dict of either public file (torch-fidelity's or pytorch-fid's).
        protocol: Its name.
        device: Where to run.
        precision: "float32" (TF32 off), or "bf16": about twice as fast on CPUs with AMX,
            features off by less than 1e-2 (relative, a test); never mix the two.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        protocol: str = "adm",
        *,
        device: torch.device | str = "cpu",
        precision: str = "float32",
    ) -> None:
        self.taps: Mapping[str, int] = TAPS
        self.labels: Mapping[str, str] = dict.fromkeys(TAPS, protocol)
        self.protocol: Protocol = get_protocol(protocol)
        if precision not in ("float32", "bf16"):
            raise UserError(f'precision is "{precision}", but must be float32 or bf16')
        self.device, self.precision = torch.device(device), precision
        self.sha256 = storage.fingerprint(weights)
        network = _network()
        storage.load_state(network, weights, "the Inception file")
        self._unbiased = network.fc.weight.detach().to(self.device)  # pyright: ignore
        _fold(network, keep=network.Mixed_6d.branch1x1)  # pyright: ignore
        network.to(self.device, memory_format=torch.channels_last)  # pyright: ignore
        self._trunk = nn.Sequential(*(getattr(network, name) for name in _TRUNK))
        self._spatial: Tensor | None = None
        network.Mixed_6d.branch1x1.conv.register_forward_hook(self._keep_spatial)  # pyright: ignore

    def _keep_spatial(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self._spatial = output

    @torch.inference_mode()
    def __call__(
        self, images: Sequence[np.ndarray], indices: Sequence[int] = ()
    ) -> dict[str, Float[Tensor, "b _"]]:
        """Features of uint8 RGB pictures [h, w, 3], float32 per tap of `TAPS`."""
        x = prepare(images, self.protocol, self.device).to(memory_format=torch.channels_last)
        half = self.precision == "bf16"
        with (
            torch.autocast(self.device.type, torch.bfloat16, enabled=half),
            exact_convolutions(),
        ):
            pool = self._trunk(x).float().mean(dim=(2, 3))
        assert self._spatial is not None
        # The ADM suite flattens 17 x 17 x 7 with the channels last (TensorFlow's order).
        spatial = self._spatial[:, :7].float().permute(0, 2, 3, 1).flatten(1)
        return {"pool": pool, "spatial": spatial, "logits": pool @ self._unbiased.T}

    def fingerprint(self) -> dict[str, str]:
        """What two sets of features must share to be compared."""
        protocol = self.protocol
        return {
            "network": "inception-v3-2015-12-05",
            "weights": self.sha256,
            "protocol": protocol.name,
            "resize": protocol.resize,
            "normalise": f"(x - {protocol.centre:g}) / {protocol.divisor:g}",
            "precision": self.precision,
        }


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict of an Inception file, read without running code from it.

    Raises:
        UserError: If the file is damaged, or holds another network.
    """
    state = storage.read_pickle(path)
    if not isinstance(state, dict) or "Mixed_7c.branch_pool.conv.weight" not in state:
        raise UserError(f"{path} does not hold the weights of FID's Inception")
    return state


def random_weights(seed: int) -> dict[str, Tensor]:
    """Weights of the right shapes, for tests and benchmarks; their figures mean nothing."""
    generator = torch.Generator().manual_seed(seed)
    network = _network()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.uniform_(module.weight, 0.8, 1.2, generator=generator)
            nn.init.normal_(module.bias, 0.0, 0.1, generator=generator)
            nn.init.normal_(module.running_mean, 0.0, 0.1, generator=generator)
            nn.init.uniform_(module.running_var, 0.8, 1.2, generator=generator)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.02, generator=generator)
            nn.init.zeros_(module.bias)
    return network.state_dict()


def _network() -> nn.Module:
    """torch-fidelity's network with weights that nobody has set."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise missing_extra("FID needs torch-fidelity", "eval") from error

    class Blank(FeatureExtractorInceptionV3):
        # Their constructor unpickles a file without restrictions; ours reads it safely, later.
        def load_state_dict(self, *args: object, **keywords: object) -> None:  # pyright: ignore
            pass

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    network = Blank("inception", ["2048"], feature_extractor_weights_path=empty)
    network.__class__ = FeatureExtractorInceptionV3  # pyright: ignore
    return network


def _fold(network: nn.Module, keep: nn.Module) -> None:
    """Batch norms into the convolutions before them, but for `keep`, whose convolution is a tap."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    for module in network.modules():
        if isinstance(getattr(module, "bn", None), nn.BatchNorm2d) and module is not keep:
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)  # pyright: ignore
            module.bn = nn.Identity()
