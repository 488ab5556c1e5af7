"""Flags of search at inference time, and what they mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from nextscale.errors import UserError, require

if TYPE_CHECKING:
    from nextscale.pipeline import NextScalePipeline


@dataclass(frozen=True, kw_only=True)
class SearchFlags:
    """More samples than pictures, and a choice."""

    search: Literal["best_of", "tree", "mg_select", "genarm"] | None = None
    """best_of: independent samples, tree: samples that go on from good beginnings, both judged by
    --search_reward; mg_select: by guidance alone; genarm: one sample, whose tokens --search_model
    weighs. It takes the place of num_candidates."""
    search_reward: str | None = None
    """A reward of single pictures as in `nextscale align`, such as clip; none: checker, for models
    of scenes."""
    search_samples: int = 8
    """Samples per picture."""
    search_steps: tuple[int, ...] = ()
    """tree: scales at which samples part; none: 1 2 3."""
    search_model: str | None = None
    """genarm: a model of the same tokenizer, such as one that `nextscale align` left."""
    search_weight: float = 1.0
    """genarm: of the model's log-probabilities."""

    def check_search(self) -> None:
        """Refuse flags that nothing would read.

        Raises:
            UserError: Says which.
        """
        require("search_samples", self.search_samples, self.search_samples > 0, "be above 0")
        given = [f.name for f in fields(SearchFlags) if getattr(self, f.name) != f.default]
        if self.search == "genarm" and self.search_model is None:
            raise UserError("--search genarm weighs tokens by another model: give --search_model")
        read = {
            None: set(),
            "best_of": {"search_reward", "search_samples"},
            "tree": {"search_reward", "search_samples", "search_steps"},
            "mg_select": {"search_samples"},
            "genarm": {"search_model", "search_weight"},
        }[self.search]
        unread = {f.name for f in fields(SearchFlags)} - read - {"search"}
        if wrong := sorted(unread & set(given)):
            which = "without --search" if self.search is None else f"by --search {self.search}"
            raise UserError(f"{', '.join(wrong)}: not read {which}; leave it out")


def open_search(flags: SearchFlags, pipe: NextScalePipeline) -> Callable[..., Any] | None:
    """What `pipe(..., search=)` takes.

    Raises:
        UserError: Without a reward where one is needed.
    """
    if flags.search is None:
        return None
    from nextscale.align.search import BestOf, GenARM, MGSelect, TreeSearch

    if flags.search == "genarm":
        assert flags.search_model is not None
        place = {"device": pipe.device, "dtype": pipe.dtype}
        judge = type(pipe).from_pretrained(flags.search_model, **place)
        return GenARM(judge, flags.search_weight)
    if flags.search == "mg_select":
        return MGSelect(flags.search_samples)
    from nextscale.align.rewards import open_reward

    scenes = pipe.transformer.conditioner.config().get("grammar") == "scenes"
    name = flags.search_reward or ("checker" if scenes else None)
    if name is None:
        raise UserError(
            f"--search {flags.search} needs a reward, such as --search_reward clip; mg_select does "
            "without"
        )
    reward = open_reward(name, device=pipe.device)
    if flags.search == "best_of":
        return BestOf(reward, flags.search_samples)
    return TreeSearch(reward, flags.search_samples, steps=flags.search_steps or None)
