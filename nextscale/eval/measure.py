"""`evaluate`: pictures in, figures with their errors, warnings and record out."""

from __future__ import annotations

import difflib
import hashlib
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nextscale import __version__, processes
from nextscale.errors import UserError
from nextscale.eval.features import Features, Joined, Network, extract
from nextscale.eval.images import FileImages, Images, open_images
from nextscale.eval.metrics import BLOCKS, METRICS, Metric, Pair, Value, scored
from nextscale.eval.protocols import get_protocol, inception_splits
from nextscale.eval.reconstruction import Paired
from nextscale.eval.scorers import SCORERS, Scored, Scorer
from nextscale.eval.set_warnings import warnings_of
from nextscale.eval.statistics import (
    Statistics,
    cached_path,
    check_same,
    describe,
    is_statistics,
    read_statistics,
    save_statistics,
    statistics_of,
)
from nextscale.training.record import git_revision

SCHEMA = 1


@dataclass(frozen=True)
class Measured:
    """A record and what it was made of.

    Attributes:
        record: For JSON.
        images: The measured set.
        fake: Its features.
        real: The reference's, if its pictures were read.
        prompts: Of each picture; empty if there are none.
    """

    record: dict[str, Any]
    images: Images
    fake: Features
    real: Features | None
    prompts: Sequence[str]


def evaluate(samples: Any, reference: Any = None, **settings: Any) -> dict[str, Any]:
    """Measure a set of pictures; the record alone of `measure`, which has the same arguments."""
    return measure(samples, reference, **settings).record


def measure(
    samples: Any,
    reference: Any = None,
    *,
    network: Network | None = None,
    metrics: Sequence[str] | str | None = None,
    prompts: Sequence[str] | None = None,
    scorers: Mapping[str, Scorer] | None = None,
    sample_networks: Sequence[Network] = (),
    lpips: torch.nn.Module | None = None,
    num_images: int | None = None,
    num_reference: int | None = None,
    k: int = 3,
    seed: int = 2020,
    jackknife: bool = True,
    batch_size: int = 32,
    num_workers: int = 0,
    cache: Path | None = None,
    keep: Sequence[str] = (),
    progress: bool = False,
) -> Measured:
    """Measure a set of pictures.

    Args:
        samples: What is measured; see `open_images`.
        reference: Pictures, or an .npz of statistics (`nextscale eval stats`, the ADM suite's,
            pytorch-fid's). The ADM suite's file may hold both. For metrics of pairs, the originals.
        network: Gives the features, such as `Inception(weights, protocol)`, or several as
            `Joined`; None for metrics that need none.
        metrics: Names of `METRICS` and of `scorers`; None: all of `scorers`, or else fid.
        prompts: Of each picture, for CLIPScore and the checker; own scorers get "" without.
        scorers: Further metrics by name, such as a reward model; means over the pictures.
        sample_networks: Networks that see the measured pictures alone: `Scored` with the tap
            "cosine" for CLIPScore.
        lpips: The network of `load_lpips`.
        num_images: How many pictures a source function draws.
        num_reference: Likewise, for a reference that is drawn.
        k: Neighbours of prc.
        seed: Of kid's subsets.
        jackknife: Standard errors of what is no mean (Fréchet distances, Inception score, KID and
            CMMD of the full sets, Vendi score) from 20 more values, without a twentieth of the
            measured pictures each. The reference counts as fixed.
        batch_size: Pictures at once.
        num_workers: Processes that decode.
        cache: Folder where statistics of reference files are kept, by their content; None: off.
        keep: Taps whose features are kept in any case, of both sets.
        progress: Show bars.

    Returns:
        `record`, for JSON: `metrics` (name[label] -> value, se, ci95, n_ref, n_gen,
        higher_is_better, protocol, params), `warnings`, `manifest`; and what it was made of.

    Raises:
        UserError: For a name that is none, sets that are too small, statistics of another protocol,
            pictures that cannot be read.
    """
    began = time.perf_counter()
    own = dict(scorers or {})
    metrics = [metrics] if isinstance(metrics, str) else list(metrics or own or ["fid"])
    check_request(metrics, reference, k, scorers=tuple(own))
    table = METRICS | {name: scored(name) for name in own}
    wanted = {name: table[name] for name in metrics}
    images = open_images(samples, num_images)
    if len(images) < 2:
        raise UserError(f"2 pictures or more are needed, got {len(images)}")
    if prompts is None and own:
        prompts = [""] * len(images) if not any(m.prompts for m in wanted.values()) else None
    named = [name for name, m in wanted.items() if m.prompts or name in own]
    texts = _checked_prompts(prompts, len(images), named)
    statistics, real_images = None, None
    if any(metric.reference or metric.paired for metric in wanted.values()):
        statistics, real_images = _open_reference(reference, num_reference or len(images))
        if real_images is not None and any(m.moments and m.paired for m in wanted.values()):
            statistics = None  # rFID is to the originals themselves
        _check_reference(wanted, images, real_images, reference, k)

    networks = [*([] if network is None else [network]), *sample_networks]
    both = _join(networks, wanted, SCORERS | own, texts, real_images, lpips)
    warnings: list[str] = []
    if statistics is not None:
        warnings += filter(None, [check_same(statistics, both.fingerprint())])

    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "num_workers": num_workers,
        "progress": progress,
    }
    moments = sorted({m.tap for m in wanted.values() if m.moments})
    splits = None
    if "isc" in metrics:
        splits = inception_splits(get_protocol(both.labels["logits"]), len(images))
    fake = extract(
        images,
        both,
        moments=moments,
        rows=sorted({m.tap for m in wanted.values() if m.rows} | set(keep)),
        blocks=BLOCKS if jackknife else 1,
        splits=splits,
        label="samples",
        **settings,
    )
    real = None
    if real_images is not None and network is not None:
        rows = sorted({m.tap for m in wanted.values() if m.rows and m.reference} | set(keep))
        statistics, real = _measure_reference(
            real_images, statistics, network, moments, rows, cache, settings
        )
    warnings += warnings_of(images, fake, moments, both)
    if real is not None and real_images is not None:
        about = warnings_of(real_images, real, list(real.blocks), both)
        warnings += [f"reference: {warning}" for warning in about]
        shared = len(set(fake.digests) & set(real.digests))
        if shared:
            warnings.append(f"pictures that are in the reference too: {shared}")
    pair = Pair(fake, real, statistics, texts, k, seed, jackknife, progress)
    results = _results(wanted, pair, both.labels)
    seconds = time.perf_counter() - began
    count = fake.count + (real.count if real else 0)
    manifest = {
        **_environment(),
        "network": both.fingerprint(),
        "samples": describe(fake),
        "reference": describe(real) if real else _about_statistics(statistics),
        "seed": seed,
        "batch_size": batch_size,
        "seconds": round(seconds, 2),
        "images_per_second": round(count / seconds, 2),
    }
    record = {"schema": SCHEMA, "metrics": results, "warnings": warnings, "manifest": manifest}
    return Measured(record, images, fake, real, texts)


