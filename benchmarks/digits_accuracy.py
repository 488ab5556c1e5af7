"""Share of generated digits that a classifier trained on the real ones reads as their label.

    python benchmarks/digits_accuracy.py --model runs/digits-var/model

The classifier is a support vector machine on scikit-learn's digits, fitted on the training split
only; its own accuracy on the validation split is printed beside.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from sklearn.svm import SVC

import nextscale as ns
from nextscale.data.checker import wilson_interval
from nextscale.data.sources import open_source


def small(images: torch.Tensor) -> np.ndarray:
    """Grey 8x8 features in [0, 1] of images [n, 3, H, W] in [0, 1]."""
    grey = images.float().mean(dim=1, keepdim=True)
    return torch.nn.functional.interpolate(grey, size=8, mode="area").flatten(1).numpy()


def real(split: str) -> tuple[np.ndarray, np.ndarray]:
    source = open_source("digits", resolution=32, split=split)  # pyright: ignore[reportArgumentType]
    batch = source.load(np.arange(len(source)))
    assert batch.labels is not None
    return small(batch.images / 255), batch.labels.numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="runs/digits-var/model")
    parser.add_argument("--num_images", type=int, default=100, help="per digit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output")
    options = parser.parse_args()
    classifier = SVC(gamma="scale", C=10.0).fit(*real("train"))
    features, labels = real("validation")
    on_real = float((classifier.predict(features) == labels).mean())
    pipe = ns.NextScalePipeline.from_pretrained(options.model)
    images = pipe(
        class_labels=list(range(10)),
        num_images_per_prompt=options.num_images,
        seed=options.seed,
        batch_size=100,
        output_type="pt",
        progress=True,
    ).images
    wanted = np.repeat(np.arange(10), options.num_images)
    hits = classifier.predict(small(images)) == wanted
    low, high = wilson_interval(int(hits.sum()), len(hits))
    result = {
        "accuracy": float(hits.mean()),
        "interval": [low, high],
        "n": len(hits),
        "per_digit": [float(hits[wanted == d].mean()) for d in range(10)],
        "classifier_on_real_validation": on_real,
    }
    print(json.dumps(result, indent=1))
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
