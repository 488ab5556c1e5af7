"""Zero-shot editing by token forcing: in-painting, out-painting, class-conditional editing.

(VAR, arXiv 2404.02905, section 5.4; next-scale.md 3.3.) All tokens are predicted; where the source
is kept its code vectors replace the predicted ones, so that it acts through the accumulated F only.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nextscale.errors import UserError
from nextscale.tokenizers import ScaleSchedule
from nextscale.var.sampling import Forcing


def box_mask(
    schedule: ScaleSchedule,
    box: tuple[float, float, float, float],
    mode: Literal["inpaint", "outpaint"],
) -> Float[Tensor, "h w"]:
    """Keep-mask on the latent grid: 1 where the source stays.

    Args:
        schedule: Scales.
        box: (top, left, bottom, right) as fractions of the side in [0, 1]; corners are rounded to
            cells, half to even.
        mode: inpaint keeps the outside of the box, outpaint the inside.

    Raises:
        UserError: If the box is outside the picture, empty, or empty once it is rounded.
    """
    top, left, bottom, right = box
    if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
        raise UserError(
            f"box must be top left bottom right with 0 <= top < bottom <= 1 and "
            f"0 <= left < right <= 1, got {box}"
        )
    height, width = schedule.grid
    rows = slice(round(top * height), round(bottom * height))
    columns = slice(round(left * width), round(right * width))
    inside = torch.zeros(height, width)
    inside[rows, columns] = 1
    if not inside.any():
        raise UserError(
            f"box {box} is smaller than a cell of the {height}x{width} latent grid; enlarge it"
        )
    return 1 - inside if mode == "inpaint" else inside


def keep_tokens(
    schedule: ScaleSchedule, tokens: Int[Tensor, "b t"], mask: Float[Tensor, "h w"]
) -> Forcing:
    """Forcing that keeps the source's tokens where the mask, resized to each scale, exceeds 1/2.

    Scales of at most 3 tokens are kept whole.

    Args:
        schedule: Scales.
        tokens: Of the source.
        mask: Keep-mask on the latent grid, 1 = keep.
    """
    parts: list[Bool[Tensor, " l"]] = []
    for side, length in zip(schedule.sides, schedule.lengths, strict=True):
        small = F.interpolate(mask[None, None].float(), size=side, mode="bilinear")
        parts.append((small > 0.5).flatten() if length > 3 else torch.ones(length).bool())
    flat = torch.cat(parts).to(tokens.device)
    return Forcing(tokens, flat.expand(len(tokens), -1))
