"""The work behind `nextscale generate`: which pictures are missing, draw them, put them together.

Batch b of the whole run holds pictures [b * batch_size, (b + 1) * batch_size), the last one
padded, whatever process draws it and whatever a resumed run has already: so every picture comes
out of the same batch, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextscale import __version__, processes, storage
from nextscale.cli.conditions import NO_PROMPT
from nextscale.cli.console import Interrupted, Output
from nextscale.cli.control_flags import read_controls
from nextscale.cli.job import (
    RECIPE,
    Job,
    metadata,
    read_metadata,
    record,
    remove_pictures,
    resolve_job,
)
from nextscale.cli.loading import load_pipeline
from nextscale.cli.ranks import on_main, process_group
from nextscale.cli.recipes import to_yaml
from nextscale.cli.search_flags import SearchFlags, open_pipeline_search, summary

if TYPE_CHECKING:
    from nextscale.align.start_model import Start
    from nextscale.cli.generate import GenerateConfig
    from nextscale.control.attach import Attached
    from nextscale.pipeline import NextScalePipeline

MAX_GRID = 64
SEARCH = tuple(field.name for field in fields(SearchFlags))
CONTROL = (
    *("control_type", "control_image", "control_scale", "control_start", "control_end"),
    *("control", "control_mask", "control_extract", "guess_mode"),
)


def generate(config: GenerateConfig, output: Output) -> dict[str, Any]:
    """Run the whole command; the summary is what --json prints."""
    began = time.perf_counter()
    with process_group():
        job = on_main(partial(resolve_job, config))
        # Asked once: another process may be drawing while this one looks.
        search = None
        todo = on_main(lambda: list(range(job.count)) if config.overwrite else job.missing())
        try:
            if todo:
                pipe = _load(job)
                start = _open_start(job, pipe)
                place = {"local_files_only": config.local_files_only}
                search = config.search and open_pipeline_search(config, pipe, **place)
                controls = _open_controls(config, pipe)
                on_main(partial(_start, job, pipe))
                _draw(job, pipe, start, search, controls, output, set(todo))
            processes.barrier()
            extras = on_main(partial(_finish, job, output))
            extras["search"] = summary(search)
        except KeyboardInterrupt as error:
            kept = job.count - len(job.missing())
            raise Interrupted(
                f"interrupted; {kept} images kept in {config.output_dir}, continue with --resume"
            ) from error
    images = [str(job.path(i)) for i in range(job.count)]
    facts = {"num_images": job.count, "seed": job.seed, "output_dir": config.output_dir}
    seconds = time.perf_counter() - began
    return {**facts, **extras, "weights": job.weights, "seconds": seconds, "images": images}


def _load(job: Job) -> NextScalePipeline:
    pipe = load_pipeline(job.config)
    if job.config.lora is not None:
        pipe.load_lora(job.config.lora, job.config.lora_scale)
    return pipe


def _open_start(job: Job, pipe: NextScalePipeline) -> Start | None:
    """What `--start` names, for all prompts of the run."""
    if job.config.start is None:
        return None
    from nextscale.align.start_model import Start

    settings = {k: v for k, v in job.settings.items() if v is not None}
    start = Start(job.config.start, pipe, pipe.settings(**settings))
    start.check(job.conditions)
    return start


def _start(job: Job, pipe: NextScalePipeline) -> None:
    """The folder comes into being when nothing is left that could be refused."""
    settings = pipe.settings(**{k: v for k, v in job.settings.items() if v is not None})
    settings.guidance(len(pipe.scales))  # refuses a list of another length
    settings.temperatures(len(pipe.scales))
    settings.control_guidance(len(pipe.scales))
    folder = Path(job.config.output_dir)
    with storage.os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if job.config.overwrite:
        remove_pictures(folder)
    for leftover in folder.glob(".tmp-*"):  # of a killed run
        leftover.unlink()
    comment = f"nextscale {__version__}; weights {job.weights}"
    text = to_yaml("generate", record(job), f"{comment}\nrepeat: nextscale generate --config ...")
    storage.write_bytes(folder / RECIPE, text.encode())


def _open_controls(config: GenerateConfig, pipe: NextScalePipeline) -> list[Attached]:
    """The controls of the run, encoded once; whatever is wrong with them is refused here."""
    controls = read_controls(config, pipe)
    if not controls:
        return []
    from nextscale.control.maps import attach_all

    return attach_all(controls, {c.type: pipe.control(c.type) for c in controls}, 1, 1)


def _draw(
    job: Job,
    pipe: NextScalePipeline,
    start: Start | None,
    search: Callable[..., Any] | None,
    controls: Sequence[Attached],
    output: Output,
    todo: set[int],
) -> None:
    """Draw the missing pictures of this process's batches."""
    from tqdm import tqdm

    from nextscale.cli.sheets import filmstrip
    from nextscale.data.images import save_png

    # A run of several batches pads its last one; a small run is one batch of its own size.
    size, facts = min(job.config.batch_size, job.count), _facts(job)
    key = "prompt" if job.prompts else "class_labels"
    settings = {k: v for k, v in job.settings.items() if v is not None}
    batches = sorted({index // size for index in todo})
    own = [batches[i] for i in processes.own_range(len(batches))]
    shape = "{l_bar}{bar}| {n:.0f}/{total} [{elapsed}<{remaining}]"
    total = sum(min(size, job.count - b * size) for b in own)
    with tqdm(total=total, desc="images", bar_format=shape, disable=not output.bar()) as bar:
        for batch in own:
            rows = range(batch * size, min((batch + 1) * size, job.count))
            padded = [*rows, *[rows[-1]] * (size - len(rows))]
            conditions, seeds = [job.condition(i) for i in padded], [job.seed + i for i in padded]
            given = None if start is None else start(conditions, seeds)
            asked: dict[str, Any] = {key: conditions}
            if job.conditions == (NO_PROMPT,):
                asked = {"num_images_per_prompt": len(conditions)}
            tick = partial(_tick, bar, len(rows) / (len(pipe.scales) - pipe.given_scales(given)))
            result = pipe(
                **asked,
                **settings,
                negative_prompt=job.config.negative_prompt,
                start=given,
                search=search,
                controls=controls,
                seed=seeds,
                return_scales=job.config.save_scales,
                callback=tick if search is None else None,
            )
            if search is not None:
                bar.update(len(rows))
            for row, index in enumerate(rows):
                if index not in todo:
                    continue
                text = metadata({**_about(job, index, pipe), **facts})
                if result.scales is not None:
                    drawn = [s[row] for s in result.scales]
                    strip = filmstrip(drawn, pipe.scales[-len(drawn) :])
                    save_png(strip, job.path(index, "_scales"), text)
                save_png(result.images[row], job.path(index), text)


def _tick(bar: Any, part: float, *_: Any) -> None:
    """One scale of a batch is drawn."""
    bar.update(part)


def _about(job: Job, index: int, pipe: NextScalePipeline) -> dict[str, Any]:
    """What is a picture's own: its prompt, or its class by number, and its seed."""
    condition = job.condition(index)
    if job.prompts or condition == NO_PROMPT:
        return {"prompt": condition, "seed": job.seed + index}
    label = int(pipe.transformer.conditioner.tokenize([condition])[0])
    return {"class_label": label, "seed": job.seed + index}


def _facts(job: Job) -> dict[str, Any]:
    """What every PNG of the run says about itself."""
    config = job.config
    lora = {} if config.lora is None else {"lora": config.lora, "lora_scale": config.lora_scale}
    return {
        **{"model": config.model, "weights": job.weights, **lora},
        **({} if config.start is None else {"start": config.start}),
        **({k: getattr(config, k) for k in SEARCH} if config.search else {}),
        **({k: getattr(config, k) for k in CONTROL} if config.control_type else {}),
        **{k: v for k, v in job.settings.items() if v is not None},
        **({} if config.negative_prompt is None else {"negative_prompt": config.negative_prompt}),
        **{"dtype": config.dtype, "batch_size": config.batch_size},
    }


def _finish(job: Job, output: Output) -> dict[str, Any]:
    from nextscale.cli.sheets import write_grid, write_npz

    paths = [job.path(i) for i in range(job.count)]
    folder = Path(job.config.output_dir)
    extras: dict[str, Any] = {"grid": None, "npz": None, "recipe": str(folder / RECIPE)}
    if job.count <= MAX_GRID:
        extras["grid"] = str(folder / "grid.png")
        captions = [job.condition(i) for i in range(job.count)]
        text = metadata({"seed": job.seed, "num_images": job.config.num_images, **_facts(job)})
        write_grid(folder / "grid.png", paths, captions, job.config.num_images, text)
    if job.config.npz:
        extras["npz"] = str(folder / "samples.npz")
        labels = None if job.prompts else [read_metadata(p)["class_label"] for p in paths]
        write_npz(folder / "samples.npz", paths, labels, progress=output.bar())
    return extras
