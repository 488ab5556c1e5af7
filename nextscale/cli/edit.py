"""`nextscale edit {inpaint,outpaint,class}`: redraw a part of a picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from nextscale import storage
from nextscale.cli.console import Output, check_folder
from nextscale.cli.flags import parse
from nextscale.cli.job import RECIPE, metadata, remove_pictures
from nextscale.cli.loading import ModelFiles, check_conditions, load_pipeline, read_model
from nextscale.cli.model_flags import ModelFlags, SamplingFlags
from nextscale.cli.recipes import to_yaml
from nextscale.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

ABOUT = {
    "edit inpaint": "Redraw the inside of a box. Without prompt and label it is filled from its "
    "surroundings.",
    "edit outpaint": "Redraw the outside of a box.",
    "edit class": "Redraw the inside of a box as a class or prompt.",
}
EXAMPLE = (
    'nextscale {} --image out/000000.png --box 0.0 0.5 1.0 1.0 --prompt "a red circle" '
    "--output_dir edited"
)


@dataclass(frozen=True, kw_only=True)
class EditConfig(SamplingFlags, ModelFlags):
    """Flags of `nextscale edit`."""

    image: tuple[str, ...]
    """Pictures; cropped in the centre and resized to the model's resolution."""
    box: tuple[float, float, float, float]
    """top left bottom right, as fractions of the side in [0, 1]."""
    prompt: str | None = None
    """What the result shows."""
    class_label: str | None = None
    """Likewise, for class-conditional models."""
    seed: int | None = None
    """Picture i is drawn with seed + i; None or -1: random."""
    output_dir: str = "out"
    """Folder of the results."""
    overwrite: bool = False
    """Write into a folder that is not empty."""

    def __post_init__(self) -> None:
        if not self.image:
            raise UserError("--image needs at least one picture.")
        if self.prompt is not None and self.class_label is not None:
            raise UserError("pass --prompt or --class_label, not both.")


def run(command: str, arguments: list[str]) -> int:
    """Edit and say where the pictures are."""
    example = EXAMPLE.format(command)
    config, output = parse(command, EditConfig, arguments, about=ABOUT[command], example=example)
    if output.print_config:
        print(to_yaml(command, asdict(config)), end="")
        return 0
    if command == "edit class" and config.prompt is None and config.class_label is None:
        raise UserError("edit class needs what to draw: --class_label or --prompt.")
    _edit(command, config, output)
    return 0


def _edit(command: str, config: EditConfig, output: Output) -> None:
    hint = "Choose another folder, or --overwrite."
    folder = check_folder(config.output_dir, empty=not config.overwrite, hint=hint)
    files = read_model(
        config.model, revision=config.revision, local_files_only=config.local_files_only
    )
    condition = _condition(config, files)

    import torch
    from tqdm import tqdm

    from nextscale.data.images import decode, save_png, to_uint8
    from nextscale.streams import image_seeds
    from nextscale.training.grid import save_grid

    originals = [decode(name) for name in config.image]
    pipe = load_pipeline(config)
    images = torch.stack([_fit(image, pipe.tokenizer.resolution) for image in originals])
    seeds = image_seeds(None if config.seed == -1 else config.seed, None, len(images))
    edited, paths = [], []
    for index, seed in enumerate(tqdm(seeds, desc="images", disable=not output.bar())):
        edited += pipe.edit(
            images[index : index + 1],
            box=config.box,
            mode="outpaint" if command == "edit outpaint" else "inpaint",
            seed=seed,
            output_type="pt",
            **condition,
            **config.sampling(),
        ).images
    with storage.os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if config.overwrite:
        remove_pictures(folder)
    for index, (picture, seed) in enumerate(zip(edited, seeds, strict=True)):
        facts = {
            **{"command": command, "model": config.model, "weights": files.weights()},
            **{"image": config.image[index], "box": config.box, "seed": seed},
            **condition,
            **asdict(pipe.settings(**config.sampling())),
            "dtype": config.dtype,
        }
        path = folder / f"{index:06d}.png"
        pixels = to_uint8(picture).permute(1, 2, 0).numpy()
        save_png(pixels, path, metadata(facts))
        paths.append(str(path))
    save_grid(torch.stack([*images, *edited]), folder / "grid.png", columns=len(images))
    repeated = {**asdict(config), "seed": seeds[0]}
    storage.write_bytes(folder / RECIPE, to_yaml(command, repeated).encode())
    summary = {"images": paths, "grid": str(folder / "grid.png"), "seeds": seeds}
    output.figures(
        summary,
        f"{len(paths)} edited in {folder} (seed {seeds[0]}); before and after: {summary['grid']}",
    )


def _condition(config: EditConfig, files: ModelFiles) -> dict[str, Any]:
    given = config.prompt if files.takes_prompts else config.class_label
    other = config.class_label if files.takes_prompts else config.prompt
    if other is not None:
        wanted = "--prompt" if files.takes_prompts else "--class_label"
        raise UserError(f"the model {config.model} takes {wanted}.")
    if given is None:
        return {}
    check_conditions(files, [given])
    return {"prompt" if files.takes_prompts else "class_labels": given}


def _fit(image: Any, resolution: tuple[int, int]) -> Tensor:
    import torch

    from nextscale.data.images import fit_to

    if resolution[0] != resolution[1]:
        raise UserError(f"edit takes square models, this one draws {resolution}.")
    pixels = fit_to(image, resolution[0], "center", overscale=1.0)
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
