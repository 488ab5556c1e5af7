"""Rewards that are computed from pixels alone, without any network."""

from __future__ import annotations

import io
from hashlib import blake2b

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageColor
from torch import Tensor

from nextscale.align.rewards.reward import CheckedReward, Prompts, as_reward
from nextscale.data.images import to_uint8
from nextscale.errors import UserError, require

JPEG_QUALITY = 95
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's mode L
_INF = float("inf")


def jpeg_reward(sign: int, *, divisor: float = 1.0) -> CheckedReward:
    """How little (sign -1) or how much (sign 1) a picture takes as a JPEG, in kB of 1000 bytes.

    Compressibility and incompressibility of DDPO (Black et al., arXiv 2305.13301):
    Pillow at quality 95, the header included.

    Args:
        sign: -1 or 1.
        divisor: Of the kB; 1 in DDPO, 500 in Flow-GRPO.
    """
    require("divisor", divisor, divisor > 0, "be above 0")

    def kilobytes(images: Float[Tensor, "b 3 h w"], prompts: Prompts) -> list[float]:
        return [sign * _jpeg_size(pixels) / 1000 / divisor for pixels in _pixels(images)]

    name = "jpeg_compressibility" if sign < 0 else "jpeg_incompressibility"
    bounds = (-_INF, 0.0) if sign < 0 else (0.0, _INF)
    return as_reward(kilobytes, name, range=bounds, needs_prompt=False)


def brightness_reward(target: float = 1.0) -> CheckedReward:
    """Minus the squared distance of a picture's mean luma from a target.

    Luma is 0.299 R + 0.587 G + 0.114 B of the stored values, without undoing their gamma.

    Args:
        target: In [0, 1].
    """
    require("the target of brightness", target, 0 <= target <= 1, "lie in [0, 1]")

    def distance(images: Float[Tensor, "b 3 h w"], prompts: Prompts) -> Float[Tensor, " b"]:
        means = images.float().mean(dim=(2, 3))
        return -(means @ means.new_tensor(LUMA) - target).square()

    return as_reward(
        distance, "brightness", range=(-1.0, 0.0), needs_prompt=False, differentiable=True
    )


def color_reward(color: str) -> CheckedReward:
    """Minus the squared distance of a picture's mean colour from a target, in [0, 1]^3.

    Args:
        color: A CSS name or hexadecimal digits, such as "red" or "#ff8800".
    """
    try:
        target = ImageColor.getrgb(color)[:3]
    except ValueError as error:
        raise UserError(
            f'"{color}" is no colour. Give a CSS name such as red, or #rrggbb'
        ) from error

    def distance(images: Float[Tensor, "b 3 h w"], prompts: Prompts) -> Float[Tensor, " b"]:
        means = images.float().mean(dim=(2, 3))
        return -(means - means.new_tensor(target) / 255).square().sum(dim=1)

    return as_reward(distance, "color", range=(-3.0, 0.0), needs_prompt=False, differentiable=True)


def random_reward() -> CheckedReward:
    """A number in [0, 1) that follows from the 8-bit pixels and the prompt, and means nothing.

    A control: no policy should learn anything from it, yet a picture keeps its reward.
    """

    def draw(images: Float[Tensor, "b 3 h w"], prompts: Prompts) -> list[float]:
        return [
            int.from_bytes(
                blake2b(pixels.tobytes() + str(prompt).encode(), digest_size=3).digest(), "big"
            )
            / 2**24  # float32 holds 24 bits
            for pixels, prompt in zip(_pixels(images), prompts, strict=True)
        ]

    return as_reward(draw, "random", range=(0.0, 1.0))


def png(image: Float[Tensor, "3 h w"]) -> bytes:
    """A picture in [0, 1] as the bytes of a PNG file."""
    buffer = io.BytesIO()
    pixels = to_uint8(image).permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _pixels(images: Float[Tensor, "b 3 h w"]) -> np.ndarray:
    return to_uint8(images.detach()).permute(0, 2, 3, 1).cpu().numpy()


def _jpeg_size(pixels: np.ndarray) -> int:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.tell()
