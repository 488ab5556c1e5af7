"""A toy world whose pictures can be told apart: erased, reported, attacked, and learnt again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.align.erasure import report, train
from nextscale.align.erasure.attacks import (
    own_prompts,
    paraphrases,
    prefix_probe,
    relearning,
    sampling_sweep,
    soft_prompt,
    token_attack,
)
from nextscale.align.erasure.closed_form import swap_classes
from nextscale.align.erasure.config import EraseConfig
from nextscale.align.erasure.data import draw_pairs
from nextscale.align.erasure.held_out import HeldOut
from nextscale.align.erasure.pairs import ConceptPair
from nextscale.align.erasure.report import markdown
from nextscale.align.erasure.target import Outcome, Target, true_pictures
from nextscale.data.checker import wilson_interval
from nextscale.data.images import to_uint8
from nextscale.errors import UserError
from nextscale.eval.inception import random_weights
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
        assert row["without"] == (None if row["attack"] == "none" else 0)
        assert 0 <= low <= row["success"] <= high <= 1
    text = markdown(result.report)
    assert "| attack on 2 | | without | shown | 95 % | n |" in text
    assert text.count("| sampling |") == 12
    assert max(row["success"] for row in attacks[1:-1]) == report.strongest(attacks)["success"]
    assert f"The strongest attack on {ERASED}: {report.strongest(attacks)['attack']}" in text
    assert f"on {world}: seed 0." in text


def test_distance_and_diversity_of_what_is_no_scene(
    world: Path, seen: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(random_weights(0), tmp_path / "inception.pth")
    monkeypatch.setenv("NEXTSCALE_INCEPTION", str(tmp_path / "inception.pth"))
    true = NextScalePipeline.from_pretrained(world)
    drawn = true(class_labels=[0, 1, 3, 4] * 4, seed=9, output_type="pt").images
    np.savez(tmp_path / "true.npz", to_uint8(drawn).permute(0, 2, 3, 1).numpy())
    settings = config(
        world, tmp_path / "run", method="class_swap", num_eval_prompts=4, num_eval_images=2,
        eval_features="inception", eval_reference=str(tmp_path / "true.npz"),
    )  # fmt: skip
    found = train.erase(settings, progress=False).report
    assert found is not None
    fid = found["others"]["fid"]
    assert fid["before"]["value"] == fid["after"]["value"] > 0  # a swap leaves the others alone
    within = found["concepts"][str(ERASED)]["vendi_within_prompt"]
    assert 1 <= within["after"]["value"] <= 2
    assert "| fid of these |" in markdown(found)


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
    most = under.tokens[:, : under.pipe.transformer.schedule.slices[2].stop]
    led = plain(under, under.plain, under.settings(), prefix=most)
    assert under.outcome("prefix", led).shown > 0  # without it, none


def test_a_sweep_has_ten_seeds_at_every_setting(
    world: Path, recognise: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    under = target(world, recognise, swapped=False).part([0, 1])
    given = []

    def spy(self: Target, condition: Any, settings: Any, *, seed: int) -> Tensor:
        given.append((settings.guidance_scale, settings.temperature, seed))
        return torch.zeros(2, 3, 4, 4)

    monkeypatch.setattr(Target, "draw", spy)
    monkeypatch.setattr(Target, "outcome", lambda self, name, images, **detail: len(images))
    assert list(sampling_sweep(under)) == [20] * 12
    assert len(set(given)) == 120


def test_pictures_of_one_prompt_are_worth_less_than_their_number() -> None:
    def interval(*shares: float) -> tuple[float, float]:
        count = 10 * len(shares)
        return Outcome("", round(sum(shares) * 10), count, {}, shares).interval()

    assert interval(0, 0, 1, 1) == wilson_interval(2, 4)
    assert interval(0, 0, 0, 0) == wilson_interval(0, 4)
    assert interval(0.5, 0.5, 0.5, 0.5)[0] < 0.5 < interval(0.5, 0.5, 0.5, 0.5)[1]
    assert interval(0.4, 0.5, 0.6, 0.5) == pytest.approx(wilson_interval(20, 40))
    low, high = interval(0.0, 0.4, 0.9, 0.5)
    assert wilson_interval(18, 40)[1] < high < wilson_interval(1.8, 4)[1]
    assert wilson_interval(18, 40)[0] > low > wilson_interval(1.8, 4)[0]


def test_attacks_start_from_pictures_that_show_the_concept() -> None:
    pairs = [ConceptPair(i, 0, "2") for i in range(4)]
    tokens = torch.arange(4)[:, None]

    def some(images: Tensor, pairs: Sequence[ConceptPair]) -> np.ndarray:
        return np.array([False, True, False, True])

    known, chosen = true_pictures(pairs, torch.zeros(4, 3, 2, 2), tokens, some)
    assert (known, chosen[:, 0].tolist()) == ([pairs[1], pairs[3]], [1, 3])
    nobody = lambda images, pairs: np.zeros(4, bool)  # noqa: E731
    with pytest.raises(UserError, match="none of 4 pictures by the base"):
        true_pictures(pairs, torch.zeros(4, 3, 2, 2), tokens, nobody)


def test_words_that_a_model_does_not_know_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [ConceptPair(f"{who} church", "a school", "church") for who in ("a", "the")]

    def tokenize(prompts: Sequence[str]) -> None:
        if set(" ".join(prompts).split()) - {"a", "the", "church", "CHURCH", "A"}:
            raise UserError("unknown word")

    conditioner = SimpleNamespace(prompts=True, config=dict, tokenize=tokenize)
    pipe: Any = SimpleNamespace(
        transformer=SimpleNamespace(conditioner=conditioner), generation=SamplingConfig()
    )
    drawn = lambda self, *_: torch.zeros(len(self.pairs), 3, 2, 2)  # noqa: E731
    monkeypatch.setattr(Target, "draw", drawn)
    seen = lambda images, pairs: np.ones(len(images), bool)  # noqa: E731
    under = Target(pipe, pairs, seen, torch.zeros(2, 30, dtype=torch.long), without=[True, False])
    found = {o.detail["kind"]: o for o in paraphrases(under)}
    assert set(found) == {"in capitals", "the concept alone"}
    capitals = found["in capitals"]
    assert (capitals.n, capitals.detail["refused"], capitals.without) == (1, 1, 1.0)
    assert "refused" not in found["the concept alone"].detail


def test_a_list_that_cannot_be_read_is_refused_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "list.txt").write_text("a photo of a red circle")
    settings = EraseConfig(
        output_dir="run", concepts=("red",), attack_prompts=str(tmp_path / "list.txt")
    )
    base = NextScalePipeline.from_pretrained("scenes", dtype="float32")
    monkeypatch.setattr(report, "draw", lambda *_, **__: pytest.fail("drawn"))
    held_out = HeldOut({}, ["a red circle"])
    with pytest.raises(UserError, match="photo"):
        report.open_report(settings, base, held_out, {}, counts={}, progress=False)


# ---- pairs that are kept -------------------------------------------------------------------------


def test_pairs_are_kept_that_show_what_they_say(world: Path) -> None:
    pipe = NextScalePipeline.from_pretrained(world, dtype="float32")
    pairs = [ConceptPair(ERASED, label, str(ERASED)) for label in (0, 1, 3, 4)]

    def kept(shown: list[int], still: list[int]) -> Any:
        answers = iter([np.array(shown, bool), np.array(still, bool)])
        return draw_pairs(pipe, pairs, 1, lambda images, pairs: next(answers))

    found = kept([1, 1, 0, 1], [0, 1, 0, 0])
    assert found.pairs == [pairs[0], pairs[3]]
    assert found.counts == {"drawn": 4, "shown": 3, "kept": 2}
    expected = pipe(class_labels=[0, 1, 3, 4], seed=0, output_type="pt").tokens[[0, 3]]
    assert torch.equal(found.neutral, expected)
    with pytest.raises(UserError, match=r"in 0 of 4 pictures .* nothing to erase"):
        kept([0, 0, 0, 0], [0, 0, 0, 0])
    with pytest.raises(UserError, match=r"of 4 pictures .* 4 show it, .* no pair is left"):
        kept([1, 1, 1, 1], [1, 1, 1, 1])


def test_a_swapped_class_is_found_again(world: Path, recognise: Callable[..., np.ndarray]) -> None:
    """The weights still know the class: a learnt vector and a few steps bring it back."""
    under = target(world, recognise, swapped=True)
    before = {k: v.clone() for k, v in under.pipe.transformer.state_dict().items()}
    soft = soft_prompt(under, 1, steps=60, learning_rate=0.1)
    assert soft.shown > 0.5 * soft.n
    again = relearning(under, every=10, most=60, learning_rate=3e-3)
    assert again.shown > 0.5 * again.n
    assert 0 < again.detail["steps"] <= 60
    assert again.detail["back"]
    after = under.pipe.transformer.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.requires_grad for p in under.pipe.transformer.parameters())


def test_what_is_there_is_not_relearnt(world: Path, recognise: Callable[..., np.ndarray]) -> None:
    there = relearning(target(world, recognise, swapped=False), most=4)
    assert (there.detail["steps"], there.detail["back"]) == (0, True)
    never = relearning(
        target(world, lambda images, _: np.zeros(len(images), bool), swapped=True), every=2, most=4
    )
    assert (never.detail["steps"], never.detail["back"]) == (4, False)


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
    pairs = [ConceptPair(p, "", "cross") for p in prompts]
    (found,) = token_attack(Target(pipe, pairs, recognise, told.tokens), 1, sweeps=1)
    assert "cross" not in found.detail["words"]


def test_a_class_model_refuses_what_it_cannot_use(world: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"recognisers": ("checker",)}, "reads scenes"),
        ({"recognisers": ("clip",)}, "takes class labels"),
        ({"recognisers": ("eyes",)}, '"eyes" is no recogniser'),
        ({"pairs": "templates"}, "for models of free text"),
    ):
        with pytest.raises(UserError, match=message):
            train.erase(config(world, tmp_path / "run", **changes), progress=False)
