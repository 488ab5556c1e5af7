"""What moves while a run goes on: the curriculum, weights under constraints; and preferences."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nextscale.align.curriculum import Curriculum, upper_bounds
from nextscale.align.prompts import Prompt
from nextscale.align.rewards import as_reward, open_reward, pairwise_column
from nextscale.align.rewards.composition import Preference
from nextscale.align.rewards.lagrangian import Lagrangian
from nextscale.errors import UserError

MISC = json.loads((Path(__file__).parents[1] / "golden" / "align" / "misc.json").read_text())


def prompts(**counts: int) -> list[Prompt]:
    return [Prompt(f"{name} {i}", {}, name) for name, n in counts.items() for i in range(n)]


# ---- curriculum ----------------------------------------------------------------------------------


def test_bounds_are_those_of_the_paper() -> None:
    row = MISC["dump_ucb"]
    bounds = upper_bounds(row["mean_abs_advantage"], [int(n) for n in row["counts"]])
    torch.testing.assert_close(bounds, torch.tensor(row["ucb"], dtype=torch.float64))
    shares = (bounds / row["temperature"]).softmax(0)
    torch.testing.assert_close(shares, torch.tensor(row["probs"], dtype=torch.float64))


def test_sources_that_teach_are_drawn_more_often() -> None:
    curriculum = Curriculum(prompts(easy=5, useful=5, hard=5), temperature=0.05)
    gains, drawn = {"easy": 0.0, "useful": 0.4, "hard": 0.0}, Counter()
    for number in range(60):
        chosen = curriculum.draw(8, 0, number)
        curriculum.update(chosen, [gains[p.source] for p in chosen])
        drawn.update(p.source for p in chosen)
    assert drawn["useful"] > 2 * drawn["easy"]
    assert min(drawn.values()) >= 8  # none is forgotten
    gains["hard"] = 1.0  # it becomes the one to learn
    late = Counter()
    for number in range(60, 120):
        chosen = curriculum.draw(8, 0, number)
        curriculum.update(chosen, [gains[p.source] for p in chosen])
        late.update(p.source for p in chosen)
    assert late["hard"] > late["useful"]


def test_every_prompt_of_a_source_takes_its_turn_and_a_state_goes_on() -> None:
    whole, halves = (Curriculum(prompts(a=4, b=6)) for _ in range(2))
    seen: list[Any] = []
    for number in range(10):
        chosen = whole.draw(6, 3, number)
        seen += [p.condition for p in chosen]
        whole.update(chosen, [0.1 if p.source == "a" else math.nan for p in chosen])
        if number == 5:
            halves = Curriculum(prompts(a=4, b=6))
            halves.load_state_dict(json.loads(json.dumps(whole.state_dict())))
        elif number > 5:
            again = halves.draw(6, 3, number)
            assert again == chosen
            halves.update(again, [0.1 if p.source == "a" else math.nan for p in again])
    counts = Counter(seen)
    assert max(counts[f"a {i}"] for i in range(4)) - min(counts[f"a {i}"] for i in range(4)) <= 1
    with pytest.raises(UserError, match="there is only a"):
        Curriculum(prompts(a=4))


# ---- constraints ---------------------------------------------------------------------------------


def test_a_curriculum_forgets_what_is_long_ago() -> None:
    known = prompts(taught=1, other=1)
    curriculum = Curriculum(known)
    curriculum.draw(64, 0, 0)
    sides = []
    for past in (5.0, 0.0):  # 300 gains count, and then none of the older ones
        curriculum.update(known[:1] * 300, [past] * 300)
        curriculum.update(known[:1] * 299, [1.0] * 299)
        before = curriculum.probabilities()
        curriculum.update(known[:1], [1.0])
        sides.append((before, curriculum.probabilities()))
    assert not torch.equal(sides[0][0], sides[1][0])
    assert torch.equal(sides[0][1], sides[1][1])


def test_a_missed_threshold_gains_weight_and_a_met_one_loses_it() -> None:
    rule = Lagrangian([1.0, 0.5, 0.0], [math.nan, 0.8, 0.2], rate=0.5)
    rule.update([5.0, 0.6, 0.9])
    assert rule.weights == pytest.approx([1.0, 0.6, 0.0])
    rule.update([5.0, 1.0, 0.0])
    assert rule.weights == pytest.approx([1.0, 0.5, 0.1])
    rule.update([5.0, math.nan, 0.2])
    assert rule.weights == pytest.approx([1.0, 0.5, 0.1])
    again = Lagrangian([1.0, 0.0, 0.0], [None, 0.8, 0.2])
    again.load_state_dict(json.loads(json.dumps(rule.state_dict())))
    assert again.weights == rule.weights


def test_multipliers_settle_where_the_constraint_holds() -> None:
    """Maximise x subject to 1 - x^2 >= 0.75: x = 1/2, mu = 1."""
    rule, x = Lagrangian([1.0, 0.0], [None, 0.75], rate=0.05), 0.0
    for _ in range(2000):
        x += 0.05 * (rule.weights[0] - rule.weights[1] * 2 * x)
        rule.update([x, 1 - x * x])
    assert x == pytest.approx(0.5, abs=1e-3)
    assert rule.weights[1] == pytest.approx(1.0, abs=1e-2)


@pytest.mark.parametrize(
    ("weights", "thresholds", "message"),
    [
        ([1.0, 1.0], [0.5], "1 numbers for 2 rewards"),
        ([1.0, 1.0], [math.nan, None], "with a threshold and one or more without"),
        ([1.0, 1.0], [0.1, 0.2], "with a threshold and one or more without"),
    ],
)
def test_thresholds_that_do_not_fit(
    weights: list[float], thresholds: list[float | None], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Lagrangian(weights, thresholds)


# ---- preferences ---------------------------------------------------------------------------------


def test_the_reward_of_preferences_is_the_share_of_the_group_that_is_beaten() -> None:
    row = MISC["spo"]
    matrix = torch.tensor(row["pref"], dtype=torch.float64)

    class Given:
        name = "given"

        def compare(self, images: Tensor, _: Any) -> Tensor:
            rows = images[:, 0, 0, 0].long()
            return matrix[rows][:, rows]

    images = torch.arange(5.0)[:, None, None, None].expand(-1, 3, 1, 1)
    order = torch.tensor([3, 0, 4, 1, 2])
    groups = torch.zeros(5, dtype=torch.long)
    found = pairwise_column(Given(), images[order], [""] * 5, groups)
    wanted = torch.tensor(row["reward"], dtype=found.dtype)
    torch.testing.assert_close(found, wanted[order], rtol=1e-6, atol=1e-7)


def test_a_reward_as_preferences_keeps_its_order() -> None:
    def light(images: Tensor, _: Any) -> Tensor:
        return images.mean((1, 2, 3)) * 10

    images = torch.tensor([0.1, 0.9, 0.4, 0.5])[:, None, None, None].expand(-1, 3, 2, 2)
    reward = Preference(as_reward(light, "light"), 0.1)
    matrix = reward.compare(images, [""] * 4)
    torch.testing.assert_close(matrix + matrix.T, torch.ones_like(matrix))
    column = pairwise_column(reward, images, [""] * 4, torch.zeros(4, dtype=torch.long))
    assert column.argsort().tolist() == [0, 2, 3, 1]
    assert bool(((column >= 0) & (column <= 1)).all())
    named: Any = open_reward("preference:brightness:0.5@0.2")
    assert (named.name, named.temperature) == ("preference_brightness", 0.2)
    for wrong, message in (
        ("preference", "needs"),
        ("preference:vendi", "compares single pictures"),
        ("preference:brightnes", "Did you mean brightness"),
        ("preference:brightness@warm", "takes a number"),
    ):
        with pytest.raises(UserError, match=message):
            open_reward(wrong)
