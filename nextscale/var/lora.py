"""LoRA on the transformer, by peft: apply, save, load, refuse on another base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nextscale import storage
from nextscale.errors import UserError, missing_extra
from nextscale.var.transformer import NextScaleTransformer

if TYPE_CHECKING:
    from peft import LoraModel

FORMAT_VERSION = 1
DEFAULT_TARGETS = ("qkv", "proj", "fc1", "fc2")


def base_fingerprint(model: nn.Module, dtype: torch.dtype | None = None) -> str:
    """Hash of the base weights, the same whether they are loaded in float32 or in bfloat16.

    Args:
        model: The base.
        dtype: As if they were cast to this first; None: as they are.
    """
    base = {
        name.replace(".base_layer.", "."): tensor.detach().to(dtype).to(torch.bfloat16).cpu()
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name
    }
    return storage.fingerprint(base)


def add_lora(
    model: NextScaleTransformer,
    *,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: Sequence[str] = DEFAULT_TARGETS,
) -> LoraModel:
    """Put trainable low-rank adapters on linear layers in place; everything else is frozen.

    Args:
        model: Base.
        rank: Rank of the update.
        alpha: The update is scaled by alpha / rank; None: alpha = rank.
        dropout: Dropout on the adapters' input, training only.
        targets: Last parts of module names: qkv, proj, fc1, fc2, modulation, head, ...

    Returns:
        peft's handle, with `unload()` and `merge_and_unload()`.
    """
    try:
        from peft import LoraConfig, LoraModel
    except ImportError as error:
        raise missing_extra("LoRA needs peft", "train") from error
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=dropout,
        target_modules=list(targets),
    )
    try:
        return LoraModel(model, {"default": config}, "default")
    except ValueError as error:
        raise UserError(f"lora_target_modules {list(targets)}: {error}") from error


def save_lora(model: nn.Module, folder: str | Path, settings: dict[str, Any]) -> None:
    """Write adapter_config.json (with the base's fingerprint) and adapter_model.safetensors."""
    tensors = {k: v.detach().cpu() for k, v in model.state_dict().items() if ".lora_" in k}
    config = {
        "format_version": FORMAT_VERSION,
        "class": "NextScaleLora",
        "base_fingerprint": base_fingerprint(model),
        **settings,
    }
    with storage.replace_folder(folder) as target:
        storage.write_tensors(target / "adapter_model.safetensors", tensors)
        storage.write_json(target / "adapter_config.json", config)


def adapter_file(folder: str | Path, name: str) -> Path:
    """A file of a saved LoRA.

    Raises:
        UserError: For the folder of a run, which has its LoRA inside.
    """
    folder = Path(folder)
    for inner in ("adapter", "model"):
        if not (folder / name).is_file() and (folder / inner / name).is_file():
            raise UserError(f"{folder} is the folder of a run; its LoRA is {folder / inner}")
    return folder / name


def load_lora(model: NextScaleTransformer, folder: str | Path, scale: float = 1.0) -> LoraModel:
    """Put a saved LoRA on its base, in place.

    Args:
        model: The base it was trained on.
        folder: What `save_lora` wrote.
        scale: Strength, 1.0 as trained.

    Raises:
        UserError: If the base is another one.
    """
    folder = Path(folder)
    config = storage.read_config(folder / "adapter_config.json", FORMAT_VERSION, "NextScaleLora")
    if model.head.weight.dtype == torch.float16:  # its rounding would change the fingerprint
        raise UserError(
            "a LoRA is put on a base in float32 or bfloat16; load the model with one of these, and "
            "cast it afterwards"
        )
    keys = ("rank", "alpha", "target_modules", "base_fingerprint")
    missing = ", ".join(key for key in keys if key not in config)
    if missing:
        raise UserError(f"the LoRA {folder} is damaged: adapter_config.json lacks {missing}")
    if config["base_fingerprint"] != base_fingerprint(model):
        raise UserError(
            f"the LoRA {folder} was trained on other weights than this model's; load the model "
            "that it was trained on"
        )
    state = storage.read_tensors(folder / "adapter_model.safetensors")
    weight = model.head.weight
    tuner = add_lora(
        model, rank=config["rank"], alpha=config["alpha"], targets=config["target_modules"]
    )
    own = {k: v for k, v in model.state_dict().items() if ".lora_" in k}
    if set(own) != set(state):
        tuner.unload()
        raise UserError(f"the LoRA {folder} is damaged: its tensors do not fit its configuration")
    model.load_state_dict(state, strict=False)
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", scale)  # pyright: ignore[reportCallIssue]
    model.to(weight.device, weight.dtype)
    model.requires_grad_(False)
    model.eval()
    return tuner
