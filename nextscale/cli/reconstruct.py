"""`nextscale reconstruct`: images -> tokens -> images, measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nextscale.cli.console import Output, check_folder, number, table
from nextscale.cli.flags import parse
from nextscale.cli.loading import load_tokenizer
from nextscale.cli.ranks import pick_device
from nextscale.cli.recipes import to_yaml
from nextscale.data.config import DataConfig
from nextscale.errors import UserError

if TYPE_CHECKING:
    from nextscale.data.sources import ImageSource
    from nextscale.tokenizers import MultiscaleVQ

ABOUT = (
    "Encode and decode held-out images and print PSNR and the codebook's usage per scale; on "
    "scenes also how often the checker agrees with the caption of the reconstruction."
)
EXAMPLE = "nextscale reconstruct --tokenizer scenes --dataset scenes --num_images 2000"
SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig(DataConfig):
    """Flags of `nextscale reconstruct`."""

    tokenizer: str = "scenes"
    """A bundled model, a folder (tokenizer, model or training run), a hub id, or a .pth file."""
    num_images: int | None = 2000
    """Use only the first so many images of the validation split; None: all."""
    output_dir: str | None = None
    """Write reconstructions.png here: originals above, reconstructions below."""
    batch_size: int = 32
    """Images at a time."""
    device: str | None = None
    """cpu, cuda, ...; None: a GPU if there is one."""
    dtype: str = "auto"
    """float32, bfloat16, float16, or auto: bfloat16 on GPUs and CPUs that multiply in it."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size must be 1 or more, got {self.batch_size}.")


def run(command: str, arguments: list[str]) -> int:
    """Measure and print."""
    config, output = parse(command, ReconstructConfig, arguments, about=ABOUT, example=EXAMPLE)
    if output.print_config:
        print(to_yaml(command, asdict(config)), end="")
        return 0
    if config.output_dir is not None:
        check_folder(config.output_dir, empty=False)
    tokenizer = load_tokenizer(config.tokenizer, pick_device(config.device), config.dtype)

    from nextscale.data.config import open_dataset
    from nextscale.tokenizers.train import measure

    if tokenizer.resolution != (config.resolution, config.resolution):
        raise UserError(
            f"resolution {config.resolution} does not fit the tokenizer; use --resolution "
            f"{tokenizer.resolution[0]}"
        )
    source = open_dataset(config, "validation")
    report: dict[str, Any] = {"split": "validation (held out)", "num_images": len(source)}
    report |= measure(tokenizer, source, len(source), config.batch_size, progress=output.bar())
    if config.dataset == "scenes":
        report["checker_agreement"] = _agreement(tokenizer, source, config.batch_size, output)
    if config.output_dir is not None:
        report["picture"] = _picture(tokenizer, source, config.output_dir)
    _print(report, tokenizer, output)
    return 0


def _reconstruct(tokenizer: MultiscaleVQ, images: Any) -> Any:
    """Float [b, 3, R, R] in [0, 1] of uint8 images."""
    from nextscale.data.images import to_float

    pixels = to_float(images).to(tokenizer.quant_conv.weight.device)
    return (tokenizer.decode(tokenizer.encode(pixels)) + 1) / 2


def _agreement(
    tokenizer: MultiscaleVQ, source: ImageSource, batch_size: int, output: Output
) -> float:
    """Share of the reconstructions that still show what their caption says."""
    from tqdm import tqdm

    from nextscale.data.checker import check_batch
    from nextscale.data.images import to_uint8

    right = 0
    starts = range(0, len(source), batch_size)
    for start in tqdm(starts, desc="checker", disable=not output.bar()):
        batch = source.load(np.arange(start, min(start + batch_size, len(source))))
        images = to_uint8(_reconstruct(tokenizer, batch.images)).permute(0, 2, 3, 1).cpu().numpy()
        assert batch.captions is not None
        right += sum(r.holds for r in check_batch(images, batch.captions))
    return right / len(source)


def _picture(tokenizer: MultiscaleVQ, source: ImageSource, folder: str) -> str:
    from pathlib import Path

    import torch

    from nextscale.training.grid import save_grid

    images = source.load(np.arange(min(SHOWN, len(source)))).images
    rows = torch.cat([images.float() / 255, _reconstruct(tokenizer, images).cpu()])
    path = Path(folder) / "reconstructions.png"
    save_grid(rows, path, columns=len(images))
    return str(path)


def _print(report: dict[str, Any], tokenizer: MultiscaleVQ, output: Output) -> None:
    if output.json:
        output.figures(report)
        return
    if output.quiet:
        return
    whole = {k: v for k, v in report.items() if not k[-1].isdigit()}
    table(("", ""), [(k, number(v)) for k, v in whole.items()])
    names = ("codes", "share", "perplexity")
    rows = [
        [str(k), f"{h}x{w}", *(number(report[f"{name}_{k}"]) for name in names)]
        for k, (h, w) in enumerate(tokenizer.schedule.sides)
    ]
    table(("scale", "side", "codes used", "share of possible", "perplexity"), rows)
