"""Text in pictures: how much of the quoted words a reader finds in them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nextscale.align.rewards.reward import CheckedReward, Prompts, as_reward, texts
from nextscale.data.images import to_uint8
from nextscale.errors import MissingExtraError, UserError, missing_extra

Recogniser = Callable[[Float[Tensor, "b 3 h w"]], Sequence[str]]
"""Pictures in [0, 1] -> all text in each, line after line."""

_QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')


def ocr_reward(recognise: Recogniser) -> CheckedReward:
    """1 - min(edit distance, length) / length between the text in a picture and the wanted text.

    The reward of Flow-GRPO (arXiv 2505.05470): the wanted text stands in double quotes in the
    prompt (the first such part), both are lower-cased and lose their spaces, and a text that holds
    the wanted one is at distance 0. Beyond it, curly quotes count too, all white space is dropped,
    and a prompt without quotes is unscorable where the released code fails.

    Args:
        recognise: Reads the text; see `open_recogniser`.
    """
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise missing_extra('the reward "ocr" needs rapidfuzz', "align") from error

    def similarity(images: Float[Tensor, "b 3 h w"], prompts: Prompts) -> list[float]:
        wanted = [_target(prompt) for prompt in texts(prompts, "ocr")]
        read = [_plain(text) for text in recognise(images)]
        if len(read) != len(wanted):
            raise UserError(
                f"the recogniser read {len(read)} texts from {len(wanted)} pictures; it must give "
                "one per picture, an empty one where there is none",
                exit_code=1,
            )
        values = []
        for text, target in zip(read, wanted, strict=True):
            if not target:
                values.append(math.nan)
                continue
            distance = 0 if target in text else Levenshtein.distance(text, target)
            values.append(1 - min(distance, len(target)) / len(target))
        return values

    return as_reward(similarity, "ocr", range=(0.0, 1.0))


def open_recogniser(
    name: str | None = None, language: str = "en", device: torch.device | str = "cpu"
) -> Recogniser:
    """A reader of text by an installed package.

    Both packages fetch their own weights when first used, unless they lie in their caches.

    Args:
        name: paddleocr (3 or later; Flow-GRPO's choice) or easyocr; None: the one that is there.
        language: As the package calls it.
        device: Where easyocr runs; paddleocr chooses by itself.

    Raises:
        UserError: For another name.
        MissingExtraError: If the package is not installed.
    """
    if name is not None and name not in _PACKAGES:
        raise UserError(f'there is no OCR package "{name}" here: use {" or ".join(_PACKAGES)}')
    for package in (name,) if name else _PACKAGES:
        if find_spec(package) is not None:
            return _PACKAGES[package](language, device)
    wanted = name or "paddleocr or easyocr"
    raise MissingExtraError(
        f'the reward "ocr" needs {wanted}, which is not installed. Install it with: pip install '
        f"{name or 'easyocr'}"
    )


def _paddleocr(language: str, device: torch.device | str) -> Recogniser:
    import paddleocr  # pyright: ignore[reportMissingImports]

    reader: Any = paddleocr.PaddleOCR(
        lang=language,
        use_doc_orientation_classify=False,
        use_doc_unwarping=False,
        use_textline_orientation=False,
    )

    def recognise(images: Float[Tensor, "b 3 h w"]) -> list[str]:
        found = []
        for pixels in _pixels(images):
            (page,) = reader.predict(np.ascontiguousarray(pixels[..., ::-1]))  # it reads BGR
            found.append(" ".join(page["rec_texts"]))
        return found

    return recognise


def _easyocr(language: str, device: torch.device | str) -> Recogniser:
    import easyocr  # pyright: ignore[reportMissingImports]

    reader: Any = easyocr.Reader([language], gpu=torch.device(device).type == "cuda", verbose=False)

    def recognise(images: Float[Tensor, "b 3 h w"]) -> list[str]:
        return [" ".join(reader.readtext(pixels, detail=0)) for pixels in _pixels(images)]

    return recognise


_PACKAGES: dict[str, Callable[[str, torch.device | str], Recogniser]] = {
    "paddleocr": _paddleocr,
    "easyocr": _easyocr,
}


def _pixels(images: Tensor) -> np.ndarray:
    return to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()


def _target(prompt: str) -> str:
    found = _QUOTED.search(prompt)
    return _plain(found[1] or found[2]) if found else ""


def _plain(text: str) -> str:
    return "".join(text.split()).lower()
