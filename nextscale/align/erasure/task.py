"""Batches and losses of a run: what the loop of all trainers is given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale import processes
from nextscale.align.erasure.config import EraseConfig
from nextscale.align.erasure.data import Drawn
from nextscale.align.erasure.losses import (
    ear_hidden_loss,
    ear_logit_loss,
    entropy,
    filtered_cross_entropy,
    kl_divergence,
    window_means,
)
from nextscale.align.erasure.windows import last_scale, token_windows
from nextscale.align.objectives.d2o import d2o_loss
from nextscale.align.references import Reference
from nextscale.errors import UserError
from nextscale.pipeline import NextScalePipeline
from nextscale.tokenizers import ScaleSchedule
from nextscale.training import bare
from nextscale.training.batches import micro_batch

ROUNDING = 1e-9  # a loss of equal prompts: kernels with and without gradients round differently
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Retained:
    """Prompts that stay as they are, with the base's pictures of them."""

    prompts: list[str | int]
    tokens: Int[Tensor, "n t"]


def trained_scales(config: EraseConfig, schedule: ScaleSchedule) -> int:
    """How many scales a run trains.

    Raises:
        UserError: For more than there are.
    """
    count = config.train_scales or (1 if config.method == "sace" else schedule.num_scales)
    if count > schedule.num_scales:
        raise UserError(f"train_scales is {count}, the model has {schedule.num_scales} scales")
    return count


