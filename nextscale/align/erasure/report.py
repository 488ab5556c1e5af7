"""What was erased, what was kept, what an attacker gets back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from nextscale import storage
from nextscale.align import tables
from nextscale.align.erasure.attacks import attack
from nextscale.align.erasure.config import CLOSED_FORM, EraseConfig
from nextscale.align.erasure.data import draw
from nextscale.align.erasure.held_out import Asked, HeldOut, checked
from nextscale.align.erasure.losses import kl_divergence
from nextscale.align.erasure.pairs import ConceptPair
from nextscale.align.erasure.recognisers import Recognise
from nextscale.align.erasure.target import Outcome, Target, true_pictures
from nextscale.align.picture_sets import PictureSets, open_picture_sets
from nextscale.align.prompts import open_prompts
from nextscale.data.checker import prompt_accuracy
from nextscale.data.images import to_uint8
from nextscale.eval.clip import BUNDLED, clip_scorer, open_clip_model
from nextscale.eval.scorers import Scorer
from nextscale.pipeline import NextScalePipeline
from nextscale.training import save_grid

_SEED = 2_000_000_000  # of the report's first picture, apart from those of training
_SHOWN = 8
_SAMPLE = 50  # pictures of each concept for a person to judge
_SHARE = (0.0, 1.0)
_SETTINGS = ("max_train_steps", "train_batch_size", "learning_rate", "lora_rank", "eta", "seed")
_GLOSSARY = """
Seen: the recogniser finds the concept. Right: all that the prompt asks for is there. Near: prompts
that share a part with the concept (a single word has none). Base with the modified prompt: how
often the concept is seen where it was not asked for; no erasure can be better. Harmonic mean: of
the share that no longer shows the concept and of the others that are right. Intervals: 95 %,
bootstrap over prompts; 0 to 0 says that none of so few showed it.

Erasure lowers the ability to draw a concept; it does not remove it: see the attacks.
"""


@dataclass
class EraseReport:
    """Pictures of the base, and what is measured once the concept is out.

    Attributes:
        config: The run.
        counts: Pictures of the pairs drawn, showing the concept, and kept.
        held_out: What is asked for.
        recognisers: Who sees a concept, by name; the first one's word counts in attacks.
        scenes: Whether the model draws scenes, which have a checker of their own.
        picture_sets: Sees diversity and distance; None: neither is measured.
        clip: Scores pictures by their prompts; None: nobody does.
        before: The base's pictures of each set, as (images, tokens).
        oracle: The base's pictures of the targets' modified prompts, by concept.
        attack_prompts: A list of prompts that are tried besides.
        progress: Show a bar.
    """

    config: EraseConfig
    counts: Mapping[str, int]
    held_out: HeldOut
    recognisers: Mapping[str, Recognise]
    scenes: bool
    picture_sets: PictureSets | None
    clip: Scorer | None
    before: dict[str, tuple[Tensor, Tensor]]
    oracle: dict[str, Tensor]
    attack_prompts: list[str]
    progress: bool

    def finish(
        self,
        base: NextScalePipeline,
        edited: NextScalePipeline,
        windows: Sequence[dict[str, Any]] = (),
    ) -> dict[str, Any]:
        """Draw by the edited model, attack it, write report.json, report.md and the grids.

        Args:
            base: The model as it came.
            edited: The model without the concept.
            windows: How often each window of tokens was updated.
        """
        after = {name: self.draw(edited, asked) for name, asked in self.sets().items()}
        record: dict[str, Any] = {
            "method": self.config.method,
            "model": self.config.model,
            "recognisers": list(self.recognisers),
            "settings": self._settings(),
            "pictures_of_pairs": dict(self.counts),
            "images_per_prompt": self.config.num_eval_images,
            "concepts": {},
        }
        for name, pairs in self.held_out.targets.items():
            record["concepts"][name] = self._concept(name, pairs, after)
        record["others"] = self._kept("others", self.held_out.others, after)
        if self.picture_sets is not None:
            sides = (_bytes(drawn["others"][0]) for drawn in (self.before, after))
            record["others"] |= self.picture_sets.distances(*sides)
        if self.clip is not None:
            record["others"]["clip"] = self._clip_score(self.clip, after)
        record["drift"] = self._drift(base, edited)
        if "accuracy" in record["others"]:
            worst = max(c["recognised"]["after"]["value"] for c in record["concepts"].values())
            kept = record["others"]["accuracy"]["after"]["value"]
            record["harmonic_mean"] = 2 * (1 - worst) * kept / max(1 - worst + kept, 1e-9)
        if windows:
            record["windows"] = list(windows)
        self._write(record)  # attacks take long
        self._grids(after, Path(self.config.output_dir))
        if self.config.attacks:
            for name, pairs in self.held_out.targets.items():
                found = self._attacked(edited, name, pairs)
                record["concepts"][name]["attacks"] = [o.record() for o in found]
                self._write(record)
        return record

    def _settings(self) -> dict[str, Any]:
        names = ("seed",) if self.config.method in CLOSED_FORM else _SETTINGS
        return {name: getattr(self.config, name) for name in names}

    def _write(self, record: dict[str, Any]) -> None:
        folder = Path(self.config.output_dir)
        storage.write_json(folder / "report.json", record)
        storage.write_bytes(folder / "report.md", markdown(record).encode())

    def sets(self) -> dict[str, list[Asked]]:
        """All that both models are asked for."""
        held_out = self.held_out
        targets = {n: [p.original for p in pairs] for n, pairs in held_out.targets.items()}
        near = {f"near {n}": asked for n, asked in held_out.near.items()}
        return {**targets, **near, "others": held_out.others}

    def draw(self, pipe: NextScalePipeline, asked: Sequence[Asked]) -> tuple[Tensor, Tensor]:
        """Pictures and tokens, `num_eval_images` in a row for each."""
        half = self.config.half
        return draw(pipe, self._repeated(asked), seed=_SEED, half=half, progress=self.progress)

    def _repeated(self, entries: Sequence[Any]) -> list[Any]:
        return [entry for entry in entries for _ in range(self.config.num_eval_images)]

    def _groups(self, count: int) -> Int[Tensor, " n"]:
        return torch.arange(count) // self.config.num_eval_images

    # ---- figures -----------------------------------------------------------------------------

    def _concept(
        self, name: str, pairs: Sequence[ConceptPair], after: Mapping[str, tuple[Tensor, Tensor]]
    ) -> dict[str, Any]:
        every = self._repeated(pairs)
        groups = self._groups(len(every))
        found: dict[str, Any] = {"num_prompts": len(pairs)}
        for who, recognise in self.recognisers.items():
            shown = [
                torch.from_numpy(recognise(images, every)).float()
                for images in (self.before[name][0], after[name][0], self.oracle[name])
            ]
            seen = {
                "recognised": _compare(shown[0], shown[1], groups, _SHARE),
                "oracle": _compare(shown[2], shown[2], groups, _SHARE)["before"],
            }
            if "recognised" not in found:
                found |= seen
            else:
                found.setdefault("also_by", {})[who] = seen
        if self.picture_sets is not None and self.config.num_eval_images > 1:
            sides = [_bytes(drawn[name][0]) for drawn in (self.before, after)]
            diversity = self.picture_sets.diversity(sides[0], sides[1], groups)
            found["vendi_within_prompt"] = diversity
        key = f"near {name}"
        if key in after:
            found["near"] = self._kept(key, self.held_out.near[name], after)
        return found

    def _kept(
        self, name: str, asked: Sequence[Asked], after: Mapping[str, tuple[Tensor, Tensor]]
    ) -> dict[str, Any]:
        """The share of pictures that are right, before and after; of scenes also by value."""
        found: dict[str, Any] = {"num_prompts": len(asked)}
        every, pictures = self._repeated(asked), (self.before[name][0], after[name][0])
        if self.held_out.right is not None:
            sides = [self.held_out.right(images, every) for images in pictures]
            found["accuracy"] = _compare(sides[0], sides[1], self._groups(len(every)), _SHARE)
        if self.scenes:
            values = [prompt_accuracy(checked(images, every))["values"] for images in pictures]
            found["values"] = {
                value: {"before": own["accuracy"], "after": values[1][value]["accuracy"]}
                for value, own in values[0].items()
            }
        return found

    def _clip_score(
        self, clip: Scorer, after: Mapping[str, tuple[Tensor, Tensor]]
    ) -> dict[str, Any]:
        every = self._repeated(self.held_out.others)
        sides = [clip(drawn["others"][0], every) for drawn in (self.before, after)]
        return _compare(sides[0], sides[1], self._groups(len(every)), (-1.0, 1.0))

    @torch.no_grad()
    def _drift(self, base: NextScalePipeline, edited: NextScalePipeline) -> dict[str, Any]:
        """Mean KL(base || edited) on the base's pictures of other prompts, in nats, by scale."""
        schedule = base.transformer.schedule
        every = self._repeated(self.held_out.others)
        tokens, parts = self.before["others"][1], []
        for start in range(0, len(every), 64):
            rows = slice(start, start + 64)
            ids = base.transformer.conditioner.tokenize(every[rows]).to(base.device)
            inputs = base.tokenizer.teacher_inputs(tokens[rows].to(base.device))
            sides = [pipe.transformer(inputs, ids=ids) for pipe in (base, edited)]
            parts.append(kl_divergence(sides[0], sides[1]).cpu())
        each = torch.cat(parts)
        per_scale = [float(each[:, where].sum(1).mean()) for where in schedule.slices]
        return {"per_scale": per_scale, "total": sum(per_scale), "unit": "nats"}

    # ---- attacks and pictures ----------------------------------------------------------------

    def _attacked(
        self, edited: NextScalePipeline, name: str, pairs: list[ConceptPair]
    ) -> list[Outcome]:
        recognise, half = next(iter(self.recognisers.values())), self.config.half
        images, tokens = (part[:: self.config.num_eval_images] for part in self.before[name])
        known, tokens = true_pictures(pairs, images, tokens, recognise)
        target = Target(edited, known, recognise, tokens, seed=_SEED, half=half)
        return attack(target, self.attack_prompts, progress=self.progress)

    def _grids(self, after: Mapping[str, tuple[Tensor, Tensor]], folder: Path) -> None:
        """Two rows for each set, before and after; and for each concept a sheet to judge by eye."""
        tiles, captions = [], []
        step = self.config.num_eval_images
        for name, asked in self.sets().items():
            texts = [str(a) for a in asked[:_SHOWN]]
            for side, images in (("before", self.before[name][0]), ("after", after[name][0])):
                chosen = images[::step][:_SHOWN]
                blank = torch.ones(_SHOWN - len(chosen), *chosen.shape[1:])
                tiles.append(torch.cat([chosen, blank]))
                captions += [f"{side}: {t}" for t in texts] + [""] * len(blank)
        save_grid(torch.cat(tiles), folder / "before_after.png", columns=_SHOWN, captions=captions)
        for name in self.held_out.targets:
            file = f"after_{re.sub(r'[^0-9A-Za-z-]+', '_', name)}.png"
            asked = self._repeated([pair.original for pair in self.held_out.targets[name]])
            captions = [str(text) for text in asked[:_SAMPLE]]
            save_grid(after[name][0][:_SAMPLE], folder / file, columns=10, captions=captions)


