"""`nextscale eval stats`, `eval pack`, `eval compare`: what stands around a measurement."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from nextscale import processes, storage
from nextscale.cli.console import Output, check_file, number, table
from nextscale.cli.eval_networks import NetworkFlags, open_networks
from nextscale.cli.flags import parse
from nextscale.cli.ranks import process_group
from nextscale.cli.recipes import to_yaml
from nextscale.errors import UserError

ABOUT = {
    "eval stats": "Write the statistics of a reference set, once for many runs.",
    "eval pack": "Pack a folder of pictures into an .npz (arr_0) as the ADM suite reads it.",
    "eval compare": "Compare two results of `nextscale eval --output`.",
}
EXAMPLE = {
    "eval stats": "nextscale eval stats --samples train_images --output reference.npz",
    "eval pack": "nextscale eval pack --samples out --output samples.npz",
    "eval compare": "nextscale eval compare a.json b.json",
}


@dataclass(frozen=True, kw_only=True)
class StatsConfig(NetworkFlags):
    """Flags of `nextscale eval stats`."""

    samples: str
    """Pictures: a folder, .npz with arr_0, .npy, .zip, .tar or .parquet."""
    output: str
    """The .npz."""
    features: Literal["inception", "scenes", "clip", "dinov2", "cmmd"] = "inception"
    """Of which network: inception for fid, sfid, and X for fd_X."""


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """Flags of `nextscale eval pack`."""

    samples: str
    """Folder of pictures of one size."""
    output: str
    """The .npz."""
    count: int | None = None
    """Refuse another number of pictures (50000 for published figures)."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Arguments of `nextscale eval compare`."""

    first: tyro.conf.Positional[str]
    """A result."""
    second: tyro.conf.Positional[str]
    """Another one; the difference is second minus first."""


def run(command: str, arguments: list[str]) -> int:
    """Run one of the three commands."""
    settings: type
    work: Any
    settings, work = {
        "eval stats": (StatsConfig, _stats),
        "eval pack": (PackConfig, _pack),
        "eval compare": (CompareConfig, _compare),
    }[command]
    config, output = parse(
        command, settings, arguments, about=ABOUT[command], example=EXAMPLE[command]
    )
    if output.print_config:
        print(to_yaml(command, asdict(config)), end="")
    else:
        work(config, output)
    return 0


def _stats(config: StatsConfig, output: Output) -> None:
    from nextscale.eval.features import extract
    from nextscale.eval.images import open_images
    from nextscale.eval.set_warnings import warnings_of
    from nextscale.eval.statistics import save_statistics, statistics_of

    if Path(config.output).suffix != ".npz":
        raise UserError(f"--output must end in .npz, got {config.output}")
    check_file(config.output)
    taps = ("pool", "spatial") if config.features == "inception" else (config.features,)
    with process_group():
        network, _, _ = open_networks(config, {*taps}, None, output)
        assert network is not None
        images = open_images(config.samples)
        features = extract(
            images,
            network,
            moments=taps,
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            progress=output.bar(),
        )
    if processes.is_main():
        for warning in warnings_of(images, features, taps, network):
            output.note(f"warning: {warning}")
        statistics = statistics_of(features, network.fingerprint(), config.output)
        save_statistics(statistics, config.output)
        label = network.labels.get(taps[0], config.features)
        text = f"statistics of {features.count} pictures [{label}] in {config.output}"
        output.figures({"output": config.output, "count": features.count}, text)


def _pack(config: PackConfig, output: Output) -> None:
    import numpy as np
    from tqdm import tqdm

    from nextscale.eval.images import open_images
    from nextscale.eval.set_warnings import LOSSY

    check_file(config.output)
    images = open_images(config.samples)
    if config.count is not None and len(images) != config.count:
        raise UserError(f"{config.samples} has {len(images)} pictures, not {config.count}")
    first = images.load([0])[0]
    pixels = np.empty((len(images), *first.shape), np.uint8)
    for index in tqdm(range(len(images)), desc="pack", disable=not output.bar()):
        picture = images.load([index])[0]
        if picture.shape != first.shape:
            raise UserError(
                f"{images.name(index)} is {picture.shape[1]}x{picture.shape[0]}, the first is "
                f"{first.shape[1]}x{first.shape[0]}: pack pictures of one size"
            )
        pixels[index] = picture
    arrays = {"arr_0": pixels} | ({} if images.labels is None else {"arr_1": images.labels})
    with storage.atomic(config.output) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
    counts = None if images.labels is None else np.bincount(images.labels)
    if counts is not None and counts.max() > counts.min():
        output.note(f"warning: the classes have {counts.min()} to {counts.max()} pictures")
    lossy = [row for row, kind in images.kinds.items() if kind.split()[0] in LOSSY]
    if lossy:
        output.note(f"warning: {len(lossy)} files are lossy ({images.name(lossy[0])})")
    facts = {"output": config.output, "count": len(images), "shape": list(pixels.shape)}
    output.figures(facts, f"{len(images)} pictures of {first.shape[1]}x{first.shape[0]} packed")


def _compare(config: CompareConfig, output: Output) -> None:
    first, second = (_read_record(path) for path in (config.first, config.second))
    shared = [name for name in first["metrics"] if name in second["metrics"]]
    if not shared:
        raise UserError(f"{config.first} and {config.second} share no metric of one protocol")
    for path, record in {config.first: first, config.second: second}.items():
        if record.get("valid") is False:
            output.note(f"warning: {path} was made with random weights; its figures mean nothing")
    for part in _differing(first, second, shared):
        output.note(f"warning: the two have another {part}: the difference is not theirs alone")
    counts = [{entry["n_gen"] for entry in r["metrics"].values()} for r in (first, second)]
    if counts[0] != counts[1]:
        output.note(
            f"warning: {max(counts[0])} and {max(counts[1])} pictures: Fréchet distances and Vendi "
            "scores of other counts do not compare"
        )
    rows, found = [], {}
    for name in shared:
        a, b = first["metrics"][name], second["metrics"][name]
        if a["value"] is None or b["value"] is None:
            continue
        difference = b["value"] - a["value"]
        se = None
        if a["se"] is not None and b["se"] is not None:
            se = (a["se"] ** 2 + b["se"] ** 2) ** 0.5
        found[name] = {"difference": difference, "se": se, "first": a, "second": b}
        shown = "" if se is None else f"{se:.2g}"
        rows.append((name, number(a["value"]), number(b["value"]), number(difference), shown))
    if output.json:
        output.figures(found)
    elif not output.quiet:
        table(("metric", "first", "second", "difference", "± se"), rows)


def _differing(first: dict[str, Any], second: dict[str, Any], shared: list[str]) -> list[str]:
    """What besides the pictures differs, as far as the shared figures depend on it."""
    a, b = (record.get("manifest", {}) for record in (first, second))
    networks = (a.get("network") or {}, b.get("network") or {})
    both = set(networks[0]) & set(networks[1])
    found = ["network"] if any(networks[0][key] != networks[1][key] for key in both) else []
    compared = any(first["metrics"][name].get("n_ref") is not None for name in shared)
    if compared and a.get("reference") != b.get("reference"):
        found.append("reference")
    return found


def _read_record(path: str) -> dict[str, Any]:
    record = storage.read_json(path)
    if not isinstance(record, dict) or not isinstance(record.get("metrics"), dict):
        raise UserError(f"{path} is no result of nextscale eval --output")
    return record
