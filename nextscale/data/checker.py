"""Does a picture of the scenes world show what its caption says? Statement by statement.

The world is closed: a shape that the caption does not name makes it false. `detector` finds the
shapes; here they are matched to the caption's groups, and each statement is judged on its own, so
that a single wrong attribute fails a single statement.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

from nextscale.data.captions import (
    COLORS,
    COUNTS,
    FILLS,
    MAX_SHAPES,
    RELATIONS,
    SHAPES,
    SIZES,
    Caption,
    Group,
    parse,
)
from nextscale.data.detector import DetectedShape, Detection, detect
from nextscale.data.scenes import (
    Background,
    GroundTruth,
    Scene,
    Shape,
    ground_truth,
    render,
    sample_scene,
)
from nextscale.errors import UserError

KINDS = ("shape", "color", "count", "size", "fill", "relation", "closed_world")
MIN_OFFSET = 0.04  # distance of centres, in units of the side, from which a relation holds
ATTRIBUTES = ("color", "shape", "size", "fill")
_VALUES = {"color": COLORS, "shape": SHAPES, "size": SIZES, "fill": FILLS}
# Colour and shape decide which shape is meant; size and fill only break ties.
_WEIGHTS = {"color": 1.0, "shape": 1.0, "size": 0.1, "fill": 0.1}
_EMPTY = Background((0.5, 0.5, 0.5), (0.0, 0.0), (0.0, 0.0, 0.0))


@dataclass(frozen=True)
class Statement:
    """One claim of a caption.

    Attributes:
        kind: One of KINDS.
        text: The claim in words.
        holds: Whether the picture shows it.
        value: The claimed value, such as "red", "two" or "left of"; "" for the closed world.
    """

    kind: str
    text: str
    holds: bool
    value: str = ""


@dataclass(frozen=True)
class Report:
    """The verdict on one picture and one caption."""

    caption: Caption
    detection: Detection
    statements: tuple[Statement, ...]

    @property
    def holds(self) -> bool:
        """Whether every statement holds and the picture was not rejected."""
        return self.detection.rejected is None and all(s.holds for s in self.statements)

    @property
    def score(self) -> float:
        """Share of the statements that hold, in [0, 1]; 0 for a rejected picture."""
        if self.detection.rejected is not None:
            return 0.0
        return sum(s.holds for s in self.statements) / len(self.statements)


def check(image: np.ndarray, caption: Caption | str) -> Report:
    """Judge a picture by a caption, in the closed world.

    Args:
        image: uint8 [side, side, 3], RGB.
        caption: A caption of the grammar, as text or parsed.

    Returns:
        For each group "shape", "color" (all shapes matched to it have this one, and there is at
        least one), "count", and "size" and "fill" where the caption names them; then "relation"
        (each member of the first group against each of the second) and "closed_world" (no shape
        is left over). In a rejected picture nothing holds.

    Raises:
        UserError: If the caption is outside the grammar or the array is no RGB picture.
    """
    caption = parse(caption) if isinstance(caption, str) else caption
    detection = detect(image)
    statements = judge(detection.shapes, caption)
    if detection.rejected is not None:
        statements = [replace(s, holds=False) for s in statements]
    return Report(caption, detection, tuple(statements))


def check_batch(images: np.ndarray, captions: Sequence[Caption | str]) -> list[Report]:
    """Judge picture i by caption i.

    Args:
        images: uint8 [n, side, side, 3], RGB.
        captions: n captions of the grammar.
    """
    if len(images) != len(captions):
        raise UserError(f"as many captions as images are needed: {len(captions)}, {len(images)}")
    return [check(image, caption) for image, caption in zip(images, captions, strict=True)]


def judge(shapes: Sequence[Shape], caption: Caption) -> list[Statement]:
    """The statements of a caption about given shapes; `check` is this after `detect`."""
    members, leftover = _match(shapes, caption)
    statements = []
    for group, matched in zip(caption.groups, members, strict=True):
        words = str(group)
        for attribute in ATTRIBUTES:
            value = getattr(group, attribute)
            if value is not None:
                holds = bool(matched) and all(getattr(s, attribute) == value for s in matched)
                statements.append(Statement(attribute, f"{words}: {value}", holds, value))
        number = words.split()[0]
        holds = len(matched) == group.count
        statements.append(Statement("count", f"{words}: {number}", holds, number))
    if caption.relation is not None:
        first, second = caption.groups[:2]
        offset = _smallest_offset(members[0], members[1], caption.relation)
        text = f"{first} {caption.relation} {second}"
        statements.append(Statement("relation", text, offset > MIN_OFFSET, caption.relation))
    statements.append(Statement("closed_world", "nothing else", not leftover))
    return statements


def _match(shapes: Sequence[Shape], caption: Caption) -> tuple[list[list[Shape]], list[Shape]]:
    """Shapes per group, and those that the caption does not name.

    A surplus shape of a group's colour and kind belongs to the group: that is a wrong count, not
    an unnamed shape.
    """
    slots = [g for g, group in enumerate(caption.groups) for _ in range(group.count)]
    members: list[list[Shape]] = [[] for _ in caption.groups]
    cost = np.array([[_mismatch(shape, caption.groups[g]) for g in slots] for shape in shapes])
    rows, columns = linear_sum_assignment(cost.reshape(len(shapes), len(slots)))
    for row, column in zip(rows, columns, strict=True):
        members[slots[column]].append(shapes[row])
    leftover = []
    for row in sorted(set(range(len(shapes))) - set(rows.tolist())):
        shape = shapes[row]
        same = (g for g, group in enumerate(caption.groups) if _same_kind(shape, group))
        home = next(same, None)
        (leftover if home is None else members[home]).append(shape)
    return members, leftover


def _mismatch(shape: Shape, group: Group) -> float:
    wanted = ((a, getattr(group, a)) for a in ATTRIBUTES)
    return sum(_WEIGHTS[a] for a, v in wanted if v is not None and getattr(shape, a) != v)


def _same_kind(shape: Shape, group: Group) -> bool:
    return (shape.color, shape.shape) == (group.color, group.shape)


def _smallest_offset(first: Sequence[Shape], second: Sequence[Shape], relation: str) -> float:
    """The worst pair's distance of centres in the relation's direction; -1 if a side is empty."""
    axis, sign = {
        "left of": ("x", 1),
        "right of": ("x", -1),
        "above": ("y", 1),
        "below": ("y", -1),
    }[relation]
    offsets = (sign * (getattr(b, axis) - getattr(a, axis)) for a in first for b in second)
    return min(offsets, default=-1.0)


def prompt_accuracy(reports: Sequence[Report]) -> dict[str, Any]:
    """Summarise reports.

    Returns:
        "n", "accuracy" (share of pictures where every statement holds) and its Wilson 95 %
        "interval", "score" (mean), "rejected" (count), "kinds" and "values": per kind of
        statement, and per claimed value such as "red", the accuracy and its n.
    """
    if not reports:
        raise UserError("prompt_accuracy needs at least one report")
    kinds: defaultdict[str, list[bool]] = defaultdict(list)
    values: defaultdict[str, list[bool]] = defaultdict(list)
    for report in reports:
        for statement in report.statements:
            kinds[statement.kind].append(statement.holds)
            if statement.value:
                values[statement.value].append(statement.holds)
    right = sum(report.holds for report in reports)
    return {
        "n": len(reports),
        "accuracy": right / len(reports),
        "interval": wilson_interval(right, len(reports)),
        "score": float(np.mean([report.score for report in reports])),
        "rejected": sum(report.detection.rejected is not None for report in reports),
        "kinds": {k: _share(kinds[k]) for k in KINDS if k in kinds},
        "values": {v: _share(values[v]) for v in sorted(values)},
    }


def _share(outcomes: list[bool]) -> dict[str, float]:
    return {"accuracy": sum(outcomes) / len(outcomes), "n": len(outcomes)}


def wilson_interval(successes: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share."""
    z = 1.959964
    center = (successes + z * z / 2) / (n + z * z)
    share = successes / n
    half = z / (n + z * z) * np.sqrt(n * share * (1 - share) + z * z / 4)
    return float(np.clip(center - half, 0.0, share)), float(np.clip(center + half, share, 1.0))


