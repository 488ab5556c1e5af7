"""Index arithmetic of the schedule of scales."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nextscale.errors import UserError
from nextscale.tokenizers import ScaleSchedule
from nextscale.tokenizers.schedule import OFFICIAL_SCALES, as_schedule

sides = st.one_of(st.integers(1, 4), st.tuples(st.integers(1, 4), st.integers(1, 4)))
schedules = st.lists(sides, min_size=1, max_size=5).map(ScaleSchedule)


@pytest.mark.parametrize(("tokens", "scales"), OFFICIAL_SCALES.items())
def test_released_schedules_have_the_token_count_they_are_known_by(
    tokens: int, scales: tuple[int, ...]
) -> None:
    schedule = ScaleSchedule(scales)
    assert schedule.num_tokens == tokens
    assert schedule.num_scales == len(scales)
    assert schedule.grid == (scales[-1], scales[-1])


def test_square_and_rectangular_sides_mix() -> None:
    schedule = ScaleSchedule([1, (1, 2), [3, 2]])
    assert schedule.sides == ((1, 1), (1, 2), (3, 2))
    assert schedule.lengths == (1, 2, 6)
    assert schedule.slices == (slice(0, 1), slice(1, 3), slice(3, 9))
    assert str(schedule) == "1 1x2 3x2"


@given(schedules)
def test_split_and_slices_cut_the_sequence_without_gap_or_overlap(schedule: ScaleSchedule) -> None:
    tokens = torch.arange(2 * schedule.num_tokens).view(2, -1)
    parts = schedule.split(tokens)
    assert [part.shape[1] for part in parts] == list(schedule.lengths)
    assert torch.equal(torch.cat(parts, dim=1), tokens)
    for part, where in zip(parts, schedule.slices, strict=True):
        assert torch.equal(part, tokens[:, where])


def test_split_cuts_another_axis_on_demand() -> None:
    parts = ScaleSchedule([1, 2]).split(torch.zeros(3, 4, 5), dim=2)
    assert [part.shape for part in parts] == [(3, 4, 1), (3, 4, 4)]


@given(schedules)
def test_scale_index_and_causal_mask_equal_a_loop(schedule: ScaleSchedule) -> None:
    owner = [k for k, (h, w) in enumerate(schedule.sides) for _ in range(h * w)]
    assert schedule.scale_index().tolist() == owner
    expected = [[column <= row for column in owner] for row in owner]
    assert schedule.causal_mask().tolist() == expected


@given(schedules)
def test_json_gives_the_schedule_back(schedule: ScaleSchedule) -> None:
    again = ScaleSchedule(json.loads(json.dumps(schedule.to_list())))
    assert again == schedule
    assert hash(again) == hash(schedule)


def test_truncated_schedule_keeps_the_first_scales() -> None:
    schedule = ScaleSchedule([1, 2, 3, 4])
    assert schedule.truncate(2) == ScaleSchedule([1, 2])
    assert schedule.truncate(4) == schedule


def test_as_schedule_takes_sides_schedules_and_none() -> None:
    schedule = ScaleSchedule([1, 2])
    assert as_schedule((1, 2)) == schedule
    assert as_schedule(schedule) is schedule
    assert as_schedule(None) is None


@pytest.mark.parametrize("bad", [[], [0], [1, -2], [(2, 0)]])
def test_sides_that_are_no_sizes_are_refused(bad: list[int]) -> None:
    with pytest.raises(UserError, match="scales must be positive"):
        ScaleSchedule(bad)


def test_a_wrong_token_count_is_named() -> None:
    with pytest.raises(UserError, match="expected 5 tokens for the scales 1 2, got 6"):
        ScaleSchedule([1, 2]).split(torch.zeros(1, 6))


def test_a_schedule_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ScaleSchedule([1]).sides = ((2, 2),)  # type: ignore[misc]
