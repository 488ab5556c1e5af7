"""Search at inference time, behind one interface; see `Search`."""

from nextscale.align.search.best_of import BestOf
from nextscale.align.search.genarm import GenARM
from nextscale.align.search.search import Cost, Search
from nextscale.align.search.tree import TreeSearch
from nextscale.align.search.verifier_free import MGSelect

__all__ = ["BestOf", "Cost", "GenARM", "MGSelect", "Search", "TreeSearch"]
