"""Concepts of the scenes world: in captions, in pictures, and what replaces them.

A concept is a colour, a shape, a size, a fill, several of these bound to one shape ("striped red
circle"), or a relation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from nextscale.data.captions import (
    COLORS,
    FILLS,
    RELATIONS,
    SHAPES,
    SIZES,
    Caption,
    Group,
)
from nextscale.data.checker import ATTRIBUTES, Report
from nextscale.data.scenes import HELD_OUT, Shape
from nextscale.errors import UserError

VALUES = {"color": COLORS, "shape": SHAPES, "size": SIZES, "fill": FILLS}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True)
class SceneConcept:
    """A concept.

    Attributes:
        name: As given.
        attributes: (attribute, value) pairs that one shape has together.
        relation: Or a relation.
    """

    name: str
    attributes: tuple[tuple[str, str], ...] = ()
    relation: str | None = None

    def in_caption(self, caption: Caption) -> bool:
        """Whether the caption asks for it."""
        if self.relation is not None:
            return caption.relation == self.relation
        return any(self._matches(group) for group in caption.groups)

    def in_picture(self, report: Report) -> bool:
        """Whether the picture shows it: a shape that has it all, or the caption's relation."""
        if self.relation is not None:
            found = [s for s in report.statements if s.kind == "relation"]
            return bool(found) and all(s.holds for s in found)
        return any(self._matches(shape) for shape in report.detection.shapes)

    def is_sibling(self, caption: Caption) -> bool:
        """Whether a caption without it is near it.

        Bound attributes: a shape has some of them. A relation, a size, a fill: the caption names
        another one. A single colour or shape has no siblings, because every caption would be one.
        """
        if self.in_caption(caption):
            return False
        if self.relation is not None:
            return caption.relation is not None
        if len(self.attributes) > 1:
            shared = (sum(_has(g, a, v) for a, v in self.attributes) for g in caption.groups)
            return any(shared)
        often_silent = {attribute for attribute, _ in self.attributes} & {"size", "fill"}
        return any(
            getattr(g, attribute) is not None for attribute in often_silent for g in caption.groups
        )

    def replaced(
        self, caption: Caption, rng: np.random.Generator, others: Sequence[SceneConcept] = ()
    ) -> tuple[Caption, str] | None:
        """The caption with something else in its place, and what; None: the grammar has no room.

        A relation becomes its opposite, because shapes stand left of each other by chance in every
        second picture, or the next one; of bound attributes one is changed.

        Args:
            caption: Names the concept.
            rng: Chooses.
            others: Further erased concepts, which are replaced as well.
        """
        changed = self._replaced(caption, rng, others)
        if changed is None:
            return None
        found, what = changed
        for other in others:
            if other.in_caption(found):
                rest = (self, *(c for c in others if c is not other))
                changed = other._replaced(found, rng, rest)
                if changed is None:
                    return None
                found = changed[0]
        return found, what

    def _replaced(
        self, caption: Caption, rng: np.random.Generator, others: Sequence[SceneConcept]
    ) -> tuple[Caption, str] | None:
        """One step of `replaced`: none of the others comes in."""

        def clean(changed: Caption) -> bool:
            return all(c.in_caption(caption) or not c.in_caption(changed) for c in others)

        if self.relation is not None:
            for other in (OPPOSITE[self.relation], *RELATIONS):
                changed = replace(caption, relation=other)
                if other != self.relation and clean(changed):
                    return changed, other
            return None
        attribute, value = self.attributes[rng.integers(len(self.attributes))]
        choices = []
        for other in VALUES[attribute]:
            if other == value:
                continue
            groups = tuple(
                replace(g, **{attribute: other}) if self._matches(g) else g for g in caption.groups
            )
            pairs = [(g.color, g.shape) for g in groups]
            if len(set(pairs)) == len(pairs) and not any(pair in HELD_OUT for pair in pairs):
                changed = replace(caption, groups=groups)
                if clean(changed):
                    choices.append((changed, other))
        return choices[rng.integers(len(choices))] if choices else None

    def _matches(self, shape: Group | Shape) -> bool:
        return all(_has(shape, attribute, value) for attribute, value in self.attributes)


def _has(shape: Group | Shape, attribute: str, value: str) -> bool:
    return getattr(shape, attribute) == value


def scene_concept(text: str) -> SceneConcept:
    """Read a concept: "red", "circle", "red circle", "striped", "left of", ...

    Raises:
        UserError: For words that are none of the scenes world, or two values of one attribute.
    """
    words = text.lower().strip()
    if words in RELATIONS:
        return SceneConcept(text, relation=words)
    attributes: dict[str, str] = {}
    for word in words.split():
        found = [a for a in ATTRIBUTES if word in VALUES[a]]
        if not found:
            known = ", ".join(v for values in VALUES.values() for v in values)
            raise UserError(
                f'the concept "{text}" is none of the scenes world: "{word}" is not one of '
                f"{known}, and no relation ({', '.join(RELATIONS)})"
            )
        if found[0] in attributes:
            raise UserError(f'the concept "{text}" names two values of {found[0]}')
        attributes[found[0]] = word
    if not attributes:
        raise UserError("a concept is empty; name one, such as red circle")
    if tuple(attributes.get(a) for a in ("color", "shape")) in HELD_OUT:
        raise UserError(
            f'the concept "{text}" is one that the training pictures never show; the model was not '
            "taught it"
        )
    return SceneConcept(text, tuple(attributes.items()))
