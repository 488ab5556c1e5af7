"""The networks that `nextscale eval` measures with: flags -> networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from nextscale.cli.console import Output
from nextscale.cli.ranks import pick_device
from nextscale.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence, Set

    import torch

    from nextscale.cli.evaluate import EvalConfig
    from nextscale.eval.features import Network
    from nextscale.eval.inception import Inception

# The networks that the published figures are made with.
CLIP_MODELS = {"clip": "ViT-B-32-quickgelu", "cmmd": "ViT-L-14-336-quickgelu"}
ProtocolName = Literal["adm", "torch-fidelity", "clean", "pytorch-fid", "torchmetrics"]


@dataclass(frozen=True, kw_only=True)
class NetworkFlags:
    """Flags of the pass over the pictures."""

    protocol: ProtocolName = "adm"
    """How pictures are resized and normalised; see the docs."""
    weights: str | None = None
    """File of Inception's weights; None: NEXTSCALE_INCEPTION, then the caches."""
    download: bool = False
    """Fetch the weights if they are nowhere."""
    random_weights: int | None = None
    """Random weights from this seed instead, for trying things out: the record says invalid."""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16 is about twice as fast and changes the features a little; do not mix the two."""
    batch_size: int = 32
    """Pictures at once."""
    num_workers: int = 2
    """Processes that decode."""
    device: str | None = None
    """cpu, cuda, cuda:1; None: a GPU if there is one."""
    features_model: str = "scenes-features"
    """Feature network of fd_scenes and its relatives; a folder of `train features`."""
    clip_model: str | None = None
    """scenes-clip (bundled), an open_clip model folder, or a name of open_clip's list, such as
    ViT-L-14-quickgelu; None: what each metric was published with."""
    clip_weights: str | None = None
    """File of its weights; None: NEXTSCALE_CLIP, then the hub's cache."""
    dinov2_weights: str | None = None
    """timm's file of DINOv2 ViT-L/14; None: NEXTSCALE_DINOV2, then the hub's cache."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size must be 1 or more, got {self.batch_size}.")
        if self.num_workers < 0:
            raise UserError(f"num_workers must be 0 or more, got {self.num_workers}.")


def open_networks(
    config: NetworkFlags, taps: Set[str], prompts: Sequence[str] | None, output: Output
) -> tuple[Network | None, list[Network], list[str]]:
    """The networks that give the taps: for both sets, for the samples alone; and warnings."""
    from nextscale.eval.features import Joined
    from nextscale.eval.inception import TAPS

    found: list[Network] = []
    if taps & set(TAPS):
        found.append(open_inception(config, output))
    if "scenes" in taps:
        found.append(_small_features(config))
    if "dinov2" in taps:
        found.append(_dinov2(config))
    of_samples: list[Network] = []
    warnings: list[str] = []
    by_model: dict[str, list[str]] = {}
    for tap in sorted(taps & {"clip", "cosine", "cmmd"}):
        default = CLIP_MODELS["cmmd" if tap == "cmmd" else "clip"]
        by_model.setdefault(config.clip_model or default, []).append(tap)
    if len(by_model) > 1 and config.clip_weights is not None:
        raise UserError(
            f"clip and cmmd are of two models ({', '.join(by_model)}), and --clip_weights is one "
            "file: measure them one by one, or choose one --clip_model"
        )
    for name, wanted in by_model.items():
        from nextscale.eval.clip import ClipFeatures, clip_scorer, open_clip_model
        from nextscale.eval.scorers import Scored

        clip = open_clip_model(
            name, config.clip_weights, device=pick_device(config.device), download=config.download
        )
        if "cosine" in wanted and prompts is not None:
            of_samples.append(Scored({"cosine": clip_scorer(clip)}, prompts, clip.name))
            if cut := clip.vocabulary.cut(prompts):
                warnings.append(f"{cut} prompts are longer than {name} reads, and were cut")
        if wanted != ["cosine"]:
            found.append(ClipFeatures(clip, [tap for tap in wanted if tap != "cosine"]))
    return (Joined(found) if found else None), of_samples, warnings


def _small_features(config: NetworkFlags) -> Network:
    from nextscale.eval.feature_network import small_features

    return small_features(config.features_model, device=pick_device(config.device))


def _dinov2(config: NetworkFlags) -> Network:
    from nextscale.eval.dinov2 import WEIGHTS, DinoV2
    from nextscale.eval.weights import find_weights

    path = find_weights(WEIGHTS, config.dinov2_weights, download=config.download)
    return DinoV2(path, device=pick_device(config.device))


def open_inception(config: NetworkFlags, output: Output) -> Inception:
    """Inception in the chosen protocol."""
    from nextscale.eval.inception import Inception, random_weights, read_weights
    from nextscale.eval.weights import INCEPTION, find_weights

    if config.random_weights is not None:
        output.note("warning: random weights; the figures mean nothing")
        weights = random_weights(config.random_weights)
    else:
        weights = read_weights(find_weights(INCEPTION, config.weights, download=config.download))
    device = pick_device(config.device)
    return Inception(weights, config.protocol, device=device, precision=config.precision)


def open_lpips(config: EvalConfig) -> torch.nn.Module | None:
    """The network of LPIPS, if it is wanted."""
    if "lpips" not in config.metrics:
        return None
    from nextscale import storage
    from nextscale.eval.reconstruction import load_lpips
    from nextscale.eval.weights import ALEXNET, find_weights

    path = find_weights(ALEXNET, config.lpips_weights, download=config.download)
    weights: Any = storage.read_pickle(path)
    if not isinstance(weights, dict):
        raise UserError(f"{path} holds no weights of torchvision's AlexNet")
    return load_lpips(weights).to(pick_device(config.device))
