"""Erasure losses, token by token: student on the concept's prompt, teacher on both prompts.

All streams see the same tokens (a shared prefix), so that position t of each is the same place of
the same picture. s: student given the concept's prompt; t: teacher given it; n: teacher given the
modified prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nextscale.align.objectives.kl import categorical_kl


def ear_hidden_loss(
    student: Float[Tensor, "b u d"],
    teacher: Float[Tensor, "b u d"],
    neutral: Float[Tensor, "b u d"],
    eta: float = 1.0,
) -> Float[Tensor, "b u"]:
    """|| s - sg[n - eta (t - n)] ||^2 / d, of the input of the head (EAR, arXiv 2506.20151).

    Differs from the released code: all three see their full context and the same tokens; its
    "target" and "neutral" streams are one.
    """
    target = neutral - eta * (teacher - neutral)
    return F.mse_loss(student, target.detach(), reduction="none").mean(dim=-1)


def ear_logit_loss(
    student: Float[Tensor, "b u v"],
    teacher: Float[Tensor, "b u v"],
    neutral: Float[Tensor, "b u v"],
    eta: float = 1.0,
) -> Float[Tensor, "b u"]:
    """KL(softmax(n - eta (t - n)) || softmax(s)): the same on logits."""
    target = (neutral - eta * (teacher - neutral)).detach()
    return kl_divergence(target, student)


def kl_divergence(
    first: Float[Tensor, "b u v"], second: Float[Tensor, "b u v"]
) -> Float[Tensor, "b u"]:
    """KL(softmax(first) || softmax(second)) in nats, in float32."""
    return categorical_kl(first.float().log_softmax(dim=-1), second.float().log_softmax(dim=-1))


def filtered_cross_entropy(
    student: Float[Tensor, "b u v"], tokens: Int[Tensor, "b u"]
) -> Float[Tensor, "b u"]:
    """-log p_s(r) where p_s(r) < 1/2, 0 elsewhere (S-VARE, arXiv 2509.22400, on index heads).

    r are the teacher's tokens of the modified prompt. The paper filters the bits of a bitwise head:
    a bit is wrong if its cross-entropy is above ln 2, which for an index is p < 1/2. The mean is to
    be taken over all tokens, kept or not, so that a sample that is nearly right moves little.
    """
    entropy = F.cross_entropy(student.transpose(1, 2).float(), tokens, reduction="none")
    return entropy * wrong_tokens(student, tokens)


def wrong_tokens(
    student: Float[Tensor, "b u v"], tokens: Int[Tensor, "b u"]
) -> Bool[Tensor, "b u"]:
    """Where the student gives a token less than one half."""
    with torch.no_grad():
        p = student.float().softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]
    return p < 0.5


def entropy(logits: Float[Tensor, "b u v"]) -> Float[Tensor, "b u"]:
    """Of softmax(logits), in nats."""
    logp = logits.float().log_softmax(dim=-1)
    return -(logp.exp() * logp).sum(dim=-1)


def window_means(losses: Float[Tensor, "b u"], windows: Sequence[slice]) -> Float[Tensor, " w"]:
    """Mean loss of each window, which EAR's gate compares with a threshold.

    EAR compares the sum over a window with one number, so that its threshold per token falls with
    the window's length.
    """
    return torch.stack([losses[:, window].mean() for window in windows])
