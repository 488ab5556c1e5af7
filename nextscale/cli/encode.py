"""`nextscale encode`: images -> token maps."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nextscale import processes, storage
from nextscale.cli.console import Interrupted, check_folder
from nextscale.cli.flags import parse
from nextscale.cli.loading import load_tokenizer
from nextscale.cli.ranks import on_main, pick_device, process_group
from nextscale.cli.recipes import to_yaml
from nextscale.data.config import DataConfig, open_dataset
from nextscale.errors import UserError

if TYPE_CHECKING:
    from nextscale.data.sources import ImageSource, Split
    from nextscale.tokenizers.token_maps import TokenMaps

ABOUT = (
    "Turn images into token maps, once for many trainings: pass the folder as --dataset of "
    "`nextscale train var`. Images are cropped in the centre. Shards are spread over processes: "
    "torchrun --nproc_per_node 8 -m nextscale encode ..."
)
EXAMPLE = "nextscale encode --tokenizer scenes --dataset scenes --num_images 1000 --output_dir maps"


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(DataConfig):
    """Flags of `nextscale encode`."""

    output_dir: str
    """Folder of the token maps."""
    tokenizer: str = "scenes"
    """A bundled model, a folder (tokenizer, model or training run), a hub id, or a .pth file."""
    num_validation_images: int = 2000
    """Images of the validation split, encoded beside the training split; 0 = none."""
    batch_size: int = 32
    """Images encoded at a time, per process."""
    shard_size: int = 10_000
    """Images per file."""
    overwrite: bool = False
    """Write into a folder that is not empty."""
    device: str | None = None
    """cpu, cuda, ...; None: a GPU if there is one."""
    dtype: str = "auto"
    """float32, bfloat16, float16, or auto: bfloat16 on GPUs and CPUs that multiply in it."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be 1 or more, got {getattr(self, name)}.")
        if self.num_validation_images < 0:
            raise UserError(
                f"num_validation_images must be 0 or more, got {self.num_validation_images}."
            )


def run(command: str, arguments: list[str]) -> int:
    """Encode and say where the maps are."""
    config, output = parse(command, EncodeConfig, arguments, about=ABOUT, example=EXAMPLE)
    if output.print_config:
        print(to_yaml(command, asdict(config)), end="")
        return 0
    with process_group():
        hint = "Choose another folder, or --overwrite."
        on_main(lambda: check_folder(config.output_dir, empty=not config.overwrite, hint=hint))
        try:
            maps, counts, skipped = encode(config, progress=output.bar())
        except KeyboardInterrupt as error:
            raise Interrupted(
                f"interrupted; {config.output_dir} is unfinished, start again with --overwrite"
            ) from error
    if skipped:
        output.note(f"{len(skipped)} files were no image and were skipped, such as {skipped[0]}")
    figures = {
        "output_dir": config.output_dir,
        **{f"num_{split}": count for split, count in counts.items()},
        "scales": maps.schedule.to_list(),
        "fingerprint": maps.fingerprint,
        "skipped": skipped,
    }
    text = " and ".join(f"{count} {split}" for split, count in counts.items())
    output.figures(figures, f"{text} token maps in {config.output_dir} (scales {maps.schedule})")
    return 0


def encode(config: EncodeConfig, *, progress: bool) -> tuple[TokenMaps, dict[str, int], list[str]]:
    """Write the token maps; returns them, the images per split, and the files skipped."""
    from nextscale.tokenizers.token_maps import INDEX, write_token_maps

    tokenizer = load_tokenizer(config.tokenizer, pick_device(config.device), config.dtype)
    if tokenizer.resolution != (config.resolution, config.resolution):
        raise UserError(
            f"resolution {config.resolution} does not fit the tokenizer, which is made for "
            f"{tokenizer.resolution[0]} x {tokenizer.resolution[1]} pixels; use --resolution "
            f"{tokenizer.resolution[0]}"
        )
    sources = {"train": _open(config, "train", config.num_images)}
    if config.num_validation_images:
        held_out = config.num_validation_images
        sources["validation"] = _open(config, "validation", held_out)
    if processes.is_main():
        # Until the new index is there, the folder counts as unfinished.
        (Path(config.output_dir) / INDEX).unlink(missing_ok=True)
    maps = write_token_maps(
        config.output_dir,
        tokenizer,
        sources,
        batch_size=config.batch_size,
        shard_size=config.shard_size,
        facts={"dataset": config.dataset, "tokenizer": config.tokenizer},
        progress=progress,
    )
    skipped = [name for source in sources.values() for name in source.skipped]
    shards = storage.read_json(Path(config.output_dir) / INDEX)["splits"]
    return maps, {split: sum(n for _, n in own) for split, own in shards.items()}, skipped


def _open(config: DataConfig, split: Split, num_images: int | None) -> ImageSource:
    return open_dataset(replace(config, num_images=num_images), split, crop="center")
