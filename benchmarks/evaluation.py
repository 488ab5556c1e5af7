"""FID of two folders of PNGs: images per second and peak memory beside the peers', one run.

    python benchmarks/evaluation.py --count 2000

Pictures of 256 px, decoding, network creation and the Fréchet term included; every tool in a
process of its own with the same random-weight Inception. Then the Fréchet term alone at 2,048
dimensions beside scipy's sqrtm. bf16 is labelled: its features differ by about 4e-3.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from record import save_record

from nextscale.eval.frechet import Moments, frechet_distance
from nextscale.eval.inception import _TRUNK, _network, random_weights
from nextscale.processes import keep_freed_memory

BATCH, WORKERS = 32, 2


def ours(folder: Path, precision: str) -> float:
    from nextscale.eval.inception import Inception, read_weights
    from nextscale.eval.measure import evaluate

    keep_freed_memory()  # as the command line does
    network = Inception(read_weights(folder / "inception.pth"), precision=precision)
    record = evaluate(
        folder / "a", folder / "b", network=network, jackknife=False,
        batch_size=BATCH, num_workers=WORKERS,
    )  # fmt: skip
    return record["metrics"]["fid[adm]"]["value"]


def torch_fidelity(folder: Path) -> float:
    from torch_fidelity import calculate_metrics

    found = calculate_metrics(
        input1=str(folder / "a"), input2=str(folder / "b"), fid=True, cuda=False, verbose=False,
        batch_size=BATCH, cache=False,
        feature_extractor_weights_path=str(folder / "inception.pth"),
    )  # fmt: skip
    return found["frechet_inception_distance"]


def pytorch_fid(folder: Path) -> float:
    from pytorch_fid import fid_score, inception

    state = torch.load(folder / "inception.pth", weights_only=True)
    inception.load_state_dict_from_url = lambda *args, **keywords: state
    paths = [str(folder / "a"), str(folder / "b")]
    return float(fid_score.calculate_fid_given_paths(paths, BATCH, "cpu", 2048, WORKERS))


def clean_fid(folder: Path) -> float:
    from cleanfid import fid

    network = _network().eval()
    network.load_state_dict(torch.load(folder / "inception.pth", weights_only=True))
    trunk = torch.nn.Sequential(*(getattr(network, name) for name in _TRUNK))

    @torch.no_grad()
    def features(x: torch.Tensor) -> torch.Tensor:
        return trunk((x - 128) / 128).mean(dim=(2, 3))

    return fid.compute_fid(
        str(folder / "a"), str(folder / "b"), mode="clean", custom_feat_extractor=features,
        batch_size=BATCH, num_workers=WORKERS, device=torch.device("cpu"), verbose=False,
        use_dataparallel=False,
    )  # fmt: skip


TOOLS: dict[str, Callable[[Path], float]] = {
    "nextscale float32": lambda folder: ours(folder, "float32"),
    "nextscale bf16": lambda folder: ours(folder, "bf16"),
    "torch-fidelity": torch_fidelity,
    "pytorch-fid": pytorch_fid,
    "clean-fid": clean_fid,
}


def make_pictures(folder: Path, count: int) -> None:
    """Smooth colour fields with noise: PNGs of about 120 kB, two halves of `count`."""
    random = np.random.default_rng(0)
    for part in ("a", "b"):
        (folder / part).mkdir()
        for index in range(count // 2):
            coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((256, 256), Image.Resampling.BICUBIC), np.int16)
            noisy = smooth + random.integers(-6, 7, smooth.shape)
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(
                folder / part / f"{index:05d}.png"
            )


def frechet_terms() -> list[dict[str, Any]]:
    """Seconds of the Fréchet distance at full rank and rank-deficient, ours and scipy's sqrtm."""
    import scipy.linalg

    rows = []
    mixing = np.random.default_rng(0).normal(size=(2048, 2048)) / 45
    for count in (10_000, 1_000):
        sets = [np.random.default_rng(s).normal(size=(count, 2048)) @ mixing for s in (1, 2)]
        a, b = map(Moments.of, sets)
        start = time.perf_counter()
        value = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
        mine = time.perf_counter() - start
        s1, s2 = a.covariance.numpy(), b.covariance.numpy()
        start = time.perf_counter()
        root = scipy.linalg.sqrtm(s1 @ s2)
        theirs = time.perf_counter() - start
        trace = float(np.trace(s1) + np.trace(s2))
        mean = float(((a.mean - b.mean) ** 2).sum())
        # Exact: tr (S1 S2)^(1/2) is the nuclear norm of A B^T with A, B centred / sqrt(n - 1).
        centred = [(x - x.mean(0)) / np.sqrt(count - 1) for x in sets]
        if count < 2048:
            roots = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
        else:
            roots = np.trace(root).real
        exact = mean + trace - 2 * roots
        row = {
            "count": count, "seconds": round(mine, 2), "scipy_seconds": round(theirs, 2),
            "ratio": round(theirs / mine, 1), "error_of_trace": abs(value - exact) / trace,
        }  # fmt: skip
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def measure(tools: list[str], count: int) -> dict[str, dict[str, Any]]:
    """Every tool on the same `count` pictures, each in a process of its own."""
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_pictures(folder, count)
        torch.save(random_weights(0), folder / "inception.pth")
        for tool in tools:
            words = [sys.executable, __file__, "--row", name, "--tools", tool]
            done = subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ)
            row = json.loads(done.stdout.splitlines()[-1])
            row["images_per_second"] = round(count / row.pop("seconds"), 2)
            rows[tool] = row
            print(count, tool, json.dumps(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=list(TOOLS))
    parser.add_argument("--output", default="benchmarks/results/evaluation.json")
    parser.add_argument("--row", help="internal: folder of one process")
    options = parser.parse_args()
    if options.row:
        start = time.perf_counter()
        value = TOOLS[options.tools[0]](Path(options.row))
        spent = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": spent, "peak_mb": round(peak), "fid": value}))
        return
    rows = measure(options.tools, options.count)
    # Memory that grew with the number of pictures would show here.
    half = measure([t for t in options.tools if "nextscale" in t], options.count // 2)
    for tool, row in half.items():
        rows[tool]["peak_mb_at_a_half"] = row["peak_mb"]
    peers = [row["images_per_second"] for tool, row in rows.items() if "nextscale" not in tool]
    for tool in rows:
        if peers and "nextscale" in tool:
            rows[tool]["ratio"] = round(rows[tool]["images_per_second"] / max(peers), 2)
    command = shlex.join(["python", *sys.argv])
    packages = ("torch-fidelity", "pytorch-fid", "clean-fid", "scipy")
    save_record(
        options.output, command, *packages, count=options.count, tools=rows, frechet=frechet_terms()
    )


if __name__ == "__main__":
    main()
