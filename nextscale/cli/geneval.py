"""`nextscale eval geneval`: write the folders that GenEval's detector reads; sum up its lines."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from nextscale import processes
from nextscale.cli.console import Output, number, table
from nextscale.cli.flags import parse
from nextscale.cli.loading import load_pipeline, read_model
from nextscale.cli.model_flags import ModelFlags, SamplingFlags
from nextscale.cli.ranks import process_group
from nextscale.cli.recipes import to_yaml
from nextscale.errors import UserError

ABOUT = (
    "Draw GenEval's prompts into the folders that its own detector scripts read, or sum up what "
    "they found. The prompts (evaluation_metadata.jsonl) and the detector come from GenEval."
)
EXAMPLE = (
    "nextscale eval geneval --prompts evaluation_metadata.jsonl --model runs/var/model "
    "--output_dir geneval\n  nextscale eval geneval --results results.jsonl"
)


@dataclass(frozen=True, kw_only=True)
class GenevalConfig(SamplingFlags, ModelFlags):
    """Flags of `nextscale eval geneval`."""

    prompts: str | None = None
    """GenEval's evaluation_metadata.jsonl: draw it."""
    output_dir: str | None = None
    """Where the folders go; pictures that are there are kept."""
    num_images: int = 4
    """Pictures per prompt; published figures take 4."""
    seed: int = 0
    """Picture j of prompt i is drawn with seed + i * num_images + j."""
    results: str | None = None
    """The detector's results.jsonl: sum it up."""

    def __post_init__(self) -> None:
        if (self.prompts is None) == (self.results is None):
            raise UserError("pass --prompts FILE to draw pictures, or --results FILE to sum up.")
        if self.prompts is not None and self.output_dir is None:
            raise UserError("pass --output_dir DIR: where the folders go.")
        if self.num_images < 1:
            raise UserError(f"num_images must be 1 or more, got {self.num_images}.")


def run(command: str, arguments: list[str]) -> int:
    """Draw, or sum up."""
    config, output = parse(command, GenevalConfig, arguments, about=ABOUT, example=EXAMPLE)
    if output.print_config:
        print(to_yaml(command, asdict(config)), end="")
    elif config.results is not None:
        _sum_up(config.results, output)
    else:
        _draw(config, output)
    return 0


def _draw(config: GenevalConfig, output: Output) -> None:
    from nextscale.data.images import to_uint8
    from nextscale.eval.geneval import read_lines, write_folders

    assert config.prompts is not None
    assert config.output_dir is not None
    lines = read_lines(config.prompts)
    weights = read_model(
        config.model, revision=config.revision, local_files_only=config.local_files_only
    ).weights()
    pipe = load_pipeline(config)
    if not pipe.transformer.conditioner.prompts:
        raise UserError(f"{config.model} draws classes, not prompts")

    def draw(prompts: Any, seeds: Any) -> Any:
        images = pipe(list(prompts), **config.sampling(), seed=list(seeds), output_type="pt").images
        return to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()

    with process_group():
        drawn = write_folders(
            lines,
            draw,
            config.output_dir,
            per_prompt=config.num_images,
            seed=config.seed,
            about={"model": config.model, "weights": weights, **config.sampling()},
            progress=output.bar(),
        )
    if not processes.is_main():
        return
    facts = {"output_dir": config.output_dir, "prompts": len(lines), "drawn": drawn}
    output.figures(facts, f"{len(lines)} prompts in {config.output_dir}, {drawn} pictures drawn")


def _sum_up(path: str, output: Output) -> None:
    from nextscale.eval.geneval import read_lines
    from nextscale.eval.scores import geneval_aggregate

    try:
        found = geneval_aggregate(read_lines(path))
    except KeyError as error:
        raise UserError(f"{path} is no result of GenEval: a line has no {error}") from error
    if output.json:
        output.figures(found)
    elif not output.quiet:
        whole = {k: v for k, v in found.items() if k != "tasks"}
        table(("", "accuracy"), [(k, number(v)) for k, v in {**found["tasks"], **whole}.items()])
