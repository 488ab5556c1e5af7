"""Schedules against values worked out by hand."""

from __future__ import annotations

import pytest

from nextscale.errors import UserError
from nextscale.training import TrainingConfig, lr_factor, weight_decay_at
from nextscale.var.train import TransformerTrainingConfig


def config(**fields: object) -> TrainingConfig:
    return TrainingConfig(output_dir="unused", **fields)


def test_var_holds_then_falls_to_the_final_fraction() -> None:
    run = config(max_train_steps=111, lr_warmup_steps=10, lr_scheduler="var", lr_final=0.1)
    assert lr_factor(run, 0) == pytest.approx(0.005)
    assert lr_factor(run, 5) == pytest.approx(0.005 + 0.995 / 2)
    assert lr_factor(run, 10) == 1.0
    assert lr_factor(run, 15) == pytest.approx(1.0)  # 5 % of the 100 steps after the warm-up
    assert lr_factor(run, 60) == pytest.approx(0.1 + 0.9 * 0.5 / 0.95)
    assert lr_factor(run, 110) == pytest.approx(0.1)


def test_progressive_training_holds_the_peak_while_scales_are_added() -> None:
    run = TransformerTrainingConfig(
        output_dir="unused", max_train_steps=101, lr_scheduler="var", progressive_fraction=0.5
    )
    assert lr_factor(run, 50) == 1.0
    assert lr_factor(run, 75) == pytest.approx(0.1 + 0.9 / 2)


@pytest.mark.parametrize(
    ("name", "middle", "end"), [("constant", 1, 1), ("linear", 0.6, 0.2), ("cosine", 0.6, 0.2)]
)
def test_common_schedules(name: str, middle: float, end: float) -> None:
    run = config(max_train_steps=105, lr_warmup_steps=4, lr_scheduler=name, lr_final=0.2)
    assert [lr_factor(run, s) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert lr_factor(run, 54) == pytest.approx(middle)
    assert lr_factor(run, 104) == pytest.approx(end)


def test_weight_decay_ramps_by_a_half_cosine() -> None:
    run = config(max_train_steps=101, weight_decay=0.05, weight_decay_end=0.09)
    steps = (0, 25, 50, 100)
    expected = [0.05, 0.07 - 0.02 * 2**-0.5, 0.07, 0.09]
    assert [weight_decay_at(run, s) for s in steps] == pytest.approx(expected)
    assert weight_decay_at(config(weight_decay=0.05), 77) == 0.05


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"train_batch_size": 0}, "train_batch_size is 0, but must be above 0"),
        ({"ema_decay": 1.0}, r"ema_decay is 1.0, but must lie in \[0, 1\)"),
        (
            {"lr_scheduler": "step"},
            "lr_scheduler is step, but must be one of constant, linear, cosine, var",
        ),
        ({"checkpointing_steps": 0}, "checkpointing_steps is 0"),
    ],
)
def test_bad_settings_are_named(fields: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        config(**fields)
