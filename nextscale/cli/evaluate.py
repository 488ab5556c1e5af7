"""`nextscale eval`: pictures -> figures; `eval stats`, `eval pack`, `eval compare`."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from nextscale import processes, storage
from nextscale.cli.console import Output, check_file, check_folder, number, table
from nextscale.cli.eval_sources import (
    open_lpips,
    open_networks,
    open_reference,
    open_samples,
)
from nextscale.cli.flags import parse
from nextscale.cli.model_flags import SamplingFlags
from nextscale.cli.ranks import pick_device, process_group
from nextscale.cli.recipes import read_recipe, recipe_flags, recipe_names, to_yaml
from nextscale.errors import UserError

ProtocolName = Literal["adm", "torch-fidelity", "clean", "pytorch-fid", "torchmetrics"]

ABOUT = {
    "eval": "Measure pictures: FID, sFID, Inception score, KID, precision and recall, Vendi score. "
    "Every figure carries its protocol, because values of different protocols do not compare.",
    "eval stats": "Write the statistics of a reference set, once for many runs.",
    "eval pack": "Pack a folder of pictures into an .npz (arr_0) as the ADM suite reads it.",
    "eval compare": "Compare two results of `nextscale eval --output`.",
}
EXAMPLE = {
    "eval": "nextscale eval --samples out --reference VIRTUAL_imagenet256_labeled.npz --metrics "
    "fid sfid isc prc --output result.json",
    "eval stats": "nextscale eval stats --samples train_images --output reference.npz",
    "eval pack": "nextscale eval pack --samples out --output samples.npz",
    "eval compare": "nextscale eval compare a.json b.json",
}


@dataclass(frozen=True, kw_only=True)
class NetworkFlags:
    """Flags of the pass over the pictures."""

    protocol: ProtocolName = "adm"
    """How pictures are resized and normalised; see the docs."""
    weights: str | None = None
    """File of Inception's weights; None: NEXTSCALE_INCEPTION, then the caches."""
    download: bool = False
    """Fetch the weights if they are nowhere."""
    random_weights: int | None = None
    """Random weights from this seed instead, for trying things out: the record says invalid."""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16 is about twice as fast and changes the features a little; do not mix the two."""
    batch_size: int = 32
    """Pictures at once."""
    num_workers: int = 2
    """Processes that decode."""
    device: str | None = None
    """cpu, cuda, cuda:1; None: a GPU if there is one."""
    features_model: str = "scenes-features"
    """Feature network of fd_scenes and its relatives; a folder of `train features`."""
    clip_model: str | None = None
    """scenes-clip (bundled), an open_clip model folder, or a name of open_clip's list, such as
    ViT-L-14-quickgelu; None: what each metric was published with."""
    clip_weights: str | None = None
    """File of its weights; None: NEXTSCALE_CLIP, then the hub's cache."""
    dinov2_weights: str | None = None
    """timm's file of DINOv2 ViT-L/14; None: NEXTSCALE_DINOV2, then the hub's cache."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size must be 1 or more, got {self.batch_size}.")
        if self.num_workers < 0:
            raise UserError(f"num_workers must be 0 or more, got {self.num_workers}.")


@dataclass(frozen=True, kw_only=True)
class EvalConfig(SamplingFlags, NetworkFlags):
    """Flags of `nextscale eval`."""

    samples: str | None = None
    """Pictures: a folder, .npz with arr_0, .npy, .zip, .tar or .parquet; or a built-in world
    (scenes, digits): its true pictures, which no model can beat."""
    resolution: int = 64
    """Side of a built-in world's pictures."""
    model: str | None = None
    """Draw the pictures with this model instead (bundled name, folder or hub id)."""
    benchmark: Literal["standard", "compositional", "hard"] = "standard"
    """With --model: the captions that a scenes model draws."""
    reconstruct: str | None = None
    """With --model: measure what its tokenizer makes of the validation pictures of this dataset,
    against these pictures."""
    num_images: int | None = None
    """Pictures of --model (None: one per caption, 50 per class) or of a built-in world."""
    seed: int = 0
    """With --model: picture i is drawn with seed + i."""
    save_images: str | None = None
    """With --model: keep the drawn pictures as PNGs in this folder; a killed run goes on there."""
    prompts: str | None = None
    """With --samples: text file, the prompt of each picture, one per line; None: what the pictures
    or their metadata.jsonl say."""
    reference: str | None = None
    """Pictures to compare with, or .npz statistics (of `eval stats`, ADM, pytorch-fid), or a
    built-in world (scenes, digits)."""
    num_reference: int = 5000
    """Pictures of a reference that is a built-in world."""
    metrics: tuple[str, ...] = ("fid",)
    """Inception: fid sfid isc kid prc vendi rfid. Own features: fd_X kid_X prc_X vendi_X for X in
    scenes, clip, dinov2; cmmd. By prompt: clip, checker, checker_statements (scenes). Pair by pair:
    psnr ssim ms_ssim lpips."""
    preset: Literal["scenes", "tokenizer", "var-imagenet256"] | None = None
    """A whole benchmark (recipes eval-...); flags after it win."""
    k: int = 3
    """Neighbours of precision and recall."""
    se: Literal["jackknife", "none"] = "jackknife"
    """Standard error of Fréchet distances."""
    lpips_weights: str | None = None
    """torchvision's file of AlexNet; None: NEXTSCALE_ALEXNET, then the caches."""
    cache: bool = True
    """Keep the statistics of reference files, by their content, in NEXTSCALE_CACHE or the user's
    cache folder; --no_cache computes them anew."""
    plot: str | None = None
    """Folder for pictures of the result: a map of the features, the best and worst pictures, a
    table by class."""
    output: str | None = None
    """Write the whole record as JSON."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("reconstruct", "save_images"):
            if getattr(self, name) is not None and self.samples is not None:
                raise UserError(f"--{name} goes with --model, not with --samples")
        if self.reconstruct is not None and self.save_images is not None:
            raise UserError("--save_images keeps drawn pictures; use nextscale reconstruct instead")
        if self.num_images is not None and self.num_images < 1:
            raise UserError(f"num_images must be 1 or more, got {self.num_images}.")
        if self.num_reference < 2:
            raise UserError(f"num_reference must be 2 or more, got {self.num_reference}.")


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
    """Run one of the four commands."""
    settings: type = {
        "eval": EvalConfig,
        "eval stats": StatsConfig,
        "eval pack": PackConfig,
        "eval compare": CompareConfig,
    }[command]
    config, output = parse(
        command,
        settings,
        arguments,
        about=ABOUT[command],
        example=EXAMPLE[command],
        expand=_expand_preset if command == "eval" else list,
    )
    if output.print_config:
        print(to_yaml(command, asdict(config)), end="")
        return 0
    if command == "eval":
        _evaluate(config, output, arguments)
    else:
        work: Any = {"eval stats": _stats, "eval pack": _pack, "eval compare": _compare}[command]
        work(config, output)
    return 0


def _expand_preset(words: list[str]) -> list[str]:
    """Put the flags of a preset, which is a recipe, before the user's own."""
    for index, word in enumerate(words):
        key, equals, value = word.partition("=")
        if key == "--preset":
            name = f"eval-{value if equals else next(iter(words[index + 1 :]), '')}"
            if name in recipe_names():
                values = read_recipe(name, "eval")
                if any(w.startswith("--samples") for w in words):
                    values.pop("model", None)
                return [*recipe_flags(values, EvalConfig), *words]
    return words


