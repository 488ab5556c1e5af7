"""What a person looks at after a measurement: a map of the features, extremes, a table by class."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from nextscale import storage
from nextscale.errors import missing_extra
from nextscale.eval.measure import Measured
from nextscale.training import save_grid

SHOWN = 2000  # points of each set on the map
EXTREMES = 8  # best and worst pictures


def draw_plots(measured: Measured, folder: Path) -> list[Path]:
    """Write what the measurement allows: features.png, extremes.png, per_class.csv.

    The score that ranks pictures is the finest one that a picture has of its own (a scorer, the
    cosine of CLIPScore, SSIM, ...), else its nearness to the nearest reference picture.

    Args:
        measured: With the features kept (`keep` of `measure`).
        folder: Where to; made if need be.

    Returns:
        The files.
    """
    with storage.os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    rows, real = measured.fake.rows, measured.real
    taps = [tap for tap in rows if rows[tap].shape[1] > 1]
    written = []
    if taps:
        other = real.rows.get(taps[0]) if real is not None else None
        written.append(_draw_map(rows[taps[0]], other, taps[0], folder / "features.png"))
    score = _scores(measured, taps)
    if score is not None:
        name, values, higher = score
        written.append(_draw_extremes(measured, name, values, higher, folder / "extremes.png"))
        table = _write_table(measured, name, values, higher, folder / "per_class.csv")
        written += [table] if table is not None else []
    return written


def _scores(measured: Measured, taps: list[str]) -> tuple[str, np.ndarray, bool] | None:
    """Name, one number per picture, and whether high is good."""
    rows = measured.fake.rows
    lower = ("mse", "lpips")
    single = [tap for tap in rows if rows[tap].shape[1] == 1]
    if single:  # a score of 0 or 1 would rank by chance
        tap = max(single, key=lambda name: len(np.unique(rows[name])))
        return tap, rows[tap][:, 0], tap not in lower
    real = measured.real
    if real is None or not taps or taps[0] not in real.rows:
        return None
    ours, theirs = (torch.from_numpy(f[taps[0]]).double() for f in (rows, real.rows))
    nearest = torch.cat([torch.cdist(part, theirs).amin(dim=1) for part in ours.split(1024)])
    return f"distance to the nearest reference ({taps[0]})", nearest.numpy(), False


def _some(rows: torch.Tensor) -> torch.Tensor:
    """SHOWN rows at most, evenly from the whole set, which may be sorted by class."""
    return rows[:: -(-len(rows) // SHOWN)]


def _draw_map(fake: np.ndarray, real: np.ndarray | None, tap: str, path: Path) -> Path:
    """Both sets on the two directions in which the reference (or else the set) varies most."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("--plot needs matplotlib", "eval") from error
    base = torch.from_numpy(fake if real is None else real).double()
    centre = base.mean(dim=0)
    _, _, directions = torch.linalg.svd(_some(base) - centre, full_matrices=False)
    figure = Figure(figsize=(6, 5.5), layout="constrained")
    axes = figure.add_subplot()
    sets = [("reference", real, "tab:gray"), ("samples", fake, "tab:blue")]
    for label, rows, color in sets:
        if rows is not None:
            points = (_some(torch.from_numpy(rows)).double() - centre) @ directions[:2].T
            axes.scatter(*points.T.numpy(), s=10, alpha=0.6, linewidths=0, color=color, label=label)
    axes.set(title=f"{tap} features", xlabel="first direction", ylabel="second direction")
    axes.legend(loc="best", markerscale=3)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    storage.write_bytes(path, content.getvalue())
    return path


def _draw_extremes(
    measured: Measured, name: str, values: np.ndarray, higher: bool, path: Path
) -> Path:
    """The best pictures in the first row, the worst in the second."""
    order = np.argsort(-values if higher else values, kind="stable")
    shown = min(EXTREMES, len(order) // 2)
    chosen = [*order[:shown], *order[::-1][:shown][::-1]]
    pictures = [measured.images.load([int(row)])[0] for row in chosen]
    side = max(64, max(max(p.shape[:2]) for p in pictures))
    tiles = torch.ones(len(pictures), 3, side, side)
    for tile, picture in zip(tiles, pictures, strict=True):
        height, width = picture.shape[:2]
        tile[:, :height, :width] = torch.from_numpy(picture.copy()).permute(2, 0, 1) / 255
    told = name.split(" ")[0]
    captions = [
        f"{'best' if place < shown else 'worst'}, {told} {values[row]:.3g}"
        + (f": {measured.prompts[row]}" if measured.prompts else "")
        for place, row in enumerate(chosen)
    ]
    save_grid(tiles, path, columns=shown, captions=captions, text={"score": name})
    return path


def _write_table(
    measured: Measured, name: str, values: np.ndarray, higher: bool, path: Path
) -> Path | None:
    """Mean score of each class or prompt, worst first."""
    groups: defaultdict[str, list[float]] = defaultdict(list)
    labels = measured.images.labels
    if labels is not None:
        keys, title = [str(int(label)) for label in labels], "class"
    elif measured.prompts:
        keys, title = list(measured.prompts), "prompt"
    else:
        return None
    for key, value in zip(keys, values, strict=True):
        groups[key].append(float(value))
    means = sorted((float(np.mean(found)), key, len(found)) for key, found in groups.items())
    means = means if higher else means[::-1]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([title, "pictures", name])
    writer.writerows((key, count, f"{mean:.6g}") for mean, key, count in means)
    storage.write_bytes(path, text.getvalue().encode())
    return path
