"""The loop: resumes repeat, splits of a batch agree, failures say where."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from nextscale.errors import MissingExtraError, UserError
from nextscale.storage import read_tensors
from nextscale.streams import batch_indices
from nextscale.training import fit
from nextscale.training.optimizers import MuonWithAdamW

PROGRAM = Path(tiny.__file__)


def log_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds", None)
        line.pop("images_per_second", None)
    return lines


def weights_of(folder: Path, step: int, name: str = "net") -> dict[str, torch.Tensor]:
    return read_tensors(folder / "checkpoints" / f"step_{step:08d}" / f"{name}.safetensors")


def program(*launcher: str, config: dict[str, Any], **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, *launcher, str(PROGRAM), json.dumps(config), json.dumps(options)]
    root = str(PROGRAM.parents[2])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("muon", [False, True])
def test_killed_run_resumes_to_the_same_losses_and_weights(tmp_path: Path, muon: bool) -> None:
    fields = {"logging_steps": 2, "gradient_accumulation_steps": 2}
    options = {"dropout": 0.3, "gan": True, "muon": muon}
    # The unbroken run loads in a worker process: that must not matter either.
    tiny.run(tiny.make_config(tmp_path / "whole", dataloader_num_workers=1, **fields), **options)

    killed = {"output_dir": str(tmp_path / "killed"), **fields}
    process = program(config=killed, kill_at=8, **options)
    process.communicate(timeout=120)
    assert process.returncode == -9
    assert log_of(tmp_path / "killed")[-1]["step"] == 8  # past the checkpoint of step 5
    tiny.run(tiny.make_config(**killed, resume_from_checkpoint="latest"), **options)

    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole")
    for name in ("net", "critic", "ema_net", "optimizer_net", "optimizer_critic"):
        whole, resumed = (weights_of(tmp_path / f, 12, name) for f in ("whole", "killed"))
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize("gan", [False, True])
def test_accumulation_equals_big_batch(tmp_path: Path, gan: bool) -> None:
    # Adam divides by the gradient: without an epsilon it would blow rounding up where that is 0.
    common = {"max_train_steps": 3, "adam_epsilon": 1e-3}
    tiny.run(tiny.make_config(tmp_path / "big", train_batch_size=8, **common), gan=gan)
    split = tiny.make_config(
        tmp_path / "split", train_batch_size=4, gradient_accumulation_steps=2, **common
    )
    tiny.run(split, gan=gan)
    assert_same_run(tmp_path / "big", tmp_path / "split", gan)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    gan = True  # the harder case: two optimizers, two DDP modules
    common = {"max_train_steps": 3, "adam_epsilon": 1e-3}
    tiny.run(tiny.make_config(tmp_path / "one", train_batch_size=8, **common), gan=gan)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    config = {
        "output_dir": str(tmp_path / "two"),
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        **common,
    }
    process = program(*launcher, config=config, gan=gan)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == 2
    assert_same_run(tmp_path / "one", tmp_path / "two", gan)


def assert_same_run(left: Path, right: Path, gan: bool) -> None:
    for a, b in zip(log_of(left), log_of(right), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    for name in ("net", "critic", "ema_net") if gan else ("net", "ema_net"):
        a, b = weights_of(left, 3, name), weights_of(right, 3, name)
        for key in a.keys() - {"calls"}:
            torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-6)


def test_loop_equals_a_loop_written_by_hand(tmp_path: Path) -> None:
    config = tiny.make_config(
        tmp_path, max_train_steps=4, lr_scheduler="constant", lr_warmup_steps=0, max_grad_norm=0.5
    )
    seen: list[int] = []
    result = tiny.run(config, after_step=lambda nets, step: seen.append(step))

    net = tiny.modules()["net"]
    optimizer = tiny.optimizers(config, {"net": net})["net"]
    average: list[torch.Tensor] = []
    x, y = tiny.data()
    for step in range(4):
        indices = batch_indices(0, step, 4, tiny.SIZE)
        (net(x[indices]) - y[indices]).square().mean().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        ramp = 0.5 + 0.5 * np.cos(np.pi * step / 3)
        optimizer.param_groups[0].update(lr=1e-2, weight_decay=0.1 - 0.05 * ramp)
        optimizer.param_groups[1].update(lr=1e-2, weight_decay=0.0)
        optimizer.step()
        optimizer.zero_grad()
        now = [p.detach().clone() for p in net.parameters()]
        average = [0.8 * a + 0.2 * p for a, p in zip(average or now, now, strict=True)]

    assert seen == [1, 2, 3, 4]
    for ours, theirs in zip(result.modules["net"].parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(result.ema_modules["net"].parameters(), average, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_compile_without_a_compiler_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"compile needs a C\+\+ compiler"):
        tiny.run(tiny.make_config(tmp_path / "run", compile=True))
    assert not (tmp_path / "run").exists()


def test_muon_and_adamw_step_as_they_do_alone() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(6, 4), nn.Linear(6, 4)
    theirs.load_state_dict(ours.state_dict())
    common = {"lr": 1e-2, "weight_decay": 0.1}
    one = MuonWithAdamW([{"params": [ours.weight]}], [{"params": [ours.bias]}], **common)
    parts = [
        torch.optim.Muon([theirs.weight], adjust_lr_fn="match_rms_adamw", **common),
        torch.optim.AdamW([theirs.bias], betas=(0.9, 0.95), **common),
    ]
    saved = None
    for step in range(4):
        x = torch.randn(5, 6)
        for net, optimizers in ((ours, [one]), (theirs, parts)):
            net(x).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        torch.testing.assert_close(ours.weight, theirs.weight)
        torch.testing.assert_close(ours.bias, theirs.bias)
        if step == 1:  # what is loaded is what the parts go on with
            saved = one.state_dict()
            one = MuonWithAdamW([{"params": [ours.weight]}], [{"params": [ours.bias]}], **common)
            one.load_state_dict(saved)
    assert one.state[ours.weight].keys() == {"momentum_buffer"}


def test_non_finite_loss_names_step_indices_and_checkpoint(tmp_path: Path) -> None:
    bad = int(batch_indices(0, 4, 4, tiny.SIZE)[2])  # each image appears once in the first 5 steps
    with pytest.raises(UserError, match="loss of step 5 is not finite") as caught:
        tiny.run(tiny.make_config(tmp_path, checkpointing_steps=3), bad_index=bad)
    assert caught.value.exit_code == 1
    assert ", ".join(map(str, batch_indices(0, 4, 4, tiny.SIZE))) in str(caught.value)
    assert "step_00000003" in str(caught.value)


def test_without_accelerate_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingExtraError, match=r"training needs accelerate.*nextscale\[train\]"):
        tiny.run(tiny.make_config(tmp_path))


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    tiny.run(tiny.make_config(tmp_path, checkpointing_steps=3, checkpoints_total_limit=2))
    names = sorted(f.name for f in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000009", "step_00000012"]


def test_a_fresh_run_does_not_mix_with_an_old_one(tmp_path: Path) -> None:
    tiny.run(tiny.make_config(tmp_path))
    with pytest.raises(UserError, match="already holds a run, up to step_00000012"):
        tiny.run(tiny.make_config(tmp_path))
    older = str(tmp_path / "checkpoints" / "step_00000010")
    with pytest.raises(UserError, match="two runs would mix"):
        tiny.run(tiny.make_config(tmp_path, resume_from_checkpoint=older))
    finished = tiny.run(tiny.make_config(tmp_path, resume_from_checkpoint="latest"))
    assert finished.steps == 12


def test_validation_sees_averages_in_eval_mode_and_training_goes_on(tmp_path: Path) -> None:
    seen: list[tuple[int, bool, bool]] = []

    def validate(nets: dict[str, nn.Module], step: int) -> dict[str, float]:
        seen.append((step, nets["net"].training, torch.is_grad_enabled()))
        return {"outer": nets["net"].outer.weight.sum().item()}

    config = tiny.make_config(tmp_path, validation_steps=5)
    result = tiny.run(config, validate=validate, dropout=0.3)
    assert seen == [(5, False, False), (10, False, False), (12, False, False)]
    expected = result.ema_modules["net"].outer.weight.sum().item()
    assert result.metrics["val/outer"] == pytest.approx(expected)
    assert result.modules["net"].training
    assert result.modules["net"].calls == 12


def test_time_limit_stops_with_a_checkpoint(tmp_path: Path) -> None:
    result = tiny.run(tiny.make_config(tmp_path, max_train_minutes=1e-9))
    assert result.steps == 1
    assert result.checkpoint is not None
    assert result.checkpoint.name == "step_00000001"
    whole = tiny.run(tiny.make_config(tmp_path, resume_from_checkpoint="latest"))
    assert whole.steps == 12


def test_bf16_runs_the_forward_in_bf16_and_gives_modules_back_plain(tmp_path: Path) -> None:
    net = nn.Linear(3, 2)
    inside: list[torch.dtype] = []

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.net(x)
            inside.append(out.dtype)
            return out

    outer = Outer()

    def losses(nets: dict[str, nn.Module], batch: torch.Tensor, step: int) -> Any:
        out = nets["outer"](batch)
        assert out.dtype == torch.float32
        yield "outer", out.square().mean(), {}

    for folder in ("first", "second"):  # a second fit in one process gets autocast as well
        config = tiny.make_config(tmp_path / folder, mixed_precision="bf16", max_train_steps=1)
        fit(
            config,
            modules={"outer": outer},
            optimizers={"outer": torch.optim.AdamW(outer.parameters())},
            load_batch=lambda indices, step: torch.ones(len(indices), 3),
            dataset_size=8,
            losses=losses,
        )
    assert inside == [torch.bfloat16, torch.bfloat16]
    assert outer(torch.ones(1, 3)).dtype == torch.float32
    assert inside[-1] == torch.float32


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    tiny.run(tiny.make_config(tmp_path, max_train_steps=5), gan=False)
    other = {"net": nn.Linear(3, 2)}
    config = tiny.make_config(tmp_path, resume_from_checkpoint="latest")
    with pytest.raises(UserError, match="checkpoint of another model"):
        fit(
            config,
            modules=other,
            optimizers=tiny.optimizers(config, other),
            load_batch=lambda indices, step: torch.ones(len(indices), 3),
            dataset_size=8,
            losses=lambda nets, batch, step: iter(()),
        )
