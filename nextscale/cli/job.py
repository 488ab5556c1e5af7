"""What a `nextscale generate` run is: every flag filled in, everything refused that can be."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextscale import __version__, storage
from nextscale.cli.conditions import NO_PROMPT, read_conditions
from nextscale.cli.console import check_folder
from nextscale.cli.control_flags import control_digest
from nextscale.cli.loading import check_conditions, read_model
from nextscale.cli.ranks import pick_device
from nextscale.cli.recipes import read_recipe, to_yaml
from nextscale.cli.search_flags import reward_name
from nextscale.errors import UserError

if TYPE_CHECKING:
    from nextscale.cli.generate import GenerateConfig

RECIPE = "recipe.yaml"
_PER_SCALE = ("guidance_scale", "control_guidance_scale", "temperature")  # or one number
# Flags that do not change a picture; a resumed run may set them anew.
_FREE = ("output_dir", "resume", "overwrite", "npz", "local_files_only", "device", "download")


@dataclass(frozen=True)
class Job:
    """A resolved run.

    Attributes:
        config: The flags, with conditions, seed and dtype filled in.
        conditions: Prompts or labels, one per `num_images` pictures.
        settings: Sampling settings for the pipeline.
        weights: SHA-256 of the model's weights (and the LoRA's).
        prompts: Whether the conditions are prompts.
    """

    config: GenerateConfig
    conditions: tuple[str, ...]
    settings: dict[str, Any]
    weights: str
    prompts: bool

    @property
    def count(self) -> int:
        """Pictures of the whole run."""
        return len(self.conditions) * self.config.num_images

    @property
    def seed(self) -> int:
        """Seed of the first picture."""
        assert self.config.seed is not None
        return self.config.seed

    def condition(self, index: int) -> str:
        """Prompt or label of a picture."""
        return self.conditions[index // self.config.num_images]

    def path(self, index: int, suffix: str = "") -> Path:
        """File of a picture."""
        return Path(self.config.output_dir) / f"{index:06d}{suffix}.png"

    def missing(self) -> list[int]:
        """Pictures that are not written yet."""
        return [i for i in range(self.count) if not self.path(i).exists()]


def resolve_job(config: GenerateConfig) -> Job:
    """Everything that can be refused, in the order of its cost."""
    check_output(config)
    folder = Path(config.output_dir)
    model = read_model(
        config.model, revision=config.revision, local_files_only=config.local_files_only
    )
    conditions = read_conditions(config, model)
    alone = conditions == (NO_PROMPT,)
    if not alone:
        check_conditions(model, conditions)
    if config.negative_prompt is not None:
        if not model.takes_prompts:
            raise UserError("negative_prompt needs a model that takes prompts.")
        check_conditions(model, [config.negative_prompt])

    from nextscale.pipeline import resolve_dtype
    from nextscale.streams import image_seeds
    from nextscale.var.lora import adapter_file
    from nextscale.var.sampling import SamplingConfig

    count = len(conditions) * config.num_images
    before = read_recipe(str(folder / RECIPE)) if (folder / RECIPE).exists() else {}
    seed = None if config.seed == -1 else config.seed
    if seed is None and config.resume:
        seed = before.get("seed")
    seed = image_seeds(seed, None, count)[0]
    generation = model.folder / "generation_config.json"
    defaults = asdict(storage.build(SamplingConfig, model.generation, generation))
    settings = asdict(SamplingConfig(**{**defaults, **config.sampling()}))
    if config.search is not None:
        settings["num_candidates"] = 1
    import torch

    dtype = str(resolve_dtype(config.dtype, torch.device(pick_device(config.device))))
    given = () if alone else conditions
    named = {"prompt": given} if model.takes_prompts else {"class_labels": given}
    resolved = {
        **{"prompts": (), "prompt": (), "prompt_file": None, "class_labels": (), **named},
        **{"seed": seed, "dtype": dtype.removeprefix("torch."), "preset": None},
        **{k: _tuple(v) if k in _PER_SCALE and v is not None else v for k, v in settings.items()},
    }
    scenes = model.conditioner.get("grammar") == "scenes"
    resolved["search_reward"] = reward_name(config, scenes=scenes)
    weights = model.weights()
    if config.lora is not None:
        weights += ":" + storage.file_sha256(adapter_file(config.lora, "adapter_model.safetensors"))
    if config.start is not None:
        path = Path(config.start)
        weights += ":" + storage.file_sha256(path / "start.safetensors" if path.is_dir() else path)
    if config.search_model is not None:
        judge = read_model(config.search_model, local_files_only=config.local_files_only)
        weights += ":" + judge.weights()
    if config.control_type or config.control:
        weights += ":" + control_digest(config, model.folder)
    job = Job(replace(config, **resolved), conditions, settings, weights, model.takes_prompts)
    if config.resume and before:
        _check_same(job, before)
    elif config.resume and any(job.path(i).exists() for i in range(job.count)):
        raise UserError(
            f"--resume: {config.output_dir} holds pictures but no {RECIPE} that says how they were "
            "made. Choose another folder, or --overwrite."
        )
    return job


def check_output(config: GenerateConfig) -> None:
    """Refuse an output folder that holds something.

    Raises:
        UserError: Says what to do.
    """
    hint = "Continue it with --resume, replace its pictures with --overwrite, or choose another."
    # A recipe alone is what a run leaves that failed before its first picture.
    fresh = not (config.resume or config.overwrite)
    check_folder(config.output_dir, empty=fresh, hint=hint, besides=RECIPE)


def _check_same(job: Job, before: dict[str, Any]) -> None:
    """Refuse to continue a run that had other settings."""
    now = record(job)
    keys = [k for k in {**before, **now} if k not in _FREE and before.get(k) != now.get(k)]
    if keys:
        changes = ", ".join(f"{k} was {before.get(k)} and is {now.get(k)}" for k in keys)
        raise UserError(
            f"--resume: the run in {job.config.output_dir} had other settings: {changes}. "
            f"Continue it with --config {Path(job.config.output_dir) / RECIPE} --resume, or "
            "choose another folder."
        )
    done = next((p for i in range(job.count) if (p := job.path(i)).exists()), None)
    if done is not None and read_metadata(done).get("weights") != job.weights:
        raise UserError(
            f"--resume: {done} was made by other weights of {job.config.model}. Choose another "
            "folder, or --overwrite."
        )


def remove_pictures(folder: Path) -> None:
    """What an earlier run left in a folder that --overwrite replaces."""
    for pattern in ("[0-9]" * 6 + ".png", "[0-9]" * 6 + "_scales.png"):
        for path in folder.glob(pattern):
            path.unlink()
    for name in ("grid.png", "samples.npz", RECIPE):
        (folder / name).unlink(missing_ok=True)


def record(job: Job) -> dict[str, Any]:
    """The flags that repeat the run, as recipe.yaml holds them."""
    import yaml

    values = {k: v for k, v in asdict(job.config).items() if k not in ("resume", "overwrite")}
    content = yaml.safe_load(to_yaml("generate", values))
    content.pop("command")
    return content


def metadata(facts: dict[str, Any]) -> dict[str, str]:
    """A PNG's text chunk: these facts and the versions."""
    versions = {"nextscale": __version__, "torch": version("torch")}
    return {"nextscale": json.dumps({**facts, "versions": versions}, ensure_ascii=False)}


def read_metadata(path: Path) -> dict[str, Any]:
    """What a generated PNG says about itself; empty if it is no picture of ours."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return json.loads(image.info.get("nextscale", "{}"))
    except (OSError, ValueError):
        return {}


def _tuple(value: Any) -> tuple[float, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)
