"""What the cards of the bundled feature network and CLIP claim, on scenes of the test stream.

python benchmarks/bundled_networks.py
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from nextscale.data.checker import falsifiable
from nextscale.data.scenes import render, sample_scene
from nextscale.eval.clip import open_clip_model
from nextscale.eval.contrastive import one_change, rank_first

SEED = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clip_model", default="scenes-clip")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--output", default="benchmarks/results/bundled_networks.json")
    options = parser.parse_args()
    clip = open_clip_model(options.clip_model)
    scenes = [sample_scene(SEED, index) for index in range(options.count)]
    images = clip.images(list(render(scenes, clip.size)))
    captions = [str(scene.caption) for scene in scenes]
    false = [one_change(s, 8, np.random.default_rng(i)) for i, s in enumerate(scenes)]
    tried: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    for scene, image, caption in zip(scenes, images, captions, strict=True):
        own = clip.texts([caption])[0] @ image
        for kind, others in falsifiable(scene.caption, scene).items():
            tried[kind] += 1
            lost[kind] += bool((clip.texts([str(o) for o in others]) @ image > own).any())
    result: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "scenes": options.count,
        "weights": clip.sha256,
        "right_caption_first_of_32": rank_first(clip, images, captions, false),
        "some_false_caption_of_this_kind_wins": {
            kind: round(lost[kind] / tried[kind], 3) for kind in tried
        },
    }
    print(json.dumps(result, indent=1))
    Path(options.output).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
