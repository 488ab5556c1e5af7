"""Flags of search at inference time, and what they mean."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from nextscale.errors import UserError, require

if TYPE_CHECKING:
    import torch

    from nextscale.align.search import Search
    from nextscale.pipeline import NextScalePipeline

TAKEN = {  # settings of a picture that a search does not draw by itself
    "mg_select": ("negative_prompt", "control_type", "more_smooth"),
    "genarm": ("negative_prompt",),
}


@dataclass(frozen=True, kw_only=True)
class SearchFlags:
    """More samples than pictures, and a choice."""

    search: Literal["best_of", "tree", "dts", "mg_select", "genarm"] | None = None
    """best_of: independent samples, tree: samples that go on from good beginnings, both judged by
    --search_reward; dts: the same, but drawn by the reward and not the best; mg_select: by guidance
    alone; genarm: one sample, whose tokens --search_model weighs. It takes the place of
    num_candidates."""
    search_reward: str | None = None
    """A reward of single pictures as in `nextscale align`, such as clip; none: checker, for models
    of scenes."""
    search_samples: int = 8
    """Samples per picture."""
    search_steps: tuple[int, ...] = ()
    """tree, dts: scales at which samples part, of diffusers pipelines denoising steps; none: 1 2,
    or after each quarter."""
    search_model: str | None = None
    """genarm: a model of the same tokenizer, such as one that `nextscale align` left."""
    search_weight: float = 1.0
    """genarm: of the model's log-probabilities."""
    download: bool = False
    """Fetch what --search_reward needs and this machine lacks."""

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
            "best_of": {"search_reward", "search_samples", "download"},
            "tree": {"search_reward", "search_samples", "search_steps", "download"},
            "dts": {"search_reward", "search_samples", "search_steps", "download"},
            "mg_select": {"search_samples"},
            "genarm": {"search_model", "search_weight"},
        }[self.search]
        unread = {f.name for f in fields(SearchFlags)} - read - {"search"}
        if wrong := sorted(unread & set(given)):
            which = "without --search" if self.search is None else f"by --search {self.search}"
            raise UserError(f"{', '.join(wrong)}: not read {which}; leave it out")


def reward_name(flags: SearchFlags, *, scenes: bool) -> str | None:
    """What judges: the checker where nothing is said and prompts are in the scenes grammar."""
    by_reward = flags.search in ("best_of", "tree", "dts")
    return flags.search_reward or ("checker" if scenes and by_reward else None)


def summary(search: Any) -> dict[str, Any] | None:
    """What a search drew, of this process, for the command's own summary; None without one."""
    if search is None or not search.cost.pictures:
        return None
    cost = search.cost
    return {
        "samples": cost.samples,
        "evaluations_per_picture": cost.passes / cost.pictures,
        "rewards": [None if math.isnan(value) else value for value in cost.rewards],
    }


def describe(found: dict[str, Any]) -> str:
    """`summary` in a line."""
    known = [value for value in found["rewards"] if value is not None]
    each = f"{found['evaluations_per_picture']:.2f} evaluations a picture"
    mean = f", reward of the chosen {sum(known) / len(known):.3g}" if known else ""
    return f"search: {found['samples']} samples, {each}{mean}"


def open_pipeline_search(
    flags: SearchFlags, pipe: NextScalePipeline, *, local_files_only: bool = False
) -> Callable[..., Any] | None:
    """What `pipe(..., search=)` takes.

    Args:
        flags: Which.
        pipe: Draws.
        local_files_only: Do not go to the network for `search_model`.

    Raises:
        UserError: Without a reward where one is needed.
    """
    from nextscale.align.search import GenARM, MGSelect

    if flags.search == "genarm":
        assert flags.search_model is not None
        place = {"device": pipe.device, "dtype": pipe.dtype, "local_files_only": local_files_only}
        judge = type(pipe).from_pretrained(flags.search_model, **place)
        return GenARM(judge, flags.search_weight)
    if flags.search == "mg_select":
        return MGSelect(flags.search_samples)
    scenes = pipe.transformer.conditioner.config().get("grammar") == "scenes"
    return open_search(flags, pipe.device, scenes=scenes)


def open_search(flags: SearchFlags, device: torch.device, *, scenes: bool) -> Search | None:
    """A search by a reward, for any policy.

    Args:
        flags: Which.
        device: Of the reward.
        scenes: Whether prompts are in the scenes grammar, so that the checker can judge.

    Raises:
        UserError: Without a reward, or for the searches that are of next-scale models alone.
    """
    if flags.search is None:
        return None
    if flags.search in ("mg_select", "genarm"):
        raise UserError(f"--search {flags.search} is for next-scale models; take best_of or tree")
    from nextscale.align.rewards import open_reward
    from nextscale.align.search import BestOf, TreeSearch

    name = reward_name(flags, scenes=scenes)
    if name is None:
        raise UserError(f"--search {flags.search} needs a reward, such as --search_reward clip")
    reward = open_reward(name, device=device, download=flags.download)
    if flags.search == "best_of":
        return BestOf(reward, flags.search_samples)
    steps, greedy = flags.search_steps or None, flags.search == "tree"
    return TreeSearch(reward, flags.search_samples, steps=steps, greedy=greedy)