class Erasing:
    """Batches and losses of a run."""

    def __init__(
        self,
        config: EraseConfig,
        pipe: NextScalePipeline,
        drawn: Drawn,
        retain: Retained,
        teacher: Reference,
    ) -> None:
        self.config, self.drawn, self.retain, self.teacher = config, drawn, retain, teacher
        self.tokenizer, model = pipe.tokenizer, pipe.transformer
        self.schedule, self.conditioner = model.schedule, model.conditioner
        self.scales = trained_scales(config, self.schedule)
        part = self.schedule.truncate(self.scales)
        self.windows = token_windows(part, config.window_smallest, config.window_largest)
        windowed = config.method == "ear" and config.mode == "windowed"
        self.per_batch = len(self.windows) if windowed else 1
        self.ids = {
            "original": self.conditioner.tokenize([p.original for p in drawn.pairs]),
            "modified": self.conditioner.tokenize([p.modified for p in drawn.pairs]),
        }
        self.retain_ids = self.conditioner.tokenize(retain.prompts) if retain.prompts else None
        names = list(dict.fromkeys(pair.concept for pair in drawn.pairs))
        self.of_concept = [
            np.array([i for i, pair in enumerate(drawn.pairs) if pair.concept == name])
            for name in names
        ]
        self.thresholds: Tensor | None = None
        self.updates = 0  # steps that changed something
        self.seen, self.opened = ([0] * len(self.windows) for _ in range(2))  # ear, by window

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on counting from."""
        return {"updates": self.updates, "seen": self.seen, "opened": self.opened}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `state_dict`."""
        self.updates = state["updates"]
        self.seen, self.opened = list(state["seen"]), list(state["opened"])

    def shares(self) -> list[dict[str, Any]]:
        """Of each window, tokens from start to stop: in what share of its turns it was updated."""
        return [
            {"start": w.start, "stop": w.stop, "share": opened / seen}
            for w, seen, opened in zip(self.windows, self.seen, self.opened, strict=True)
            if seen
        ]

    def load_batch(self, indices: np.ndarray, step: int) -> Batch:
        """Pairs for all windows of a pass; in windowed mode a pass takes as many steps."""
        turn, config = step // self.per_batch, self.config
        if self.per_batch > 1 or config.sequential:
            indices = self._rows(turn, step)
        batch = {name: ids[indices] for name, ids in self.ids.items()}
        batch["tokens"] = self.drawn.neutral[indices]
        batch["concept"] = self.drawn.concept[indices]
        if self.retain_ids is not None:
            chosen = self._retained(indices, turn)
            batch["retain"] = self.retain_ids[chosen]
            batch["retain_tokens"] = self.retain.tokens[chosen]
        return batch

    def _retained(self, indices: np.ndarray, turn: int) -> np.ndarray:
        """Retain prompts of a micro-batch: an endless shuffle of their own, shared out alike."""
        config, place = self.config, (processes.rank(), processes.world_size())
        count = config.gradient_accumulation_steps
        every = [micro_batch(config, len(self.drawn.pairs), turn, m, *place) for m in range(count)]
        micro = next((m for m, own in enumerate(every) if np.array_equal(own, indices)), 0)
        other = replace(config, seed=config.seed + 1)
        assert self.retain_ids is not None
        return micro_batch(other, len(self.retain_ids), turn, micro, *place)

    def _rows(self, turn: int, step: int) -> np.ndarray:
        """The next rows of an endless shuffle, of the concept whose turn it is."""
        config, rows = self.config, np.arange(len(self.drawn.pairs))
        if config.sequential:
            share = config.max_train_steps / len(self.of_concept)
            rows = self.of_concept[min(int(step / share), len(self.of_concept) - 1)]
        place = (processes.rank(), processes.world_size())
        return rows[micro_batch(config, len(rows), turn, 0, *place)]

    def losses(
        self, modules: Mapping[str, nn.Module], batch: Batch, step: int
    ) -> Iterator[tuple[str, Tensor, Mapping[str, float | Tensor]]]:
        """The method's loss and what preserves the rest; nothing where no window is above."""
        network = modules["model"]
        bare(network).eval()
        if self.config.method == "ear" and self.thresholds is None:
            self.thresholds = self._thresholds(network)
        erasing, metrics = self._erasing(network, batch, step)
        if erasing is None:
            return
        self.updates += 1
        yield "model", erasing, metrics

    # ---- parts of the loss -------------------------------------------------------------------

    def _erasing(
        self, network: nn.Module, batch: Batch, step: int
    ) -> tuple[Tensor | None, dict[str, float | Tensor]]:
        config = self.config
        if config.method == "ear":
            return self._ear(network, batch, step)
        count, metrics = self.scales, {}
        if config.method == "d2o":
            own, own_ref = self._logps(network, batch["original"], batch["tokens"], count)
            bad, bad_ref = self._logps(network, batch["original"], batch["concept"], count)
            loss = d2o_loss(
                own[:, None], own_ref[:, None], bad, bad_ref,
                beta=config.d2o_beta, alpha=config.d2o_alpha,
            )  # fmt: skip
        else:
            logits = self._student(network, batch["original"], batch["tokens"], count)
            each = filtered_cross_entropy(logits, batch["tokens"][:, : logits.shape[1]])
            loss = each.mean()
            metrics["kept"] = float((each > 0).float().mean())
            if config.method == "sace":
                loss = loss + config.entropy_weight * entropy(logits).mean()
        metrics["erasing"] = loss.detach()
        kept = self._preserving(network, batch, count)
        metrics["preserving"] = kept.detach()
        return loss + kept, metrics

    def _ear(
        self, network: nn.Module, batch: Batch, step: int
    ) -> tuple[Tensor | None, dict[str, float | Tensor]]:
        assert self.thresholds is not None
        first = step % self.per_batch
        part = slice(first, first + 1) if self.per_batch > 1 else slice(None)
        windows, thresholds = self.windows[part], self.thresholds[part]
        count = last_scale(self.schedule, windows[-1]) + 1
        each = self._ear_losses(network, batch, count)
        means = window_means(each, windows)
        everywhere = torch.stack(processes.gather(means.detach().cpu())).mean(dim=0)
        passed = (everywhere > thresholds).to(means.device)
        metrics: dict[str, float | Tensor] = {"erasing": means.mean().detach()}
        for number, open_ in enumerate(passed.tolist(), first):
            self.seen[number] += 1
            self.opened[number] += open_
        if not bool(passed.any()):
            return None, metrics
        loss = (means * passed).sum() / len(windows)
        kept = self._preserving(network, batch, count)
        metrics["preserving"] = kept.detach()
        return loss + kept, metrics

    def _ear_losses(self, network: nn.Module, batch: Batch, count: int) -> Float[Tensor, "b u"]:
        config, hidden = self.config, self.config.space == "hidden"
        tokens = batch["tokens" if config.prefix == "neutral" else "concept"]
        with torch.no_grad(), self.teacher.use(bare(network)) as teacher:
            told = self._run(teacher, batch["original"], tokens, count, features=hidden)
            neutral = self._run(teacher, batch["modified"], tokens, count, features=hidden)
        student = self._run(network, batch["original"], tokens, count, features=hidden)
        function = ear_hidden_loss if hidden else ear_logit_loss
        each = function(student, told, neutral, config.eta)
        return each * (each.detach() >= config.token_gate)

    @torch.no_grad()
    def _thresholds(self, network: nn.Module) -> Float[Tensor, " w"]:
        """Of each window: a number, or a quantile of its losses before training."""
        config = self.config
        if config.gate is not None:
            return torch.full((len(self.windows),), max(config.gate, ROUNDING))
        place = np.concatenate([np.arange(len(rows)) for rows in self.of_concept])
        every = np.concatenate(self.of_concept)[np.argsort(place, kind="stable")]
        rows = every[:64]  # of all concepts in turn
        device = next(network.parameters()).device
        batch = {name: ids[rows].to(device) for name, ids in self.ids.items()}
        batch["tokens"] = self.drawn.neutral[rows].to(device)
        batch["concept"] = self.drawn.concept[rows].to(device)
        with self.teacher.use(bare(network)) as teacher:
            each = self._ear_losses(teacher, batch, self.scales)
        means = torch.stack([window_means(row[None], self.windows) for row in each], dim=1)
        return means.quantile(config.gate_quantile, dim=1).clamp_min(ROUNDING).cpu()

    def _preserving(self, network: nn.Module, batch: Batch, count: int) -> Tensor:
        """KL(base || model) on modified prompts, retain prompts and without a prompt."""
        config = self.config
        parts = [(config.preserve_weight, batch["modified"], batch["tokens"])]
        if "retain" in batch:
            parts.append((config.retain_weight, batch["retain"], batch["retain_tokens"]))
        null = self.conditioner.null(len(batch["tokens"])).to(batch["modified"])
        parts.append((config.unconditional_weight, null, batch["tokens"]))
        total = torch.zeros((), device=batch["tokens"].device)
        for weight, ids, tokens in parts:
            if weight:
                total = total + weight * self._drift(network, ids, tokens, count).mean()
        return total

    def _drift(
        self, network: nn.Module, ids: Tensor, tokens: Tensor, count: int
    ) -> Float[Tensor, "b u"]:
        with torch.no_grad(), self.teacher.use(bare(network)) as teacher:
            told = self._student(teacher, ids, tokens, count)
        return kl_divergence(told, self._student(network, ids, tokens, count))

    def _logps(
        self, network: nn.Module, ids: Tensor, tokens: Tensor, count: int
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Log-probabilities of pictures under the model and under the base."""
        found = []
        with torch.no_grad(), self.teacher.use(bare(network)) as teacher:
            found.append(self._student(teacher, ids, tokens, count))
        found.insert(0, self._student(network, ids, tokens, count))
        logps = [x.log_softmax(-1).gather(-1, tokens[:, : x.shape[1], None])[..., 0] for x in found]
        return logps[0].sum(1), logps[1].sum(1)

    def _student(
        self, network: nn.Module, ids: Tensor, tokens: Tensor, count: int
    ) -> Float[Tensor, "b u v"]:
        return self._run(network, ids, tokens, count, features=False)

    def _run(
        self, network: nn.Module, ids: Tensor, tokens: Tensor, count: int, *, features: bool
    ) -> Tensor:
        """One teacher-forced pass over the first scales."""
        length = self.schedule.slices[count - 1].stop
        inputs = self.tokenizer.teacher_inputs(tokens)[:, : length - self.schedule.lengths[0]]
        return network(inputs, ids=ids, num_scales=count, features=features)
