"""`nextscale eval`: pictures -> figures; `eval stats`, `eval pack`, `eval compare`."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from nextscale import processes, storage
from nextscale.cli.console import Output, number, table
from nextscale.cli.flags import parse
from nextscale.cli.ranks import pick_device, process_group
from nextscale.cli.recipes import to_yaml
from nextscale.errors import UserError

if TYPE_CHECKING:
    from nextscale.eval.images import Images
    from nextscale.eval.inception import Inception

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

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size must be 1 or more, got {self.batch_size}.")
        if self.num_workers < 0:
            raise UserError(f"num_workers must be 0 or more, got {self.num_workers}.")


@dataclass(frozen=True, kw_only=True)
class EvalConfig(NetworkFlags):
    """Flags of `nextscale eval`."""

    samples: str | None = None
    """Pictures: a folder, .npz with arr_0, .npy, .tar or .parquet."""
    model: str | None = None
    """Draw the pictures with this model instead (bundled name, folder or hub id), unwritten."""
    benchmark: Literal["standard", "compositional", "hard"] = "standard"
    """With --model: the captions that a scenes model draws."""
    num_images: int | None = None
    """With --model: pictures; None: one per caption, 50 per class."""
    seed: int = 0
    """With --model: picture i is drawn with seed + i."""
    prompts: str | None = None
    """With --samples: text file, the prompt of each picture, one per line; None: what the pictures
    or their metadata.jsonl say."""
    reference: str | None = None
    """Pictures to compare with, or .npz statistics (of `eval stats`, ADM, pytorch-fid)."""
    metrics: tuple[str, ...] = ("fid",)
    """fid sfid isc kid prc vendi, checker checker_statements (scenes captions); or psnr ssim
    ms_ssim of picture i against original i."""
    k: int = 3
    """Neighbours of precision and recall."""
    se: Literal["jackknife", "none"] = "jackknife"
    """Standard error of Fréchet distances."""
    cache: bool = True
    """Keep the statistics of reference files, by their content, in NEXTSCALE_CACHE or the user's
    cache folder; --no_cache computes them anew."""
    output: str | None = None
    """Write the whole record as JSON."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.samples is None) == (self.model is None):
            raise UserError("pass --samples FOLDER or --model NAME: what is to be measured.")


@dataclass(frozen=True, kw_only=True)
class StatsConfig(NetworkFlags):
    """Flags of `nextscale eval stats`."""

    samples: str
    """Pictures: a folder, .npz with arr_0, .npy, .tar or .parquet."""
    output: str
    """The .npz."""


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
        command, settings, arguments, about=ABOUT[command], example=EXAMPLE[command]
    )
    if output.print_config:
        print(to_yaml(command, asdict(config)), end="")
        return 0
    work: Any = {"eval": _evaluate, "eval stats": _stats, "eval pack": _pack}.get(command, _compare)
    work(config, output)
    return 0


def _evaluate(config: EvalConfig, output: Output) -> None:
    from nextscale.eval.evaluate import check_request, evaluate
    from nextscale.eval.images import open_images
    from nextscale.eval.metrics import METRICS
    from nextscale.eval.scorers import SCORERS
    from nextscale.eval.weights import cache_folder

    check_request(config.metrics, config.reference, config.k)
    with process_group():
        prompts, about = None, {}
        if config.samples is not None:
            images = open_images(config.samples)
            if set(config.metrics) & set(SCORERS):
                prompts = _prompts(config, images)
        else:
            images, prompts, about = _drawn(config)
        record = evaluate(
            images,
            config.reference,
            network=_network(config, output) if set(config.metrics) & set(METRICS) else None,
            prompts=prompts,
            metrics=config.metrics,
            protocol=config.protocol,
            k=config.k,
            jackknife=config.se == "jackknife",
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            cache=cache_folder() / "statistics" if config.cache else None,
            progress=output.bar(),
        )
    record["manifest"] |= about
    record["manifest"]["command"] = " ".join(["nextscale", "eval", *sys.argv[2:]])
    record["valid"] = config.random_weights is None
    if not processes.is_main():
        return
    if config.output is not None:
        storage.write_json(config.output, record)
    if output.json:
        output.figures(record)
        return
    for warning in record["warnings"]:
        output.note(f"warning: {warning}")
    if not output.quiet:
        rows = [_row(name, entry) for name, entry in record["metrics"].items()]
        table(("metric", "value", "± se", "n", "n_ref", "better"), rows)


def _prompts(config: EvalConfig, images: Images) -> list[str]:
    """From the file, the dataset's captions, or what `nextscale generate` wrote into the PNGs."""
    from nextscale.cli.job import read_metadata
    from nextscale.eval.images import FileImages

    if config.prompts is not None:
        try:
            lines = Path(config.prompts).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read prompts {config.prompts}: {error}") from error
        return [line.strip() for line in lines if line.strip()]
    captions = images.captions() if isinstance(images, FileImages) else None
    if captions is not None:
        return captions
    found = [read_metadata(Path(images.name(row))).get("prompt") for row in range(len(images))]
    missing = next((row for row, prompt in enumerate(found) if prompt is None), None)
    if missing is not None:
        raise UserError(
            f"{images.name(missing)} does not say its prompt: pass --prompts FILE, one line per "
            "picture, or a folder with metadata.jsonl"
        )
    return [str(prompt) for prompt in found]


