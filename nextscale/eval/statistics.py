"""Reference statistics on disk: ours, and those that the field passes around."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nextscale import storage
from nextscale.errors import UserError
from nextscale.eval.features import Features, fingerprint_of
from nextscale.eval.images import FileImages

SCHEMA = 1
# Names of mean and covariance per tap, as the ADM suite and pytorch-fid write them.
KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


@dataclass(frozen=True)
class Statistics:
    """Means and covariances of a reference set.

    Attributes:
        values: (mean [d], covariance [d, d]) by tap.
        count: Pictures, None where the file does not say.
        fingerprint: Network and protocol, None where the file does not say.
        name: The file.
        about: What the record says of the pictures, None where the file does not say.
    """

    values: Mapping[str, tuple[np.ndarray, np.ndarray]]
    count: int | None
    fingerprint: Mapping[str, str] | None
    name: str
    about: Mapping[str, Any] | None = None


def statistics_of(features: Features, fingerprint: Mapping[str, str], name: str) -> Statistics:
    """Statistics of a pass over a reference set."""
    values = {}
    for tap in features.blocks:
        moments = features.moments(tap)
        values[tap] = moments.mean.numpy(), moments.covariance.numpy()
    return Statistics(values, features.count, fingerprint, name, describe(features))


def describe(features: Features) -> dict[str, Any]:
    """What a record says of a set of pictures."""
    return {
        "count": features.count,
        "pixels_sha256": fingerprint_of(features),
        "sizes": {f"{w}x{h}": n for (h, w), n in features.sizes.most_common(8)},
        "kinds": dict(Counter(features.kinds).most_common(8)),
    }


def save_statistics(statistics: Statistics, path: str | Path) -> None:
    """Write an .npz in one step: mu, sigma (and mu_s, sigma_s), and what they belong to as JSON."""
    arrays: dict[str, np.ndarray] = {}
    for tap, pair in statistics.values.items():
        names = KEYS.get(tap, (f"mu_{tap}", f"sigma_{tap}"))
        arrays |= dict(zip(names, pair, strict=True))
    about = {
        "schema": SCHEMA,
        "count": statistics.count,
        "fingerprint": dict(statistics.fingerprint or {}),
        "about": statistics.about,
    }
    arrays["nextscale"] = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
    with storage.atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]


def cached_path(
    folder: Path, images: FileImages, fingerprint: Mapping[str, str], taps: Sequence[str]
) -> Path:
    """Where the statistics of these pictures, by their content, lie in a cache folder.

    The name is a SHA-256 over the bytes of every file with its name inside the set, the network's
    fingerprint, the taps and the format: pictures that change or move get others.
    """
    files = images.files()
    root = os.path.commonpath([file.parent for file in files])
    digest = hashlib.sha256(json.dumps([SCHEMA, dict(fingerprint), sorted(taps)]).encode())
    for file in files:
        name = os.path.relpath(file, root)
        digest.update(f"{len(name)}:{name}:{storage.file_sha256(file)}".encode())
    return folder / f"{digest.hexdigest()}.npz"


def is_statistics(path: str | Path) -> bool:
    """Whether a file is an .npz with means and covariances."""
    if Path(path).suffix != ".npz" or not Path(path).is_file():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            return any(name == "mu.npy" or name.startswith("mu_") for name in names)
    except (OSError, zipfile.BadZipFile):
        return False


def read_statistics(path: str | Path) -> Statistics:
    """Read our statistics, the ADM suite's (VIRTUAL_imagenet256_labeled.npz) or pytorch-fid's.

    Raises:
        UserError: If the file is damaged, holds objects instead of numbers, or shapes do not fit.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if not name.startswith("arr_")}
    except (OSError, ValueError, zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{path} holds no statistics that can be read ({error})") from error
    about = json.loads(bytes(arrays.pop("nextscale")).decode()) if "nextscale" in arrays else {}
    if about.get("schema", SCHEMA) > SCHEMA:
        raise UserError(f"{path} was written by a newer nextscale; update it")
    names = {**KEYS, **{k[3:]: (k, f"sigma_{k[3:]}") for k in arrays if k.startswith("mu_")}}
    values = {}
    for tap, (mean, covariance) in names.items():
        if tap == "s" or mean not in arrays:
            continue
        pair = arrays[mean], arrays.get(covariance)
        if pair[1] is None or pair[1].shape != pair[0].shape * 2 or pair[0].ndim != 1:
            raise UserError(f"{path}: {mean} and {covariance} are no mean [d], covariance [d, d]")
        values[tap] = pair
    if not values:
        raise UserError(f"{path} holds no mean mu and covariance sigma")
    told = about.get("fingerprint") or None
    return Statistics(values, about.get("count"), told, str(path), about.get("about"))


def check_same(statistics: Statistics, fingerprint: Mapping[str, str]) -> str | None:
    """Refuse statistics of another network or protocol; a warning where they do not say.

    Raises:
        UserError: Naming what differs.
    """
    if statistics.fingerprint is None:
        return (
            f"{statistics.name} does not say which protocol it was made with; taken as "
            f"{fingerprint.get('protocol', 'this one')}"
        )
    theirs = statistics.fingerprint
    # A pass may have made further features than these.
    other = [k for k in theirs if k in fingerprint and theirs[k] != fingerprint[k]]
    if other:
        what = "; ".join(f"{k} {_short(theirs[k])}, not {_short(fingerprint[k])}" for k in other)
        raise UserError(
            f"{statistics.name} does not fit: {what}. Make statistics with nextscale eval stats, "
            "or choose the protocol that they were made with."
        )
    return None


def _short(text: str) -> str:
    """Hashes by their first digits."""
    return text[:8] if len(text) == 64 else text