def recover_depth(image: np.ndarray) -> np.ndarray:
    """float32 [side, side]: nearness as in `scenes.GroundTruth.depth`, read from a picture."""
    return _redraw(image).depth


def recover_segmentation(image: np.ndarray) -> np.ndarray:
    """uint8 [side, side]: classes as in `scenes.GroundTruth.segmentation`, read from a picture."""
    return _redraw(image).segmentation


def _redraw(image: np.ndarray) -> GroundTruth:
    shapes: tuple[DetectedShape, ...] = detect(image).shapes
    return ground_truth(Scene(shapes, Caption(()), _EMPTY), len(image))


def falsify(
    caption: Caption, scene: Scene, rng: np.random.Generator, kind: str | None = None
) -> tuple[Caption, str]:
    """Change one statement of a scene's true caption so that it is false of the scene.

    "size", "fill" and "relation" may also be named where the caption is silent; a false relation
    is clearly false: at least one pair of shapes lies the other way round. "closed_world" drops a
    group.

    Args:
        caption: A caption that holds of the scene.
        scene: The scene.
        rng: Where the choice is drawn from.
        kind: One of KINDS to falsify; drawn from `falsifiable(caption, scene)` if None.

    Raises:
        UserError: If no statement of this kind can be made false within the grammar.
    """
    choices = falsifiable(caption, scene)
    if kind is None:
        kind = list(choices)[rng.integers(len(choices))]
    if kind not in choices:
        raise UserError(f'no "{kind}" of "{caption}" can be made false; use {list(choices)}')
    return choices[kind][rng.integers(len(choices[kind]))], kind


