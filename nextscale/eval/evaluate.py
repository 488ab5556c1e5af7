"""`evaluate`: pictures in, figures with their errors, warnings and record out."""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nextscale import __version__, processes
from nextscale.errors import UserError
from nextscale.eval.features import Features, Network, extract, fingerprint_of
from nextscale.eval.images import FileImages, Images, open_images
from nextscale.eval.metrics import BLOCKS, METRICS, Pair, Value, mean_score
from nextscale.eval.protocols import get_protocol, inception_splits
from nextscale.eval.reconstruction import PAIRED, measure_pairs
from nextscale.eval.scorers import SCORERS, Joined, Scored
from nextscale.eval.statistics import (
    Statistics,
    cached_path,
    check_same,
    is_statistics,
    read_statistics,
    save_statistics,
    statistics_of,
)

SCHEMA = 1
LOSSY = (".jpg", ".jpeg", ".webp", ".gif")


def evaluate(
    samples: Any,
    reference: Any = None,
    *,
    network: Network | None = None,
    metrics: Sequence[str] = ("fid",),
    protocol: str = "adm",
    prompts: Sequence[str] | None = None,
    num_images: int | None = None,
    num_reference: int | None = None,
    k: int = 3,
    seed: int = 2020,
    jackknife: bool = True,
    batch_size: int = 32,
    num_workers: int = 0,
    cache: Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Measure a set of pictures.

    Args:
        samples: What is measured; see `open_images`.
        reference: Pictures, or an .npz of statistics (`nextscale eval stats`, the ADM suite's,
            pytorch-fid's). The ADM suite's file may hold both.
        network: Gives the features, such as `Inception(weights, protocol)`; None for metrics of
            pairs, which need none.
        metrics: Names of `METRICS` and `SCORERS`, or of `PAIRED`.
        protocol: Name that stands behind each figure.
        prompts: Of each picture, for the metrics of `SCORERS`.
        num_images: How many pictures a source function draws.
        num_reference: Likewise, for a reference that is drawn.
        k: Neighbours of prc.
        seed: Of kid's subsets.
        jackknife: Standard errors of Fréchet distances: 20 more of them, without a twentieth of
            the measured pictures each. The reference counts as fixed.
        batch_size: Pictures at once.
        num_workers: Processes that decode.
        cache: Folder where statistics of reference files are kept, by their content; None: off.
        progress: Show bars.

    Returns:
        A record for JSON: `metrics` (name[protocol] -> value, se, ci95, n_ref, n_gen,
        higher_is_better, protocol, params), `warnings`, `manifest`.

    Raises:
        UserError: For a name that is none, sets that are too small, statistics of another protocol,
            pictures that cannot be read.
    """
    began = time.perf_counter()
    check_request(metrics, reference, k)
    if all(name in PAIRED for name in metrics):
        return _evaluate_pairs(
            open_images(samples, num_images), reference, metrics, batch_size, progress
        )
    images = open_images(samples, num_images)
    scored = {name: SCORERS[name] for name in metrics if name in SCORERS}
    networks: list[Network] = [] if network is None else [network]
    if scored:
        networks.append(Scored(scored, _checked_prompts(prompts, len(images), list(scored))))
    both = Joined(networks)
    wanted = [METRICS[name] for name in metrics if name in METRICS]
    missing = sorted({m.tap for m in wanted} - set(both.taps))
    if missing:
        raise UserError(f"there is no network that gives {', '.join(missing)} features")
    if len(images) < 2:
        raise UserError(f"2 pictures or more are needed, got {len(images)}")
    needs_reference = any(m.reference for m in wanted)
    statistics, real_images = None, None
    if needs_reference:
        statistics, real_images = _open_reference(reference, num_reference)
    needing = [n for n in metrics if n in METRICS and METRICS[n].rows and METRICS[n].reference]
    if needing and real_images is None:
        raise UserError(
            f"{', '.join(needing)} needs the reference's pictures, and {reference} holds "
            "statistics alone: pass a folder, or an .npz with arr_0"
        )
    fewest = min(len(s) for s in (images, real_images) if s is not None)
    if "prc" in metrics and fewest <= k:
        raise UserError(f"k = {k} neighbours need more than {k} pictures in each set, got {fewest}")
    warnings: list[str] = []
    if statistics is not None:
        warnings += filter(None, [check_same(statistics, both.fingerprint())])

    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "num_workers": num_workers,
        "progress": progress,
    }
    moments = sorted({m.tap for m in wanted if m.moments})
    rows = sorted({m.tap for m in wanted if m.rows})
    real_rows = sorted({m.tap for m in wanted if m.rows and m.reference})
    splits = None
    if "isc" in metrics:
        splits = inception_splits(get_protocol(protocol), len(images))
    fake = extract(
        images,
        both,
        moments=moments,
        rows=[*rows, *scored],
        blocks=BLOCKS if jackknife else 1,
        splits=splits,
        label="samples",
        **settings,
    )
    real = None
    kept = None
    if cache is not None and network is not None and isinstance(real_images, FileImages):
        kept = cached_path(cache, real_images, network.fingerprint(), moments) if moments else None
    if kept is not None and statistics is None and all(processes.gather(kept.exists())):
        statistics = replace(read_statistics(kept), name=str(reference))
    from_pictures = [t for t in moments if statistics is None or t not in statistics.values]
    if real_images is not None and network is not None and (from_pictures or real_rows):
        real = extract(
            real_images,
            network,
            moments=from_pictures,
            rows=real_rows,
            label="reference",
            **settings,
        )
        if from_pictures:
            statistics = statistics_of(real, network.fingerprint(), "the reference")
            if kept is not None and processes.is_main():
                save_statistics(statistics, kept)
    pair = Pair(fake, real, statistics, k, seed, progress)
    warnings += warnings_of(images, fake, moments, both)
    if real is not None and real_images is not None:
        about = warnings_of(real_images, real, from_pictures, both)
        warnings += [f"reference: {warning}" for warning in about]
        shared = len(set(fake.digests) & set(real.digests))
        if shared:
            warnings.append(f"pictures that are in the reference too: {shared}")
    results = {}
    for name in metrics:
        if name in scored:
            value = mean_score(fake.rows[name][:, 0], prompts or ())
            results[name] = _record(value, None, fake.count, None)
            continue
        for key, value in METRICS[name].compute(pair).items():
            results[f"{key}[{protocol}]"] = _entry(value, protocol, pair, METRICS[name].reference)
    seconds = time.perf_counter() - began
    count = fake.count + (real.count if real else 0)
    return {
        "schema": SCHEMA,
        "metrics": results,
        "warnings": warnings,
        "manifest": {
            **_environment(),
            "network": both.fingerprint(),
            "samples": _about(fake),
            "reference": _about(real) if real else statistics.name if statistics else None,
            "seed": seed,
            "batch_size": batch_size,
            "seconds": round(seconds, 2),
            "images_per_second": round(count / seconds, 2),
        },
    }


def _evaluate_pairs(
    images: Images, reference: Any, metrics: Sequence[str], batch_size: int, progress: bool
) -> dict[str, Any]:
    """The record of metrics that compare picture i with original i."""
    began = time.perf_counter()
    originals = open_images(reference, len(images))
    scores = measure_pairs(images, originals, metrics, batch_size=batch_size, progress=progress)
    results, count = {}, len(images)
    for name, found in scores.items():
        finite = found.values[np.isfinite(found.values)]
        params: dict[str, Any] = {"infinite": count - len(finite)}
        if found.pooled is not None:
            params["of_pooled_error"] = found.pooled
        mean = float(finite.mean()) if len(finite) else float("inf")
        se = float(finite.std(ddof=1) / len(finite) ** 0.5) if len(finite) > 1 else None
        results[name] = _record(Value(mean, True, se, params), None, count, count)
    return {
        "schema": SCHEMA,
        "metrics": results,
        "warnings": [],
        "manifest": {**_environment(), "seconds": round(time.perf_counter() - began, 2)},
    }


def _entry(value: Value, protocol: str, pair: Pair, reference: bool) -> dict[str, Any]:
    n_ref = None
    if reference and pair.real is not None:
        n_ref = pair.real.count
    elif reference and pair.statistics is not None:
        n_ref = pair.statistics.count
    return _record(value, protocol, pair.fake.count, n_ref)


def _record(value: Value, protocol: str | None, n_gen: int, n_ref: int | None) -> dict[str, Any]:
    """A figure as the record holds it."""
    ci = (
        None if value.se is None else [value.value - 1.96 * value.se, value.value + 1.96 * value.se]
    )
    return {
        "value": value.value,
        "se": value.se,
        "ci95": ci,
        "n_ref": n_ref,
        "n_gen": n_gen,
        "higher_is_better": value.higher_is_better,
        "protocol": protocol,
        "params": dict(value.params or {}),
    }


def _checked_prompts(
    prompts: Sequence[str] | None, count: int, names: Sequence[str]
) -> Sequence[str]:
    if prompts is None:
        raise UserError(f"{', '.join(names)} needs the prompt of every picture")
    if len(prompts) != count:
        raise UserError(f"there are {len(prompts)} prompts for {count} pictures: pass one for each")
    return prompts


# ---- reference, warnings, record -------------------------------------------------------------


def _open_reference(reference: Any, count: int | None) -> tuple[Statistics | None, Images | None]:
    if isinstance(reference, Statistics):
        return reference, None
    if isinstance(reference, str | Path) and is_statistics(reference):
        with np.load(reference, allow_pickle=False) as file:
            pictures = "arr_0" in file.files
        return read_statistics(reference), FileImages(reference) if pictures else None
    images = open_images(reference, count)
    if len(images) < 2:
        raise UserError(f"a reference needs 2 pictures or more, got {len(images)}")
    return None, images


def check_request(metrics: Sequence[str], reference: Any, k: int = 3) -> None:
    """Refuse what can be refused before anything is opened.

    Raises:
        UserError: For names that are none, pairs among others, a missing reference, k below 1.
    """
    known = (*METRICS, *SCORERS, *PAIRED)
    if not metrics:
        raise UserError(f"give at least one metric: {', '.join(known)}")
    for name in metrics:
        if name not in known:
            hint = " Put spaces between names." if "," in name else ""
            raise UserError(f'there is no metric "{name}".{hint} Choose from {", ".join(known)}.')
    pairs = [name for name in metrics if name in PAIRED]
    if pairs and len(pairs) < len(metrics):
        raise UserError(f"{', '.join(PAIRED)} compare pairs: measure them in a run of their own")
    names = [n for n in metrics if n in PAIRED or (n in METRICS and METRICS[n].reference)]
    if names and reference is None:
        raise UserError(f"{', '.join(names)} compares with a reference: pass --reference")
    if k < 1:
        raise UserError(f"k is {k}, but must be 1 or more")


def warnings_of(
    images: Images, fake: Features, moments: Sequence[str], network: Network
) -> list[str]:
    """What a reader of figures about this set should know."""
    found = []
    if isinstance(images, FileImages) and images.sheets:
        found.append(f"grids and filmstrips of nextscale generate left out: {images.sheets}")
    count = fake.count
    if count < 10_000 and moments:
        found.append(f"{count} pictures: figures of the FID family are published for 50,000")
    for tap in moments:
        if count < network.taps[tap] + 1:
            found.append(
                f"{count} pictures are fewer than the {network.taps[tap]} {tap} features: the "
                "Fréchet distance is far above its value for many pictures"
            )
    if len(fake.sizes) > 1:
        sizes = ", ".join(f"{w}x{h} ({n})" for (h, w), n in fake.sizes.most_common(4))
        found.append(f"the pictures have {len(fake.sizes)} sizes: {sizes}")
    odd = sum(n for (h, w), n in fake.sizes.items() if h != w)
    if odd:
        found.append(f"{odd} pictures are not square: the protocol squeezes them")
    twins = sum(n - 1 for n in Counter(fake.digests).values())
    if twins:
        found.append(f"{twins} pictures repeat another one, pixel for pixel")
    if isinstance(images, FileImages):
        names = [images.name(i) for i in range(len(images))]
        lossy = [name for name in names if name.lower().endswith(LOSSY)]
        if lossy:
            found.append(f"{len(lossy)} files are lossy ({lossy[0]}): save samples as PNG")
    if images.labels is not None:
        counts = np.bincount(images.labels)
        counts = counts[counts > 0]
        if counts.max() > counts.min():
            found.append(f"the classes are unbalanced: {counts.min()} to {counts.max()} pictures")
    return found


def _about(features: Features) -> dict[str, Any]:
    return {
        "count": features.count,
        "pixels_sha256": fingerprint_of(features),
        "sizes": {f"{w}x{h}": n for (h, w), n in features.sizes.most_common(8)},
    }


def _environment() -> dict[str, Any]:
    packages = ("torch", "torchvision", "numpy", "pillow")
    return {
        "versions": {"nextscale": __version__, **{name: version(name) for name in packages}},
        "python": platform.python_version(),
        "processes": processes.world_size(),
        "threads": torch.get_num_threads(),
    }
