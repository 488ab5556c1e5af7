"""A tiny training run, used by the tests in process and as a program (to be killed, or by ranks).

Usage: python tiny.py '{"output_dir": ..., config fields}' [options as JSON]
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from typing import Any

import numpy as np
import torch
from torch import nn

from nextscale.training import FitResult, TrainingConfig, fit, frozen
from nextscale.training.optimizers import MuonWithAdamW

SIZE = 20
DEFAULTS: dict[str, Any] = {
    "max_train_steps": 12,
    "train_batch_size": 4,
    "learning_rate": 1e-2,
    "lr_warmup_steps": 2,
    "lr_scheduler": "var",
    "weight_decay_end": 0.1,
    "mixed_precision": "no",
    "ema_decay": 0.8,
    "checkpointing_steps": 5,
    "logging_steps": 1,
    "report_to": "none",
}


class Net(nn.Module):
    """Two layers, dropout (so that noise matters for a resume) and a buffer that moves."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 8)
        self.outer = nn.Linear(8, 2)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls += 1
        return self.outer(self.dropout(torch.tanh(self.inner(x))))


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(SIZE, 3, generator=generator)
    return x, x @ torch.randn(3, 2, generator=generator)


def modules(*, dropout: float = 0.0, gan: bool = False) -> dict[str, nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        found: dict[str, nn.Module] = {"net": Net(dropout)}
        if gan:
            found["critic"] = nn.Linear(2, 1)
    return found


def optimizers(
    config: TrainingConfig, nets: dict[str, nn.Module], *, muon: bool = False
) -> dict[str, Any]:
    betas = (config.adam_beta1, config.adam_beta2)
    if muon:
        return {name: muon_optimizer(net) for name, net in nets.items()}
    return {
        name: torch.optim.AdamW(
            [
                {"params": [p for p in net.parameters() if p.ndim > 1]},
                {"params": [p for p in net.parameters() if p.ndim < 2], "decay": False},
            ],
            betas=betas,
        )
        for name, net in nets.items()
    }


def muon_optimizer(net: nn.Module) -> MuonWithAdamW:
    matrices = [p for p in net.parameters() if p.ndim == 2]
    rest = [p for p in net.parameters() if p.ndim != 2]
    return MuonWithAdamW([{"params": matrices}], [{"params": rest, "decay": False}], lr=1e-2)


def run(
    config: TrainingConfig,
    *,
    dropout: float = 0.0,
    gan: bool = False,
    muon: bool = False,
    bad_index: int | None = None,
    kill_at: int | None = None,
    **keywords: Any,
) -> FitResult:
    x, y = data()

    def load_batch(indices: np.ndarray, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = x[indices].clone()
        if bad_index is not None:
            inputs[torch.from_numpy(indices == bad_index)] = float("nan")
        return inputs, y[indices]

    def losses(nets: dict[str, nn.Module], batch: Any, step: int) -> Any:
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        inputs, target = batch
        guess = nets["net"](inputs)
        error = (guess - target).square().mean()
        if not gan:
            yield "net", error, {"error": error}
            return
        with frozen(nets["critic"]) as critic:
            yield "net", error - 0.1 * critic(guess).mean(), {"error": error}
        scores = nets["critic"](torch.cat([target, guess.detach()]))
        real, fake = scores.chunk(2)
        yield "critic", (1 - real).relu().mean() + (1 + fake).relu().mean(), {}

    nets = modules(dropout=dropout, gan=gan)
    return fit(
        config,
        modules=nets,
        optimizers=optimizers(config, nets, muon=muon),
        load_batch=load_batch,
        dataset_size=SIZE,
        losses=losses,
        ema=("net",),
        **keywords,
    )


def make_config(output_dir: Any, **fields: Any) -> TrainingConfig:
    return TrainingConfig(output_dir=str(output_dir), **(DEFAULTS | fields))


if __name__ == "__main__":
    done = run(
        make_config(**json.loads(sys.argv[1])), **json.loads(sys.argv[2] if sys.argv[2:] else "{}")
    )
    print(json.dumps(dataclasses.asdict(done)["metrics"]))
