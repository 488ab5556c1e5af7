"""The caption grammar: text and statements convert into each other without loss."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextscale.data.captions import (
    COLORS,
    EXAMPLES,
    FILLS,
    MAX_SHAPES,
    RELATIONS,
    SHAPES,
    SIZES,
    VOCABULARY,
    Caption,
    Group,
    grammar,
    parse,
)
from nextscale.errors import UserError


@st.composite
def captions(draw: st.DrawFn) -> Caption:
    """Any caption of the grammar, uniformly over its rules rather than as in training."""
    counts = draw(
        st.lists(st.integers(1, MAX_SHAPES), min_size=1, max_size=MAX_SHAPES).filter(
            lambda numbers: sum(numbers) <= MAX_SHAPES
        )
    )
    pair = st.tuples(st.sampled_from(COLORS), st.sampled_from(SHAPES))
    pairs = draw(st.lists(pair, min_size=len(counts), max_size=len(counts), unique=True))
    groups = tuple(
        Group(
            count,
            color,
            shape,
            draw(st.sampled_from((None, *SIZES))),
            draw(st.sampled_from((None, *FILLS))),
        )
        for count, (color, shape) in zip(counts, pairs, strict=True)
    )
    related = len(groups) > 1 and draw(st.booleans())
    return Caption(groups, draw(st.sampled_from(RELATIONS)) if related else None)


@given(captions())
def test_text_of_a_caption_parses_back_to_it(caption: Caption) -> None:
    assert parse(str(caption)) == caption


@given(captions())
def test_canonical_captions_use_only_the_vocabulary(caption: Caption) -> None:
    assert set(str(caption).replace(",", " ,").split()) <= set(VOCABULARY)


@given(captions(), st.sampled_from((str.upper, str.title, "  {} ".format, "{}.".format)))
def test_case_blanks_and_a_final_stop_do_not_matter(caption: Caption, change) -> None:
    assert parse(change(str(caption))) == caption


@pytest.mark.parametrize(
    ("variant", "canonical"),
    [
        ("one red circle", "a red circle"),
        ("a red circle to the left of a blue square", "a red circle left of a blue square"),
        ("a red circle on the right of a blue square", "a red circle right of a blue square"),
        ("a red circle, a blue cross", "a red circle and a blue cross"),
        (
            "a red circle above a blue cross and a green cross",
            "a red circle above a blue cross, and a green cross",
        ),
        (
            "a red circle and a blue cross and a green cross",
            "a red circle, a blue cross and a green cross",
        ),
    ],
)
def test_variants_mean_the_same(variant: str, canonical: str) -> None:
    assert str(parse(variant)) == canonical


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_are_canonical(example: str) -> None:
    assert str(parse(example)) == example


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "names no count"),
        ("a photo of a dog", '"photo"'),
        ("red circle", "names no count"),
        ("a red", "names no shape"),
        ("a circle", "names no color"),
        ("two red circle", "singular and plural"),
        ("a red circles", "singular and plural"),
        ("a red small circle", "wrong place"),
        ("three red circles and a blue cross", "more than 3"),
        ("a red circle and two red circles", "named twice"),
        ("a red circle left of a blue square above a red cross", "more than one relation"),
        ("a red circle left of", "names no count"),
    ],
)
def test_other_text_is_refused_with_the_reason_and_the_grammar(text: str, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(text)
    message = str(caught.value)
    assert reason in message
    assert grammar() in message
    assert "RELATION" in message
    assert EXAMPLES[0] in message
