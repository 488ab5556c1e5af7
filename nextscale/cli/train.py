"""`nextscale train {tokenizer,var,control,features,clip,diffusion}`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from nextscale import processes
from nextscale.cli.console import Output, check_folder, interrupted_run, number, table
from nextscale.cli.flags import parse
from nextscale.cli.recipes import to_yaml

if TYPE_CHECKING:
    from torch import Tensor

    from nextscale.tokenizers import MultiscaleVQ
    from nextscale.var import NextScaleTransformer

ABOUT = {
    "train tokenizer": "Train a multi-scale tokenizer. Runs under accelerate launch and torchrun: "
    "accelerate launch -m nextscale train tokenizer ...",
    "train var": "Train or fine-tune a next-scale transformer on class labels or captions. Runs "
    "under accelerate launch and torchrun: accelerate launch -m nextscale train var ...",
    "train control": "Train a module that makes pictures follow a map (edges, depth, segmentation) "
    "on a model that stays as it is.",
    "train features": "Train a small feature network for Fréchet distances on your own kind of "
    "pictures.",
    "train clip": "Train a small CLIP on pictures with captions.",
    "train diffusion": "Train a small latent diffusion model on pictures with captions; diffusers "
    "opens it.",
}
EXAMPLE = {
    "train tokenizer": "nextscale train tokenizer --config digits-tokenizer --output_dir runs/tok",
    "train var": "nextscale train var --config digits-var --output_dir runs/var",
    "train control": "nextscale train control --config scenes-canny --output_dir runs/canny",
    "train features": "nextscale train features --config scenes-features --output_dir runs/f",
    "train clip": "nextscale train clip --config scenes-clip --output_dir runs/clip",
    "train diffusion": "nextscale train diffusion --config scenes-diffusion --output_dir runs/sd",
}


def run(command: str, arguments: list[str]) -> int:
    """Train and print the last figures."""
    train: Any
    settings: type
    extra: dict[str, Any] = {}
    if command == "train tokenizer":
        from nextscale.tokenizers.train import TokenizerTrainingConfig as settings
        from nextscale.tokenizers.train import train_tokenizer as train
    elif command == "train control":
        from nextscale.control.train import ControlTrainingConfig as settings
        from nextscale.control.train import train_control as train
    elif command == "train features":
        from nextscale.eval.train_features import FeaturesTrainingConfig as settings
        from nextscale.eval.train_features import train_features as train
    elif command == "train clip":
        from nextscale.eval.train_clip import ClipTrainingConfig as settings
        from nextscale.eval.train_clip import train_clip as train
    elif command == "train diffusion":
        from nextscale.align.diffusion_train import DiffusionTrainingConfig as settings
        from nextscale.align.diffusion_train import train_diffusion as train
    else:
        from nextscale.var.train import TransformerTrainingConfig as settings
        from nextscale.var.train import train_transformer as train
    config, output = parse(
        command, settings, arguments, about=ABOUT[command], example=EXAMPLE[command]
    )
    if output.print_config:
        print(to_yaml(command, asdict(config)), end="")
        return 0
    check_folder(config.output_dir, empty=False)
    if command == "train var" and config.num_validation_prompts:
        extra["evaluate"] = partial(_prompt_accuracy, config)
    if command == "train diffusion" and config.num_validation_prompts:
        extra["evaluate"] = partial(_diffusion_accuracy, config)
    try:
        result = train(config, progress=output.bar(), **extra)
    except KeyboardInterrupt as error:
        raise interrupted_run(config.output_dir) from error
    if processes.is_main():
        _report(config.output_dir, result, output)
    return 0


def _prompt_accuracy(
    config: Any, model: NextScaleTransformer, tokenizer: MultiscaleVQ, step: int
) -> dict[str, float]:
    """Share of benchmark captions whose picture the checker accepts, for scenes models."""
    import torch

    from nextscale.data.benchmark import load_benchmark
    from nextscale.data.detector import MIN_SIDE
    from nextscale.pipeline import NextScalePipeline, resolve_dtype

    small = min(tokenizer.resolution) < MIN_SIDE  # too small for the checker
    if small or model.conditioner.config().get("grammar") != "scenes":
        return {}
    captions = load_benchmark("standard")[: config.num_validation_prompts]
    half = resolve_dtype("auto", model.device) == torch.bfloat16
    with torch.autocast(model.device.type, torch.bfloat16, enabled=half):
        pipe = NextScalePipeline(tokenizer, model, config.generation)
        images = pipe(captions, seed=0, batch_size=50, output_type="pt").images
    return _checked(images, captions)


def _diffusion_accuracy(
    config: Any, draw: Callable[[Sequence[str]], Tensor], step: int
) -> dict[str, float]:
    """The same of a diffusion model, and the mean share of statements that hold."""
    from nextscale.data.benchmark import load_benchmark
    from nextscale.data.detector import MIN_SIDE
    from nextscale.eval.scorers import checker_statements

    if config.resolution < MIN_SIDE or not config.grammar:
        return {}
    captions = load_benchmark("standard")[: config.num_validation_prompts]
    images = draw(captions)
    statements = checker_statements(images, captions).mean().item()
    return {**_checked(images, captions), "prompt_statements": statements}


def _checked(images: Tensor, captions: list[str]) -> dict[str, float]:
    from nextscale.data.checker import check_batch, prompt_accuracy
    from nextscale.data.images import to_uint8

    pixels = to_uint8(images).permute(0, 2, 3, 1).numpy()
    figures = prompt_accuracy(check_batch(pixels, captions))
    kinds = {f"prompt_{k}": v["accuracy"] for k, v in figures["kinds"].items()}
    return {"prompt_accuracy": figures["accuracy"], **kinds}


def _report(folder: str, result: Any, output: Output) -> None:
    facts = {"output_dir": folder, "steps": result.steps, "seconds": result.seconds}
    checkpoint = None if result.checkpoint is None else str(result.checkpoint)
    if output.json:
        output.figures({**facts, "checkpoint": checkpoint, "metrics": result.metrics})
    elif not output.quiet:
        table(("metric", "value"), [(k, number(v)) for k, v in sorted(result.metrics.items())])
        output.say(f"{result.steps} steps in {result.seconds / 60:.1f} minutes; result in {folder}")
