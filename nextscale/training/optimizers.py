"""AdamW with its groups, and Muon for the matrices of a network beside it, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from nextscale.training.config import TrainingConfig


def decay_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], plain: Callable[[str], bool] | None = None
) -> list[dict[str, Any]]:
    """Trainable parameters in groups with and without weight decay; no group is empty.

    Args:
        parameters: With their names.
        plain: Names of parameters that do not decay, besides vectors (biases, norms).
    """
    groups: list[dict[str, Any]] = [
        {"params": []},
        {"params": [], "decay": False, "weight_decay": 0.0},
    ]
    for name, parameter in parameters:
        if parameter.requires_grad:
            spared = parameter.ndim <= 1 or (plain is not None and plain(name))
            groups[spared]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def adamw(
    groups: list[dict[str, Any]],
    config: TrainingConfig,
    *,
    matrices: list[nn.Parameter] | None = None,
) -> Optimizer:
    """AdamW over the groups, with the settings of a run; with Muon for these matrices, if any."""
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    if matrices:
        return MuonWithAdamW([{"params": matrices}], groups, **settings)
    return AdamW(groups, fused=True, **settings)


class MuonWithAdamW(Optimizer):
    """Steps torch's Muon over some parameter groups and torch's AdamW over the others.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) orthogonalises the
    momentum of a matrix before it steps. Its step is scaled to the RMS of AdamW's (arXiv
    2502.16982), so that both parts share one learning rate and one schedule. States and groups
    are those of the two optimizers, so that checkpoints and schedules see a single one.

    Args:
        matrices: Groups of 2-D weights inside the network, for Muon.
        rest: Groups of embeddings, heads, biases, for AdamW.
        lr: Learning rate of both.
        momentum: Muon's momentum (Nesterov).
        betas: AdamW's decays.
        eps: AdamW's epsilon.
        weight_decay: Decoupled weight decay of groups that set none.
    """

    def __init__(
        self,
        matrices: Iterable[dict[str, Any]],
        rest: Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        muon = Muon(
            list(matrices),
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        adamw = AdamW(
            list(rest), lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, fused=True
        )
        self._parts: tuple[Optimizer, Optimizer] = (muon, adamw)
        self._first = len(muon.param_groups)
        super().__init__([*muon.param_groups, *adamw.param_groups], {"lr": lr})
        self._share()

    def _share(self) -> None:
        """Make the parts work on this optimizer's groups and states."""
        groups = (self.param_groups[: self._first], self.param_groups[self._first :])
        for part, own in zip(self._parts, groups, strict=True):
            part.param_groups, part.state = own, self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by `load_state_dict`, which replaces groups and states."""
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both; returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss
