"""What a run changed: rewards, accuracy, diversity, distance to the base, before and after."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from nextscale import processes, storage
from nextscale.align.config import AlignConfig
from nextscale.align.experience import score_together
from nextscale.align.models import AlignModel, open_model
from nextscale.align.picture_sets import PictureSets, open_picture_sets
from nextscale.align.policies.start import StartPolicy
from nextscale.align.prompts import Prompt, open_prompts
from nextscale.align.references import Given
from nextscale.align.rewards import score
from nextscale.align.rewards.reward import UNBOUNDED, AnyReward, CheckedReward, SetReward
from nextscale.align.tables import compare, markdown
from nextscale.align.trajectory import Policy
from nextscale.data.images import to_uint8
from nextscale.errors import UserError
from nextscale.streams import stream
from nextscale.training import FitResult, latest_checkpoint
from nextscale.training.grid import save_grid

_GRID = 16
_KL_SAMPLES = 64
_SEED = 0  # of the first picture of the report: both sides draw image i from seed + i


@dataclass
class Report:
    """Pictures before training, and what is measured once it is over.

    Attributes:
        config: The run.
        model: Draws.
        prompts: One per picture, `num_eval_images` in a row.
        sources: Rows of each source of prompts.
        rewards: Those that were trained, then those that were watched.
        before: uint8 [n, 3, H, W].
        sets: Sees diversity and distance; None: neither is measured.
        progress: Show bars.
        record: Filled by `finish`; what report.json holds.
    """

    config: AlignConfig
    model: AlignModel
    prompts: list[Prompt]
    sources: dict[str, slice]
    rewards: list[AnyReward]
    before: Tensor
    sets: PictureSets | None
    progress: bool
    record: dict[str, Any]

    def finish(self, final: nn.Module, result: FitResult, trend: Mapping[str, Any]) -> None:
        """Draw again, measure both sides, write report.json, report.md and the grid.

        Args:
            final: What is saved.
            result: The training.
            trend: Whether the rollouts' reward rose, with `"kept": False` where it did not and the
                saved model is the one that the run began with, and how far the other had moved.
        """
        after = _draw(self.config, self.model, final, self.prompts, self.progress)
        sides = {"before": self.before, "after": after}
        columns = {
            name: torch.cat(
                [
                    score_all(self.rewards, images[rows].float() / 255, self.prompts[rows])
                    for rows in self.sources.values()
                ]
            )
            for name, images in sides.items()
        }
        if not processes.is_main():
            return
        self.record = {
            "method": self.config.method,
            "model": self.config.model,
            "steps": result.steps,
            "minutes": round(result.seconds / 60, 2),
            "reward_trend": dict(trend),
            "images_per_prompt": self.config.num_eval_images,
            "prompts": {},
            "kl": self.divergence(final),
        }
        for name, rows in self.sources.items():
            own = {side: values[rows] for side, values in columns.items()}
            pictures = {side: images[rows] for side, images in sides.items()}
            self.record["prompts"][name] = {
                "num_prompts": len(pictures["before"]) // self.config.num_eval_images,
                "rewards": self._of_rewards(own),
                **self._of_sets(pictures),
            }
        folder = Path(self.config.output_dir)
        storage.write_json(folder / "report.json", self.record)
        storage.write_bytes(folder / "report.md", markdown(self.record).encode())
        _before_after(folder / "before_after.png", sides, self.prompts, self._groups(sides))

    def divergence(self, network: nn.Module) -> dict[str, Any]:
        """KL(network || base) of each scale or denoising step, and of whole samples."""
        return _kl_per_step(self.config, self.model, network=network, prompts=self.prompts)

    def _groups(self, sides: dict[str, Tensor]) -> Int[Tensor, " n"]:
        """Prompt of each picture."""
        return torch.arange(len(sides["before"])) // self.config.num_eval_images

    def _of_rewards(self, columns: dict[str, Tensor]) -> dict[str, Any]:
        """Each reward before and after; one of sets is a single number without an interval."""
        groups, found = self._groups(columns), {}
        for k, reward in enumerate(self.rewards):
            before, after = (columns[side][:, k] for side in ("before", "after"))
            if isinstance(reward, SetReward):
                before, after, own = before[:1], after[:1], None
            else:
                own = groups
            limits = reward.range if isinstance(reward, CheckedReward) else UNBOUNDED
            found[reward.name] = compare(before, after, own, limits)
        return found

    def _of_sets(self, sides: dict[str, Tensor]) -> dict[str, Any]:
        """Diversity within prompts, and the Fréchet distance to true pictures."""
        if self.sets is None:
            return {}
        found = self.sets.distances(**sides)
        if self.config.num_eval_images > 1:
            groups = self._groups(sides)
            found = {"vendi_within_prompt": self.sets.diversity(**sides, groups=groups), **found}
        return found


def make_report(
    config: AlignConfig,
    model: AlignModel,
    rewards: Sequence[AnyReward],
    held_out: Sequence[AnyReward],
    *,
    progress: bool,
) -> Report:
    """Draw the pictures of the report by the model as it came; a resumed run reads them again.

    Raises:
        UserError: If the pictures of the run that is resumed were others.
    """
    prompts: list[Prompt] = []
    sources = {}
    for name in config.eval_prompts:
        asked = open_prompts([name], num_classes=model.num_classes, what="eval_prompts")
        asked = asked[: config.num_eval_prompts]
        first = len(prompts)
        prompts += [prompt for prompt in asked for _ in range(config.num_eval_images)]
        sources[name] = slice(first, len(prompts))
    model.check([prompt.asked for prompt in prompts])
    sets = None
    if processes.is_main():
        sets = open_picture_sets(
            config.eval_features,
            config.eval_reference,
            scenes=model.grammar == "scenes",
            side=model.resolution[0],
            device=next(model.policy.network.parameters()).device,
            download=config.download,
        )
    path = Path(config.output_dir, "before.safetensors")
    about = _about(config, model, prompts)
    before = _read_before(path, about, resumed=latest_checkpoint(config.output_dir) is not None)
    if before is None:
        before = _draw(config, model, None, prompts, progress)
        if processes.is_main():
            path.parent.mkdir(parents=True, exist_ok=True)
            storage.write_tensors(path, {"images": before}, about)
    if processes.world_size() > 1:
        processes.barrier()
    watched = [*rewards, *held_out]
    return Report(
        config=config,
        model=model,
        prompts=prompts,
        sources=sources,
        rewards=watched,
        before=before,
        sets=sets,
        progress=progress,
        record={},
    )


def _about(config: AlignConfig, model: AlignModel, prompts: Sequence[Prompt]) -> dict[str, str]:
    """What the pictures of the report depend on."""
    conditions = "\n".join(str(prompt.asked) for prompt in prompts)
    generation = getattr(getattr(model, "pipe", None), "generation", None)
    settings = [config.guidance_scale, config.mixed_precision, str(generation), config.diffusion]
    return {
        "weights": model.fingerprint(),
        "eval_prompts": hashlib.sha256(conditions.encode()).hexdigest(),
        "sampling settings": str(settings),
    }


def _read_before(path: Path, about: Mapping[str, str], *, resumed: bool) -> Tensor | None:
    """The pictures that an earlier start of this run has drawn, if they are the same ones."""
    if not path.is_file():
        return None
    found = storage.read_metadata(path)
    changed = [name for name, value in about.items() if found.get(name) != value]
    if not changed:
        return storage.read_tensors(path)["images"]
    if resumed:
        raise UserError(
            f"{path} was drawn with other {', '.join(changed)}. Resume with the settings that the "
            "run began with, or start in another output_dir"
        )
    return None


def score_all(
    rewards: Sequence[AnyReward], images: Float[Tensor, "b 3 H W"], prompts: Sequence[Prompt]
) -> Float[Tensor, "b k"]:
    """Rewards of pictures on the CPU; groups are equal prompts, a set is all pictures."""
    if not rewards:
        return images.new_zeros(len(images), 0)
    conditions = [prompt.condition for prompt in prompts]
    columns, _ = score(rewards, images, conditions, [prompt.metadata for prompt in prompts])
    asked = [prompt.asked for prompt in prompts]
    numbers = {condition: i for i, condition in enumerate(dict.fromkeys(asked))}
    groups = torch.tensor([numbers[condition] for condition in asked])
    return score_together(rewards, columns, images, prompts, groups, whole=True)[0]


def grid(
    output_dir: str,
    step: int,
    images: Float[Tensor, "b 3 H W"],
    prompts: Sequence[Prompt],
    rewards: Float[Tensor, " b"] | None,
) -> None:
    """A sheet of the first pictures with their rewards, if any, `samples/step_STEP.png`."""
    captions = [str(prompt.condition) for prompt in prompts]
    if rewards is not None:
        pairs = zip(captions, rewards.tolist(), strict=True)
        captions = [f"{caption} ({value:.3g})" for caption, value in pairs]
    path = Path(output_dir, "samples", f"step_{step:08d}.png")
    save_grid(images[:_GRID], path, captions=captions[:_GRID])


def _draw(
    config: AlignConfig,
    model: AlignModel,
    network: nn.Module | None,
    prompts: Sequence[Prompt],
    progress: bool,
) -> Tensor:
    """uint8 [n, 3, H, W], every process a share; image i from seed + i."""
    own = processes.own_range(len(prompts))
    size = config.rollout_batch_size
    parts = []
    starts = range(own.start, own.stop, size)
    for start in tqdm(starts, "drawing for the report", unit="batch", disable=not progress):
        rows = range(start, min(start + size, own.stop))
        images = model.draw(network, [prompts[i].asked for i in rows], [_SEED + i for i in rows])
        parts.append(to_uint8(images).cpu())
    mine = torch.cat(parts) if parts else torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
    return torch.cat([part for part in processes.gather(mine) if len(part)])


def _kl_per_step(
    config: AlignConfig, model: AlignModel, *, network: nn.Module, prompts: Sequence[Prompt]
) -> dict[str, Any]:
    """Exact KL(tuned || base) in nats, of each scale or denoising step.

    On samples of the tuned policy, as rollouts draw them. The sum over scales is the divergence of
    whole samples (the chain rule); averaged log-probabilities give the mean over latent dimensions.
    """
    policy: Policy = model.policy
    reference = policy.baseline
    if not isinstance(policy, StartPolicy):  # which knows its own
        reference = Given(open_model(config).policy.network)
    chosen = list(prompts)[:: max(1, len(prompts) // _KL_SAMPLES)][:_KL_SAMPLES]
    encoded = policy.encode([prompt.asked for prompt in chosen])
    generators = [stream(config.seed, -1, i) for i in range(len(chosen))]
    drawn = policy.sample(encoded, generators=generators)
    held, policy.baseline = policy.baseline, reference
    totals: dict[int, list[float]] = {step: [] for step in range(policy.num_steps)}
    try:
        with torch.no_grad():
            for start in range(0, len(chosen), 16):
                part = drawn.index(slice(start, start + 16))
                ev = policy.evaluate(part, need=("logp", "kl"), network=network)
                assert ev.kl is not None
                for step in totals:
                    own = ev.kl[:, ev.step == step] * ev.mask[:, ev.step == step]
                    totals[step] += own.sum(1).tolist()
    finally:
        policy.baseline = held
    per_step = [float(np.mean(values)) for values in totals.values()]
    unit = "nats per latent dimension" if policy.averaged else "nats per sample"
    return {"per_step": per_step, "total": sum(per_step), "unit": unit, "samples": len(chosen)}


def _before_after(
    path: Path, sides: dict[str, Tensor], prompts: Sequence[Prompt], groups: Tensor
) -> None:
    """Two rows per line of eight prompts: above before, below after, equal seeds."""
    first = [int((groups == g).nonzero()[0]) for g in range(min(_GRID, int(groups.max()) + 1))]
    tiles, captions = [], []
    for start in range(0, len(first), 8):
        rows = first[start : start + 8]
        for name in ("before", "after"):
            tiles += [sides[name][row] for row in rows]
            captions += [f"{name}: {prompts[row].condition}" for row in rows]
    save_grid(torch.stack(tiles).float() / 255, path, min(8, len(first)), captions)
