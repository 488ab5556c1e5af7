"""`nextscale eval --preset control`: floor, controlled, ceiling of every control of a model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nextscale.cli.console import number, table
from nextscale.errors import UserError, require

if TYPE_CHECKING:
    from nextscale.cli.console import Output
    from nextscale.data.sources import ImageSource
    from nextscale.eval.frechet import Moments
    from nextscale.pipeline import NextScalePipeline

BATCH = 50
SHOWN = 8


def control_record(
    pipe: NextScalePipeline,
    source: ImageSource,
    *,
    count: int,
    seed: int,
    kinds: tuple[str, ...] = (),
    num_reference: int = 5000,
    picture: Path | None = None,
    progress: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Draw the captions of held-out pictures with and without their control maps, and measure.

    Args:
        pipe: The model with its controls.
        source: Held-out pictures with captions (or labels).
        count: How many.
        seed: Picture i is drawn with seed + i, controlled or not.
        kinds: Which controls; none: all of the model.
        num_reference: Pictures of `source`, behind the first `count`, that fd_scenes compares with.
        picture: Write a strip here: map, floor, controlled, real, for each control.
        progress: Show bars.
        settings: Sampling settings.

    Returns:
        By control: the metric of floor (no control), control, reconstruction (what the tokenizer
        makes of the real picture, the best that tokens can say), real; the shares of the gaps from
        floor to real and to reconstruction that are closed; and prompt accuracy and fd_scenes of
        floor and control.
    """
    from nextscale.control.conditions import colour_labels
    from nextscale.eval.controllability import METRIC_OF, control_score

    kinds = kinds or tuple(pipe.controls)
    if not kinds:
        raise UserError("the model has no controls; pass --control FOLDER, or train one")
    require("num_images", count, count > 1, "be 2 or more: a distance needs a covariance")
    records = {kind: pipe.control(kind).record for kind in kinds}
    for trained_for in records.values():
        if trained_for.type not in METRIC_OF:
            raise UserError(f"there is no metric for controls of the type {trained_for.type}")
    extractors = {kind: trained_for.open_extractor() for kind, trained_for in records.items()}
    pipe.settings(**settings).control_guidance(len(pipe.scales))
    batch = source.load(np.arange(count))
    conditions = _conditions(pipe, batch)
    real = batch.images.permute(0, 2, 3, 1).numpy()
    draw = _Drawing(pipe, conditions, seed, progress, settings)
    floor = draw(None)
    quality = _Quality(pipe, source, batch.captions, count, num_reference)
    record: dict[str, Any] = {"num_images": count, "seed": seed, "controls": {}}
    record["floor"] = quality(floor)
    rows = []
    for kind in kinds:
        trained_for, extractor = records[kind], extractors[kind]
        maps = extractor(real)
        controlled = draw((kind, torch.from_numpy(maps)))
        pictures = {
            "floor": floor,
            "control": controlled,
            "reconstruction": _reconstructed(pipe, batch.images),
            "real": real,
        }
        scores = {
            name: control_score(trained_for.type, maps, extractor(own), colour_labels)
            for name, own in pictures.items()
        }
        floor_value, value = scores["floor"].value, scores["control"].value
        record["controls"][kind] = {
            **{name: asdict(score) for name, score in scores.items()},
            "gap_closed": _share(value, floor_value, scores["real"].value),
            "gap_closed_reconstruction": _share(value, floor_value, scores["reconstruction"].value),
            "quality": quality(controlled),
            "extractor": trained_for.extractor,
        }
        rows += [maps[:SHOWN], *(_chw(own[:SHOWN]) for own in (floor, controlled, real))]
    if picture is not None:
        from nextscale.training.grid import save_grid

        save_grid(torch.from_numpy(np.concatenate(rows)), picture, columns=min(SHOWN, count))
    return record


def print_record(record: dict[str, Any], output: Output) -> None:
    """Two tables: does control hold, and what does it cost."""
    if output.json:
        output.figures(record)
        return
    if output.quiet:
        return
    names = ("floor", "control", "reconstruction", "real")
    rows = []
    for kind, entry in record["controls"].items():
        shown = [_with_error(entry[name]) for name in names]
        closed = [entry["gap_closed"], entry["gap_closed_reconstruction"]]
        shares = ["" if share is None else f"{share:.0%}" for share in closed]
        rows.append((kind, entry["control"]["metric"], *shown, *shares))
    table(("control", "metric", *names, "gap to real closed", "to reconstruction"), rows)
    keys = list(record["floor"])
    rows = [("none", *(number(record["floor"][key]) for key in keys))]
    for kind, entry in record["controls"].items():
        rows.append((kind, *(number(entry["quality"][key]) for key in keys)))
    if keys:
        table(("control", *keys), rows)


