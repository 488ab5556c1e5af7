"""Windows, losses and closed forms: what each is, by hand and by its own rules."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from nextscale.align.erasure.closed_form import edit_cross_attention, uce_weight
from nextscale.align.erasure.losses import (
    ear_hidden_loss,
    ear_logit_loss,
    entropy,
    filtered_cross_entropy,
    kl_divergence,
    window_means,
)
from nextscale.align.erasure.pairs import ConceptPair
from nextscale.align.erasure.windows import last_scale, token_windows
from nextscale.align.objectives import d2o_loss
from nextscale.errors import UserError
from nextscale.pipeline import NextScalePipeline
from nextscale.tokenizers import ScaleSchedule

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "align" / "misc.json").read_text())
VAR = ScaleSchedule((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- windows -----------------------------------------------------------------------------------


def test_windows_of_var_are_scales() -> None:
    lengths = [w.stop - w.start for w in token_windows(VAR, largest=None)]
    assert lengths == [30, 25, 36, 64, 100, 169, 256]
    assert [last_scale(VAR, w) for w in token_windows(VAR, largest=None)] == [3, 4, 5, 6, 7, 8, 9]
    split = [w.stop - w.start for w in token_windows(VAR, largest=64)]
    assert split == [30, 25, 36, 64, 64, 36, 64, 64, 41, 64, 64, 64, 64]


@given(
    sides=st.lists(
        st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6, unique=True
    ),
    smallest=st.integers(1, 80),
    largest=st.one_of(st.none(), st.integers(1, 80)),
)
def test_windows_partition_the_tokens(
    sides: list[tuple[int, int]], smallest: int, largest: int | None
) -> None:
    heights, widths = (sorted(side[i] for side in sides) for i in (0, 1))
    schedule = ScaleSchedule(tuple(dict.fromkeys(zip(heights, widths, strict=True))))
    windows = token_windows(schedule, smallest, largest)
    assert windows[0].start == 0
    assert windows[-1].stop == schedule.num_tokens
    assert all(a.stop == b.start for a, b in itertools.pairwise(windows))
    losses = noise(3, schedule.num_tokens)
    lengths = torch.tensor([w.stop - w.start for w in windows])
    sums = (window_means(losses, windows) * lengths * 3).sum()
    torch.testing.assert_close(sums, losses.sum(), atol=1e-3, rtol=1e-4)


def test_windows_refuse_no_tokens() -> None:
    with pytest.raises(UserError, match="window_smallest"):
        token_windows(VAR, 0)


# ---- losses ------------------------------------------------------------------------------------


def test_ear_moves_beyond_the_modified_prompt() -> None:
    told, neutral = noise(2, 5, 3, seed=1), noise(2, 5, 3, seed=2)
    target = neutral - 0.5 * (told - neutral)
    assert ear_hidden_loss(target, told, neutral, 0.5).abs().max() < 1e-12
    by_hand = ((told - target) ** 2).mean(-1)
    torch.testing.assert_close(ear_hidden_loss(told, told, neutral, 0.5), by_hand)
    assert ear_logit_loss(target, told, neutral, 0.5).abs().max() < 1e-6


@pytest.mark.parametrize("eta", [0.0, 1.0, 7.0])
def test_equal_prompts_lose_nothing(eta: float) -> None:
    same = noise(2, 5, 3)
    assert ear_hidden_loss(same, same, same, eta).abs().max() == 0
    assert ear_logit_loss(same, same, same, eta).abs().max() < 1e-6


def test_targets_get_no_gradient() -> None:
    parts = [noise(1, 4, 3, seed=i).requires_grad_() for i in range(3)]
    for loss in (ear_hidden_loss, ear_logit_loss):
        for part in parts:
            part.grad = None
        loss(parts[0], parts[1], parts[2]).sum().backward()
        assert parts[0].grad is not None
        assert parts[1].grad is None
        assert parts[2].grad is None


def test_right_tokens_are_filtered_out() -> None:
    p = torch.tensor([[[0.6, 0.3, 0.1], [0.4, 0.35, 0.25], [0.1, 0.45, 0.45]]])
    tokens = torch.tensor([[0, 0, 2]])
    expected = torch.tensor([[0.0, -math.log(0.4), -math.log(0.45)]])
    torch.testing.assert_close(filtered_cross_entropy(p.log(), tokens), expected)


def test_kl_and_entropy_are_torch_s() -> None:
    a, b = noise(2, 4, 6, seed=1), noise(2, 4, 6, seed=2)
    kl = F.kl_div(b.log_softmax(-1), a.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(kl_divergence(a, b), kl)
    torch.testing.assert_close(entropy(a), torch.distributions.Categorical(logits=a).entropy())


def test_d2o_is_the_reference_s() -> None:
    case = GOLDEN["d2o"]
    found = d2o_loss(
        torch.tensor([case["policy_selfgen"]], dtype=torch.float64),
        torch.tensor([case["ref_minus_selfgen"]], dtype=torch.float64),
        torch.tensor([case["policy_negative"]], dtype=torch.float64),
        torch.tensor([case["ref_plus_negative"]], dtype=torch.float64),
        beta=case["beta"],
        alpha=case["alpha"],
    )
    assert found.item() == pytest.approx(case["loss"], abs=1e-12)


# ---- closed forms ------------------------------------------------------------------------------


def test_uce_moves_concepts_and_keeps_the_rest() -> None:
    weight = noise(7, 12).double()
    concepts, places, kept = (noise(n, 12, seed=s).double() for n, s in ((2, 1), (2, 2), (8, 3)))
    edited = uce_weight(weight, concepts, places, kept, ridge=1e-9)
    torch.testing.assert_close(concepts @ edited.T, places @ weight.T, atol=1e-5, rtol=0)
    torch.testing.assert_close(kept @ edited.T, kept @ weight.T, atol=1e-5, rtol=0)


def test_uce_of_equal_tokens_changes_nothing() -> None:
    weight, tokens = noise(7, 12), noise(3, 12, seed=1)
    torch.testing.assert_close(uce_weight(weight, tokens, tokens, tokens), weight)


def test_uce_gives_a_word_the_place_of_another() -> None:
    """Keys and values of "red" become those of "blue"; a prompt that is kept keeps its own."""
    model = NextScalePipeline.from_pretrained("scenes", dtype="float32").transformer

    @torch.no_grad()
    def keys_values(prompt: str) -> torch.Tensor:
        condition = model.condition([prompt])
        assert condition.context is not None
        return torch.stack([block.cross.kv(condition.context) for block in model.blocks])  # pyright: ignore

    prompts = ("a red circle", "a blue circle", "a green square")
    before = [keys_values(prompt) for prompt in prompts]
    pairs = [ConceptPair("a red circle", "a blue circle", "red", "blue")]
    edit_cross_attention(model, pairs, ["a green square", "a blue circle"], preserve=10.0)
    red, blue, green = (keys_values(prompt) for prompt in prompts)
    apart = (before[0] - before[1]).norm()
    assert (red - before[1]).norm() < 0.5 * apart < (red - before[0]).norm()
    assert (blue - before[1]).norm() < 0.4 * apart
    assert (green - before[2]).norm() < 0.4 * apart
