"""`nextscale erase`: concepts out of a next-scale model, as an adapter that can be taken off."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale import processes
from nextscale.align.erasure.closed_form import edit_cross_attention, swap_classes
from nextscale.align.erasure.concepts import SceneConcept, scene_concept
from nextscale.align.erasure.config import CLOSED_FORM, EraseConfig
from nextscale.align.erasure.data import Drawn, Recognise, draw, draw_pairs
from nextscale.align.erasure.losses import (
    ear_hidden_loss,
    ear_logit_loss,
    entropy,
    filtered_cross_entropy,
    kl_divergence,
    window_means,
)
from nextscale.align.erasure.pairs import ConceptPair, read_pairs, scene_pairs, write_pairs
from nextscale.align.erasure.report import open_report
from nextscale.align.erasure.windows import last_scale, token_windows
from nextscale.align.objectives.d2o import d2o_loss
from nextscale.align.prompts import open_prompts
from nextscale.align.references import AdapterOff, FrozenCopy, Reference
from nextscale.data.captions import parse
from nextscale.data.checker import check_batch
from nextscale.data.images import to_uint8
from nextscale.errors import UserError
from nextscale.pipeline import NextScalePipeline
from nextscale.streams import batch_indices, stream
from nextscale.training import FitResult, adamw, bare, decay_groups, fit
from nextscale.training.batches import micro_batch
from nextscale.var import NextScaleTransformer
from nextscale.var.delta import save_delta
from nextscale.var.lora import add_lora, base_fingerprint, save_lora

logger = logging.getLogger(__name__)
PROMPT_TARGETS = ("cross.q", "cross.kv", "cross.proj", "fc1", "fc2")
CLASS_TARGETS = ("qkv", "modulation", "fc1", "fc2")
ROUNDING = 1e-9  # a loss of equal prompts: kernels with and without gradients round differently
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class EraseResult:
    """How a run ended.

    Attributes:
        fit: The result of the loop; None for a closed form.
        pipe: The edited model.
        counts: Pictures drawn, showing the concept, and kept.
        pairs: Those that were trained on.
        report: What was measured; None: switched off, or no scenes model.
    """

    fit: FitResult | None
    pipe: NextScalePipeline
    counts: dict[str, int]
    pairs: list[ConceptPair]
    report: dict[str, Any] | None


def erase(config: EraseConfig, *, progress: bool = True) -> EraseResult:
    """Erase concepts and save the adapter in `output_dir/adapter`, beside the pairs.

    Raises:
        UserError: For concepts that the model cannot draw, pairs of which none is left, settings
            that do not fit the model.
    """
    pipe = NextScalePipeline.from_pretrained(config.model, dtype="float32")
    pipe.tokenizer.requires_grad_(False)
    model = pipe.transformer
    fingerprint = base_fingerprint(model)
    pairs, recognise = open_pairs(config, pipe)
    drawn = draw_pairs(
        pipe,
        pairs,
        config.num_pictures,
        recognise if config.filter_pairs else None,
        seed=config.seed,
        progress=progress,
    )
    retain = _retain(config, pipe, drawn.pairs)
    report = None
    if config.num_eval_prompts and recognise is not None and processes.is_main():
        report = open_report(config, pipe, drawn.pairs, recognise, progress=progress)
    folder = Path(config.output_dir)
    settings: dict[str, Any] = {"method": config.method, "concepts": list(config.concepts)}
    if config.method in CLOSED_FORM:
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        if config.method == "uce":
            kept = [*dict.fromkeys(str(p.modified) for p in drawn.pairs), *retain.prompts]
            edit_cross_attention(model, drawn.pairs, kept, preserve=config.uce_preserve)
        else:
            swap_classes(model, drawn.pairs)
        result = None
        save_delta(
            folder / "adapter", before, dict(model.named_parameters()), fingerprint, settings
        )
    else:
        result = _train(config, pipe, drawn, retain, fingerprint, settings, progress)
    if processes.is_main():
        write_pairs(folder / "pairs.jsonl", list(dict.fromkeys(drawn.pairs)))
    record = None
    if report is not None:
        base = NextScalePipeline.from_pretrained(config.model, dtype="float32")
        record = report.finish(base, pipe)
    return EraseResult(result, pipe, drawn.counts, drawn.pairs, record)


# ---- pairs -----------------------------------------------------------------------------------


def open_pairs(
    config: EraseConfig, pipe: NextScalePipeline
) -> tuple[list[ConceptPair], Recognise | None]:
    """The pairs of a run, and who sees whether a picture shows their concept."""
    conditioner = pipe.transformer.conditioner
    scenes = conditioner.config().get("grammar") == "scenes"
    num_classes = None if conditioner.prompts else conditioner.config()["num_classes"]
    if config.pairs is not None:
        pairs = read_pairs(config.pairs, num_classes=num_classes)
        if config.concepts:
            known = {pair.concept for pair in pairs}
            if missing := [name for name in config.concepts if name not in known]:
                raise UserError(
                    f"pairs {config.pairs} name no {', '.join(missing)}; they have "
                    f"{', '.join(sorted(known))}"
                )
            pairs = [pair for pair in pairs if pair.concept in config.concepts]
    elif scenes:
        concepts = [scene_concept(name) for name in config.concepts]
        pairs = [p for c in concepts for p in scene_pairs(c, config.num_pairs, seed=config.seed)]
        pairs = [_without(pair, concepts, config.seed) for pair in pairs]
    elif num_classes is not None:
        pairs = [p for name in config.concepts for p in _class_pairs(config, name, num_classes)]
    else:
        raise UserError("this model takes free text: give prompt pairs, --pairs FILE.jsonl")
    if not scenes:
        return pairs, None
    found = {pair.concept: scene_concept(pair.concept) for pair in pairs}
    return pairs, scenes_recogniser(found)


def scenes_recogniser(concepts: Mapping[str, SceneConcept]) -> Recognise:
    """The checker, by the concept of each pair."""

    def recognise(images: Tensor, pairs: Sequence[ConceptPair]) -> np.ndarray:
        pixels = to_uint8(images).permute(0, 2, 3, 1).numpy()
        reports = check_batch(pixels, [str(pair.original) for pair in pairs])
        return np.array(
            [concepts[p.concept].in_picture(r) for p, r in zip(pairs, reports, strict=True)], bool
        )

    return recognise


def _without(pair: ConceptPair, concepts: Sequence[SceneConcept], seed: int) -> ConceptPair:
    """The pair with the other erased concepts out of its modified prompt, too."""
    caption = parse(str(pair.modified))
    rng = np.random.Generator(np.random.Philox(key=[seed, 1]))
    for _ in range(len(concepts) ** 2):
        present = [c for c in concepts if c.in_caption(caption)]
        changed = present[0].replaced(caption, rng) if present else None
        if changed is None:
            break
        caption = changed[0]
    return replace(pair, modified=str(caption))


def _class_pairs(config: EraseConfig, name: str, num_classes: int) -> list[ConceptPair]:
    """An erased class and other classes in its place, one drawn for each pair."""
    if not name.isdigit() or int(name) >= num_classes:
        raise UserError(f'the concept "{name}" is no class of the model, 0 to {num_classes - 1}')
    erased = {int(concept) for concept in config.concepts if concept.isdigit()}
    others = [label for label in range(num_classes) if label not in erased]
    if not others:
        raise UserError("every class is to be erased; leave one to take their place")
    rng = np.random.Generator(np.random.Philox(key=[config.seed, int(name)]))
    count = 1 if config.method == "class_swap" else config.num_pairs
    chosen = [others[i] for i in rng.integers(len(others), size=count)]
    return [ConceptPair(int(name), label, name, str(label)) for label in chosen]


@dataclass(frozen=True)
class _Retain:
    """Prompts that stay as they are, with the base's pictures of them."""

    prompts: list[str]
    tokens: Int[Tensor, "n t"]