def _share(value: float, low: float, high: float) -> float | None:
    return (value - low) / (high - low) if high != low else None


def _with_error(score: dict[str, Any]) -> str:
    error = "" if score["se"] is None else f" ± {score['se']:.2g}"
    return number(score["value"]) + error


def _conditions(pipe: NextScalePipeline, batch: Any) -> dict[str, Any]:
    if pipe.transformer.conditioner.prompts:
        if batch.captions is None:
            raise UserError("the model takes prompts and the dataset has no captions")
        return {"prompt": list(batch.captions)}
    if batch.labels is None:
        raise UserError("the model takes class labels and the dataset has none")
    return {"class_labels": batch.labels.tolist()}


class _Drawing:
    """uint8 pictures of the conditions, controlled or not, at equal seeds."""

    def __init__(
        self,
        pipe: NextScalePipeline,
        conditions: dict[str, Any],
        seed: int,
        progress: bool,
        settings: dict[str, Any],
    ) -> None:
        self.pipe, self.conditions, self.seed = pipe, conditions, seed
        self.progress, self.settings = progress, settings

    def __call__(self, control: tuple[str, torch.Tensor] | None) -> np.ndarray:
        from nextscale.data.images import to_uint8

        given = {k: v for k, v in self.settings.items() if control or not k.startswith("control_")}
        if control is not None:
            given |= {"control_type": control[0], "control_image": control[1]}
        output = self.pipe(
            **self.conditions, **given, seed=self.seed, batch_size=BATCH,
            output_type="pt", progress=self.progress,
        )  # fmt: skip
        return to_uint8(output.images).permute(0, 2, 3, 1).numpy()


class _Quality:
    """Prompt accuracy and Fréchet distance to other true pictures, for scenes."""

    def __init__(
        self, pipe: NextScalePipeline, source: ImageSource, captions: Any, count: int, others: int
    ) -> None:
        grammar = pipe.transformer.conditioner.config().get("grammar")
        self.captions = captions if grammar == "scenes" else None
        self.reference: Moments | None = None
        if self.captions is not None and others:
            from nextscale.eval import small_features

            self.network = small_features("scenes-features", device=pipe.device)
            side = self.network.network.config.resolution
            if pipe.tokenizer.resolution == (side, side):
                rows = np.arange(count, count + others)
                true = source.load(rows).images.permute(0, 2, 3, 1).numpy()
                self.reference = self._moments(true)

    def __call__(self, pictures: np.ndarray) -> dict[str, float]:
        if self.captions is None:
            return {}
        from nextscale.data.checker import check_batch, prompt_accuracy

        reports = check_batch(pictures, self.captions)
        found = {"prompt_accuracy": float(prompt_accuracy(reports)["accuracy"])}
        if self.reference is not None:
            from nextscale.eval import frechet_distance

            own, true = self._moments(pictures), self.reference
            found["fd_scenes"] = frechet_distance(
                own.mean, own.covariance, true.mean, true.covariance
            )
        return found

    def _moments(self, pictures: np.ndarray) -> Moments:
        """Of the pictures' features."""
        from nextscale.eval.frechet import Moments

        starts = range(0, len(pictures), BATCH)
        parts = [
            next(iter(self.network(list(pictures[i : i + BATCH]), range(i, i + BATCH)).values()))
            for i in starts
        ]
        return Moments.of(torch.cat(parts).cpu())


def _reconstructed(pipe: NextScalePipeline, images: torch.Tensor) -> np.ndarray:
    from nextscale.data.images import to_float, to_uint8

    made = []
    for start in range(0, len(images), BATCH):
        pixels = to_float(images[start : start + BATCH]).to(pipe.device)
        made.append((pipe.tokenizer.decode(pipe.tokenizer.encode(pixels)) + 1) / 2)
    return to_uint8(torch.cat(made)).permute(0, 2, 3, 1).cpu().numpy()


def _chw(pictures: np.ndarray) -> np.ndarray:
    return pictures.transpose(0, 3, 1, 2).astype(np.float32) / 255
