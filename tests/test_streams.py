import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nextscale.errors import UserError
from nextscale.streams import batch_indices, image_stream, random_seed, stream


def _draw(generator: torch.Generator) -> list[float]:
    return torch.rand(4, generator=generator).tolist()


def test_a_key_always_gives_the_same_stream() -> None:
    assert _draw(stream(1, 2, 3)) == _draw(stream(1, 2, 3))
    assert _draw(stream(np.int64(1), 2, 3)) == _draw(stream(1, 2, 3))


def test_streams_are_pinned_over_versions() -> None:
    # A change here changes every stored run: bump the format if it must happen.
    assert stream(0, 0, 0).initial_seed() == 18339399129536151103


def test_keys_that_look_alike_give_different_streams() -> None:
    keys = [(1, 23), (12, 3), (123,), (0, 1, 23), (-1, 23), (1, 23, 0), (23, 1)]
    assert len({stream(*key).initial_seed() for key in keys}) == len(keys)


def test_streams_leave_the_global_state_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    _draw(stream(5))
    _draw(image_stream(5))
    assert torch.equal(before, torch.get_rng_state())


def test_an_image_stream_is_torch_seeded_with_the_image_seed() -> None:
    assert _draw(image_stream(7)) == _draw(torch.Generator().manual_seed(7))
    image_stream(2**32 - 1)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_an_image_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(UserError, match=str(seed)):
        image_stream(seed)


def test_a_key_needs_integers() -> None:
    with pytest.raises(UserError):
        stream()
    with pytest.raises(TypeError):
        stream(1.5)  # type: ignore[arg-type]


def test_random_seeds_leave_room_for_many_images() -> None:
    seeds = {random_seed() for _ in range(50)}
    assert len(seeds) > 45
    assert all(0 <= seed < 2**31 for seed in seeds)


@given(
    seed=st.integers(0, 2**63),
    size=st.integers(1, 40),
    batch_size=st.integers(1, 100),
    epochs=st.integers(1, 4),
)
def test_each_epoch_visits_everything_once(
    seed: int, size: int, batch_size: int, epochs: int
) -> None:
    steps = -(-epochs * size // batch_size)
    seen = np.concatenate([batch_indices(seed, s, batch_size, size) for s in range(steps)])
    assert seen.dtype == np.int64
    for epoch in range(epochs):
        visited = seen[epoch * size : (epoch + 1) * size]
        assert sorted(visited) == list(range(size))


@given(step=st.integers(0, 50), batch_size=st.integers(1, 12), size=st.integers(1, 30))
def test_the_order_does_not_depend_on_the_batch_size(step: int, batch_size: int, size: int) -> None:
    ones = [batch_indices(3, step * batch_size + i, 1, size)[0] for i in range(batch_size)]
    assert batch_indices(3, step, batch_size, size).tolist() == ones


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    orders = [tuple(batch_indices(seed, step, 50, 50)) for seed in (0, 1) for step in (0, 1)]
    assert len(set(orders)) == 4


def test_the_order_is_pinned_over_versions() -> None:
    assert batch_indices(0, 0, 8, 8).tolist() == [6, 3, 1, 4, 5, 2, 7, 0]


def test_a_returned_batch_may_be_written_to() -> None:
    batch_indices(0, 0, 4, 8)[:] = 0
    assert sorted(batch_indices(0, 0, 8, 8)) == list(range(8))


@pytest.mark.parametrize("change", [{"seed": -1}, {"step": -1}, {"batch_size": 0}, {"size": 0}])
def test_arguments_out_of_range_are_refused(change: dict[str, int]) -> None:
    arguments = {"seed": 0, "step": 0, "batch_size": 1, "size": 1, **change}
    with pytest.raises(UserError, match=next(iter(change))):
        batch_indices(**arguments)
