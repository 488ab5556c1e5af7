"""Scorers that were trained on what people like: PickScore, HPSv2.1, ImageReward, aesthetics.

The package ships none of their weights; `weights.py` says where they are looked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nextscale import storage
from nextscale.data.images import to_uint8
from nextscale.errors import MissingExtraError, UserError, missing_extra
from nextscale.eval.clip import Clip, Vocabulary, clip_scorer, open_clip_model
from nextscale.eval.scorers import Scorer
from nextscale.eval.weights import (
    AESTHETIC,
    HPSV2,
    IMAGEREWARD,
    PICKSCORE,
    PICKSCORE_CONFIG,
    find_weights,
)

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's
Device = torch.device | str


def pickscore(path: str | None = None, *, device: Device = "cpu", download: bool = False) -> Scorer:
    """PickScore v1: logit scale times the cosine of picture and prompt, typically 18 to 24.

    Kirstain et al., arXiv 2305.01569. Pictures are resized on the shorter side by Pillow's bicubic
    filter and cropped; prompts are tokenised by open_clip, whose tokens are those of the released
    processor but for the padding, which the text tower does not see.

    Args:
        path: model.safetensors, with its config.json beside it; None: NEXTSCALE_PICKSCORE, the
            hub's cache, and the hub if `download`.
        device: Where to run.
        download: Fetch the weights if they are nowhere.

    Raises:
        UserError: With exit code 1 for weights that are not there; for those that do not fit.
    """
    try:
        from transformers import CLIPConfig, CLIPModel
    except ImportError as error:
        raise missing_extra("PickScore needs transformers", "align") from error
    found = find_weights(PICKSCORE, path, download=download)
    beside = found.with_name("config.json")
    if not beside.is_file() and download:
        beside = find_weights(PICKSCORE_CONFIG, download=True)
    config: Any = CLIPConfig.from_dict(storage.read_json(beside))
    model: Any = CLIPModel(config)
    stored = storage.read_tensors(found).items()
    # Older versions of transformers stored the constants 0, 1, 2, ...
    state = {k: v.float() for k, v in stored if not k.endswith("position_ids")}
    storage.load_state(model, state, found)
    model.eval().requires_grad_(False).to(device)
    vocabulary = Vocabulary(config.text_config.max_position_embeddings)
    transform = _transform(config.vision_config.image_size)

    @torch.inference_mode()
    def score(images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        pixels = torch.stack([transform(picture) for picture in _pictures(images)])
        found = model(input_ids=vocabulary(prompts).to(device), pixel_values=pixels.to(device))
        # Its forward pass returns unit vectors.
        cosines = (found.image_embeds * found.text_embeds).sum(dim=1)
        return (model.logit_scale.exp() * cosines).float().cpu()

    return score


def hpsv2(
    path: str | None = None,
    *,
    architecture: str = "ViT-H-14",
    device: Device = "cpu",
    download: bool = False,
) -> Scorer:
    """HPSv2.1: the cosine of picture and prompt by a CLIP tuned on preferences, about 0.2 to 0.35.

    Wu et al., arXiv 2306.09341. As in the released code, pictures are resized on the longer side
    and padded with black. It runs in float32; the released code in mixed precision.

    Args:
        path: HPS_v2.1_compressed.pt (or HPS_v2_compressed.pt for version 2.0); None:
            NEXTSCALE_HPSV2, the hub's cache, and the hub if `download`.
        architecture: open_clip's name of the network.
        device: Where to run.
        download: Fetch the weights if they are nowhere.

    Raises:
        UserError: With exit code 1 for weights that are not there; for those that do not fit.
    """
    try:
        import open_clip
    except ImportError as error:
        raise missing_extra("HPSv2 needs open_clip_torch", "align") from error
    found = find_weights(HPSV2, path, download=download)
    state = _mapping(storage.read_pickle(found), found)
    state = _mapping(state.get("state_dict", state), found)
    model: Any = open_clip.create_model(architecture)
    storage.load_state(model, {name: tensor.float() for name, tensor in state.items()}, found)
    size = model.visual.image_size
    preprocess = {
        "size": size if isinstance(size, int) else size[-1],
        "mean": MEAN,
        "std": STD,
        "interpolation": "bicubic",
        "resize_mode": "longest",
    }
    vocabulary = Vocabulary(model.context_length)
    return clip_scorer(Clip(model, vocabulary, preprocess, "HPSv2.1", device=device))


def imagereward(
    path: str | None = None, *, device: Device = "cpu", download: bool = False
) -> Scorer:
    """ImageReward 1.0: a BLIP head on picture and prompt, roughly standard normal.

    Xu et al., arXiv 2304.05977, by the authors' package `image-reward` (1.5 or later, which takes
    pictures in memory). It needs a version of transformers below 5, which this package's align
    extra does not: where both do not go into one environment, serve it over HTTP.

    Args:
        path: ImageReward.pt, with its med_config.json beside it; None: NEXTSCALE_IMAGEREWARD, the
            hub's cache, and the hub if `download`.
        device: Where to run.
        download: Fetch the weights if they are nowhere.

    Raises:
        MissingExtraError: If the package is not there.
        UserError: With exit code 1 for weights, or the package's own tokenizer, that are not there.
    """
    try:
        import ImageReward  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtraError(
            f"ImageReward needs the package image-reward ({error}). Install it with: pip install "
            "image-reward, in an environment with transformers below 5, and serve it as http:URL"
        ) from error
    found = find_weights(IMAGEREWARD, path, download=download)
    try:
        # It looks for med_config.json in the root, and for BERT's tokenizer in the hub's cache.
        model: Any = ImageReward.load(str(found), device=device, download_root=str(found.parent))
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"image-reward cannot open {found}: {reason}. It also needs med_config.json beside it "
            "and the tokenizer bert-base-uncased in the hub's cache",
            exit_code=1,
        ) from error

    @torch.inference_mode()
    def score(images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        pairs = zip(prompts, _pictures(images), strict=True)
        return torch.tensor([float(model.score(prompt, picture)) for prompt, picture in pairs])

    return score


def aesthetic(
    path: str | None = None,
    *,
    clip: Clip | None = None,
    device: Device = "cpu",
    download: bool = False,
) -> Scorer:
    """LAION's aesthetic score, about 1 to 10, typically 4.5 to 7; the prompts play no part.

    The predictor "sac+logos+ava1-l14-linearMSE" (Schuhmann, improved-aesthetic-predictor): a
    perceptron without activations on unit vectors of OpenAI's CLIP ViT-L/14.

    Args:
        path: The predictor's .pth; None: NEXTSCALE_AESTHETIC, the caches, and the public file if
            `download`.
        clip: The network under it; None: ViT-L/14 as `open_clip_model` finds it.
        device: Where to run.
        download: Fetch weights that are nowhere.

    Raises:
        UserError: With exit code 1 for weights that are not there; for those that do not fit.
    """
    found = find_weights(AESTHETIC, path, download=download)
    clip = clip or open_clip_model("ViT-L-14", device=device, download=download)
    head = _aesthetic_head(clip.dim)
    storage.load_state(head, _mapping(storage.read_pickle(found), found), found)
    head.eval().requires_grad_(False)

    @torch.inference_mode()
    def score(images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        pixels = list(to_uint8(images).permute(0, 2, 3, 1).cpu().numpy())
        return head(clip.images(pixels))[:, 0]

    return score


def _aesthetic_head(dim: int) -> nn.Module:
    """Linear layers and dropouts under the released names; 768 is the released width."""
    layers: list[nn.Module] = []
    for width, dropout in ((1024, 0.2), (128, 0.2), (64, 0.1), (16, None), (1, None)):
        layers.append(nn.Linear(dim, width))
        if dropout is not None:
            layers.append(nn.Dropout(dropout))
        dim = width
    head = nn.Sequential()
    head.add_module("layers", nn.Sequential(*layers))
    return head


def _transform(size: int) -> Any:
    import open_clip

    return open_clip.image_transform(
        size, is_train=False, mean=MEAN, std=STD, interpolation="bicubic"
    )


def _pictures(images: Tensor) -> list[Any]:
    from PIL import Image

    return [Image.fromarray(p) for p in to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()]


def _mapping(state: object, path: Path) -> Mapping[str, Any]:
    if not isinstance(state, Mapping):
        raise UserError(f"{path} holds no weights by name")
    return state
