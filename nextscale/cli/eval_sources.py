"""What `nextscale eval` measures: flags -> sources of pictures."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextscale.cli.job import metadata, read_metadata
from nextscale.cli.loading import load_pipeline, load_tokenizer, read_model
from nextscale.cli.model_flags import ModelFlags
from nextscale.cli.ranks import pick_device
from nextscale.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nextscale.cli.evaluate import EvalConfig
    from nextscale.eval.images import Images

DRAWN_AT_ONCE = 16  # as `nextscale generate`
WORLDS = ("scenes", "scenes-all", "digits")


@dataclass(frozen=True)
class Source:
    """Pictures, and what is known of them.

    Attributes:
        images: The pictures.
        prompts: Of each, or None.
        reference: What they are compared with, unless --reference says otherwise.
        about: What the record says of their making.
    """

    images: Images
    prompts: Sequence[str] | None = None
    reference: Any = None
    about: dict[str, Any] = field(default_factory=dict)


def open_samples(config: EvalConfig, *, prompts: bool) -> Source:
    """Files, or a model's pictures, or its tokenizer's reconstructions."""
    if config.samples in WORLDS:
        return _true_pictures(config)
    if config.samples is not None:
        from nextscale.eval.images import open_images

        if config.num_images is not None:
            raise UserError(
                f"--num_images is for --model and built-in worlds; all of {config.samples} is "
                "measured"
            )
        images = open_images(config.samples)
        return Source(images, _prompts(config, images) if prompts else None)
    return _reconstructed(config) if config.reconstruct is not None else _drawn(config)


def open_reference(config: EvalConfig, source: Source) -> Any:
    """A file, or true pictures of a built-in world; None: what the source brings."""
    if config.reference not in WORLDS:
        return source.reference if config.reference is None else config.reference
    from nextscale.data.sources import open_source
    from nextscale.eval.images import open_images

    side = _side(config, source)
    data = open_source(
        config.reference, resolution=side, split="validation", num_images=config.num_reference
    )
    return open_images(_rows_of(data), len(data))


def _true_pictures(config: EvalConfig) -> Source:
    """Pictures of a built-in world: what no model can beat."""
    from nextscale.data.sources import open_source
    from nextscale.eval.images import open_images

    assert config.samples is not None
    # Behind the reference's, if that is of the same world.
    start = config.num_reference if config.reference in WORLDS else 0
    count = config.num_images or 1000
    data = open_source(
        config.samples, resolution=config.resolution, split="validation", num_images=start + count
    )
    if len(data) < start + count:
        raise UserError(
            f"{config.samples} has {len(data)} pictures, not {start} of the reference and {count} "
            "more: lower --num_images or --num_reference"
        )
    read = _rows_of(data)
    import numpy as np

    rows = np.arange(start, start + count)
    prompts = data.captions(rows) if data.has_captions else None
    images = open_images(lambda first, number: read(start + first, number), count)
    return Source(images, prompts, None, {"samples of": config.samples})


def _side(config: EvalConfig, source: Source) -> int:
    """Of the measured pictures, without drawing any."""
    if config.samples in WORLDS:
        return config.resolution
    if config.model is None:
        return source.images.load([0])[0].shape[0]
    return source.about["pixels"]


def _rows_of(data: Any) -> Any:
    """A dataset as f(start, count)."""
    import numpy as np

    from nextscale.data.images import BadImage

    def read(start: int, count: int) -> np.ndarray:
        try:
            images = data.load(np.arange(start, start + count)).images
        except BadImage as error:
            raise UserError(f"{error.name} is no readable image: {error.reason}") from error
        return images.permute(0, 2, 3, 1).numpy()

    return read


def _prompts(config: EvalConfig, images: Images) -> list[str]:
    """From the file, the dataset's captions, or what `nextscale generate` wrote into the PNGs."""
    from nextscale.eval.images import FileImages

    if config.prompts is not None:
        try:
            lines = Path(config.prompts).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read prompts {config.prompts}: {error}") from error
        prompts = [line.strip() for line in lines if line.strip()]
        if prompts and prompts[0].startswith("{"):
            raise UserError(
                f"{config.prompts} holds JSON, not one prompt per line; a metadata.jsonl in the "
                "folder of the pictures is read without --prompts"
            )
        return prompts
    captions = images.captions() if isinstance(images, FileImages) else None
    if captions is not None:
        return captions
    found = [read_metadata(Path(images.name(row))).get("prompt") for row in range(len(images))]
    missing = next((row for row, prompt in enumerate(found) if prompt is None), None)
    if missing is not None:
        raise UserError(
            f"{images.name(missing)} does not say its prompt: pass --prompts FILE, one line per "
            "picture, or a folder with metadata.jsonl"
        )
    return [str(prompt) for prompt in found]


