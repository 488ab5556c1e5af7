"""A reward that a server computes: JSON and PNG over HTTP, never pickle."""

from __future__ import annotations

import base64
import json
import logging
import math
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError

from jaxtyping import Float
from torch import Tensor

from nextscale.align.rewards.pixels import png
from nextscale.align.rewards.reward import CheckedReward, Metadata, Prompts, as_reward
from nextscale.errors import UserError, require

logger = logging.getLogger(__name__)
_WORTH_A_RETRY = (408, 429)  # of the answers that blame the request; those above 499 all are


def http_reward(
    url: str,
    *,
    name: str = "http",
    timeout: float = 60.0,
    retries: int = 3,
    backoff: float = 1.0,
    batch_size: int = 64,
) -> CheckedReward:
    """A reward of a server, which may be another machine or another environment.

    Each batch is one POST of JSON: {"images": [PNG in base64, ...], "prompts": [text or class
    label, ...], "metadata": [{...}, ...]}. The answer is {"scores": [number or null, ...]}, null:
    unscorable. Public reward servers exchange pickles, which can run any code, and JPEGs, whose
    artefacts lower scores; this does neither. A batch without an answer after all retries is NaN.

    Args:
        url: http:// or https://.
        name: What to call it.
        timeout: Seconds after which a request without a whole answer has failed.
        retries: Requests after a failed one.
        backoff: Seconds before the first of them; each further one waits twice as long.
        batch_size: Pictures per request.

    Raises:
        UserError: For another kind of address; in use, with exit code 1, if the server refuses the
            request (404 and its like), or metadata is no JSON.
    """
    if not url.startswith(("http://", "https://")):
        raise UserError(
            f'the address of an HTTP reward starts with http:// or https://, got "{url}"'
        )
    require("timeout", timeout, timeout > 0, "be above 0")
    require("retries", retries, retries >= 0, "be 0 or more")
    require("batch_size", batch_size, batch_size > 0, "be above 0")

    def ask(images: Float[Tensor, "b 3 h w"], prompts: Prompts, metadata: Metadata) -> list[float]:
        rows = list(metadata) or [{} for _ in prompts]
        values: list[float] = []
        for start in range(0, len(images), batch_size):
            part = slice(start, start + batch_size)
            body = _body(images[part], prompts[part], rows[part], name)
            size = len(prompts[part])
            scores, problem = _patiently(url, body, size, timeout, retries, backoff)
            if scores is None:
                logger.warning(
                    'the reward "%s" has no answer of %s for %d pictures, which are left out: %s',
                    *(name, url, size, problem),
                )
            values += scores or [math.nan] * size
        return values

    return as_reward(ask, name)


def _body(images: Tensor, prompts: Prompts, metadata: Metadata, name: str) -> bytes:
    pictures = [base64.b64encode(png(image)).decode() for image in images]
    content = {"images": pictures, "prompts": list(prompts), "metadata": list(metadata)}
    try:
        return json.dumps(content, default=asdict).encode()
    except (TypeError, ValueError) as error:
        raise UserError(
            f'the reward "{name}" sends metadata as JSON, and this holds something else: {error}',
            exit_code=1,
        ) from error


def _patiently(
    url: str, body: bytes, size: int, timeout: float, retries: int, backoff: float
) -> tuple[list[float] | None, str]:
    """The scores of a batch, or None and what was wrong with the last try."""
    problem = ""
    for attempt in range(retries + 1):
        if attempt:
            time.sleep(backoff * 2 ** (attempt - 1))
        try:
            return _scores(_post(url, body, timeout), size), ""
        except HTTPError as error:
            error.close()
            problem = f"HTTP {error.code} {error.reason}"
            if error.code < 500 and error.code not in _WORTH_A_RETRY:
                raise UserError(
                    f"{url} refuses the request: {problem}. Check the address, and that the server "
                    'takes POST with {"images", "prompts", "metadata"}',
                    exit_code=1,
                ) from error
        except (OSError, HTTPException, ValueError) as error:  # no connection, or no such answer
            problem = str(error) or type(error).__name__
    return None, problem


def _post(url: str, body: bytes, timeout: float) -> Any:
    request = urllib.request.Request(
        url, data=body, headers={"Content-Type": "application/json"}, method="POST"
    )
    deadline = time.monotonic() + timeout
    parts = []
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        while part := answer.read1():  # what is there: a slow server cannot stretch the time
            parts.append(part)
            if time.monotonic() > deadline:
                raise TimeoutError(f"no whole answer within {timeout:g} s")
    return json.loads(b"".join(parts))


def _scores(answer: Any, size: int) -> list[float]:
    scores: Sequence[Any] | None = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list):
        raise ValueError('the answer is not {"scores": [...]}')
    if len(scores) != size:
        raise ValueError(f"the answer has {len(scores)} scores for {size} pictures")
    values = [math.nan if score is None else score for score in scores]
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isinf(value):
            raise ValueError(f"the answer has the score {value!r}, which is no finite number")
    return [float(value) for value in values]
