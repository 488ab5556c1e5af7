"""`nextscale erase`: concepts out of a next-scale model, as an adapter that can be taken off."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nextscale import processes
from nextscale.align.erasure.checks import check_apart, check_resumed
from nextscale.align.erasure.closed_form import (
    check_classes,
    check_cross_attention,
    edit_cross_attention,
    swap_classes,
)
from nextscale.align.erasure.concepts import scene_concept
from nextscale.align.erasure.config import CLOSED_FORM, EraseConfig
from nextscale.align.erasure.data import Drawn, draw, draw_pairs
from nextscale.align.erasure.held_out import (
    Asked,
    HeldOut,
    class_labels,
    scene_prompts,
    text_prompts,
)
from nextscale.align.erasure.pairs import ConceptPair, read_pairs, scene_pairs, write_pairs
from nextscale.align.erasure.recognisers import Recognise, open_recogniser
from nextscale.align.erasure.report import open_report
from nextscale.align.erasure.task import Erasing, Retained, trained_scales
from nextscale.align.erasure.text_pairs import local_writer, names, template_pairs, written_pairs
from nextscale.align.prompts import open_prompts
from nextscale.align.references import AdapterOff, FrozenCopy, Reference
from nextscale.data.captions import parse
from nextscale.errors import UserError
from nextscale.pipeline import NextScalePipeline
from nextscale.streams import stream
from nextscale.training import FitResult, adamw, decay_groups, fit, record
from nextscale.var import NextScaleTransformer
from nextscale.var.delta import save_delta
from nextscale.var.lora import add_lora, base_fingerprint, save_lora

logger = logging.getLogger(__name__)
PROMPT_TARGETS = ("cross.q", "cross.kv", "cross.proj", "fc1", "fc2")
CLASS_TARGETS = ("qkv", "modulation", "fc1", "fc2")


@dataclass(frozen=True)
class EraseResult:
    """How a run ended.

    Attributes:
        fit: The result of the loop; None for a closed form.
        pipe: The edited model.
        counts: Pictures drawn, showing the concept, and kept.
        pairs: Those that were trained on.
        report: What was measured; None: switched off, or nobody sees the concepts.
        windows: Of ear, how often each window of tokens was updated: `Erasing.shares`.
    """

    fit: FitResult | None
    pipe: NextScalePipeline
    counts: dict[str, int]
    pairs: list[ConceptPair]
    report: dict[str, Any] | None
    windows: list[dict[str, Any]]


def erase(config: EraseConfig, *, progress: bool = True) -> EraseResult:
    """Erase concepts and save the adapter in `output_dir/adapter`, beside the pairs.

    Raises:
        UserError: For concepts that the model cannot draw, pairs of which none is left, settings
            that do not fit the model, an output_dir that holds an adapter or touches the model.
    """
    check_apart(config)
    check_resumed(config)
    pipe = NextScalePipeline.from_pretrained(config.model, dtype="float32")
    pipe.tokenizer.requires_grad_(False)
    model = pipe.transformer
    _check_model(config, model)
    fingerprint = base_fingerprint(model)
    pairs = open_pairs(config, pipe)
    recognisers = open_recognisers(config, pipe, pairs)
    recognise = next(iter(recognisers.values()), None)
    retained = _retained(config, pipe, pairs)
    held_out = open_held_out(config, pipe, pairs, recognise, retained)
    drawn = draw_pairs(
        pipe,
        pairs,
        config.num_pictures,
        recognise if config.filter_pairs else None,
        seed=config.seed,
        half=config.half,
        progress=progress,
    )
    report = None
    if held_out is not None and processes.is_main():
        report = open_report(
            config, pipe, held_out, recognisers, counts=drawn.counts, progress=progress
        )
    retain = _retain(config, pipe, retained)
    folder = Path(config.output_dir)
    settings: dict[str, Any] = {"method": config.method, "concepts": list(config.concepts)}
    windows: list[dict[str, Any]] = []
    if config.method in CLOSED_FORM:
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        if config.method == "uce":
            kept = [*dict.fromkeys(str(p.modified) for p in drawn.pairs), *retain.prompts]
            edit_cross_attention(model, drawn.pairs, kept, preserve=config.uce_preserve)
        else:
            swap_classes(model, drawn.pairs)
        result = None
        if processes.is_main():
            record.write_record(config, {})
            after = dict(model.named_parameters())
            save_delta(folder / "adapter", before, after, fingerprint, settings)
    else:
        result, windows = _train(config, pipe, drawn, retain, fingerprint, settings, progress)
    if processes.is_main():
        write_pairs(folder / "pairs.jsonl", list(dict.fromkeys(drawn.pairs)))
    figures = None
    if report is not None:
        base = NextScalePipeline.from_pretrained(config.model, dtype="float32")
        figures = report.finish(base, pipe, windows)
    return EraseResult(result, pipe, drawn.counts, drawn.pairs, figures, windows)


def _check_model(config: EraseConfig, model: NextScaleTransformer) -> None:
    """What does not fit the model is said before anything is drawn."""
    trained_scales(config, model.schedule)
    if config.method == "uce":
        check_cross_attention(model)
    if config.method == "class_swap":
        check_classes(model)
    if config.method not in CLOSED_FORM:
        patterns = _block_targets(_targets(config, model), config.first_blocks)
        names = [f".{name}" for name, _ in model.named_modules()]
        if missing := [p for p in patterns if not any(n.endswith(f".{p}") for n in names)]:
            raise UserError(f"targets {', '.join(missing)} name no weights of the model")


# ---- pairs, and what the report asks for -----------------------------------------------------


def open_pairs(config: EraseConfig, pipe: NextScalePipeline) -> list[ConceptPair]:
    """The pairs of a run.

    Raises:
        UserError: If there is no way to make them, or they lack a concept.
    """
    scenes, num_classes = _kind(pipe)
    source = config.pairs or ""
    if source == "templates" or source.startswith("llm:"):
        if scenes or num_classes is not None:
            raise UserError(f"pairs {source} are for models of free text; leave pairs out")
        return [p for name in config.concepts for p in _text_pairs(config, name, source)]
    if config.pairs is not None:
        pairs = read_pairs(config.pairs, num_classes=num_classes)
        if config.concepts:
            known = {pair.concept for pair in pairs}
            if missing := [name for name in config.concepts if name not in known]:
                raise UserError(
                    f"pairs {config.pairs} have no concept {', '.join(missing)}; they name "
                    f"{', '.join(sorted(known))}"
                )
            pairs = [pair for pair in pairs if pair.concept in config.concepts]
        return pairs
    if scenes:
        concepts = [scene_concept(name) for name in dict.fromkeys(config.concepts)]
        found = []
        for concept in concepts:
            others = [other for other in concepts if other is not concept]
            found += scene_pairs(concept, config.num_pairs, seed=config.seed, others=others)
        return found
    if num_classes is not None:
        return [p for name in config.concepts for p in _class_pairs(config, name, num_classes)]
    raise UserError(
        "this model takes free text: give prompt pairs, --pairs FILE.jsonl, templates or llm:MODEL"
    )


def open_recognisers(
    config: EraseConfig, pipe: NextScalePipeline, pairs: Sequence[ConceptPair]
) -> dict[str, Recognise]:
    """Who sees the concepts, by name; the first one decides."""
    scenes, _ = _kind(pipe)
    usual = ("checker", "clip") if scenes else ()
    return {
        name: open_recogniser(name, pairs, scenes=scenes, download=config.download)
        for name in config.recognisers or usual
    }


def open_held_out(
    config: EraseConfig,
    pipe: NextScalePipeline,
    pairs: Sequence[ConceptPair],
    recognise: Recognise | None,
    retained: Sequence[Asked] = (),
) -> HeldOut | None:
    """What the report asks for; None: there is none, because nobody sees the concepts."""
    if not config.num_eval_prompts or recognise is None:
        return None
    scenes, num_classes = _kind(pipe)
    if scenes:
        return scene_prompts(config, pairs, retained)
    if num_classes is not None:
        return class_labels(config, pairs, recognise, num_classes)
    return text_prompts(config, pairs, retained)


def _kind(pipe: NextScalePipeline) -> tuple[bool, int | None]:
    """Whether a model draws scenes, and its number of classes if it takes labels."""
    conditioner = pipe.transformer.conditioner
    about = conditioner.config()
    return about.get("grammar") == "scenes", None if conditioner.prompts else about["num_classes"]


def _text_pairs(config: EraseConfig, name: str, source: str) -> list[ConceptPair]:
    if source == "templates":
        return template_pairs(name, config.replacements, config.num_pairs)
    writer = local_writer(source.partition(":")[2], seed=config.seed)
    return written_pairs(name, config.num_pairs, writer)


def _class_pairs(config: EraseConfig, name: str, num_classes: int) -> list[ConceptPair]:
    """An erased class and other classes in its place, one drawn for each pair."""
    if not name.isdecimal() or int(name) >= num_classes:
        raise UserError(f'the concept "{name}" is no class of the model, 0 to {num_classes - 1}')
    erased = {int(concept) for concept in config.concepts if concept.isdecimal()}
    others = [label for label in range(num_classes) if label not in erased]
    if not others:
        raise UserError("every class is to be erased; leave one to take their place")
    rng = np.random.Generator(np.random.Philox(key=[config.seed, int(name)]))
    count = 1 if config.method == "class_swap" else config.num_pairs
    chosen = [others[i] for i in rng.integers(len(others), size=count)]
    return [ConceptPair(int(name), label, name, str(label)) for label in chosen]


def _retained(
    config: EraseConfig, pipe: NextScalePipeline, pairs: Sequence[ConceptPair]
) -> list[Asked]:
    """Retain prompts; those that name an erased concept are refused, or left out if they are ours.

    Raises:
        UserError: For prompts of the user's that ask for what is erased.
    """
    scenes, num_classes = _kind(pipe)
    sources = config.retain_prompts or (("scenes:standard",) if scenes else ())
    if not sources or not config.num_retain or not config.retain_weight:
        return []
    every = open_prompts(sources, num_classes=num_classes, what="retain_prompts")
    asked = [prompt.condition for prompt in every]
    if scenes:
        concepts = [scene_concept(name) for name in dict.fromkeys(p.concept for p in pairs)]
        wrong = [c for c in asked if any(k.in_caption(parse(str(c))) for k in concepts)]
    elif num_classes is None:
        said = list(dict.fromkeys(p.concept for p in pairs))
        wrong = [c for c in asked if any(names(str(c), concept) for concept in said)]
    else:
        originals = {pair.original for pair in pairs}
        wrong = [c for c in asked if c in originals]
    if config.retain_prompts and wrong:
        raise UserError(
            f"{len(wrong)} of {len(asked)} retain_prompts ask for what is erased, such as "
            f'"{wrong[0]}"; take them out'
        )
    refused = set(wrong)
    return [c for c in asked if c not in refused][: config.num_retain]


def _retain(config: EraseConfig, pipe: NextScalePipeline, prompts: list[Asked]) -> Retained:
    """Pictures of them by the base."""
    tokens = torch.zeros(0, pipe.transformer.schedule.num_tokens, dtype=torch.long)
    if prompts:
        tokens = draw(pipe, prompts, seed=config.seed + 1_000_000, half=config.half)[1]
    return Retained(prompts, tokens)


# ---- training --------------------------------------------------------------------------------


def _train(
    config: EraseConfig,
    pipe: NextScalePipeline,
    drawn: Drawn,
    retain: Retained,
    fingerprint: str,
    settings: dict[str, Any],
    progress: bool,
) -> tuple[FitResult, list[dict[str, Any]]]:
    model = pipe.transformer
    targets = _targets(config, model)
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
    task = Erasing(config, pipe, drawn, retain, teacher)
    result = fit(
        config,
        modules={"model": model, **frozen},
        optimizers={"model": adamw(decay_groups(model.named_parameters()), config)},
        load_batch=task.load_batch,
        dataset_size=len(drawn.pairs),
        losses=task.losses,
        state=task,
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
            "Lower gate, gate_quantile or token_gate, or raise eta, with another output_dir",
            exit_code=1,
        )
    folder = Path(config.output_dir, "adapter")
    if processes.is_main():
        if config.lora_rank:
            save_lora(final, folder, settings)
        else:
            save_delta(folder, before, dict(final.named_parameters()), fingerprint, settings)
    return result, task.shares()


def _targets(config: EraseConfig, model: NextScaleTransformer) -> tuple[str, ...]:
    """Last parts of the names of what is trained."""
    return config.targets or (PROMPT_TARGETS if model.config.context_dim else CLASS_TARGETS)


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
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return chosen