def _short(word: str) -> str:
    """A path by its last part: records hold no places of a machine."""
    return Path(word).name if Path(word).is_absolute() else word


def _evaluate(config: EvalConfig, output: Output, arguments: list[str]) -> None:
    from nextscale.eval.measure import check_request, measure
    from nextscale.eval.metrics import METRICS
    from nextscale.eval.published import PUBLISHED
    from nextscale.eval.weights import cache_folder

    if config.samples is None and config.model is None:
        raise UserError("pass --samples FOLDER or --model NAME: what is to be measured.")
    if config.samples is not None and config.model is not None:
        raise UserError("pass --samples or --model (which draws them), not both.")
    if config.output is not None:
        check_file(config.output)
    if config.plot is not None:
        check_folder(config.plot, empty=False)
    given = config.reference if config.reconstruct is None else config.reconstruct
    check_request(config.metrics, given, config.k)
    asked = [METRICS[name] for name in config.metrics]
    with process_group():
        source = open_samples(config, prompts=any(metric.prompts for metric in asked))
        reference = open_reference(config, source)
        warnings: list[str] = []
        if config.preset in PUBLISHED:
            _check_preset(config)
            side = source.about.get("pixels")
            warnings += PUBLISHED[config.preset].check(source.images, reference, side)
        network, of_samples, about_prompts = open_networks(
            config, {metric.tap for metric in asked}, source.prompts, output
        )
        taps = [metric.tap for metric in asked if metric.moments or metric.rows]
        own = [] if network is None else [tap for tap in taps if tap in network.taps]
        measured = measure(
            source.images,
            reference,
            network=network,
            sample_networks=of_samples,
            prompts=source.prompts,
            lpips=open_lpips(config),
            metrics=config.metrics,
            k=config.k,
            jackknife=config.se == "jackknife",
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            cache=cache_folder() / "statistics" if config.cache else None,
            keep=[tap for tap in own[:1] if config.plot and tap != "cosine"],
            progress=output.bar(),
        )
    record = measured.record
    record["warnings"] = [*warnings, *about_prompts, *record["warnings"]]
    record["manifest"] |= source.about
    record["manifest"]["preset"] = config.preset
    record["manifest"]["command"] = shlex.join(["nextscale", "eval", *map(_short, arguments)])
    record["manifest"]["device"] = pick_device(config.device)
    record["valid"] = config.random_weights is None
    if not processes.is_main():
        return
    if config.output is not None:
        storage.write_json(config.output, record)
    drawn = []
    if config.plot is not None:
        from nextscale.eval.plots import draw_plots

        drawn = draw_plots(measured, Path(config.plot))
    if output.json:
        output.figures(record)
        return
    for warning in record["warnings"]:
        output.note(f"warning: {warning}")
    if not output.quiet:
        rows = [_row(name, entry) for name, entry in record["metrics"].items()]
        table(("metric", "value", "± se", "n", "n_ref", "better"), rows)
        for path in drawn:
            output.say(f"plot: {path}")


def _check_preset(config: EvalConfig) -> None:
    """A published protocol is all of its settings; only the metrics are free."""
    assert config.preset is not None
    fixed = {"precision": "float32", **read_recipe(f"eval-{config.preset}", "eval")}
    drawing = {*SamplingFlags.__dataclass_fields__}
    for name, wanted in fixed.items():
        value = getattr(config, name)
        value = list(value) if isinstance(value, tuple) else value
        if name != "metrics" and value != wanted and not (config.samples and name in drawing):
            raise UserError(f"{config.preset} has {name} {wanted}, not {value}; drop --preset")


def _row(name: str, entry: dict[str, Any]) -> tuple[str, ...]:
    se = "" if entry["se"] is None else f"{entry['se']:.2g}"
    n_ref = "" if entry["n_ref"] is None else str(entry["n_ref"])
    better = "higher" if entry["higher_is_better"] else "lower"
    return name, number(entry["value"]), se, str(entry["n_gen"]), n_ref, better


def _stats(config: StatsConfig, output: Output) -> None:
    from nextscale.eval.features import extract
    from nextscale.eval.images import open_images
    from nextscale.eval.measure import warnings_of
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
    from nextscale.eval.measure import LOSSY

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
