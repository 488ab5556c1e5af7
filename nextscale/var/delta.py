"""Differences of weights on disk: apply with a strength, take off, refuse on another base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nextscale import storage
from nextscale.errors import UserError
from nextscale.var.lora import base_fingerprint

FORMAT_VERSION = 1
KIND = "NextScaleDelta"


def save_delta(
    folder: str | Path,
    base: Mapping[str, Tensor],
    trained: Mapping[str, Tensor],
    fingerprint: str,
    settings: Mapping[str, Any],
) -> None:
    """Write adapter_config.json (with the base's fingerprint) and adapter_model.safetensors.

    Args:
        folder: Where to.
        base: Weights before, by name; those that did not change are left out.
        trained: The same after.
        fingerprint: `base_fingerprint` of the base.
        settings: What else the configuration says.
    """
    changed = {
        k: (trained[k] - base[k]).float().cpu() for k in base if not _equal(base, trained, k)
    }
    config = {
        "format_version": FORMAT_VERSION,
        "class": KIND,
        "base_fingerprint": fingerprint,
        **settings,
    }
    with storage.replace_folder(folder) as target:
        storage.write_tensors(target / "adapter_model.safetensors", changed)
        storage.write_json(target / "adapter_config.json", config)


def _equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor], name: str) -> bool:
    return torch.equal(first[name], second[name].to(first[name]))


class Delta:
    """Applied differences; `unload` gives the base back bit for bit."""

    def __init__(self, model: nn.Module, changes: Mapping[str, Tensor], scale: float) -> None:
        self.model, own = model, dict(model.named_parameters())
        self.originals = {name: own[name].detach().clone() for name in changes}
        with torch.no_grad():
            for name, change in changes.items():
                own[name].add_(change.to(own[name]), alpha=scale)

    def unload(self) -> None:
        """Put the base's weights back."""
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in self.originals.items():
                own[name].copy_(value)

    def merge_and_unload(self) -> None:
        """Keep the changed weights for good."""
        self.originals.clear()


def load_delta(model: nn.Module, folder: str | Path, scale: float = 1.0) -> Delta:
    """Add saved differences to their base, in place.

    Args:
        model: The base they belong to.
        folder: What `save_delta` wrote.
        scale: Strength, 1.0 as trained.

    Raises:
        UserError: If the base is another one, or the file does not fit it.
    """
    folder = Path(folder)
    config = storage.read_config(folder / "adapter_config.json", FORMAT_VERSION, KIND)
    if config.get("base_fingerprint") != base_fingerprint(model):
        raise UserError(
            f"the differences {folder} belong to other weights than this model's; load the model "
            "that they were made for"
        )
    changes = storage.read_tensors(folder / "adapter_model.safetensors")
    own = dict(model.named_parameters())
    wrong = [k for k, v in changes.items() if k not in own or own[k].shape != v.shape]
    if wrong:
        raise UserError(f"the differences {folder} are damaged: {wrong[0]} does not fit the model")
    return Delta(model, changes, scale)