def _join(
    networks: Sequence[Network],
    wanted: Mapping[str, Metric],
    scorers: Mapping[str, Scorer],
    texts: Sequence[str],
    originals: Images | None,
    lpips: torch.nn.Module | None,
) -> Joined:
    """The networks, with scorers and comparisons of pairs as further ones."""
    found = list(networks)
    scores = {name: scorers[name] for name in wanted if name in scorers}
    if scores:
        found.append(Scored(scores, texts))
    pair_taps = sorted({m.tap for m in wanted.values() if m.paired and not m.reference})
    if pair_taps and originals is not None:
        found.append(Paired(originals, pair_taps, lpips))
    both = Joined(found)
    missing = sorted({m.tap for m in wanted.values()} - set(both.taps))
    if missing:
        raise UserError(f"there is no network that gives {', '.join(missing)} features")
    return both


def _results(
    wanted: Mapping[str, Metric], pair: Pair, labels: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Every figure by its name[label]."""
    found = {}
    for metric in wanted.values():
        label = labels.get(metric.tap)
        for name, value in metric.compute(pair).items():
            key = name if label is None else f"{name}[{label}]"
            if not np.isfinite([v for v in (value.value, value.se) if v is not None]).all():
                raise UserError(f"{key} is {value.value} ± {value.se}", exit_code=1)
            found[key] = _record(value, label, pair.fake.count, _reference_count(metric, pair))
    return found


def _measure_reference(
    images: Images,
    statistics: Statistics | None,
    network: Network,
    moments: Sequence[str],
    rows: Sequence[str],
    cache: Path | None,
    settings: Mapping[str, Any],
) -> tuple[Statistics | None, Features | None]:
    """What the reference's pictures still have to give, and their features if they were read."""
    kept = None
    if cache is not None and isinstance(images, FileImages) and moments:
        kept = cached_path(cache, images, network.fingerprint(), moments)
    if kept is not None and statistics is None and all(processes.gather(kept.exists())):
        statistics = replace(read_statistics(kept), name="the cached reference")
    missing = [tap for tap in moments if statistics is None or tap not in statistics.values]
    if not missing and not rows:
        return statistics, None
    real = extract(images, network, moments=missing, rows=rows, label="reference", **settings)
    if missing:
        statistics = statistics_of(real, network.fingerprint(), "the reference")
        if kept is not None and processes.is_main():
            save_statistics(statistics, kept)
    return statistics, real


def _check_reference(
    wanted: Mapping[str, Metric],
    images: Images,
    originals: Images | None,
    reference: Any,
    k: int,
) -> None:
    needing = [n for n, m in wanted.items() if m.paired or (m.rows and m.reference)]
    if needing and originals is None:
        raise UserError(
            f"{', '.join(needing)} needs the reference's pictures, and {reference} holds "
            "statistics alone: pass a folder, or an .npz with arr_0"
        )
    pairs = [name for name, metric in wanted.items() if metric.paired]
    if pairs and originals is not None and len(images) != len(originals):
        raise UserError(
            f"{', '.join(pairs)} compare picture i with original i: {len(images)} pictures "
            f"and {len(originals)} originals"
        )
    fewest = min(len(s) for s in (images, originals) if s is not None)
    if any(name.startswith("prc") for name in wanted) and fewest <= k:
        raise UserError(f"k = {k} neighbours need more than {k} pictures in each set, got {fewest}")


def _reference_count(metric: Metric, pair: Pair) -> int | None:
    if not (metric.reference or metric.paired):
        return None
    if metric.moments:
        return pair.statistics.count if pair.statistics is not None else None
    return pair.fake.count if pair.real is None else pair.real.count


def _record(value: Value, label: str | None, n_gen: int, n_ref: int | None) -> dict[str, Any]:
    """A figure as the record holds it."""
    low_high = None
    if value.value is not None and value.se is not None:
        low_high = [value.value - 1.96 * value.se, value.value + 1.96 * value.se]
    return {
        "value": value.value,
        "se": value.se,
        "ci95": low_high,
        "n_ref": n_ref,
        "n_gen": n_gen,
        "higher_is_better": value.higher_is_better,
        "protocol": label,
        "params": dict(value.params or {}),
    }


def _checked_prompts(
    prompts: Sequence[str] | None, count: int, names: Sequence[str]
) -> Sequence[str]:
    if not names:
        return ()
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


def check_request(
    metrics: Sequence[str], reference: Any, k: int = 3, *, scorers: Sequence[str] = ()
) -> None:
    """Refuse what can be refused before anything is opened.

    Raises:
        UserError: For names that are none, a missing reference, k below 1.
    """
    known = (*METRICS, *scorers)
    if not metrics:
        raise UserError(f"give at least one metric: {', '.join(known)}")
    for name in metrics:
        if name not in known:
            near = difflib.get_close_matches(name.lower(), known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            hint = " Put spaces between names." if "," in name else hint
            raise UserError(f'there is no metric "{name}".{hint} Choose from {", ".join(known)}.')
    names = [n for n in metrics if n in METRICS and (METRICS[n].reference or METRICS[n].paired)]
    if names and reference is None:
        verb = "compares" if len(names) == 1 else "compare"
        raise UserError(f"{', '.join(names)} {verb} with a reference: pass --reference")
    if k < 1:
        raise UserError(f"k is {k}, but must be 1 or more")


def _about_statistics(statistics: Statistics | None) -> dict[str, Any] | None:
    """Of a reference whose pictures were not read; its hash is that of its numbers."""
    if statistics is None:
        return None
    if statistics.about is not None:
        return dict(statistics.about)
    digest = hashlib.sha256()
    for tap, pair in sorted(statistics.values.items()):
        digest.update(tap.encode())
        for array in pair:
            digest.update(np.ascontiguousarray(array).tobytes())
    name = Path(statistics.name).name
    return {"name": name, "count": statistics.count, "statistics_sha256": digest.hexdigest()}


def _environment() -> dict[str, Any]:
    packages = ("torch", "torchvision", "numpy", "pillow")
    return {
        "versions": {"nextscale": __version__, **{name: version(name) for name in packages}},
        "python": platform.python_version(),
        "git": git_revision(),
        "allow_tf32": {
            "matmul": torch.backends.cuda.matmul.allow_tf32,
            "cudnn": False,  # see exact_convolutions
        },
        "processes": processes.world_size(),
        "threads": torch.get_num_threads(),
    }