def _bytes(images: Tensor) -> Tensor:
    return to_uint8(images).cpu()


def _compare(*given: Any) -> dict[str, Any]:
    """Before, after, difference, with bootstrap intervals over prompts."""
    return tables.compare(*given, bootstrap=True)


def open_report(
    config: EraseConfig,
    base: NextScalePipeline,
    held_out: HeldOut,
    recognisers: Mapping[str, Recognise],
    *,
    counts: Mapping[str, int],
    progress: bool,
) -> EraseReport:
    """Draw the base's side of a report."""
    conditioner = base.transformer.conditioner
    scenes = conditioner.config().get("grammar") == "scenes"
    named = [name.partition(":")[2] for name in recognisers if name.partition(":")[0] == "clip"]
    clip = None
    if conditioner.prompts and (scenes or named):
        clip = clip_scorer(open_clip_model((named or [""])[0] or BUNDLED))
    prompts: list[str] = []
    if config.attacks and config.attack_prompts is not None:
        listed = open_prompts([config.attack_prompts], what="attack_prompts")
        prompts = [str(prompt.condition) for prompt in listed]
        conditioner.tokenize(prompts)  # what it cannot read is said before the training
    sets = open_picture_sets(
        config.eval_features,
        config.eval_reference,
        scenes=scenes,
        side=base.tokenizer.resolution[0],
        device=base.device,
        download=config.download,
    )
    report = EraseReport(
        config, counts, held_out, recognisers, scenes, sets, clip, {}, {}, prompts, progress
    )
    report.before = {n: report.draw(base, asked) for n, asked in report.sets().items()}
    report.oracle = {
        n: report.draw(base, [p.modified for p in own])[0] for n, own in held_out.targets.items()
    }
    return report


