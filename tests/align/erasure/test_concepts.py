"""Concepts of the scenes world: in captions, in pictures, replaced; pairs on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nextscale.align.erasure.concepts import scene_concept
from nextscale.align.erasure.held_out import held_out_pairs
from nextscale.align.erasure.pairs import ConceptPair, read_pairs, scene_pairs, write_pairs
from nextscale.data.benchmark import load_benchmark
from nextscale.data.captions import parse
from nextscale.data.checker import check
from nextscale.data.scenes import render, sample_scene
from nextscale.errors import UserError

CONCEPTS = ("red", "circle", "striped", "large", "red circle", "left of", "striped blue")


@pytest.mark.parametrize(
    ("concept", "caption", "expected"),
    [
        ("red", "a red circle", True),
        ("red", "a blue circle and two red crosses", True),
        ("red circle", "a red square and a blue circle", False),
        ("red circle", "two small red circles", True),
        ("striped", "a red circle", False),
        ("left of", "a red circle left of a blue square", True),
        ("left of", "a red circle right of a blue square", False),
    ],
)
def test_captions_with_a_concept(concept: str, caption: str, expected: bool) -> None:
    assert scene_concept(concept).in_caption(parse(caption)) == expected


@pytest.mark.parametrize("name", CONCEPTS)
def test_replacing_a_concept_takes_it_out_and_leaves_the_rest(name: str) -> None:
    concept, rng = scene_concept(name), np.random.default_rng(0)
    changed = 0
    for text in load_benchmark("standard"):
        caption = parse(text)
        if not concept.in_caption(caption):
            continue
        found = concept.replaced(caption, rng)
        if found is None:
            continue
        other, word = found
        changed += 1
        assert not concept.in_caption(other)
        assert word in str(other)
        assert parse(str(other)) == other
        assert [g.count for g in other.groups] == [g.count for g in caption.groups]
    assert changed > 10


@pytest.mark.parametrize("name", CONCEPTS)
def test_pictures_of_true_captions_show_what_they_name(name: str) -> None:
    """On rendered scenes the recogniser agrees with the caption, but for what it leaves open."""
    concept, seen = scene_concept(name), 0
    for index in range(150):
        scene = sample_scene(3, index)
        report = check(render([scene], 64)[0], scene.caption)
        if concept.in_caption(scene.caption):
            seen += 1
            assert concept.in_picture(report)
        elif not set(dict(concept.attributes)) & {"size", "fill"} and concept.relation is None:
            assert not concept.in_picture(report)
    assert seen > 0


@pytest.mark.parametrize(
    "erased",
    [
        ("left of", "right of"),
        ("red", "blue"),
        ("circle", "square", "triangle"),
        ("red circle", "striped"),
        ("red", "green", "blue", "yellow"),
    ],
)
def test_no_pair_names_another_erased_concept(erased: tuple[str, ...]) -> None:
    concepts = [scene_concept(name) for name in erased]
    for concept in concepts:
        others = [c for c in concepts if c is not concept]
        pairs = scene_pairs(concept, 20, others=others)
        pairs += held_out_pairs(concept, 20, pairs, others=others)
        assert len(pairs) == 40
        for pair in pairs:
            assert concept.in_caption(parse(str(pair.original)))
            assert not any(c.in_caption(parse(str(pair.modified))) for c in concepts), pair


def test_too_many_concepts_at_once_are_refused() -> None:
    first, *others = (scene_concept(name) for name in ("solid", "striped"))
    with pytest.raises(UserError, match='the grammar gave 0 captions with "solid"'):
        scene_pairs(first, 1, others=others)


def test_siblings_share_a_part() -> None:
    captions = [parse(f"a {name}") for name in ("red circle", "red square", "blue circle")]
    captions.append(parse("a blue square"))
    both, red = scene_concept("red circle"), scene_concept("red")
    assert [both.is_sibling(c) for c in captions] == [False, True, True, False]
    assert not any(red.is_sibling(c) for c in captions)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a concept is empty"),
        ("red dog", '"dog" is not one of'),
        ("red blue", "two values of color"),
        ("purple triangle", "the training pictures never show"),
    ],
)
def test_what_is_no_concept_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        scene_concept(text)


@pytest.mark.parametrize("name", CONCEPTS)
def test_pairs_are_many_and_apart_from_what_is_measured(name: str) -> None:
    concept = scene_concept(name)
    pairs = scene_pairs(concept, 40)
    assert len({pair.original for pair in pairs}) == 40
    assert pairs == scene_pairs(concept, 40)
    assert pairs != scene_pairs(concept, 40, seed=1)
    benchmarks = {c for b in ("standard", "compositional", "hard") for c in load_benchmark(b)}
    assert not benchmarks & {pair.original for pair in pairs}
    held_out = held_out_pairs(concept, 60, pairs)
    assert len(held_out) == 60
    assert not {p.original for p in held_out} & {p.original for p in pairs}
    for pair in held_out:
        assert concept.in_caption(parse(str(pair.original)))
        assert not concept.in_caption(parse(str(pair.modified)))


def test_pairs_on_disk(tmp_path: Path) -> None:
    pairs = [ConceptPair("a church", "a barn", "church", "barn"), ConceptPair("b", "c", "d", "")]
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    assert read_pairs(tmp_path / "pairs.jsonl") == pairs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no line"),
        ('{"original": "a"}\n', r"line 1: needs \"original\""),
        ("\n[1]\n", "line 2"),
        ('{"original": 1, "modified": 2, "concept": "1", "replacement": "2"}', "must be str"),
    ],
)
def test_lines_that_are_no_pairs_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        read_pairs(tmp_path / "pairs.jsonl")
