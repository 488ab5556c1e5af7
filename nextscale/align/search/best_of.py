"""The best of several samples."""

from __future__ import annotations

from collections.abc import Sequence

from nextscale.align.rewards.reward import AnyReward
from nextscale.align.search.search import Drawer, Search
from nextscale.errors import require


class BestOf(Search):
    """Best of N: independent samples, of which the reward chooses one.

    Args:
        reward: Of single pictures.
        num_samples: N.
    """

    def __init__(self, reward: AnyReward, num_samples: int = 8) -> None:
        super().__init__(reward)
        require("num_samples", num_samples, num_samples > 0, "be above 0")
        self.num_samples = num_samples

    def choose(self, drawer: Drawer) -> Sequence[int]:
        """See `Search`."""
        for _ in range(self.num_samples):
            if pictures := drawer.unfinished():
                drawer.sample(pictures)
        return drawer.best()
