"""`nextscale generate --model PIPELINE`: a diffusers pipeline, plain or with search."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextscale import processes, storage
from nextscale.cli.conditions import read_conditions
from nextscale.cli.console import Output
from nextscale.cli.job import RECIPE, metadata, remove_pictures
from nextscale.cli.loading import ModelFiles
from nextscale.cli.recipes import to_yaml
from nextscale.cli.search_flags import SearchFlags, open_search, reward_name, summary
from nextscale.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from nextscale.align.models import DiffusionModel
    from nextscale.align.search import Search
    from nextscale.cli.generate import GenerateConfig

_READ = {
    *("prompts", "prompt", "prompt_file", "class_labels", "num_images", "seed", "output_dir"),
    *("overwrite", "batch_size", "guidance_scale", "num_inference_steps", "eta"),
    "guidance_threshold",
    *("model", "revision", "local_files_only"),
    *(field.name for field in fields(SearchFlags)),
}


@dataclass(frozen=True, kw_only=True)
class DiffusionFlags:
    """How a diffusers pipeline draws; next-scale models have neither."""

    num_inference_steps: int | None = None
    """Denoising steps of a diffusers pipeline; none: 20."""
    eta: float | None = None
    """Noise of DDIM steps under --search, (0, 1]; none: 1. Without search there is
    none, and flow matching has its own."""

    def diffusion(self) -> dict[str, Any]:
        """Those that are given."""
        names = DiffusionFlags.__dataclass_fields__
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def pipeline_folder(config: GenerateConfig) -> Path | None:
    """Where the model lies if it is a diffusers pipeline, which one process alone draws by.

    Raises:
        UserError: If there is no such model.
    """
    if processes.world_size() > 1:
        return None
    place = {"revision": config.revision, "local_files_only": config.local_files_only}
    folder = storage.resolve_model(config.model, **place)
    index = folder / storage.MODEL_INDEX
    found = index.is_file() and "_class_name" in storage.read_json(index)
    return folder if found else None


def generate(config: GenerateConfig, folder: Path, output: Output) -> dict[str, Any]:
    """Run the whole command; the summary is what --json prints.

    Raises:
        UserError: For flags of next-scale models, and pipelines without log-probabilities.
    """
    began = time.perf_counter()
    usual = {field.name: field.default for field in fields(config)}
    wrong = [name for name in usual if name not in _READ and getattr(config, name) != usual[name]]
    if wrong:
        raise UserError(
            f"{', '.join(wrong)}: not for {config.model}, which is a diffusers pipeline. Leave it "
            "out"
        )
    if config.eta is not None and config.search is None:
        raise UserError("eta is the noise that a search chooses from: give --search too")
    if config.guidance_scale is not None and len(config.guidance_scale) != 1:
        raise UserError("guidance_scale of a diffusers pipeline is one number")
    from nextscale.align.config import AlignConfig, DiffusionSettings
    from nextscale.align.models import DiffusionModel, open_model
    from nextscale.streams import image_seeds

    settings = AlignConfig(
        model=str(folder),
        output_dir=config.output_dir,
        guidance_scale=None if config.guidance_scale is None else config.guidance_scale[0],
        rollout_batch_size=config.batch_size,
        diffusion=DiffusionSettings(**config.diffusion()),
    )
    model = open_model(settings)
    assert isinstance(model, DiffusionModel)
    model.adapt_guidance(config.guidance_threshold)
    kind = "text" if model.num_classes is None else "class"
    files = ModelFiles(folder, {}, {"kind": kind, "num_classes": model.num_classes})
    given = read_conditions(config, files)
    conditions = [condition for condition in given for _ in range(config.num_images)]
    seed = None if config.seed == -1 else config.seed
    seeds = image_seeds(seed, None, len(conditions))
    search = open_search(
        config, next(model.policy.network.parameters()).device, scenes=model.grammar == "scenes"
    )
    draw = _drawing(config, model, search, given)
    target = Path(config.output_dir)
    if config.overwrite and target.is_dir():
        remove_pictures(target)
    named = {"prompt": given} if model.num_classes is None else {"class_labels": given}
    repeated: dict[str, Any] = {"prompts": (), "prompt_file": None, "overwrite": False, **named}
    repeated["search_reward"] = reward_name(config, scenes=model.grammar == "scenes")
    made = replace(config, seed=seeds[0], **repeated)
    storage.write_bytes(target / RECIPE, to_yaml("generate", asdict(made)).encode())
    paths = [target / f"{i:06d}.png" for i in range(len(conditions))]
    _write(draw, conditions, seeds, paths, made, output)
    from nextscale.cli.sheets import write_grid

    grid = None
    if len(paths) <= 64:
        grid = str(target / "grid.png")
        write_grid(Path(grid), paths, conditions, config.num_images, metadata(_facts(made)))
    return {
        "num_images": len(paths), "seed": seeds[0], "output_dir": config.output_dir, "grid": grid,
        "npz": None, "search": summary(search), "seconds": time.perf_counter() - began,
        "images": [str(p) for p in paths],
    }  # fmt: skip


def _drawing(
    config: GenerateConfig, model: DiffusionModel, search: Search | None, given: Sequence[str]
) -> Callable[[list[str], list[int]], Tensor]:
    """A function (prompts or labels, seeds) -> pictures in [0, 1].

    Raises:
        UserError: For what would be refused only while drawing.
    """
    import torch

    from nextscale.align.policies.gaussian import FlowTransitions

    policy: Any = model.policy
    if config.eta is not None and isinstance(policy.transitions, FlowTransitions):
        raise UserError("eta is of DDIM, and this pipeline's scheduler is one of flow matching")
    if search is not None:
        search.check(policy)
    by_class = model.num_classes is not None

    def named(conditions: Sequence[str]) -> list[Any]:
        return [int(c) if by_class and c.isdigit() else c for c in conditions]

    if by_class:
        policy.encode(named(list(dict.fromkeys(given))))

    @torch.no_grad()
    def draw(conditions: list[str], seeds: list[int]) -> Tensor:
        asked = named(conditions)
        if search is None:
            return model.draw(None, asked, seeds)
        return policy.decode(search.on(policy, asked, seeds)).cpu()

    return draw


def _write(
    draw: Callable[[list[str], list[int]], Tensor],
    conditions: list[str],
    seeds: list[int],
    paths: list[Path],
    config: GenerateConfig,
    output: Output,
) -> None:
    from tqdm import tqdm

    from nextscale.data.images import save_png, to_uint8

    with tqdm(total=len(paths), desc="images", disable=not output.bar()) as bar:
        for start in range(0, len(paths), config.batch_size):
            part = slice(start, start + config.batch_size)
            images = draw(conditions[part], seeds[part])
            own = zip(images, paths[part], conditions[part], seeds[part], strict=True)
            for image, path, condition, seed in own:
                facts = {"prompt": condition, "seed": seed, **_facts(config)}
                pixels = to_uint8(image).permute(1, 2, 0).numpy()
                save_png(pixels, path, metadata(facts))
            bar.update(len(images))


def _facts(config: GenerateConfig) -> dict[str, Any]:
    """What every PNG of the run says about itself."""
    searched = {f.name: getattr(config, f.name) for f in fields(SearchFlags)}
    guidance = {n: getattr(config, n) for n in ("guidance_scale", "guidance_threshold")}
    return {
        "model": config.model, **config.diffusion(), **guidance,
        **(searched if config.search else {}),
    }  # fmt: skip
