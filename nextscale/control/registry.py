"""Control modules by name, and on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nextscale import storage
from nextscale.control.adapter import AdapterControl
from nextscale.control.additive import AdditiveControl
from nextscale.control.module import (
    ENCODER,
    FORMAT_VERSION,
    ControlConfig,
    ControlModule,
    ControlRecord,
)
from nextscale.control.side_network import SideNetworkControl
from nextscale.errors import UserError
from nextscale.var import TransformerConfig

ARCHITECTURES: dict[str, type[ControlModule]] = {
    cls.architecture: cls for cls in (AdditiveControl, AdapterControl, SideNetworkControl)
}


def build_control(
    config: ControlConfig, base: TransformerConfig, record: ControlRecord
) -> ControlModule:
    """A fresh module of the kind that a configuration belongs to."""
    found = [cls for cls in ARCHITECTURES.values() if type(config) is cls.config_class]
    return found[0](config, base, record)  # pyright: ignore[reportArgumentType]


def find_control(name: str | Path) -> Path:
    """The folder of a module: itself, that of a run of `train control`, or one from the hub.

    Raises:
        UserError: If there is none, or a run that trained its base too.
    """
    try:
        folder = storage.resolve_model(name)
    except UserError as error:
        if error.exit_code != 2:
            raise
        raise UserError(
            f"{name} is no control module; give the folder of one, a run of "
            "`nextscale train control`, or a hub id like owner/name"
        ) from error
    inside = folder / "model"  # of a training run
    for place in (inside, folder):
        if (place / "model_index.json").is_file():
            raise UserError(
                f"{name} holds a whole model, whose base was trained too: open it as the model"
            )
    for place in (inside, folder):
        if (place / "config.json").is_file():
            return place
    raise UserError(
        f"{name} holds no control module (config.json); give the folder of one, or a run of "
        "`nextscale train control`"
    )


def read_control(folder: str | Path) -> ControlModule:
    """Read what `ControlModule.save_pretrained` wrote (float32 on the CPU).

    Raises:
        UserError: If the folder holds no control module, or a damaged one.
    """
    folder = Path(folder)
    path = folder / "config.json"
    values = storage.read_config(path, FORMAT_VERSION, "ControlModule")
    kind = values.get("architecture")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise UserError(
            f'{folder} is a control module of the architecture "{kind}", this nextscale knows '
            f"{', '.join(ARCHITECTURES)}; update it"
        )
    cls = ARCHITECTURES[kind]
    for key in ("module", "base", "record"):
        if not isinstance(values.get(key), dict):
            raise UserError(f"{path} is damaged: it lacks {key}")
    encoder = values["module"].get("encoder")
    size = values["record"].get("resolution")
    if not isinstance(encoder, dict):
        raise UserError(f"{path} is damaged: module.encoder is {encoder!r}")
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(s, int) for s in size)):
        raise UserError(f"{path} is damaged: record.resolution is {size!r}")
    encoder["pretrained"] = False  # the file has the weights
    config = storage.build(cls.config_class, values["module"], path)
    local = config
    if (folder / ENCODER).is_file():
        local = replace(config, encoder=replace(config.encoder, name=str(folder / ENCODER)))
    base = storage.build(TransformerConfig, values["base"], path)
    values["record"]["resolution"] = tuple(size)
    record = storage.build(ControlRecord, values["record"], path)
    try:
        module = cls(local, base, record)
    except (TypeError, AttributeError, ValueError, IndexError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    module.config = config  # which names the place that the encoder came from
    state = storage.read_tensors(folder / "model.safetensors")
    storage.load_state(module, {k: v.float() for k, v in state.items()}, folder)
    return module.eval()
