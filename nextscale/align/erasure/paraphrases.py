"""Prompts that ask for the same concept in other words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from nextscale.align.erasure.concepts import OPPOSITE
from nextscale.align.erasure.pairs import ConceptPair
from nextscale.data.captions import FILLS, SIZES, Caption, Group, parse


def other_words(pairs: Sequence[ConceptPair], *, scenes: bool) -> dict[str, dict[int, ConceptPair]]:
    """Pairs with other originals, by kind of change and place among the pairs.

    Those that a change does not fit are left out. The scenes grammar has no synonyms: there the
    concept is asked for in another number, further described, in company, or in another order.

    Args:
        pairs: With the originals that are rewritten.
        scenes: Whether they are captions of scenes; otherwise they are free text.
    """
    found: dict[str, dict[int, ConceptPair]] = {}
    for kind in _SCENES if scenes else _FREE:
        texts = [
            _SCENES[kind](parse(str(pair.original)), i) if scenes else _FREE[kind](pair, i)
            for i, pair in enumerate(pairs)
        ]
        changed = {
            i: replace(pair, original=str(text))
            for i, (pair, text) in enumerate(zip(pairs, texts, strict=True))
            if text is not None
        }
        if changed:
            found[kind] = changed
    return found


def _count(caption: Caption, i: int) -> Caption | None:
    """Two in place of one."""
    room = 3 - caption.num_shapes
    groups = [replace(g, count=2) if g.count == 1 and room else g for g in caption.groups[:1]]
    changed = replace(caption, groups=(*groups, *caption.groups[1:]))
    return changed if changed != caption else None


def _described(caption: Caption, i: int) -> Caption:
    """Sizes and fills named where the caption is silent."""
    groups = (
        replace(g, size=g.size or SIZES[i % 2], fill=g.fill or FILLS[(i // 2) % 2])
        for g in caption.groups
    )
    return replace(caption, groups=tuple(groups))


def _company(caption: Caption, i: int) -> Caption | None:
    """Another shape beside them."""
    taken = {(g.color, g.shape) for g in caption.groups}
    choices = (("blue", "square"), ("green", "cross"), ("green", "triangle"), ("blue", "circle"))
    color, shape = next(pair for pair in (*choices[i % 4 :], *choices) if pair not in taken)
    if caption.num_shapes > 2:
        return None
    return replace(caption, groups=(*caption.groups, Group(1, color, shape)))


def _turned(caption: Caption, i: int) -> Caption | None:
    """The same scene told from the other side."""
    if caption.relation is None:
        groups = tuple(reversed(caption.groups))
        return replace(caption, groups=groups) if len(groups) > 1 else None
    first, second, *rest = caption.groups
    return Caption((second, first, *rest), OPPOSITE[caption.relation])


def _mistyped(pair: ConceptPair, i: int) -> str | None:
    """Two letters inside the concept change places."""
    word = max(pair.concept.split(), key=len)
    text = str(pair.original)
    place = text.lower().find(word.lower())
    places = [at for at in range(place + 1, place + len(word) - 1) if text[at] != text[at + 1]]
    if place < 0 or len(word) < 4 or not places:
        return None
    at = places[i % len(places)]
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]


_SCENES: dict[str, Callable[[Caption, int], Caption | None]] = {
    "another count": _count,
    "described further": _described,
    "in company": _company,
    "told in another order": _turned,
}
_FREE: dict[str, Callable[[ConceptPair, int], str | None]] = {
    "in a frame": lambda pair, i: f"a detailed picture: {pair.original}, high quality",
    "in capitals": lambda pair, i: str(pair.original).upper(),
    "the concept alone": lambda pair, i: pair.concept,
    "mistyped": _mistyped,
}
