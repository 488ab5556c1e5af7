"""`nextscale extract`: images -> control maps."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from nextscale import storage
from nextscale.cli.console import Interrupted, check_folder
from nextscale.cli.flags import parse
from nextscale.cli.recipes import to_yaml
from nextscale.control.conditions import ExtractorSettings, open_extractor
from nextscale.errors import UserError, require

log = logging.getLogger(__name__)

ABOUT = (
    "Make control maps of images: canny, softedge, scribble, depth, normal, segmentation, lowres, "
    "inpaint; hed, lineart, pidi, normalbae, openpose, zoe with the extra control-aux. "
    "`nextscale generate --control_image` takes such a map. What made the maps is written beside "
    "them, in extractor.json."
)
EXAMPLE = "nextscale extract photos --type canny --output_dir maps"


@dataclass(frozen=True, kw_only=True)
class ExtractConfig(ExtractorSettings):
    """Flags of `nextscale extract`."""

    images: tyro.conf.Positional[tuple[str, ...]] = ()
    """Pictures, or folders of pictures."""
    type: str = "canny"
    """TYPE or TYPE:SOURCE, such as canny, depth:scenes, segmentation:OWNER/MODEL."""
    resolution: int | None = None
    """Resize and crop to this side first; None: as they are."""
    output_dir: str = "maps"
    """Folder of the maps, PNGs with the names of the images."""
    overwrite: bool = False
    """Write into a folder that is not empty."""

    def __post_init__(self) -> None:
        side = self.resolution
        require("resolution", side, side is None or side > 0, "be above 0")


def run(command: str, arguments: list[str]) -> int:
    """Extract and say where the maps are."""
    config, output = parse(command, ExtractConfig, arguments, about=ABOUT, example=EXAMPLE)
    if output.print_config:
        print(to_yaml(command, asdict(config)), end="")
        return 0

    from tqdm import tqdm

    from nextscale.data.images import BadImage, save_png

    given = ExtractorSettings(
        **{f.name: getattr(config, f.name) for f in fields(ExtractorSettings)}
    )
    extractor = open_extractor(config.type, **given.given())
    paths = _paths(config.images)
    hint = "Choose another folder, or --overwrite."
    check_folder(config.output_dir, empty=not config.overwrite, hint=hint)
    folder = Path(config.output_dir)
    failed: BadImage | None = None
    for path, _ in paths:  # what fails, fails before the folder is there
        try:
            extractor(_read(path, config.resolution)[None])
            break
        except BadImage as error:
            failed = error
    else:
        assert failed is not None
        raise failed
    with storage.os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    written: list[str] = []
    plain = 0
    try:
        for path, name in tqdm(paths, desc=extractor.type, disable=not output.bar()):
            try:
                pixels = _read(path, config.resolution)
            except BadImage as error:
                log.warning("%s is left out, it is no readable image: %s", error.name, error.reason)
                continue
            found = extractor(pixels[None])[0]
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            save_png(
                np.rint(found.transpose(1, 2, 0) * 255).astype(np.uint8),
                target,
                {"nextscale": json.dumps(extractor.record())},
            )
            written.append(str(target))
            plain += int(np.ptp(found, axis=(1, 2)).max() == 0)
    except KeyboardInterrupt as error:
        raise Interrupted(f"interrupted; {len(written)} maps in {folder}") from error
    if plain:
        log.warning(
            "%d of %d maps are of one colour: nothing was found in these pictures%s",
            plain, len(written),
            f" (the {extractor.name} reads scenes; for photos name a model, {extractor.type}:"
            "OWNER/MODEL)" if "scenes" in extractor.name else "",
        )  # fmt: skip
    record: dict[str, Any] = {"type": extractor.type, **extractor.record()}
    storage.write_json(folder / "extractor.json", record)
    output.figures(
        {"output_dir": str(folder), "num_maps": len(written), "maps": written, **record},
        f"maps in {folder}: {len(written)} ({extractor.name}; {extractor.polarity})",
    )
    return 0


def _paths(given: tuple[str, ...]) -> list[tuple[Path, str]]:
    """Pictures and the names of their maps."""
    from nextscale.data.images import is_sheet, list_images

    if not given:
        raise UserError("pass the pictures, or a folder of them: nextscale extract photos ...")
    found: list[tuple[Path, str]] = []
    for place in map(Path, given):
        if place.is_dir():
            for path in (p for p in list_images(place) if not is_sheet(p)):
                found.append((path, str(path.relative_to(place).with_suffix(".png"))))
        elif place.is_file():
            found.append((place, f"{place.stem}.png"))
        else:
            raise UserError(f"there is no picture or folder {place}")
    names = [name for _, name in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"two images would be written to {twice}; extract them one after the other")
    return found


def _read(path: Path, resolution: int | None) -> np.ndarray:
    from nextscale.data.images import decode, fit_to

    image = decode(path)
    if resolution is not None:
        return fit_to(image, resolution, "center", overscale=1.0)
    return np.asarray(image)