def _drawn(config: EvalConfig) -> tuple[Images, list[str] | None, dict[str, Any]]:
    """The pipeline as a source of pictures, its prompts, and what the record says of it."""
    from nextscale.cli.loading import read_model
    from nextscale.data.benchmark import load_benchmark
    from nextscale.data.images import to_uint8
    from nextscale.eval.images import open_images
    from nextscale.pipeline import NextScalePipeline

    assert config.model is not None
    pipe = NextScalePipeline.from_pretrained(config.model, device=pick_device(config.device))
    conditioner = pipe.transformer.conditioner
    prompts: list[str] | None = None
    if conditioner.prompts:
        prompts = load_benchmark(config.benchmark)
        count = config.num_images or len(prompts)
        prompts = [prompts[i % len(prompts)] for i in range(count)]
        conditions: dict[str, list[Any]] = {"prompt": prompts}
    else:
        classes = conditioner.config()["num_classes"]
        count = config.num_images or 50 * classes
        conditions = {"class_labels": [i * classes // count for i in range(count)]}

    def draw(start: int, number: int) -> Any:
        given: dict[str, Any] = {
            key: values[start : start + number] for key, values in conditions.items()
        }
        seeds = [config.seed + i for i in range(start, start + number)]
        images = pipe(**given, seed=seeds, output_type="pt").images
        return to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()

    about = {
        "model": config.model,
        "weights": read_model(config.model).weights(),
        "generation": {**asdict(pipe.generation), "seed": config.seed},
        "captions": config.benchmark if prompts else None,
    }
    return open_images(draw, count), prompts, about


def _row(name: str, entry: dict[str, Any]) -> tuple[str, ...]:
    se = "" if entry["se"] is None else f"{entry['se']:.2g}"
    n_ref = "" if entry["n_ref"] is None else str(entry["n_ref"])
    better = "higher" if entry["higher_is_better"] else "lower"
    return name, number(entry["value"]), se, str(entry["n_gen"]), n_ref, better


def _stats(config: StatsConfig, output: Output) -> None:
    from nextscale.eval.evaluate import warnings_of
    from nextscale.eval.features import extract
    from nextscale.eval.images import open_images
    from nextscale.eval.statistics import save_statistics, statistics_of

    if Path(config.output).suffix != ".npz":
        raise UserError(f"--output must end in .npz, got {config.output}")
    with process_group():
        network = _network(config, output)
        images = open_images(config.samples)
        features = extract(
            images,
            network,
            moments=("pool", "spatial"),
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            progress=output.bar(),
        )
    if processes.is_main():
        for warning in warnings_of(images, features, ("pool", "spatial"), network):
            output.note(f"warning: {warning}")
        statistics = statistics_of(features, network.fingerprint(), config.output)
        save_statistics(statistics, config.output)
        text = f"statistics of {features.count} pictures [{config.protocol}] in {config.output}"
        output.figures({"output": config.output, "count": features.count}, text)


def _network(config: NetworkFlags, output: Output) -> Inception:
    from nextscale.eval.inception import Inception, random_weights, read_weights
    from nextscale.eval.weights import INCEPTION, find_weights

    if config.random_weights is not None:
        output.note("warning: random weights; the figures mean nothing")
        weights = random_weights(config.random_weights)
    else:
        weights = read_weights(find_weights(INCEPTION, config.weights, download=config.download))
    device = pick_device(config.device)
    return Inception(weights, config.protocol, device=device, precision=config.precision)


def _pack(config: PackConfig, output: Output) -> None:
    import numpy as np
    from tqdm import tqdm

    from nextscale.eval.images import open_images

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
    with storage.atomic(config.output) as temporary, open(temporary, "wb") as file:
        np.savez(file, arr_0=pixels)
    counts = None if images.labels is None else np.bincount(images.labels)
    if counts is not None and counts.max() > counts.min():
        output.note(f"warning: the classes have {counts.min()} to {counts.max()} pictures")
    facts = {"output": config.output, "count": len(images), "shape": list(pixels.shape)}
    output.figures(facts, f"{len(images)} pictures of {first.shape[1]}x{first.shape[0]} packed")


def _compare(config: CompareConfig, output: Output) -> None:
    first, second = (_read_record(path) for path in (config.first, config.second))
    shared = [name for name in first["metrics"] if name in second["metrics"]]
    if not shared:
        raise UserError(f"{config.first} and {config.second} share no metric of one protocol")
    for record, path in ((first, config.first), (second, config.second)):
        if record.get("valid") is False:
            output.note(f"warning: {path} was made with random weights; its figures mean nothing")
    for part in ("network", "reference"):
        sides = [record.get("manifest", {}).get(part) for record in (first, second)]
        if sides[0] != sides[1]:
            output.note(f"warning: the two have another {part}: the difference is not theirs alone")
    rows, found = [], {}
    for name in shared:
        a, b = first["metrics"][name], second["metrics"][name]
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


def _read_record(path: str) -> dict[str, Any]:
    record = storage.read_json(path)
    if not isinstance(record, dict) or not isinstance(record.get("metrics"), dict):
        raise UserError(f"{path} is no result of nextscale eval --output")
    return record
