"""What the cards of the bundled feature network and CLIP claim, on scenes of the test stream.

python benchmarks/bundled_networks.py
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter
from tqdm import tqdm

from nextscale.data.checker import falsifiable
from nextscale.data.scenes import Scene, render, sample_scene
from nextscale.eval import evaluate
from nextscale.eval.clip import Clip, open_clip_model
from nextscale.eval.contrastive import one_change, rank_first
from nextscale.eval.feature_network import small_features
from nextscale.eval.features import extract
from nextscale.eval.images import open_images
from nextscale.eval.statistics import statistics_of

SEED = 2  # the test stream: neither trained nor validated on
COUNT = 5000  # scenes of each set of a Fréchet distance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clip_model", default="scenes-clip")
    parser.add_argument("--count", type=int, default=1000, help="scenes that the CLIP reads")
    parser.add_argument("--output", default="benchmarks/results/bundled_networks.json")
    options = parser.parse_args()
    clip = open_clip_model(options.clip_model)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "scenes-clip": captions_read(clip, options.count),
        "fd_scenes": {name: list(values) for name, values in faults_told()},
    }
    print(json.dumps(result, indent=1))
    Path(options.output).write_text(json.dumps(result, indent=1) + "\n")


# ---- the small CLIP --------------------------------------------------------------------------


def captions_read(clip: Clip, count: int) -> dict[str, Any]:
    """How often the right caption wins among 32, and what wins if not."""
    found: dict[str, Any] = {"weights": clip.sha256, "scenes": count}
    for held_out in (False, True):
        scenes = [sample_scene(SEED, index, held_out=held_out) for index in range(count)]
        name = "right_caption_first_of_32" + (", held-out pairs" if held_out else "")
        found[name] = right_caption_first(clip, scenes)
        found[f"{name}, true rivals too"] = right_caption_first(clip, scenes, true_rivals=True)
        if not held_out:
            found["some_false_caption_of_this_kind_wins"] = false_captions_that_win(clip, scenes)
    return found


def right_caption_first(clip: Clip, scenes: list[Scene], *, true_rivals: bool = False) -> float:
    """Among 32, of which 8 have one statement changed; the others are those of other scenes.

    `true_rivals` keeps captions of other scenes that are true of the picture as well.
    """
    captions = [str(scene.caption) for scene in scenes]
    false = [one_change(s, 8, np.random.default_rng(i)) for i, s in enumerate(scenes)]
    images = clip.images(list(render(scenes, clip.size)))
    return rank_first(clip, images, captions, false, scenes=None if true_rivals else scenes)


def false_captions_that_win(clip: Clip, scenes: list[Scene]) -> dict[str, float]:
    """By the kind of the changed statement, of the scenes where there is one."""
    tried: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    images = clip.images(list(render(scenes, clip.size)))
    for scene, image in zip(tqdm(scenes, desc="captions"), images, strict=True):
        false = falsifiable(scene.caption, scene)
        texts = [str(caption) for others in false.values() for caption in others]
        own, *scores = (clip.texts([str(scene.caption), *texts]) @ image).tolist()
        for kind, others in false.items():
            here, scores = scores[: len(others)], scores[len(others) :]
            tried[kind] += 1
            lost[kind] += max(here) > own
    return {kind: round(lost[kind] / tried[kind], 3) for kind in tried}


# ---- the feature network ---------------------------------------------------------------------


def _rounded(pixels: np.ndarray) -> np.ndarray:
    return pixels.round().clip(0, 255).astype(np.uint8)


def blurred(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur; sigma in pixels."""
    parts = np.array_split(pixels, 10)
    return np.concatenate(
        [_rounded(gaussian_filter(p.astype(np.float32), (0, sigma, sigma, 0))) for p in parts]
    )


def noisy(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian noise; sigma of the range."""
    rng, parts = np.random.default_rng(0), np.array_split(pixels, 10)
    return np.concatenate(
        [_rounded(p + 255 * sigma * rng.standard_normal(p.shape, dtype=np.float32)) for p in parts]
    )


def shifted(pixels: np.ndarray, amount: float) -> np.ndarray:
    """More red, less green and blue; of the range."""
    change = np.array([1.0, -0.5, -1.0], dtype=np.float32)
    return _rounded(pixels + np.float32(255 * amount) * change)


def unbalanced(pixels: np.ndarray, share: float) -> np.ndarray:
    """So many of the pictures show a red circle first, whatever else they show."""
    count = int(share * len(pixels))
    scenes = (sample_scene(SEED, 10 * COUNT + i) for i in range(100 * COUNT))
    red = [s for s, _ in zip((s for s in scenes if s.class_label == 0), range(count), strict=False)]
    more = render(red, 64) if red else pixels[:0]
    return np.concatenate([more, pixels[count:]])


FAULTS: Mapping[str, tuple[Callable[[np.ndarray, float], np.ndarray], tuple[float, ...]]] = {
    "blur": (blurred, (0.5, 0.7, 1.0)),
    "noise": (noisy, (0.02, 0.05, 0.1)),
    "colour shift": (shifted, (0.02, 0.05, 0.1)),
    "red circles": (unbalanced, (0.1, 0.2, 0.4)),
}


def true_scenes(count: int) -> np.ndarray:
    """Pictures of 64 pixels, [count, 64, 64, 3]."""
    drawn = [sample_scene(SEED, index) for index in range(count)]
    return np.concatenate([render(drawn[i : i + 500], 64) for i in range(0, count, 500)])


def meter(reference: np.ndarray) -> Callable[[np.ndarray], tuple[float, float]]:
    """Pictures -> `fd_scenes` to these pictures, and its standard error."""
    network = small_features()
    features = extract(open_images(reference), network, moments=["scenes"], batch_size=250)
    statistics = statistics_of(features, network.fingerprint(), "true scenes")

    def measure(pixels: np.ndarray) -> tuple[float, float]:
        found = evaluate(
            pixels, statistics, network=network, metrics=["fd_scenes"], batch_size=250
        )["metrics"]["fd_scenes"]
        return found["value"], found["se"]

    return measure


def faults_told() -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """By fault: value and error of none and of each amount."""
    pixels = true_scenes(2 * COUNT)
    measure = meter(pixels[:COUNT])
    clean = measure(pixels[COUNT:])
    for name, (damage, amounts) in tqdm(FAULTS.items(), desc="faults"):
        yield name, [clean, *(measure(damage(pixels[COUNT:], amount)) for amount in amounts)]


if __name__ == "__main__":
    main()