def _drawn(config: EvalConfig) -> Source:
    """The pipeline as a source of pictures."""
    import numpy as np

    from nextscale.data.benchmark import load_benchmark
    from nextscale.data.images import to_uint8
    from nextscale.eval.images import DrawnImages

    assert config.model is not None
    pipe = load_pipeline(ModelFlags(model=config.model, device=config.device))
    conditioner = pipe.transformer.conditioner
    prompts: list[str] | None = None
    labels = None
    if conditioner.prompts:
        prompts = load_benchmark(config.benchmark)
        count = config.num_images or len(prompts)
        prompts = [prompts[i % len(prompts)] for i in range(count)]
        conditions: dict[str, list[Any]] = {"prompt": prompts}
    else:
        classes = conditioner.config()["num_classes"]
        count = config.num_images or 50 * classes
        labels = np.arange(count) * classes // count
        conditions = {"class_labels": labels.tolist()}
    settings = config.sampling()
    size = min(DRAWN_AT_ONCE, count)

    @lru_cache(maxsize=2)
    def block(number: int) -> np.ndarray:
        # Always of one size, the last one padded, as `nextscale generate` has it: what is drawn
        # does not depend on the batches of the pass or the number of processes.
        rows = [min(number * size + i, count - 1) for i in range(size)]
        given: dict[str, Any] = {
            key: [values[i] for i in rows] for key, values in conditions.items()
        }
        seeds = [config.seed + i for i in rows]
        images = pipe(**given, **settings, seed=seeds, output_type="pt").images
        return to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()

    def draw(start: int, number: int) -> np.ndarray:
        return np.stack([block(i // size)[i % size] for i in range(start, start + number)])

    about = {
        "model": config.model,
        "weights": read_model(config.model).weights(),
        "generation": {**asdict(pipe.generation), **settings, "seed": config.seed},
        "captions": config.benchmark if prompts else None,
        "pixels": pipe.tokenizer.resolution[0],
        "dtype": str(pipe.dtype).removeprefix("torch."),
    }
    kept = None if config.save_images is None else Path(config.save_images)

    def told(row: int) -> dict[str, str]:
        facts = {key: values[row] for key, values in conditions.items()}
        return metadata({**facts, "seed": config.seed + row, **about})

    drawn = DrawnImages(draw, count, kept, about, labels, told)
    return Source(drawn, prompts, None, about)


def _reconstructed(config: EvalConfig) -> Source:
    """What is left of a dataset's pictures after the tokenizer, with the pictures as reference."""
    import numpy as np
    import torch

    from nextscale.data.images import to_float, to_uint8
    from nextscale.data.sources import open_source
    from nextscale.eval.images import DrawnImages

    assert config.model is not None
    assert config.reconstruct is not None
    tokenizer = load_tokenizer(config.model, pick_device(config.device), "auto")
    side = tokenizer.resolution[0]
    data = open_source(
        config.reconstruct,
        resolution=side,
        split="validation",
        num_images=config.num_images,
        strict=True,  # a stand-in for a broken file would count twice
        overscale=1.0,
    )
    if config.num_images is None and config.reconstruct in WORLDS[:2]:
        raise UserError(f"{config.reconstruct} has no end: pass --num_images N")
    read = _rows_of(data)

    @torch.inference_mode()
    def reconstruct(start: int, count: int) -> np.ndarray:
        images = torch.from_numpy(read(start, count)).permute(0, 3, 1, 2)
        pixels = to_float(images).to(tokenizer.quant_conv.weight.device)
        back = (tokenizer.decode(tokenizer.encode(pixels)) + 1) / 2
        return to_uint8(back.float()).permute(0, 2, 3, 1).cpu().numpy()

    prompts = data.captions(np.arange(len(data))) if data.has_captions else None
    about = {"tokenizer": config.model, "reconstruct": config.reconstruct, "pixels": side}
    originals = DrawnImages(read, len(data))
    return Source(DrawnImages(reconstruct, len(data)), prompts, originals, about)