def _retain(config: EraseConfig, pipe: NextScalePipeline, pairs: Sequence[ConceptPair]) -> _Retain:
    """Retain prompts without those that name an erased concept."""
    conditioner = pipe.transformer.conditioner
    scenes = conditioner.config().get("grammar") == "scenes"
    names = config.retain_prompts or (("scenes:standard",) if scenes else ())
    empty = _Retain([], torch.zeros(0, pipe.transformer.schedule.num_tokens, dtype=torch.long))
    if not names or not config.num_retain or not config.retain_weight:
        return empty
    num_classes = None if conditioner.prompts else conditioner.config()["num_classes"]
    every = open_prompts(names, num_classes=num_classes, what="retain_prompts")
    asked = [prompt.condition for prompt in every]
    if scenes:
        concepts = [scene_concept(name) for name in dict.fromkeys(p.concept for p in pairs)]
        wrong = [c for c in asked if any(k.in_caption(parse(str(c))) for k in concepts)]
    else:
        originals = {pair.original for pair in pairs}
        wrong = [c for c in asked if c in originals]
    if config.retain_prompts and wrong:
        raise UserError(
            f"{len(wrong)} of {len(asked)} retain_prompts ask for what is erased, such as "
            f'"{wrong[0]}"; take them out'
        )
    refused = set(wrong)
    kept: list[Any] = [c for c in asked if c not in refused][: config.num_retain]
    if not kept:
        return empty
    tokens = draw(pipe, kept, seed=config.seed + 1_000_000)[1]
    return _Retain(kept, tokens)


# ---- training --------------------------------------------------------------------------------