def falsifiable(caption: Caption, scene: Scene) -> dict[str, list[Caption]]:
    """Per kind, all captions that differ from a true one by one statement that is false."""
    groups = caption.groups
    members, _ = _match(scene.shapes, caption)
    false: defaultdict[str, list[Caption]] = defaultdict(list)
    for g, group in enumerate(groups):
        changed = [("count", count) for count in COUNTS.values()]
        changed += [(attribute, value) for attribute in ATTRIBUTES for value in _VALUES[attribute]]
        for field, value in changed:
            other = Caption((*groups[:g], replace(group, **{field: value}), *groups[g + 1 :]))
            pairs = {(one.color, one.shape) for one in other.groups}
            if len(pairs) < len(groups) or other.num_shapes > MAX_SHAPES:
                continue
            if field == "count":
                wrong = value != group.count
            else:
                wrong = any(getattr(shape, field) != value for shape in members[g])
            if wrong:
                false[field].append(replace(other, relation=caption.relation))
        if len(groups) > 1:
            rest = (*groups[:g], *groups[g + 1 :])
            relation = caption.relation if g > 1 else None
            false["closed_world"].append(Caption(rest, relation))
    if len(groups) > 1:
        false["relation"] = [
            Caption(groups, relation)
            for relation in RELATIONS
            if _smallest_offset(members[0], members[1], relation) < 0
        ]
    return {kind: false[kind] for kind in KINDS if false[kind]}


def checker_error(
    n: int = 2000, size: int = 64, seed: int = 2, *, progress: bool = False
) -> dict[str, Any]:
    """Measure the checker itself on rendered scenes.

    Args:
        n: Scenes of stream `seed`, each judged by its true and by one falsified caption.
        size: Side in pixels.
        seed: Stream of scenes.
        progress: Show a bar.

    Returns:
        "n", "true_error" (share of true captions that are refused), "false_error" (share of
        falsified captions that are accepted), each with its Wilson 95 % interval, and
        "false_kinds": accepted and n per kind of the falsified statement.
    """
    accepted: Counter[str] = Counter()
    tried: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
    refused = 0
    for index in tqdm(range(n), unit="scene", disable=not progress):
        scene = sample_scene(seed, index)
        rng = np.random.Generator(np.random.Philox(key=(int(seed) << 64) | index, counter=1 << 64))
        # The kind tried least so far, as not every caption can be made false in every way.
        kind = min(falsifiable(scene.caption, scene), key=lambda k: tried[k])
        wrong, _ = falsify(scene.caption, scene, rng, kind)
        tried[kind] += 1
        detection = detect(render([scene], size)[0])
        verdicts = [
            Report(caption, detection, tuple(judge(detection.shapes, caption))).holds
            for caption in (scene.caption, wrong)
        ]
        refused += not verdicts[0]
        accepted[kind] += verdicts[1]
    false = sum(accepted.values())
    return {
        "n": n,
        "true_error": refused / n,
        "true_interval": wilson_interval(refused, n),
        "false_error": false / n,
        "false_interval": wilson_interval(false, n),
        "false_kinds": {kind: {"accepted": accepted[kind], "n": tried[kind]} for kind in KINDS},
    }