def markdown(record: Mapping[str, Any]) -> str:
    """The record as tables."""
    settings = ", ".join(f"{name} {value}" for name, value in record["settings"].items())
    pictures = record["pictures_of_pairs"]
    lines = [f"{record['method']} on {record['model']}: {settings}."]
    lines += [
        f"{pictures['kept']} of {pictures['drawn']} pictures of the pairs were trained on; "
        f"{record['others']['num_prompts']} other prompts, "
        f"{record['images_per_prompt']} pictures each."
    ]
    lines += [""]
    lines += ["| seen or right | before | after | difference |", "|---|---|---|---|"]
    for name, found in record["concepts"].items():
        seen = {record["recognisers"][0]: found, **found.get("also_by", {})}
        for who, own in seen.items():
            title = f"**{name}**, {found['num_prompts']} prompts, seen by {who}"
            lines.append(_row(title, own["recognised"]))
            lines.append(f"| base with the modified prompt, {who} | {_cell(own['oracle'])} | | |")
        if "near" in found:
            count = found["near"]["num_prompts"]
            lines.append(_row(f"near {name}, {count} prompts, right", found["near"]["accuracy"]))
    others = record["others"]
    if "accuracy" in others:
        lines.append(_row("others, right", others["accuracy"]))
    for metric in [name for name in ("fd_scenes", "fid") if name in others]:
        cells = [f"{others[metric][side]['value']:.3f}" for side in ("before", "after")]
        lines.append(f"| {metric} of these | {cells[0]} | {cells[1]} | |")
    if "clip" in others:
        lines.append(_row("CLIP score of these", others["clip"], percent=False))
    drift = " ".join(f"{value:.3g}" for value in record["drift"]["per_scale"])
    lines.append("")
    if "harmonic_mean" in record:
        lines.append(f"Harmonic mean of erased and kept: {record['harmonic_mean']:.3f}.")
    lines += [f"KL from the base on others, nats, by scale: {drift}."]
    if "windows" in record:
        shares = ", ".join(
            f"{w['start']} to {w['stop'] - 1}: {100 * w['share']:.0f} %" for w in record["windows"]
        )
        lines += ["", f"Windows of tokens, and the share of their turns that updated: {shares}."]
    for name, found in record["concepts"].items():
        if "attacks" not in found:
            continue
        head = f"| attack on {name} | | without | shown | 95 % | n |"
        lines += ["", head, "|---|---|---|---|---|---|"]
        for row in found["attacks"]:
            known = ("attack", "success", "n", "interval", "without")
            detail = ", ".join(f"{k} {v}" for k, v in row.items() if k not in known)
            low, high = (f"{100 * x:.0f}" for x in row["interval"])
            shown = (row["without"], row["success"])
            rates = ("" if share is None else f"{100 * share:.1f} %" for share in shown)
            cells = (row["attack"], detail, *rates, f"{low} to {high}")
            lines.append(f"| {' | '.join(cells)} | {row['n']} |")
        worst = strongest(found["attacks"])
        share = f"{100 * worst['success']:.1f} %"
        lines += ["", f"The strongest attack on {name}: {worst['attack']}, {share}."]
    return "\n".join(lines) + "\n" + _GLOSSARY


def strongest(attacks: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The attack that brings a concept back most often, without relearning, which always can."""
    return max(
        (row for row in attacks if row["attack"] not in ("none", "relearning")),
        key=lambda row: row["success"],
    )


def _row(name: str, row: Mapping[str, Any], *, percent: bool = True) -> str:
    cells = [_cell(row[side], percent=percent) for side in ("before", "after", "difference")]
    return f"| {name} | {' | '.join(cells)} |"


def _cell(value: Mapping[str, Any] | None, *, percent: bool = True) -> str:
    if value is None:
        return ""
    shown: Callable[[float], str] = (
        (lambda x: f"{100 * x:.1f} %") if percent else (lambda x: f"{x:.4g}")
    )
    if value["ci95"] is None:
        return shown(value["value"])
    low, high = (shown(x).removesuffix(" %") for x in value["ci95"])
    return f"{shown(value['value'])} ({low} to {high})"
