"""A small network in place of Inception, and Inception with random weights."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_network import TinyNetwork


@pytest.fixture
def network() -> TinyNetwork:
    return TinyNetwork()


@pytest.fixture(scope="session")
def inception_weights() -> dict[str, Any]:
    """Seeded random weights under the released names."""
    pytest.importorskip("torch_fidelity")
    from nextscale.eval.inception import random_weights

    return random_weights(0)
