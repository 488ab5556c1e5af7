"""Checkpoints as safetensors and JSON, the same for one process, DDP and FSDP.

`step_00001000/` holds `NAME.safetensors` per trained module, `ema_NAME.safetensors` per average,
`optimizer_NAME.safetensors` (moments) and `state.json` (everything that is not a tensor).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from nextscale.errors import UserError
from nextscale.storage import read_json, read_tensors, replace_folder, write_json, write_tensors

FORMAT_VERSION = 1
STATE = "state.json"
# Frozen parameters (the base under a LoRA) are somebody else's file; strict would miss them.
_OPTIONS: dict[str, Any] = {"full_state_dict": True, "ignore_frozen_params": True, "strict": False}


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folders = Path(output_dir, "checkpoints").glob("step_*")
    complete = [f for f in folders if re.fullmatch(r"step_\d+", f.name) and (f / STATE).is_file()]
    return sorted(complete, key=lambda folder: int(folder.name.removeprefix("step_")))


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    return (list_checkpoints(output_dir) or [None])[-1]


def find_checkpoint(output_dir: str | Path, wanted: str | None) -> Path | None:
    """Resolve `resume_from_checkpoint`; None means from scratch.

    Raises:
        UserError: If the folder is not a checkpoint, or a fresh run would mix with an older one.
    """
    newest = latest_checkpoint(output_dir)
    if wanted is None and newest is not None:
        raise UserError(
            f"output_dir {output_dir} already holds a run, up to {newest.name}. Continue it with "
            "resume_from_checkpoint=latest, or choose another output_dir."
        )
    if wanted in (None, "latest"):
        return newest
    if not Path(wanted, STATE).is_file():
        raise UserError(
            f"resume_from_checkpoint {wanted} is no checkpoint: it has no {STATE}. Give a folder "
            "such as RUN/checkpoints/step_00001000, or latest."
        )
    if newest is not None and _step_of(newest) > _step_of(Path(wanted)):
        raise UserError(
            f"output_dir {output_dir} holds {newest.name}, later than resume_from_checkpoint "
            f"{wanted}: two runs would mix. Delete the later ones, or choose another output_dir."
        )
    return Path(wanted)


def _step_of(folder: Path) -> int:
    return read_json(folder / STATE)["step"]


def save_checkpoint(
    folder: Path,
    modules: nn.ModuleDict,
    optimizers: Mapping[str, Optimizer],
    averages: Mapping[str, AveragedModel],
    state: Mapping[str, Any],
    *,
    main: bool,
) -> None:
    """Write one checkpoint; every process must call it, the main one writes.

    Args:
        folder: Where to, `.../step_00001000`; it appears complete or not at all.
        modules: The trained modules, wrapped or not.
        optimizers: The plain optimizers over their parameters.
        averages: EMA by module name.
        state: What else a resume needs, as JSON.
        main: Whether this is the process that writes.
    """
    options = StateDictOptions(cpu_offload=True, **_OPTIONS)
    # Gathering is collective under FSDP, so it comes before the question who writes.
    weights: dict[str, Any] = dict(get_model_state_dict(modules, options=options))
    moments = {name: _optimizer_state(modules, o, options) for name, o in optimizers.items()}
    if not main:
        return
    with replace_folder(folder) as temporary:
        for name in modules:
            own = {k.removeprefix(f"{name}."): v for k, v in weights.items() if _of(name, k)}
            write_tensors(temporary / f"{name}.safetensors", own)
        for name, average in averages.items():
            write_tensors(temporary / f"ema_{name}.safetensors", average.module.state_dict())
        scalars = {}
        for name, (tensors, rest) in moments.items():
            write_tensors(temporary / f"optimizer_{name}.safetensors", tensors)
            scalars[name] = rest
        record = {"format_version": FORMAT_VERSION, **state, "optimizers": scalars}
        write_json(temporary / STATE, record)


def load_checkpoint(
    folder: Path,
    modules: nn.ModuleDict,
    optimizers: Mapping[str, Optimizer],
    averages: Mapping[str, AveragedModel],
) -> dict[str, Any]:
    """Put a checkpoint into modules, optimizers and averages; returns its `state`.

    Raises:
        UserError: If the checkpoint is of another model.
    """
    state = read_json(folder / STATE)
    if state["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{folder} has format_version {state['format_version']}, this nextscale reads "
            f"{FORMAT_VERSION}. Resume with the version that wrote it."
        )
    options = StateDictOptions(**_OPTIONS)
    weights: dict[str, Any] = {}
    for name in modules:
        tensors = read_tensors(folder / f"{name}.safetensors")
        weights |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
    current: dict[str, Any] = dict(get_model_state_dict(modules, options=options))
    _check_fit(folder, weights, current)
    set_model_state_dict(modules, weights, options=options)
    for name, average in averages.items():
        tensors = read_tensors(folder / f"ema_{name}.safetensors")
        _check_fit(folder, tensors, average.module.state_dict())
        average.module.load_state_dict(tensors)
        average.n_averaged.fill_(state["step"])
    for name, optimizer in optimizers.items():
        saved = state["optimizers"].get(name)
        # An optimizer that had not stepped yet (a discriminator that starts late) has no state.
        if saved is None or not saved["param_groups"]:
            continue
        merged: dict[str, dict[str, Any]] = {key: dict(v) for key, v in saved["state"].items()}
        for key, tensor in read_tensors(folder / f"optimizer_{name}.safetensors").items():
            parameter, _, slot = key.rpartition("/")
            merged.setdefault(parameter, {})[slot] = tensor
        loaded = {"state": merged, "param_groups": saved["param_groups"]}
        set_optimizer_state_dict(modules, optimizer, loaded, options=options)
        _align_layout(optimizer)
    return state


def delete_old_checkpoints(output_dir: str | Path, limit: int | None) -> None:
    """Keep the newest `limit` checkpoints; None keeps all."""
    for folder in list_checkpoints(output_dir)[: -limit if limit else 0]:
        shutil.rmtree(folder)


def _optimizer_state(
    modules: nn.ModuleDict, optimizer: Optimizer, options: StateDictOptions
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state into tensors by `PARAMETER/SLOT` and a JSON rest."""
    if not optimizer.state:
        # torch would take a step with zero gradients here to create the state.
        return {}, {"state": {}, "param_groups": []}
    full: Any = get_optimizer_state_dict(modules, optimizer, options=options)
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for parameter, slots in full.get("state", {}).items():
        for slot, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"{parameter}/{slot}"] = value
            else:
                scalars.setdefault(parameter, {})[slot] = value
    return tensors, {"state": scalars, "param_groups": full.get("param_groups", [])}


def _align_layout(optimizer: Optimizer) -> None:
    """Give loaded moments the strides of their parameters (channels_last weights).

    Fused optimizers walk through memory and would pair a weight with another one's moments.
    """
    for parameter, slots in optimizer.state.items():
        for slot, value in slots.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                slots[slot] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _of(name: str, key: str) -> bool:
    return key.startswith(f"{name}.")


def _check_fit(
    folder: Path, saved: Mapping[str, Tensor], current: Mapping[str, torch.Tensor]
) -> None:
    odd = sorted(saved.keys() ^ current.keys())
    odd += sorted(k for k in saved.keys() & current.keys() if saved[k].shape != current[k].shape)
    if odd:
        raise UserError(
            f"{folder} is a checkpoint of another model: {len(odd)} weights differ in name or "
            f"shape, first {odd[0]}. Use the model settings of its recipe.yaml."
        )
