"""`nextscale info`: versions and devices, or all about a model."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nextscale import __version__, storage
from nextscale.cli.console import Output
from nextscale.cli.flags import parse
from nextscale.cli.loading import read_model
from nextscale.cli.recipes import to_yaml
from nextscale.errors import UserError

ABOUT = "Versions, device and extras; with --model, a model's sizes, defaults and grammar."
EXAMPLE = "nextscale info --model scenes"
CORE = ("torch", "numpy", "pillow", "safetensors", "huggingface_hub", "tyro", "scipy")
EXTRAS = {
    "train": (
        *("torchvision", "accelerate", "peft", "datasets", "webdataset", "tensorboard"),
        "scikit-learn",
    ),
    "eval": ("torch-fidelity", "torchmetrics", "open_clip_torch", "timm"),
    "control": ("opencv-python-headless", "kornia", "timm"),
    "align": ("diffusers", "transformers"),
    "xformers": ("xformers",),
}


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """Flags of `nextscale info`."""

    model: str | None = None
    """A bundled model, a folder, or a hub id."""
    checker: bool = False
    """Measure the scenes checker's own error on rendered scenes, with true and false captions."""
    num_images: int = 2000
    """Scenes for --checker."""


def run(command: str, arguments: list[str]) -> int:
    """Print what is asked."""
    config, output = parse(command, InfoConfig, arguments, about=ABOUT, example=EXAMPLE)
    if output.print_config:
        print(to_yaml(command, asdict(config)), end="")
    elif config.checker:
        _checker(config.num_images, output)
    elif config.model is not None:
        _model(config.model, output)
    else:
        _machine(output)
    return 0


def _machine(output: Output) -> None:
    import torch

    from nextscale.pipeline import resolve_dtype

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    device = torch.device("cuda" if gpus else "cpu")
    absent = {
        extra: [package for package in packages if _version(package) is None]
        for extra, packages in EXTRAS.items()
    }
    facts: dict[str, Any] = {
        "nextscale": __version__,
        "python": platform.python_version(),
        **{package: _version(package) for package in CORE},
        "device": f"{device.type}" + (f" ({', '.join(gpus)})" if gpus else ""),
        "dtype auto": str(resolve_dtype("auto", device)).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "bundled models": ", ".join(storage.bundled_names()) or "none",
    }
    for extra, names in absent.items():
        facts[f"extra {extra}"] = "installed" if not names else f"without {', '.join(names)}"
    output.figures(facts)


def _model(name: str, output: Output) -> None:
    files = read_model(name)
    tokenizer = storage.read_config(files.folder / "tokenizer" / "config.json", 1, "MultiscaleVQ")
    transformer = storage.read_config(
        files.folder / "transformer" / "config.json", 1, "NextScaleTransformer"
    )
    scales = tokenizer["scales"]
    stride = 2 ** (len(tokenizer["channel_multipliers"]) - 1)
    height, width = (scales[-1],) * 2 if isinstance(scales[-1], int) else scales[-1]
    card = files.folder / "README.md"
    kind = files.conditioner["kind"]
    classes = f", {files.num_classes} classes" if files.num_classes else ""
    facts: dict[str, Any] = {
        "model": name,
        "folder": str(files.folder),
        "pixels": f"{width * stride}x{height * stride}",
        "scales": scales,
        "codebook": f"{tokenizer['codebook_size']} x {tokenizer['codebook_dim']}",
        "tokenizer parameters": _parameters(files.folder / "tokenizer"),
        "transformer depth": transformer["depth"],
        "transformer width": transformer["width"] or 64 * transformer["depth"],
        "transformer parameters": _parameters(files.folder / "transformer"),
        "takes": ("prompts" if files.takes_prompts else "class_labels") + f" ({kind}{classes})",
        **{f"default {k}": v for k, v in files.generation.items()},
        **{
            f"control {folder.name}": _control(folder)
            for folder in sorted(files.folder.glob("controls/*"))
            if folder.is_dir()
        },
        "card": str(card) if card.exists() else None,
        **{
            f"sha256 {part}": storage.file_sha256(files.folder / part / "model.safetensors")
            for part in ("tokenizer", "transformer", "conditioner")
        },
        "weights": files.weights(),
    }
    grammar = None
    if files.conditioner.get("grammar") == "scenes":
        from nextscale.data import captions

        grammar = captions.grammar()
        facts["grammar"] = grammar if output.json else "below"
    output.figures(facts)
    if grammar is not None:
        output.say(grammar)


def _control(folder: Path) -> str:
    """A control module in a line."""
    values = storage.read_config(folder / "config.json", 1, "ControlModule")
    record = values["record"]
    made_by = record["extractor"]
    settings = ", ".join(f"{k} {v}" for k, v in made_by.get("settings", {}).items())
    return (
        f"{values['architecture']}, {_parameters(folder)}; maps by {made_by.get('name', '?')}"
        + (f" ({settings})" if settings else "")
        + f", {made_by.get('polarity', '?')}"
    )


def _checker(count: int, output: Output) -> None:
    from nextscale.data.checker import checker_error

    if count < 1:
        raise UserError(f"num_images must be 1 or more, got {count}.")
    report = checker_error(count, progress=output.bar())
    if output.json:
        output.figures(report)
        return
    rows = {"scenes": report["n"]}
    for kind, what in (("true", "true captions refused"), ("false", "false captions accepted")):
        low, high = (f"{100 * x:.2f}" for x in report[f"{kind}_interval"])
        rows[what] = f"{100 * report[f'{kind}_error']:.2f} % (95 %: {low} to {high})"
    for kind, counts in report["false_kinds"].items():
        rows[f"  false {kind}"] = f"{counts['accepted']} of {counts['n']} accepted"
    output.figures(rows)


def _parameters(folder: Any) -> str:
    """Millions of numbers in a weight file, from its header."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    total = 0
    for shape in shapes:
        size = 1
        for side in shape:
            size *= side
        total += size
    return f"{total / 1e6:.2f} M"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
