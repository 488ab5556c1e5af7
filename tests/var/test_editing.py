"""Editing by token forcing: which cells and tokens stay, and that they do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.errors import UserError
from nextscale.tokenizers import MultiscaleVQ, ScaleSchedule
from nextscale.var import NextScaleTransformer, SamplingConfig, sample
from nextscale.var.editing import box_mask, keep_tokens

SCHEDULE = ScaleSchedule([1, 2, 3, 4])
HALF = (0.0, 0.5, 1.0, 1.0)


@pytest.fixture(scope="module")
def source(tiny_tokenizer: MultiscaleVQ) -> Tensor:
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return tiny_tokenizer.encode(images)


def test_inpainting_keeps_the_outside_of_the_box_and_outpainting_the_inside() -> None:
    inside = [[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0]]
    box = (0.25, 0.25, 0.75, 1.0)
    assert box_mask(SCHEDULE, box, "outpaint").tolist() == inside
    assert box_mask(SCHEDULE, box, "inpaint").tolist() == [[1 - v for v in row] for row in inside]


@pytest.mark.parametrize(
    ("edge", "cells"),
    # On a grid of 4: 0.5 -> 0 and 2.5 -> 2 go to the even number, 1.5 -> 2 and 3.5 -> 4 too.
    [(0.125, 0), (0.13, 1), (0.375, 2), (0.37, 1), (0.625, 2), (0.63, 3), (0.875, 4), (0.87, 3)],
)
def test_corners_are_rounded_to_cells_half_to_even(edge: float, cells: int) -> None:
    if cells < 4:
        mask = box_mask(SCHEDULE, (edge, 0.0, 1.0, 1.0), "outpaint")
        assert mask[:, 0].tolist() == [0] * cells + [1] * (4 - cells)
    if cells > 0:
        mask = box_mask(SCHEDULE, (0.0, 0.0, 1.0, edge), "outpaint")
        assert mask[0].tolist() == [1] * cells + [0] * (4 - cells)


def test_boxes_follow_the_sides_of_a_non_square_grid() -> None:
    mask = box_mask(ScaleSchedule([1, (2, 6)]), (0.5, 0.5, 1.0, 1.0), "outpaint")
    assert mask.tolist() == [[0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1]]


@pytest.mark.parametrize(
    "box",
    [(0.5, 0.0, 0.5, 1.0), (0.6, 0.0, 0.4, 1.0), (-0.1, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 1.2)],
)
def test_boxes_that_are_empty_or_outside_are_refused(box: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match="box must be top left bottom right"):
        box_mask(SCHEDULE, box, "inpaint")  # type: ignore[arg-type]


def test_a_box_smaller_than_a_cell_is_refused() -> None:
    with pytest.raises(UserError, match="smaller than a cell of the 4x4 latent grid"):
        box_mask(SCHEDULE, (0.5, 0.0, 0.55, 1.0), "inpaint")


def test_tokens_stay_where_the_resized_mask_exceeds_one_half(source: Tensor) -> None:
    mask = box_mask(SCHEDULE, (0.0, 0.0, 1.0, 0.75), "outpaint")
    parts = SCHEDULE.split(keep_tokens(SCHEDULE, source, mask).mask)
    assert parts[0].all()
    for part, side in zip(parts[1:], (2, 3, 4), strict=True):
        small = F.interpolate(mask[None, None], size=(side, side), mode="bilinear") > 0.5
        assert torch.equal(part, small.flatten().expand(2, -1))
    assert parts[1][0].tolist() == [True, False] * 2  # half of a cell kept is not enough


def test_scales_of_at_most_three_tokens_are_kept_whole() -> None:
    schedule = ScaleSchedule([1, (1, 2), (3, 1), 2, 4])
    nothing = torch.zeros(4, 4)
    kept = keep_tokens(schedule, torch.zeros(1, schedule.num_tokens, dtype=torch.long), nothing)
    counts = [part.sum().item() for part in schedule.split(kept.mask)]
    assert counts == [1, 2, 3, 0, 0]


@pytest.mark.parametrize("smooth", [False, True])
def test_kept_tokens_are_in_the_result_and_the_others_are_drawn(
    tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ, source: Tensor, smooth: bool
) -> None:
    forcing = keep_tokens(SCHEDULE, source, box_mask(SCHEDULE, HALF, "inpaint"))
    condition = tiny_model.condition([1, 2])
    settings = SamplingConfig(guidance_scale=3.0, more_smooth=smooth)
    steps = list(
        sample(tiny_model, tiny_tokenizer, condition, settings, seeds=[0, 1], forcing=forcing)
    )
    tokens = torch.cat([step.tokens for step in steps], dim=1)
    predicted = torch.cat([step.predicted for step in steps], dim=1)
    kept = forcing.mask
    assert 0 < kept.sum() < kept.numel()
    assert torch.equal(tokens[kept], source[kept])
    assert torch.equal(tokens[~kept], predicted[~kept])
    assert not torch.equal(predicted[kept], source[kept])  # predicted all the same
    assert not torch.equal(tokens[~kept], source[~kept])
    if not smooth:
        *_, (f_hat, _) = tiny_tokenizer.quantizer.accumulate(tokens, SCHEDULE)
        assert torch.equal(steps[-1].f_hat, f_hat)


def test_keeping_everything_returns_the_source(
    tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ, source: Tensor
) -> None:
    forcing = keep_tokens(SCHEDULE, source, torch.ones(4, 4))
    condition = tiny_model.condition([1, 2])
    settings = SamplingConfig(more_smooth=True)
    *_, last = sample(
        tiny_model, tiny_tokenizer, condition, settings, seeds=[0, 1], forcing=forcing
    )
    expected = tiny_tokenizer.decode(source)
    torch.testing.assert_close(tiny_tokenizer.decode_latents(last.f_hat), expected)


def test_the_source_acts_on_the_prediction_through_the_accumulated_map_only(
    tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ, source: Tensor
) -> None:
    forcing = keep_tokens(SCHEDULE, source, torch.zeros(4, 4))
    condition = tiny_model.condition([1, 2])
    forced = list(
        sample(
            tiny_model, tiny_tokenizer, condition, SamplingConfig(), seeds=[0, 1], forcing=forcing
        )
    )
    # Only the first scale is kept: the rest is a run that resumes from the source's first token.
    rest = sample(
        tiny_model,
        tiny_tokenizer,
        condition,
        SamplingConfig(),
        seeds=[0, 1],
        prefix=source[:, :1],
    )
    for one, other in zip(forced[1:], rest, strict=True):
        assert torch.equal(one.tokens, other.tokens)
