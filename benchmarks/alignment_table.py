"""The alignment methods on one budget of drawn samples, and what each is for.

    python benchmarks/alignment_table.py --suite table

Suites: `table` compares all methods on the checker, `further` five later ones beside GRPO and
`others` those that are left; `sparse` compares B2-DiffuRL and GRPO on all statements or nothing;
`sets` trains on properties of sets, and on single pictures for comparison; `find` trains starts,
for known captions or any, for more and more rollouts; `diffusion` compares the methods on the
pipeline of `nextscale train diffusion --config scenes-diffusion`, by the bytes of a JPEG.

Each row is a shipped recipe, cut to --rollouts rollouts of 192 pictures at a constant learning
rate; each run is a process of its own, for its peak memory. Measured on benchmark captions before
and after with equal seeds, drawn as rollouts are: at temperature 1 and without a choice among eight
candidates. Runs that are in the results are not run again, nor are those in --output_dir: an
interrupted series goes on. `--rows` and `--seeds` choose. Writes
benchmarks/results/alignment_SUITE.json, and the rollouts' rewards against samples drawn as
docs/images/alignment_SUITE.png (but for `sets`; of `find` what is measured after them); `table`,
`further` and `others` also print themselves as Markdown.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from record import earlier, save_record

from nextscale.data.benchmark import training_captions
from nextscale.data.captions import parse
from nextscale.data.scenes import render, sample_scene
from nextscale.pipeline import NextScalePipeline

SAMPLES = 192  # of a rollout, of every method
ROLLOUTS = (10, 20, 40)  # after which FIND is measured
EXEMPLARS = 1000  # pictures that the sets suite is to resemble
HELD_OUT = 250  # captions that it is measured on, of the same list as those that it draws
KNOWN = 24  # captions that the per-caption start of FIND learns
RATE = "--learning_rate 2e-5 --train_scales 4"
BASE = "--config grpo-scenes --learning_rate 1e-12 --num_train_prompts 4 "
BASE += "--gradient_accumulation_steps 1 --num_eval_prompts 0"
CHECKER = "--reward_funcs checker checker_statements --reward_weights 1 1 "
CHECKER += "--prompts scenes:hard scenes:hard scenes:standard"
VERDICT = "--reward_funcs checker --reward_weights 1 --prompts scenes:hard"
B2 = f"--config b2-scenes --b2.num_stages 3 --b2.stage_rollouts 8 {RATE}"
FIND = "--config find-scenes --learning_rate 1e-3"
DRAGON = "--config dragon-scenes --dragon.credit leave_one_out --num_prompts 192"
LARGE = "--num_prompts 96 --num_train_prompts 64"
FURTHER = f"--config grpo-scenes {RATE} --gradient_accumulation_steps 2"  # two steps a rollout:
# in the first one, on policy, KL-Cov is GRPO and Reg-GRPO a multiple of it
ONE_STEP = "--max_train_steps 24"  # a rollout
TWO_STEPS = ("further", "others")
NFT = "--config grpo-diffusion --method diffusion_nft --num_iterations 4 --max_train_steps 160"
SETS = f"{RATE} --prompts CAPTIONS --eval_prompts HELD_OUT "
SETS += "--reward_funcs frechet_pixels:EXEMPLARS@1 frechet_pixels_instance:EXEMPLARS@1 vendi "
SETS += "--reward_weights"
SUITES: dict[str, dict[str, str]] = {
    "table": {
        "base": BASE,
        "GRPO": f"--config grpo-scenes {RATE}",
        "DPO": f"--config dpo-scenes {RATE}",
        "RAFT": f"--config raft-scenes {RATE}",
        "FIND": f"{FIND} {CHECKER}",
        "B2-DiffuRL": f"{B2} {CHECKER}",
        "DRAGON": f"--config dragon-scenes {RATE} {CHECKER}",
    },
    "further": {
        "base": BASE,
        "GRPO": FURTHER,
        "Sibling-GRPO": f"{FURTHER} --method sibling --sibling.steps 1 3 --num_generations 2 "
        "--sibling.loss.scale_weight scale",
        "NFT": f"{FURTHER} --method nft --nft.threshold 1.5 --nft.scale_weight scale",
        "Reg-GRPO": f"{FURTHER} --method reg_grpo --train_batch_size 4 "
        "--reg_grpo.scale_weight scale",
        "f-DPG": f"{FURTHER} --method fdpg --fdpg.loss.scale_weight scale",
        "KL-Cov": f"{FURTHER} --method grpo --grpo.covariance kl",
    },
    "others": {
        "BNPO": f"{FURTHER} --grpo.scale_rewards beta_norm --reward_weights 0.5 0.5",
        "OBLR-PO's baseline": f"{FURTHER} --grpo.baseline score_norm",
        "GBPO": f"{FURTHER} --grpo.loss_type gbpo --grpo.baseline median --grpo.scale_rewards none",
        "MDPO": f"{FURTHER} --grpo.loss_type mdpo",
        "Clip-Cov": f"{FURTHER} --grpo.covariance clip",
        "SPO": f"{FURTHER} --reward_funcs preference:checker_statements checker "
        "--reward_weights 1 0",
        "SPO, sharp": f"{FURTHER} --reward_funcs preference:checker_statements@0.1 checker "
        "--reward_weights 1 0",
        "GRPO, statements": f"{FURTHER} --reward_funcs checker_statements checker "
        "--reward_weights 1 0",
        "DUMP": f"{FURTHER} --curriculum dump",
        "D2O": f"--config d2o-scenes {RATE} {ONE_STEP}",
        "RPO": f"--config rpo-scenes {RATE} {ONE_STEP}",
        "SePPO": f"{FURTHER} --method seppo --prompts examples:scenes",
    },
    "sparse": {"GRPO": f"--config grpo-scenes {RATE} {VERDICT}", "B2-DiffuRL": f"{B2} {VERDICT}"},
    "sets": {  # six rollouts of 768 pictures, and four updates on each
        "DRAGON, Fréchet": f"{DRAGON} {SETS} 1 0 0",
        "GRPO, part of each in Fréchet": f"--config grpo-scenes {LARGE} {SETS} 1 0 0",
        "GRPO, nearness of each": f"--config grpo-scenes {LARGE} {SETS} 0 1 0",
        "DRAGON, Vendi": f"{DRAGON} {SETS} 0 0 1",
    },
    "find": {
        f"{name}, {count} rollouts": f"{FIND} {flags} --max_train_steps {count} "
        "--eval_prompts KNOWN --num_eval_images 8"
        for name, flags in {
            "any caption": "",
            "known captions": "--prompts KNOWN --find.no_amortised --find.space prefix_table "
            "--learning_rate 1e-1",
        }.items()
        for count in ROLLOUTS
    },
    "diffusion": {
        "GRPO": "--config grpo-diffusion",
        "DPO": "--config dpo-diffusion --max_train_steps 80",
        "RAFT": "--config raft-diffusion --raft.score pair --num_iterations 4 --max_train_steps 80",
        "RAFT, guided": "--config raft-diffusion --raft.score policy --num_iterations 2 "
        "--max_train_steps 40",
        "FIND": "--config find-diffusion",
        "B2-DiffuRL": "--config b2-diffusion",
        "DRAGON": "--config dragon-diffusion",
        "DiffusionNFT": f"{NFT} --guidance_scale 1",
        "DiffusionNFT, guided": NFT,
    },
}
FILES = {
    "KNOWN": "known.txt", "CAPTIONS": "captions.txt", "HELD_OUT": "held_out.txt",
    "EXEMPLARS": "exemplars",
}  # fmt: skip
DIFFUSION_SAMPLES = 2560  # of all rollouts of each row of the suite diffusion


def flags_of(row: str, seed: int, options: argparse.Namespace) -> list[str]:
    """The command behind `nextscale align`; what the row says comes last and holds."""
    shared: dict[str, Any] = {
        "trend_p_value": None,  # a row shows what came out, whatever it is
        "logging_steps": 2,
        "num_validation_prompts": 0,
        "checkpointing_steps": None,
        "num_eval_prompts": options.prompts,
        "num_eval_images": 4,
        "seed": seed,
        "model": options.diffusion,
    }
    if options.suite != "diffusion":
        shared |= {
            "lr_scheduler": "constant",
            "lr_warmup_steps": 5,
            "max_train_steps": options.rollouts * (2 if options.suite in TWO_STEPS else 1),
            "temperature": 1.0,
            "model": str(Path(options.output_dir, "model")),
        }
    flags = [part for key, value in shared.items() for part in (f"--{key}", str(value))]
    for name, path in FILES.items():
        row = row.replace(name, str(Path(options.output_dir, path)))
    return [*flags, *row.split()]


def write_sets(folder: Path) -> None:
    """Captions of one list, in two parts, and exemplars that are as many shapes as they ask for.

    Sets are compared, so both parts and the exemplars must hold one, two and three shapes in the
    same shares. What makes exemplars different: grounds are dark or bright, with nothing between,
    so that the mean of the set is what none of its pictures look like.
    """
    captions = training_captions("standard", 8000)
    (folder / FILES["CAPTIONS"]).write_text("\n".join(captions[HELD_OUT:]))
    (folder / FILES["HELD_OUT"]).write_text("\n".join(captions[:HELD_OUT]))
    wanted = Counter(parse(caption).num_shapes for caption in captions[:EXEMPLARS])
    found = []
    for index in itertools.count():
        scene = sample_scene(5, index)
        extreme = abs(statistics.mean(scene.background.rgb) - 0.61) > 0.21
        if wanted[len(scene.shapes)] and extreme:
            wanted[len(scene.shapes)] -= 1
            found.append(scene)
        if not any(wanted.values()):
            break
    (folder / FILES["EXEMPLARS"]).mkdir()
    for number, image in enumerate(render(found, 64)):
        Image.fromarray(image).save(folder / FILES["EXEMPLARS"] / f"{number:04}.png")


def run(folder: Path, flags: list[str], before: Path | None = None) -> None:
    """One run, or more steps of an earlier one: its log and, once it is whole, its peak memory."""
    shutil.rmtree(folder, ignore_errors=True)
    if before is not None:
        shutil.copytree(before, folder, ignore=shutil.ignore_patterns("peak_memory_kb"))
        flags = [*flags, "--resume_from_checkpoint", "latest"]
    folder.mkdir(parents=True, exist_ok=True)
    first = sorted(folder.parent.glob("*/before.safetensors"))
    if first and before is None:
        # the base draws the same again; other captions are drawn anew
        shutil.copy(first[0], folder)
    command = [sys.executable, "-m", "nextscale", "align", *flags, "--output_dir", str(folder)]
    with (folder / "run.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}\nfailed; see {folder / 'run.log'}")
    (folder / "peak_memory_kb").write_text(str(usage.ru_maxrss))


def folder_of(name: str, seed: int, options: argparse.Namespace) -> Path:
    """Where a run lies."""
    return Path(options.output_dir, f"{options.suite} {name} {seed}".replace(" ", "_"))


def earlier_of(name: str, seed: int, options: argparse.Namespace) -> Path | None:
    """The row that a longer one of the find suite goes on from."""
    kind, _, length = name.partition(", ")
    count = int(length.split()[0]) if length.endswith(" rollouts") else ROLLOUTS[0]
    if count == ROLLOUTS[0]:
        return None
    before = ROLLOUTS[ROLLOUTS.index(count) - 1]
    return folder_of(f"{kind}, {before} rollouts", seed, options)


def read(folder: Path) -> dict[str, Any]:
    """What the table shows of a run."""
    found: dict[str, Any] = {}
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "reward" in line]
    found["rollouts"] = [line["reward"] for line in lines]
    for key in lines[0]:
        if key.startswith("rewards/") and key.endswith("/mean") and key.count("/") == 2:
            found[f"last_half/{key}"] = statistics.mean(x[key] for x in lines[len(lines) // 2 :])
    found["peak_memory_mb"] = int((folder / "peak_memory_kb").read_text()) // 1024
    if not (folder / "report.json").is_file():  # the base
        return found
    record = json.loads((folder / "report.json").read_text())
    for source, part in record["prompts"].items():
        name = source.removeprefix("benchmark:").rpartition("/")[2]
        measured = {**part["rewards"], "vendi_within_prompt": part["vendi_within_prompt"]}
        for side in ("before", "after"):
            for reward, value in measured.items():
                found[f"{name}/{reward}/{side}"] = value[side]["value"]
            found[f"{name}/fd_scenes/{side}"] = part["fd_scenes"][side]["value"]
        for reward, value in part["rewards"].items():
            found[f"{name}/{reward}/ci95"] = (value["difference"] or {}).get("ci95")
    found["kl"] = record["kl"]["total"]
    found["minutes"] = record["minutes"]
    return found


def plot(rows: dict[str, Any], path: Path, total: int) -> None:
    """Mean reward of the rollouts against samples drawn, one line per row.

    Each seed has a pale line beside it where rows are few.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, (name, row) in enumerate(rows.items()):
        curves = [run["rollouts"] for run in row["runs"].values()]
        count = len(curves[0])
        samples = [total * (i + 1) / count for i in range(count)]
        for curve in curves if len(rows) < 4 else ():
            axes.plot(samples, curve, color=f"C{number}", alpha=0.25)
        mean = [statistics.mean(values) for values in zip(*curves, strict=True)]
        axes.plot(samples, mean, color=f"C{number}", label=name)
    axes.set(xlabel="samples drawn", ylabel="mean reward of the rollouts")
    figure.legend(loc="outside right upper")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def plot_find(rows: dict[str, Any], path: Path) -> None:
    """Gain and loss of diversity against updates, from the model as it is on, one line per kind."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    shown = {"checker": "captions right", "vendi_within_prompt": "Vendi score within prompt"}
    for axes, (key, label) in zip(panels, shown.items(), strict=True):
        for kind in dict.fromkeys(name.partition(",")[0] for name in rows):
            own = [next(iter(rows[f"{kind}, {n} rollouts"]["runs"].values())) for n in ROLLOUTS]
            values = [own[0][f"known.txt/{key}/before"]]
            values += [run[f"known.txt/{key}/after"] for run in own]
            axes.plot((0, *ROLLOUTS), values, marker="o", label=kind)
        axes.set(xlabel="updates (rollouts of 192 pictures)", ylabel=label)
        axes.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(path, dpi=120)


def summary(runs: list[dict[str, Any]]) -> dict[str, str]:
    """Mean and standard deviation over seeds."""
    numbers = [k for k, v in runs[0].items() if isinstance(v, int | float)]
    columns = {k: [run[k] for run in runs] for k in numbers}
    return {
        k: f"{statistics.mean(v):.4g}" + (f" ± {statistics.stdev(v):.2g}" if len(v) > 1 else "")
        for k, v in columns.items()
    }


def markdown(rows: dict[str, Any]) -> str:
    """As docs/align.md has it: means over seeds, differences of each."""
    head = "| | seeds | rollouts, last half | `hard` | difference, each seed | `standard` | Vendi "
    lines = [f"{head}| `fd_scenes`, `hard` | nats | minutes | MB |", "|---" * 11 + "|"]
    half = "last_half/rewards/checker/mean"
    if "base" in rows:
        base, first = (next(iter(rows[name]["runs"].values())) for name in ("base", "GRPO"))
        before = [100 * base[half], 100 * first["hard/checker/before"]]
        before += [100 * first["standard/checker/before"]]
        vendi, distance = (first[f"hard/{k}/before"] for k in ("vendi_within_prompt", "fd_scenes"))
        lines.append(
            f"| base | | {before[0]:.1f} | {before[1]:.1f} | | {before[2]:.1f} | {vendi:.3f} "
            f"| {distance:.1f} | 0 | | |"
        )
    for name, row in rows.items():
        if name == "base":
            continue
        runs = list(row["runs"].values())
        differences = []
        for run in runs:
            change = 100 * (run["hard/checker/after"] - run["hard/checker/before"])
            low, high = (100 * x for x in run["hard/checker/ci95"])
            differences.append(f"{change:+.1f} ({low:.1f} to {high:.1f})")

        def mean(key: str, runs: list[dict[str, Any]] = runs) -> float:
            return statistics.mean(run.get(key, math.nan) for run in runs)

        lines.append(
            f"| {name} | {len(runs)} | {100 * mean(half):.1f} "
            f"| {100 * mean('hard/checker/after'):.1f} | {', '.join(differences)} "
            f"| {100 * mean('standard/checker/after'):.1f} "
            f"| {mean('hard/vendi_within_prompt/after'):.3f} "
            f"| {mean('hard/fd_scenes/after'):.1f} | {mean('kl'):.1f} | {mean('minutes'):.1f} "
            f"| {mean('peak_memory_mb'):.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", default="table", choices=list(SUITES))
    parser.add_argument("--rows", nargs="+", help="some rows of the suite; otherwise all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 100_000, 200_000])
    parser.add_argument("--rollouts", type=int, default=24)
    parser.add_argument("--prompts", type=int, default=250, help="benchmark captions of each kind")
    parser.add_argument("--diffusion", default="runs/scenes-diffusion/model", help="the pipeline")
    parser.add_argument("--output_dir", default="runs/alignment_table")
    parser.add_argument("--output", help="otherwise benchmarks/results/alignment_SUITE.json")
    parser.add_argument("--plot", help="otherwise docs/images/alignment_SUITE.png")
    options = parser.parse_args()
    suite = SUITES[options.suite]
    names = options.rows or list(suite)
    if unknown := set(names) - set(suite):
        parser.error(f"--rows {', '.join(unknown)}: the suite has {', '.join(suite)}")
    output = Path(options.output or f"benchmarks/results/alignment_{options.suite}.json")
    Path(options.output_dir).mkdir(parents=True, exist_ok=True)
    if not Path(options.output_dir, "model").is_dir():
        pipe = NextScalePipeline.from_pretrained("scenes", dtype="float32")
        pipe.generation = replace(pipe.generation, num_candidates=1, temperature=1.0)
        pipe.save_pretrained(Path(options.output_dir, "model"))
    if options.suite == "sets" and not Path(options.output_dir, FILES["EXEMPLARS"]).is_dir():
        write_sets(Path(options.output_dir))
    captions = list(dict.fromkeys(training_captions("hard", 2 * KNOWN)))[:KNOWN]
    Path(options.output_dir, FILES["KNOWN"]).write_text("\n".join(captions))
    scenes = options.rollouts * SAMPLES
    total = DIFFUSION_SAMPLES if options.suite == "diffusion" else scenes
    for seed in options.seeds:
        for name in names:
            folder = folder_of(name, seed, options)
            flags = flags_of(suite[name], seed, options)
            command = f"nextscale align {' '.join(flags)}"
            runs = earlier(output).get(name, {"runs": {}})["runs"]
            if runs.get(str(seed), {}).get("command") == command:
                print(f"{name} {seed}: in {output} already; another --output makes it anew")
                continue
            if not (folder / "peak_memory_kb").is_file():
                run(folder, flags, earlier_of(name, seed, options))
            table = earlier(output)  # anew: another process may have added to it
            row = table.setdefault(name, {"runs": {}})
            row["runs"][str(seed)] = {"command": command, **read(folder)}
            row["summary"] = summary(list(row["runs"].values()))
            print(name, seed, json.dumps(row["runs"][str(seed)]), flush=True)
            save_record(
                output,
                f"python benchmarks/alignment_table.py --suite {options.suite} "
                f"--rollouts {options.rollouts} --prompts {options.prompts}",
                samples_drawn=total,
                rows=table,
            )
    table = earlier(output)
    printed = options.suite == "others" or {"base", "GRPO"} <= set(table)
    if options.suite in ("table", "further", "others") and printed:
        print(markdown(table))
    picture = Path(options.plot or f"docs/images/alignment_{options.suite}.png")
    if options.suite == "find":
        plot_find(table, picture)
    elif options.suite != "sets":  # whose rows have rewards of their own, on scales of their own
        plot(table, picture, total)


if __name__ == "__main__":
    main()
