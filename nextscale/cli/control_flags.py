"""Flags of spatial control, and the controls that they mean."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextscale.cli.model_flags import ControlGuidanceFlags
from nextscale.errors import UserError

if TYPE_CHECKING:
    from nextscale.control import Control, ControlRecord
    from nextscale.pipeline import NextScalePipeline


@dataclass(frozen=True, kw_only=True)
class ControlFlags(ControlGuidanceFlags):
    """Pictures that follow a map."""

    control_image: tuple[str, ...] = ()
    """Control maps, one for each --control_type; not photos, unless --control_extract."""
    control_type: tuple[str, ...] = ()
    """canny, segmentation, depth, or another control of the model (`nextscale info` lists them)."""
    control_scale: tuple[float, ...] = (1.0,)
    """Strength, one for all controls or one each; 1 as trained, 0 off."""
    control: tuple[str, ...] = ()
    """Folders of further control modules, or runs of `nextscale train control`."""
    control_extract: bool = False
    """The control images are photos: make the maps first, as the modules were trained."""
    control_start: tuple[int, ...] = (0,)
    """First scale under control, one for all controls or one each."""
    control_end: tuple[int, ...] = ()
    """First scale that is not any more, one for all controls or one each; none: to the last."""
    control_mask: str | None = None
    """Grey picture: where control acts, white 1, black 0."""
    guess_mode: bool = False
    """Control alone, without a prompt: strength rises over the blocks from 0.1 to 1."""

    def __post_init__(self) -> None:
        count = len(self.control_type)
        if len(self.control_image) != count:
            raise UserError(
                f"{len(self.control_image)} control images and {count} control types: pass one "
                "--control_type for each --control_image"
            )
        for name in ("control_scale", "control_start", "control_end"):
            given = len(getattr(self, name))
            if not given and name != "control_end":
                raise UserError(f"{name} has no value; give one, or leave it out")
            if given > 1 and given != count:
                wanted = "pass one" if count == 1 else f"pass 1 or {count}"
                raise UserError(f"{given} values of {name}, {count} of control_image; {wanted}")
        files = [("control_image", path) for path in self.control_image]
        files += [("control_mask", self.control_mask)] if self.control_mask else []
        for name, path in files:
            if not Path(path).is_file():
                raise UserError(f"{name}: {path} is no file")
        usual = ControlFlags.__dataclass_fields__
        for name in (
            "control",
            "control_scale",
            "control_start",
            "control_end",
            "control_mask",
            "guess_mode",
            "control_extract",
            "control_guidance_scale",
            "control_in_negative",
        ):
            if not count and getattr(self, name) not in (usual[name].default, None, False):
                raise UserError(f"{name} needs --control_image and --control_type")


def read_controls(config: ControlFlags, pipe: NextScalePipeline) -> list[Control]:
    """The controls that the flags mean, their pictures read, their modules loaded."""
    for path in config.control:
        pipe.load_control(path)
    if not config.control_type:
        return []
    from nextscale.control import Control
    from nextscale.data.images import decode

    mask = None if config.control_mask is None else decode(config.control_mask)
    controls = []
    for i, kind in enumerate(config.control_type):
        image: Any = decode(config.control_image[i])
        if config.control_extract:
            image = _extracted(image, pipe.control(kind).record, pipe)
        controls.append(
            Control(
                image=image,
                type=kind,
                strength=_one(config.control_scale, i),
                start_scale=_one(config.control_start, i),
                end_scale=_one(config.control_end, i) if config.control_end else None,
                mask=mask,
                guess_mode=config.guess_mode,
            )
        )
    return controls


def control_digest(config: ControlFlags, folder: Path) -> str:
    """SHA-256 of the modules and pictures of the flags, empty without any."""
    from nextscale import storage

    paths = [Path(path) for path in config.control_image]
    paths += [folder / "controls" / kind / "model.safetensors" for kind in config.control_type]
    for place in map(Path, config.control):
        paths += [place / "model.safetensors", place / "model" / "model.safetensors"]
    if config.control_mask is not None:
        paths.append(Path(config.control_mask))
    return ":".join(storage.file_sha256(path) for path in paths if path.is_file())


def _one(values: tuple[Any, ...], index: int) -> Any:
    return values[min(index, len(values) - 1)]


def _extracted(image: Any, record: ControlRecord, pipe: NextScalePipeline) -> Any:
    """The map of a photo, at the model's resolution, by the extractor of the module's training."""
    import torch

    from nextscale.data.images import fit_to

    pixels = fit_to(image, pipe.tokenizer.resolution[0], "center", overscale=1.0)
    return torch.from_numpy(record.open_extractor()(pixels[None]))
