"""The caption grammar of the scenes world: text <-> statements.

    caption  = groups | group RELATION group [", and" group]
    groups   = group | group "and" group | group "," group "and" group
    group    = COUNT [SIZE] [FILL] COLOR SHAPE
    COUNT    = a | one | two | three        SIZE = small | large      FILL = solid | striped
    COLOR    = red | green | blue | yellow | purple
    SHAPE    = circle | square | triangle | cross (or the plural)
    RELATION = left of | right of | above | below

A caption holds 1 to 3 shapes in all. "two red circles left of a blue square" says that every red
circle is left of the blue square. The world is closed: what the caption does not name is absent.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

from nextscale.errors import UserError

COLORS = ("red", "green", "blue", "yellow", "purple")
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
FILLS = ("solid", "striped")
RELATIONS = ("left of", "right of", "above", "below")
COUNTS = {"a": 1, "two": 2, "three": 3}
MAX_SHAPES = 3

EXAMPLES = (
    "a red circle",
    "a red circle left of a blue square",
    "two small yellow triangles and a striped green cross",
    "two red circles above a large purple square",
    "a blue cross right of a green circle, and a red triangle",
)

_PLURALS = {s: s + ("es" if s.endswith("ss") else "s") for s in SHAPES}
_SINGULARS = {plural: s for s, plural in _PLURALS.items()}
_WORDS = (*COUNTS, *SIZES, *FILLS, *COLORS, *SHAPES, *_PLURALS.values())
# The words of canonical captions, in a fixed order: the vocabulary of the bundled text encoder.
VOCABULARY = (*_WORDS, "left", "right", "of", "above", "below", "and", ",")


@dataclass(frozen=True)
class Group:
    """`count` shapes of one colour and kind; size and fill are None where the caption is silent."""

    count: int
    color: str
    shape: str
    size: str | None = None
    fill: str | None = None

    def __str__(self) -> str:
        number = next(word for word, count in COUNTS.items() if count == self.count)
        noun = self.shape if self.count == 1 else _PLURALS[self.shape]
        return " ".join(w for w in (number, self.size, self.fill, self.color, noun) if w)


@dataclass(frozen=True)
class Caption:
    """Groups in the order of the text; `relation` holds between the first and the second."""

    groups: tuple[Group, ...]
    relation: str | None = None

    def __str__(self) -> str:
        texts = [str(group) for group in self.groups]
        if self.relation is not None:
            head = f"{texts[0]} {self.relation} {texts[1]}"
            return ", and ".join([head, *texts[2:]])
        return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)

    @property
    def num_shapes(self) -> int:
        """Shapes of all groups together."""
        return sum(group.count for group in self.groups)


def parse(text: str) -> Caption:
    """Read a caption of the grammar; case, "to the left of" and "on" variants are accepted.

    Args:
        text: For example "two small red circles left of a blue square".

    Raises:
        UserError: If the text is outside the grammar; the message says where and shows the grammar.
    """
    rest = re.sub(r"[.!]+\s*$", "", text.strip().lower())
    rest = re.sub(r"\b(?:on |to )?the (left|right) of\b", r"\1 of", rest)
    rest = re.sub(r"\bone\b|\ban\b", "a", rest)
    relation = next((r for r in RELATIONS if re.search(rf"\b{r}\b", rest)), None)
    if sum(len(re.findall(rf"\b{r}\b", rest)) for r in RELATIONS) > 1:
        raise _outside(text, "it names more than one relation")
    if relation is None:
        parts = re.split(r"\s*,\s*and\s+|\s*,\s*|\s+and\s+", rest)
        groups = tuple(_parse_group(part, text) for part in parts)
    else:
        first, second, *extra = re.split(rf"\s*\b{relation}\b\s*", rest, maxsplit=1)
        tail = re.split(r"\s*,\s*and\s+|\s*,\s*|\s+and\s+", second)
        groups = tuple(_parse_group(part, text) for part in [first, *tail, *extra])
    for one, other in itertools.combinations(groups, 2):
        if (one.color, one.shape) == (other.color, other.shape):
            raise _outside(text, f'"{one.color} {one.shape}" is named twice; use a count')
    if sum(group.count for group in groups) > MAX_SHAPES:
        raise _outside(text, f"it names more than {MAX_SHAPES} shapes in all")
    return Caption(groups, relation)


def _parse_group(text: str, whole: str) -> Group:
    words = text.split()
    known = (*_WORDS, "of", "left", "right")
    for word in words:
        if word not in known:
            raise _outside(whole, f'the word "{word}" is not in it')
    fields: dict[str, str] = {}
    order = ("count", "size", "fill", "color", "shape")
    position = 0
    for word in words:
        word = _SINGULARS.get(word, word)
        values = {"count": COUNTS, "size": SIZES, "fill": FILLS, "color": COLORS, "shape": SHAPES}
        slot = next((s for s in order[position:] if word in values[s]), None)
        if slot is None:
            raise _outside(whole, f'"{word}" stands in the wrong place in "{text}"')
        fields[slot] = word
        position = order.index(slot) + 1
    for slot in ("count", "color", "shape"):
        if slot not in fields:
            raise _outside(whole, f'"{text}" names no {slot}')
    plural = words[-1] in _SINGULARS
    if plural != (COUNTS[fields["count"]] > 1):
        raise _outside(whole, f'"{text}" mixes singular and plural')
    return Group(
        COUNTS[fields["count"]],
        fields["color"],
        fields["shape"],
        fields.get("size"),
        fields.get("fill"),
    )


def grammar() -> str:
    """The grammar as text, with examples, for messages and `nextscale info`."""
    assert __doc__ is not None
    rules = __doc__.split("\n\n")[1]
    limits = f"\n\n    at most {MAX_SHAPES} shapes in all, and one RELATION"
    return rules + limits + "\n\n    examples:\n" + "\n".join(f"      {e}" for e in EXAMPLES)


def _outside(text: str, why: str) -> UserError:
    return UserError(
        f'the prompt "{text}" is outside the grammar of the scenes model: {why}. '
        f"Prompts look like this:\n{grammar()}"
    )
