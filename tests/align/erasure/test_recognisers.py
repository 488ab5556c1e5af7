"""Who sees concepts, prompts in other words, and pairs for models of free text."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nextscale.align.erasure import train
from nextscale.align.erasure.concepts import scene_concept
from nextscale.align.erasure.config import EraseConfig
from nextscale.align.erasure.held_out import scene_prompts, text_prompts
from nextscale.align.erasure.pairs import ConceptPair, scene_pairs, write_pairs
from nextscale.align.erasure.paraphrases import other_words
from nextscale.align.erasure.recognisers import (
    classifier_recogniser,
    open_recogniser,
    scenes_recogniser,
)
from nextscale.align.erasure.text_pairs import (
    TEMPLATES,
    local_writer,
    names,
    read_answer,
    template_pairs,
    written_pairs,
)
from nextscale.data.captions import parse
from nextscale.data.scenes import render, sample_scene
from nextscale.errors import UserError

CONCEPT = scene_concept("red circle")
PAIRS = scene_pairs(CONCEPT, 12)


# ---- recognisers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["checker", "clip"])
def test_true_pictures_show_their_concept_and_not_its_replacement(name: str) -> None:
    found = (sample_scene(3, index) for index in range(4000))
    shown = [s for s in found if CONCEPT.in_caption(s.caption)][:24]
    rng = np.random.default_rng(0)
    pairs = []
    for scene in shown:
        changed = CONCEPT.replaced(scene.caption, rng)
        assert changed is not None
        pairs.append(ConceptPair(str(scene.caption), str(changed[0]), "red circle", changed[1]))
    images = torch.from_numpy(render(shown, 64)).permute(0, 3, 1, 2).float() / 255
    recognise = open_recogniser(name, pairs, scenes=True)
    assert recognise(images, pairs).mean() > 0.9
    swapped = [ConceptPair(str(p.modified), str(p.original), p.concept) for p in pairs]
    if name == "clip":  # whose word depends on the two prompts alone
        assert recognise(images, swapped).mean() < 0.1
    others = [s for s in (sample_scene(4, i) for i in range(200)) if len(s.shapes) == 1]
    blue = [s for s in others if s.shapes[0].color == "blue"][: len(pairs)]
    elsewhere = torch.from_numpy(render(blue, 64)).permute(0, 3, 1, 2).float() / 255
    if name == "checker":
        assert not recognise(elsewhere, pairs[: len(blue)]).any()


def test_a_classifier_looks_at_the_likeliest_classes() -> None:
    logits = torch.tensor([[5.0, 4.0, 0.0], [0.0, 4.0, 5.0]])
    pairs = [ConceptPair(1, 0, "1")] * 2
    images = torch.zeros(2, 3, 4, 4)
    assert not classifier_recogniser(lambda _: logits)(images, pairs).any()
    assert classifier_recogniser(lambda _: logits, top=2)(images, pairs).all()
    church = torch.zeros(1, 1000)
    church[0, 497] = 1.0
    texts = [ConceptPair("a photo of a church", "a photo of a school", "church")]
    assert classifier_recogniser(lambda _: church)(images[:1], texts).all()


@pytest.mark.parametrize(
    ("name", "pair", "scenes", "message"),
    [
        ("checker", ConceptPair("a", "b", "c"), False, "reads scenes"),
        ("clip", ConceptPair(1, 2, "1"), False, "takes class labels"),
        ("classifier", ConceptPair(1, 2, "1"), False, "is no recogniser"),
        ("classifier:resnet18", ConceptPair("a", "b", "no such thing"), False, "no ImageNet class"),
        ("eyes", ConceptPair("a", "b", "c"), True, '"eyes" is no recogniser'),
    ],
)
def test_a_recogniser_that_cannot_see_is_refused(
    name: str, pair: ConceptPair, scenes: bool, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        open_recogniser(name, [pair], scenes=scenes)


# ---- other words ---------------------------------------------------------------------------------


def test_captions_in_other_words_still_ask_for_the_concept() -> None:
    found = other_words(PAIRS, scenes=True)
    assert len(found) >= 3
    for kind, pairs in found.items():
        originals = {str(pair.original) for pair in PAIRS}
        for pair in pairs.values():
            assert CONCEPT.in_caption(parse(str(pair.original))), (kind, pair)
        assert any(pair.original not in originals for pair in pairs.values())


def test_free_text_in_other_words() -> None:
    pairs = [ConceptPair("a church at night", "a school at night", "church", "school")] * 3
    found = other_words(pairs, scenes=False)
    for kind, changed in found.items():
        if kind != "mistyped":
            assert all(names(str(pair.original), "church") for pair in changed.values())
    typos = [str(pair.original) for pair in found["mistyped"].values()]
    assert len(set(typos)) == 3
    assert all(sorted(typo) == sorted("a church at night") for typo in typos)
    book = [ConceptPair("a book", "a lamp", "book", "lamp")] * 3
    typos = [str(pair.original) for pair in other_words(book, scenes=False)["mistyped"].values()]
    assert "a book" not in typos


# ---- pairs of free text --------------------------------------------------------------------------


def test_templates_take_turns_with_replacements() -> None:
    pairs = template_pairs("a church", ["a school", "a field"], 30)
    assert len(pairs) == len({(p.original, p.modified) for p in pairs}) == 30
    assert {p.replacement for p in pairs} == {"a school", "a field"}
    for pair in pairs:
        assert str(pair.original).replace("a church", pair.replacement) == pair.modified
    assert len(template_pairs("a church", ["a school"], 999)) == len(TEMPLATES)
    with pytest.raises(UserError, match="--replacements"):
        template_pairs("a church", [], 3)
    with pytest.raises(UserError, match="cannot replace itself"):
        template_pairs("a church", ["a church"], 3)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a church at night", True),
        ("two Churches", True),
        ("the churchyard", False),
        ("a school", False),
    ],
)
def test_a_concept_is_found_as_whole_words(prompt: str, said: bool) -> None:
    assert names(prompt, "a church") is said


def line(original: str, modified: str, replacement: str = "school") -> str:
    return json.dumps({"original": original, "modified": modified, "replacement": replacement})


def test_an_answer_is_read_for_what_can_be_used() -> None:
    answer = "\n".join(
        [
            "Sure! Here are the prompts:",
            line("a church at night", "a school at night"),
            line("a house", "a school"),  # the concept is missing
            line("a church in rain", "an old church in rain"),  # it is still there
            '{"original": "a church", "modified": 3}',
            '{"original": "a church"',
            line("the church by a lake", "the lake", ""),
        ]
    )
    pairs = read_answer(answer, "church")
    assert [p.original for p in pairs] == ["a church at night", "the church by a lake"]
    assert pairs[1].replacement == ""


def test_a_model_is_asked_until_there_are_enough() -> None:
    asked: list[str] = []

    def write(instruction: str, attempt: int) -> str:
        asked.append(instruction)
        return "\n".join(line(f"a church, {k}", f"a school, {k}") for k in (attempt, attempt + 1))

    pairs = written_pairs("church", 4, write)
    assert [p.original for p in pairs] == [f"a church, {k}" for k in range(4)]
    assert len(asked) == 3
    assert "Write 2 prompts" in asked[1]
    assert all("church" in text for text in asked)
    with pytest.raises(UserError, match=r"wrote 0 of 3 usable pairs.*I cannot") as caught:
        written_pairs("church", 3, lambda *_: "I cannot")
    assert caught.value.exit_code == 1


def test_a_folder_without_a_language_model_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be opened") as caught:
        local_writer(str(tmp_path))
    assert caught.value.exit_code == 1


# ---- what a report asks for ----------------------------------------------------------------------


def test_held_out_captions_are_apart() -> None:
    config = EraseConfig(output_dir="x", concepts=("red circle",), num_eval_prompts=30)
    found = scene_prompts(config, PAIRS)
    trained = {pair.original for pair in PAIRS}
    targets = {pair.original for pair in found.targets["red circle"]}
    near, others = set(found.near["red circle"]), set(found.others)
    assert len(targets) == 30
    assert near
    assert others
    assert not trained & targets
    assert not near & others
    assert not any(CONCEPT.in_caption(parse(str(text))) for text in near | others)


def test_free_text_is_measured_on_pairs_of_its_own(tmp_path: Path) -> None:
    trained = template_pairs("a church", ["a school"], 5)
    held_out = template_pairs("a church", ["a school"], 9)[5:]
    write_pairs(tmp_path / "held_out.jsonl", held_out)
    (tmp_path / "others.txt").write_text("a dog\na tree\n")

    def config(**changes: object) -> EraseConfig:
        values = {
            "output_dir": "x",
            "concepts": ("a church",),
            "eval_pairs": str(tmp_path / "held_out.jsonl"),
            "eval_prompts": (str(tmp_path / "others.txt"),),
        }
        return EraseConfig(**{**values, **changes})  # pyright: ignore[reportArgumentType]

    found = text_prompts(config(), trained)
    assert found is not None
    assert found.targets == {"a church": held_out}
    assert found.others == ["a dog", "a tree"]
    assert found.right is None
    assert text_prompts(config(eval_pairs=None), trained) is None
    with pytest.raises(UserError, match=r"4 of 4 were trained on"):
        text_prompts(config(), held_out)
    with pytest.raises(UserError, match="has no pair of a dome"):
        text_prompts(config(), [*trained, ConceptPair("a dome", "a roof", "a dome")])
    with pytest.raises(UserError, match="eval_prompts is empty"):
        text_prompts(config(eval_prompts=()), trained)
    with pytest.raises(UserError, match=r'1 of 2 eval_prompts are held in place .* "a tree"'):
        text_prompts(config(), trained, ["a tree"])


def test_what_is_held_in_place_is_not_measured() -> None:
    config = EraseConfig(output_dir="x", concepts=("red circle",), num_eval_prompts=1000)
    free = scene_prompts(config, PAIRS)
    held = [str(prompt) for prompt in (*free.others[:5], *free.near["red circle"][:5])]
    found = scene_prompts(config, PAIRS, held)
    assert set(found.others) == set(free.others) - set(held)
    assert set(found.near["red circle"]) == set(free.near["red circle"]) - set(held)
    with pytest.raises(UserError, match="nothing shows what is kept"):
        scene_prompts(config, PAIRS, free.others)


def test_retain_prompts_of_free_text_do_not_name_the_concept(tmp_path: Path) -> None:
    (tmp_path / "retain.txt").write_text("a dog\na church at night\n")
    conditioner = SimpleNamespace(prompts=True, config=dict)
    pipe: Any = SimpleNamespace(transformer=SimpleNamespace(conditioner=conditioner))
    pairs = [ConceptPair("a church", "a school", "a church", "a school")]
    settings = EraseConfig(
        output_dir="x", concepts=("a church",), retain_prompts=(str(tmp_path / "retain.txt"),)
    )
    with pytest.raises(UserError, match=r'1 of 2 retain_prompts .* "a church at night"'):
        train._retained(settings, pipe, pairs)


def test_relations_are_read_from_the_caption() -> None:
    concept = scene_concept("left of")
    (pair,) = scene_pairs(concept, 1)
    recognise = scenes_recogniser({"left of": concept})
    blank = torch.ones(1, 3, 64, 64)
    assert not recognise(blank, [pair]).any()
