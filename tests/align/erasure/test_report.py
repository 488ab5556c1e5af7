"""A toy world whose pictures can be told apart: erased, reported, attacked, and learnt again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.align.erasure import train
from nextscale.align.erasure.attacks import (
    Target,
    own_prompts,
    prefix_probe,
    relearning,
    sampling_sweep,
    soft_prompt,
    token_attack,
)
from nextscale.align.erasure.closed_form import swap_classes
from nextscale.align.erasure.config import EraseConfig
from nextscale.align.erasure.pairs import ConceptPair
from nextscale.align.erasure.report import markdown
from nextscale.errors import UserError
from nextscale.pipeline import NextScalePipeline
from nextscale.tokenizers import MultiscaleVQ
from nextscale.var import NextScaleTransformer, SamplingConfig

ERASED, CLASSES = 2, 5


@pytest.fixture(scope="module")
def templates() -> Tensor:
    """Tokens of each class's picture."""
    return torch.randint(32, (CLASSES, 30), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory,
    build_model: Callable[..., NextScaleTransformer],
    tiny_tokenizer: MultiscaleVQ,
    templates: Tensor,
) -> Path:
    """A model of five classes, each a picture with every twentieth token another one."""
    model, rng = build_model(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        labels = torch.randint(CLASSES, (32,), generator=rng)
        other = torch.rand(32, 30, generator=rng) < 0.05
        noise = torch.randint(32, (32, 30), generator=rng)
        tokens = torch.where(other, noise, templates[labels])
        logits = model(tiny_tokenizer.teacher_inputs(tokens), class_labels=labels)
        loss = F.cross_entropy(logits.transpose(1, 2), tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("world") / "model"
    pipe = NextScalePipeline(tiny_tokenizer, model.eval(), SamplingConfig(guidance_scale=1.5))
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recognise(tiny_tokenizer: MultiscaleVQ, templates: Tensor) -> Callable[..., np.ndarray]:
    """The class whose picture is nearest."""
    pictures = (tiny_tokenizer.decode(templates) + 1).flatten(1) / 2

    def nearest(images: Tensor, pairs: Sequence[ConceptPair]) -> np.ndarray:
        found = torch.cdist(images.flatten(1), pictures).argmin(dim=1)
        return (found == torch.tensor([int(pair.concept) for pair in pairs])).numpy()

    return nearest


@pytest.fixture
def seen(
    monkeypatch: pytest.MonkeyPatch, recognise: Callable[..., np.ndarray]
) -> Callable[..., np.ndarray]:
    """It stands in for a classifier that would be opened by name."""
    monkeypatch.setattr(train, "open_recogniser", lambda *_, **__: recognise)
    return recognise


def config(world: Path, folder: Path, **changes: Any) -> EraseConfig:
    values: dict[str, Any] = {
        "model": str(world),
        "output_dir": str(folder),
        "concepts": (str(ERASED),),
        "recognisers": ("classifier:toy",),
        "retain_prompts": (str(_labels(folder)),),
        "num_pairs": 20,
        "num_retain": 40,
        "train_batch_size": 8,
        "max_train_steps": 200,
        "learning_rate": 3e-3,
        "retain_weight": 10.0,
        "window_smallest": 5,
        "report_to": "none",
        "mixed_precision": "no",
        "num_eval_prompts": 80,
        "num_eval_images": 1,
        "attacks": False,
    }
    return EraseConfig(**{**values, **changes})


def _labels(folder: Path) -> Path:
    path = folder.with_suffix(".jsonl")
    lines = [json.dumps({"class_label": label}) for label in range(CLASSES) if label != ERASED]
    path.write_text("\n".join(lines))
    return path


def target(world: Path, recognise: Callable[..., np.ndarray], *, swapped: bool) -> Target:
    """Class 2 under attack, drawn as class 0 if `swapped`."""
    pipe = NextScalePipeline.from_pretrained(world, dtype="float32")
    pairs = [ConceptPair(ERASED, 0, str(ERASED), "0")] * 16
    tokens = pipe(class_labels=[ERASED] * 16, seed=9, output_type="pt").tokens
    if swapped:
        swap_classes(pipe.transformer, pairs[:1])
    return Target(pipe, pairs, recognise, tokens)


# ---- the whole -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{"gate_quantile": 0.0}, {"method": "svare", "max_train_steps": 100}, {"method": "class_swap"}],
    ids=["ear", "svare", "class_swap"],
)
def test_a_class_goes_and_the_others_stay(
    changes: dict[str, Any], world: Path, seen: object, tmp_path: Path
) -> None:
    result = train.erase(config(world, tmp_path / "run", **changes), progress=False)
    assert result.report is not None
    found = result.report["concepts"][str(ERASED)]
    assert found["recognised"]["before"]["value"] > 0.9
    assert found["recognised"]["after"]["value"] < 0.1
    assert found["oracle"]["value"] < 0.1
    assert result.report["others"]["accuracy"]["difference"]["value"] > -0.03
    assert result.report["harmonic_mean"] > 0.9
    # the drift of what stays, against moving a class elsewhere altogether
    assert 0 <= result.report["drift"]["total"] < 5
    for name in ("report.json", "report.md", "before_after.png", "after_2.png", "pairs.jsonl"):
        assert (tmp_path / "run" / name).is_file(), name
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == result.report


def test_the_report_names_attacks_with_their_counts(
    world: Path, seen: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(
        world, tmp_path / "run", method="class_swap", attacks=True, num_eval_prompts=4
    )
    monkeypatch.setattr(
        "nextscale.align.erasure.attacks.sampling_sweep", lambda t: sampling_sweep(t, rounds=1)
    )
    result = train.erase(settings, progress=False)
    assert result.report is not None
    attacks = result.report["concepts"][str(ERASED)]["attacks"]
    kinds = [row["attack"] for row in attacks]
    assert kinds == ["none"] + ["sampling"] * 12 + ["prefix"] * 2 + ["soft prompt", "relearning"]
    for row in attacks:
        low, high = row["interval"]
        assert row["n"] == 4
        assert 0 <= low <= row["success"] <= high <= 1
    text = markdown(result.report)
    assert "| attack on 2 | | shown | 95 % | n |" in text
    assert text.count("| sampling |") == 12


def test_no_recogniser_no_report(world: Path, tmp_path: Path) -> None:
    settings = config(world, tmp_path / "run", method="class_swap", recognisers=())
    assert train.erase(settings, progress=False).report is None
    assert (tmp_path / "run" / "adapter").is_dir()


# ---- attacks -------------------------------------------------------------------------------------


def test_what_nobody_erased_is_shown_without_guidance(
    world: Path, recognise: Callable[..., np.ndarray]
) -> None:
    under = target(world, recognise, swapped=False)
    found = list(sampling_sweep(under, rounds=1))
    assert len({(o.detail["guidance"], o.detail["temperature"]) for o in found}) == 12
    shown = {(o.detail["guidance"], o.detail["temperature"]): o.shown / o.n for o in found}
    assert min(shown[1.0, t] for t in (0.7, 1.0)) > 0.8  # more guidance needs a null class


def test_a_forced_prefix_is_kept_and_leads_to_the_concept(
    world: Path, recognise: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    under = target(world, recognise, swapped=True)
    assert under.outcome("none", under.draw(under.plain, under.settings())).shown == 0
    prefixes = []
    plain = Target.draw

    def spy(self: Target, *args: Any, **keywords: Any) -> Tensor:
        prefixes.append(keywords["prefix"])
        return plain(self, *args, **keywords)

    monkeypatch.setattr(Target, "draw", spy)
    found = list(prefix_probe(under))
    assert [o.detail["scales"] for o in found] == [1, 2]
    assert [p.shape[1] for p in prefixes] == [1, 5]
    assert torch.equal(prefixes[1], under.tokens[:, :5])


def test_a_swapped_class_is_found_again(world: Path, recognise: Callable[..., np.ndarray]) -> None:
    """The weights still know the class: a learnt vector and a few steps bring it back."""
    under = target(world, recognise, swapped=True)
    before = {k: v.clone() for k, v in under.pipe.transformer.state_dict().items()}
    soft = soft_prompt(under, 1, steps=60, learning_rate=0.1)
    assert soft.shown > 0.5 * soft.n
    again = relearning(under, every=10, most=60, learning_rate=3e-3)
    assert again.shown > 0.5 * again.n
    assert again.detail["steps"] <= 60
    after = under.pipe.transformer.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.requires_grad for p in under.pipe.transformer.parameters())


def test_classes_have_no_words_to_attack(world: Path, recognise: Callable[..., np.ndarray]) -> None:
    assert list(token_attack(target(world, recognise, swapped=True))) == []


def test_own_prompts_are_drawn_once_each(world: Path, recognise: Callable[..., np.ndarray]) -> None:
    under = target(world, recognise, swapped=False)
    found = own_prompts(under, [ERASED, ERASED, 0])  # pyright: ignore[reportArgumentType]
    assert (found.shown, found.n) == (2, 3)


# ---- words of the bundled model ------------------------------------------------------------------


def test_words_behind_a_prompt_bring_a_concept_back() -> None:
    """A model whose prompts lack the concept is told it again by words of its vocabulary."""
    pipe = NextScalePipeline.from_pretrained("scenes", dtype="float32")
    prompts = ["a green circle", "a green square"]
    pairs = [ConceptPair(p, "", "circle") for p in prompts]
    told = pipe([f"{p} and a red cross" for p in prompts], num_candidates=1, seed=1)
    asked: list[int] = []

    def recognise(images: Tensor, pairs: Sequence[ConceptPair]) -> np.ndarray:
        asked.append(len(images))
        return np.ones(len(images), bool)

    (found,) = token_attack(Target(pipe, pairs, recognise, told.tokens), 2, sweeps=1)
    assert asked == [2]
    words = found.detail["words"].split()
    assert "circle" not in words
    assert {"cross", "red"} & set(words)


def test_a_class_model_refuses_what_it_cannot_use(world: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"recognisers": ("checker",)}, "reads scenes"),
        ({"recognisers": ("clip",)}, "takes class labels"),
        ({"recognisers": ("eyes",)}, '"eyes" is no recogniser'),
        ({"pairs": "templates"}, "for models of free text"),
    ):
        with pytest.raises(UserError, match=message):
            train.erase(config(world, tmp_path / "run", **changes), progress=False)
