"""`nextscale eval`: pictures -> figures."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from nextscale import processes, storage
from nextscale.cli.console import Output, check_file, check_folder, number, table
from nextscale.cli.eval_networks import NetworkFlags, open_lpips, open_networks
from nextscale.cli.eval_sources import open_reference, open_samples
from nextscale.cli.flags import parse
from nextscale.cli.model_flags import ControlGuidanceFlags, SamplingFlags
from nextscale.cli.ranks import pick_device, process_group
from nextscale.cli.recipes import read_recipe, recipe_flags, recipe_names, to_yaml
from nextscale.errors import UserError

ABOUT = (
    "Measure pictures: FID, sFID, Inception score, KID, precision and recall, Vendi score. "
    "Every figure carries its protocol, because values of different protocols do not compare."
)
EXAMPLE = (
    "nextscale eval --samples out --reference VIRTUAL_imagenet256_labeled.npz --metrics "
    "fid sfid isc prc --output result.json"
)


@dataclass(frozen=True, kw_only=True)
class EvalConfig(ControlGuidanceFlags, SamplingFlags, NetworkFlags):
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
    preset: Literal["scenes", "tokenizer", "control", "var-imagenet256"] | None = None
    """A whole benchmark (recipes eval-...); flags after it win. control: how well the model's
    controls hold, between no control and the real picture."""
    control: tuple[str, ...] = ()
    """With --preset control: folders of control modules besides the model's own."""
    control_type: tuple[str, ...] = ()
    """With --preset control: these controls alone."""
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
        for name in ("control_guidance_scale", "control_in_negative", "control", "control_type"):
            if getattr(self, name) and self.preset != "control":
                raise UserError(f"--{name} goes with --preset control")
        if self.num_images is not None and self.num_images < 1:
            raise UserError(f"num_images must be 1 or more, got {self.num_images}.")
        if self.num_reference < 2:
            raise UserError(f"num_reference must be 2 or more, got {self.num_reference}.")


def run(command: str, arguments: list[str]) -> int:
    """Measure."""
    config, output = parse(
        command, EvalConfig, arguments, about=ABOUT, example=EXAMPLE, expand=_expand_preset
    )
    if output.print_config:
        print(to_yaml(command, asdict(config)), end="")
    elif config.preset == "control":
        _evaluate_control(config, output, arguments)
    else:
        _evaluate(config, output, arguments)
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


def _evaluate_control(config: EvalConfig, output: Output, arguments: list[str]) -> None:
    """The controllability table of a model's control modules."""
    from nextscale.cli.control_table import control_record, print_record
    from nextscale.cli.loading import load_pipeline
    from nextscale.cli.model_flags import ModelFlags
    from nextscale.data.sources import open_source

    if config.model is None:
        raise UserError("--preset control draws pictures: pass --model, not --samples")
    for path, check in ((config.output, check_file), (config.plot, _check_plots)):
        if path is not None:
            check(path)
    pipe = load_pipeline(ModelFlags(model=config.model, device=config.device))
    for path in config.control:
        pipe.load_control(path)
    for kind in config.control_type:
        pipe.control(kind)
    count = config.num_images or 500
    source = open_source(
        config.reference or "scenes",
        resolution=pipe.tokenizer.resolution[0],
        split="validation",
        num_images=count + config.num_reference,
        crop="center",
    )
    if len(source) < count + config.num_reference:
        raise UserError(
            f"the reference has {len(source)} held-out pictures, and {count} to draw and "
            f"{config.num_reference} to compare with are wanted: lower num_images or num_reference"
        )
    record = control_record(
        pipe,
        source,
        count=count,
        seed=config.seed,
        kinds=config.control_type,
        num_reference=config.num_reference,
        picture=None if config.plot is None else Path(config.plot) / "controls.png",
        progress=output.bar(),
        **config.sampling(),
    )
    record["command"] = shlex.join(["nextscale", "eval", *map(_short, arguments)])
    record["device"] = pick_device(config.device)
    if config.output is not None:
        storage.write_json(config.output, record)
    print_record(record, output)


def _check_plots(path: str) -> None:
    check_folder(path, empty=False)


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
