"""`nextscale generate`: pictures from prompts or class labels, one or fifty thousand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import tyro

from nextscale import processes
from nextscale.cli.control_flags import ControlFlags
from nextscale.cli.diffusion import DiffusionFlags, pipeline_folder
from nextscale.cli.flags import parse
from nextscale.cli.job import check_output
from nextscale.cli.model_flags import ModelFlags, SamplingFlags
from nextscale.cli.recipes import to_yaml
from nextscale.cli.search_flags import TAKEN, SearchFlags, describe
from nextscale.errors import UserError

ABOUT = (
    "Generate pictures. They are numbered prompt by prompt; picture i is drawn with seed + i. "
    "--output_dir holds 000000.png, ..., grid.png (up to 64 pictures) and recipe.yaml, which "
    "repeats the run. The official VAR cfg is another number: cfg=1.5 is --guidance_scale 2.5. "
    "Bulk runs: torchrun --nproc_per_node 8 -m nextscale generate ..., and --resume."
)
EXAMPLE = 'nextscale generate "a red circle left of a blue square" --num_images 4 --output_dir out'
# What a preset stands for; a flag given after --preset wins.
PRESETS: dict[str, tuple[str, ...]] = {
    "fid": (
        *("--guidance_scale", "2.5", "--guidance_schedule", "linear"),
        *("--top_k", "900", "--top_p", "0.96", "--no_more_smooth", "--num_images", "50"),
        *("--num_candidates", "1"),
    ),
    "visual": (
        *("--guidance_scale", "6.0", "--guidance_schedule", "linear"),
        *("--top_k", "900", "--top_p", "0.95", "--more_smooth"),
        *("--num_candidates", "1"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(SearchFlags, ControlFlags, SamplingFlags, DiffusionFlags, ModelFlags):
    """Flags of `nextscale generate`."""

    prompts: tyro.conf.Positional[tuple[str, ...]] = ()
    """One or several prompts; they take the place of --prompt."""
    prompt: tuple[str, ...] = ()
    """Prompts as a flag, as recipes have them."""
    prompt_file: str | None = None
    """Text file with one prompt per line."""
    class_labels: tuple[str, ...] = ()
    """Class ids or names, such as 207 "golden retriever"."""
    negative_prompt: str | None = None
    """What guidance moves away from."""
    num_images: int = 1
    """Pictures per prompt or label."""
    seed: int | None = None
    """Picture i is drawn with seed + i; None or -1: random, printed and stored."""
    preset: Literal["fid", "visual"] | None = None
    """fid: guidance 2.5 linear, top_k 900, top_p 0.96, not smoothed, 50 pictures of every class;
    visual: guidance 6.0 linear, top_k 900, top_p 0.95, smoothed. A flag given after it wins."""
    output_dir: str = "out"
    """Folder of the pictures."""
    batch_size: int = 16
    """Pictures at a time, per process."""
    save_scales: bool = False
    """Also write 000000_scales.png, ...: the picture after each scale, side by side."""
    npz: bool = False
    """Also write samples.npz, the layout of ADM's evaluator: arr_0 uint8 [N, H, W, 3]; for class
    models the labels are arr_1."""
    resume: bool = False
    """Continue an interrupted run in output_dir: finished pictures are kept."""
    overwrite: bool = False
    """Delete the pictures of an earlier run in output_dir first."""
    lora: str | None = None
    """Folder of a LoRA for the model."""
    lora_scale: float = 1.0
    """Strength of the LoRA."""
    start: str | None = None
    """Start file of `nextscale align --method find`, or its folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_images", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be 1 or more, got {getattr(self, name)}.")
        if self.seed is not None and not -1 <= self.seed < 2**32:
            raise UserError(f"seed must be -1 (random) or in [0, 2^32), got {self.seed}.")
        if not math.isfinite(self.lora_scale):
            raise UserError(f"lora_scale must be finite, got {self.lora_scale}.")
        if self.lora_scale != 1 and self.lora is None:
            raise UserError("--lora_scale is the strength of --lora, which is missing")
        self.check_search()
        if self.search is not None and self.num_candidates not in (None, 1):
            raise UserError("--search takes the place of num_candidates: leave one of them out")
        for name in ("start", "save_scales", "negative_prompt", "control_type", "more_smooth"):
            if self.search is None or name in TAKEN.get(self.search, ()) or not getattr(self, name):
                continue
            off = f"give --{name} False" if name == "more_smooth" else f"leave {name} out"
            raise UserError(f"--search {self.search} does not go with {name}: {off}")
        if self.start is not None and self.negative_prompt is not None:
            raise UserError(
                "negative_prompt and start: starts are learnt without a negative prompt. Leave one "
                "of them out"
            )
        if self.resume and self.overwrite:
            raise UserError("--resume keeps finished pictures, --overwrite deletes them: pass one.")


def run(command: str, arguments: list[str]) -> int:
    """Generate and say where the pictures are."""
    config, output = parse(
        command, GenerateConfig, arguments, about=ABOUT, example=EXAMPLE, expand=expand_preset
    )
    if not output.print_config and processes.world_size() == 1:
        check_output(config)  # before a model is fetched
    folder = pipeline_folder(config)
    if output.print_config:
        if folder is not None:
            print(to_yaml(command, asdict(config)), end="")
            return 0
        from nextscale.cli.loading import read_model

        files = read_model(
            config.model, revision=config.revision, local_files_only=config.local_files_only
        )
        resolved = {**asdict(config), **files.generation, **config.sampling(), "preset": None}
        resolved["prompt"] = [*resolved.pop("prompts"), *resolved["prompt"]]
        print(to_yaml(command, resolved), end="")
        return 0
    if folder is not None:
        from nextscale.cli.diffusion import generate as generate_diffusion

        summary = generate_diffusion(config, folder, output)
    else:
        if unread := config.diffusion():
            raise UserError(
                f"{', '.join(unread)}: for diffusers pipelines, and {config.model} is a next-scale "
                "model. Leave it out"
            )
        from nextscale.cli.bulk import generate

        summary = generate(config, output)
    what = f"{summary['num_images']} picture{'s' * (summary['num_images'] != 1)}"
    lines = [f"{what} in {config.output_dir} (seed {summary['seed']}, {summary['seconds']:.1f} s)"]
    lines += [f"{name}: {summary[name]}" for name in ("grid", "npz") if summary[name]]
    if summary.get("search"):
        lines.append(describe(summary["search"]))
    output.figures(summary, "\n".join(lines))
    return 0


def expand_preset(words: Sequence[str]) -> list[str]:
    """Put a preset's flags right behind it."""
    result: list[str] = []
    previous = ""
    for word in words:
        result.append(word)
        name = word.removeprefix("--preset=") if word.startswith("--preset=") else None
        name = word if previous == "--preset" else name
        result += PRESETS.get(name or "", ())
        previous = word
    return result
