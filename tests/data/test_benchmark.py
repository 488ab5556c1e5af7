"""The benchmark captions: the committed files are what their function draws."""

from __future__ import annotations

from collections import Counter

import pytest

from nextscale.data.benchmark import BENCHMARKS, load_benchmark, make_benchmark
from nextscale.data.captions import Caption, parse
from nextscale.data.scenes import HELD_OUT, sample_scene
from nextscale.errors import UserError


def has_held_out_pair(caption: Caption) -> bool:
    return any((group.color, group.shape) in HELD_OUT for group in caption.groups)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_file_holds_what_the_function_draws(name: str) -> None:
    captions = load_benchmark(name)
    assert captions == make_benchmark(name)
    assert len(captions) == 500
    assert [str(parse(caption)) for caption in captions] == captions


@pytest.mark.parametrize("name", ["standard", "compositional"])
def test_thirds_of_one_two_and_three_shapes_half_of_them_related(name: str) -> None:
    captions = [parse(caption) for caption in load_benchmark(name)]
    assert Counter(c.num_shapes for c in captions) == {1: 167, 2: 167, 3: 166}
    for shapes in (2, 3):
        related = [c.relation is not None for c in captions if c.num_shapes == shapes]
        assert abs(sum(related) - len(related) / 2) <= 1
    assert all(has_held_out_pair(c) == (name == "compositional") for c in captions)


def test_hard_captions_have_three_shapes_a_count_and_a_relation() -> None:
    captions = [parse(caption) for caption in load_benchmark("hard")]
    assert len(set(captions)) == 500
    for caption in captions:
        assert sorted(group.count for group in caption.groups) == [1, 2]
        assert caption.relation is not None
        assert not has_held_out_pair(caption)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_caption_can_be_drawn(name: str) -> None:
    for index, text in enumerate(load_benchmark(name)[::10]):
        assert sample_scene(0, index, caption=parse(text)).shapes


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UserError, match="standard, compositional, hard"):
        load_benchmark("easy")
