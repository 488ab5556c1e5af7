"""Scenes per second on one core: sampled, captioned and rendered at the training size.

python benchmarks/scenes.py
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time

import numpy as np
from record import save_record

from nextscale.data.sources import open_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", default="benchmarks/results/scenes.json")
    options = parser.parse_args()
    source = open_source("scenes", resolution=options.resolution, split="train")
    rates = []
    for repeat in range(options.repeats):
        start = time.process_time()  # this process alone, whatever else runs
        source.load(np.arange(repeat * options.batch, (repeat + 1) * options.batch))
        rates.append(options.batch / (time.process_time() - start))
    rate = round(statistics.median(rates))
    print(rate, "scenes per second of one core")
    command = shlex.join(["python", *sys.argv])
    save_record(options.output, command, resolution=options.resolution, images_per_cpu_second=rate)


if __name__ == "__main__":
    main()
