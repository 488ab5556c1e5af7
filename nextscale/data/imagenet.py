"""Names of the 1000 ImageNet classes, for `--class_labels "golden retriever"`.

The names in imagenet_classes.json are those of torchvision (BSD 3-clause), in the order of the ids.
"""

from __future__ import annotations

import difflib
import json
from functools import lru_cache
from importlib.resources import files

from nextscale.errors import UserError

NUM_CLASSES = 1000
# ImageNet gives these ids the name of another class; torchvision tells them apart by a word more.
_SHARED_NAMES = {134: "crane", 639: "maillot"}


@lru_cache(maxsize=1)
def imagenet_names() -> tuple[str, ...]:
    """Name of every class, by id."""
    text = files("nextscale.data").joinpath("imagenet_classes.json").read_text(encoding="utf-8")
    return tuple(json.loads(text))


def imagenet_class(name_or_id: str | int) -> int:
    """Find a class by name, whatever the case, or check an id.

    Args:
        name_or_id: "golden retriever", 207 or "207".

    Returns:
        The id, in [0, 1000).

    Raises:
        UserError: If there is no such class, or the name fits two.
    """
    text = str(name_or_id).strip()
    if text.removeprefix("-").isdecimal():
        if not 0 <= int(text) < NUM_CLASSES:
            raise UserError(f"ImageNet class ids lie in 0..{NUM_CLASSES - 1}, got {text}.")
        return int(text)
    ids = _ids_by_name()
    key = " ".join(text.lower().replace("_", " ").split())
    found = ids.get(key, [])
    if len(found) == 1:
        return found[0]
    if found:
        names = imagenet_names()
        choice = ", ".join(f"{i} ({names[i]})" for i in found)
        raise UserError(f'ImageNet has {len(found)} classes named "{text}": {choice}. Give the id.')
    near = difflib.get_close_matches(key, ids, n=3)
    near += [name for name in ids if key and key in name.split() and name not in near][
        : 5 - len(near)
    ]
    hint = f"Did you mean {', '.join(near)}?" if near else "Give an id in 0..999."
    raise UserError(f'there is no ImageNet class "{text}". {hint}')


@lru_cache(maxsize=1)
def _ids_by_name() -> dict[str, list[int]]:
    ids: dict[str, list[int]] = {}
    for i, name in enumerate(imagenet_names()):
        ids.setdefault(name.lower().replace("_", " "), []).append(i)
    for i, name in _SHARED_NAMES.items():
        ids[name].append(i)
    return {name: sorted(found) for name, found in ids.items()}