def _train(
    config: EraseConfig,
    pipe: NextScalePipeline,
    drawn: Drawn,
    retain: _Retain,
    fingerprint: str,
    settings: dict[str, Any],
    progress: bool,
) -> FitResult:
    model = pipe.transformer
    usual = PROMPT_TARGETS if model.config.context_dim else CLASS_TARGETS
    targets = config.targets or usual
    frozen: dict[str, nn.Module] = {}
    before: dict[str, Tensor] = {}
    teacher: Reference
    if config.lora_rank:
        patterns = _block_targets(targets, config.first_blocks)
        with torch.random.fork_rng():
            torch.manual_seed(stream(config.seed).initial_seed())
            add_lora(model, rank=config.lora_rank, alpha=config.lora_alpha, targets=patterns)
        teacher = AdapterOff()
        settings |= {
            "rank": config.lora_rank,
            "alpha": config.lora_alpha,
            "target_modules": list(patterns),
        }
    else:
        copied = FrozenCopy(model)
        teacher, frozen = copied, {"teacher": copied.module}
        chosen = _unfreeze(model, targets, config.first_blocks)
        before = {n: p.detach().clone() for n, p in model.named_parameters() if n in chosen}
    task = _Task(config, pipe, drawn, retain, teacher)
    result = fit(
        config,
        modules={"model": model, **frozen},
        optimizers={"model": adamw(decay_groups(model.named_parameters()), config)},
        load_batch=task.load_batch,
        dataset_size=len(drawn.pairs),
        losses=task.losses,
        find_unused_parameters=True,
        progress=progress,
    )
    final = result.modules["model"]
    if "model" in result.ema_modules:
        final.load_state_dict(result.ema_modules["model"].state_dict())
    final.eval()
    if not task.updates:
        raise UserError(
            f"no window was ever above its threshold in {result.steps} steps: nothing was erased. "
            "Lower gate or gate_quantile, or raise eta",
            exit_code=1,
        )
    folder = Path(config.output_dir, "adapter")
    if processes.is_main():
        if config.lora_rank:
            save_lora(final, folder, settings)
        else:
            save_delta(folder, before, dict(final.named_parameters()), fingerprint, settings)
    return result


def _block_targets(targets: Sequence[str], blocks: int | None) -> tuple[str, ...]:
    """Names of modules in all blocks or in the first ones."""
    if blocks is None:
        return tuple(targets)
    own = {"cross": "cross.", "attention": "attention.", "feed_forward": "feed_forward."}
    inside = {"qkv": own["attention"], "fc1": own["feed_forward"], "fc2": own["feed_forward"]}
    return tuple(f"blocks.{i}.{inside.get(t, '')}{t}" for i in range(blocks) for t in targets)


def _unfreeze(model: NextScaleTransformer, targets: Sequence[str], blocks: int | None) -> set[str]:
    """Train the weights of the targets alone; returns their names."""
    model.requires_grad_(False)
    wanted = _block_targets(targets, blocks)
    chosen = {
        name
        for name, _ in model.named_parameters()
        if any(f".{name.rpartition('.')[0]}".endswith(f".{target}") for target in wanted)
    }
    if not chosen:
        raise UserError(f"targets {', '.join(targets)} name no weights of the model")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return chosen


class _Task:
    """Batches and losses of a run."""

    def __init__(
        self,
        config: EraseConfig,
        pipe: NextScalePipeline,
        drawn: Drawn,
        retain: _Retain,
        teacher: Reference,
    ) -> None:
        self.config, self.drawn, self.retain, self.teacher = config, drawn, retain, teacher
        self.tokenizer, model = pipe.tokenizer, pipe.transformer
        self.schedule, self.conditioner = model.schedule, model.conditioner
        count = config.train_scales or (1 if config.method == "sace" else None)
        if count is not None and count > self.schedule.num_scales:
            raise UserError(
                f"train_scales is {count}, the model has {self.schedule.num_scales} scales"
            )
        self.scales = count or self.schedule.num_scales
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
        self.updates = 0

    def load_batch(self, indices: np.ndarray, step: int) -> Batch:
        """Pairs for all windows of a pass; in windowed mode a pass takes as many steps."""
        turn, config = step // self.per_batch, self.config
        if self.per_batch > 1 or config.sequential:
            indices = self._rows(turn, step)
        batch = {name: ids[indices] for name, ids in self.ids.items()}
        batch["tokens"] = self.drawn.neutral[indices]
        batch["concept"] = self.drawn.concept[indices]
        if self.retain_ids is not None:
            chosen = batch_indices(config.seed + 1, turn, len(indices), len(self.retain_ids))
            batch["retain"] = self.retain_ids[chosen]
            batch["retain_tokens"] = self.retain.tokens[chosen]
        return batch

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
        if self.per_batch > 1:
            number = step % self.per_batch
            windows, thresholds = [self.windows[number]], self.thresholds[number : number + 1]
        else:
            windows, thresholds = self.windows, self.thresholds
        count = last_scale(self.schedule, windows[-1]) + 1
        each = self._ear_losses(network, batch, count)
        means = window_means(each, windows)
        everywhere = torch.stack(processes.gather(means.detach().cpu())).mean(dim=0)
        passed = (everywhere > thresholds).to(means.device)
        metrics: dict[str, float | Tensor] = {"erasing": means.mean().detach()}
        for window, open_ in zip(windows, passed.tolist(), strict=True):
            metrics[f"updated/{window.start}"] = float(open_)
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
        rows = np.arange(min(len(self.drawn.pairs), 64))
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
