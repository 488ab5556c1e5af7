"""Prompt pairs for models of free text: from templates, or written by a local language model.

The idea of ECGVF (EAR, arXiv 2506.20151): an instruction asks for prompts with a concept and the
same prompts with something else; pictures decide afterwards which pairs stay. The instruction and
the templates are ours.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

from nextscale.align.erasure.pairs import ConceptPair
from nextscale.errors import UserError, missing_extra

Write = Callable[[str, int], str]
"""An instruction and a number of the try -> what a language model answers."""

TEMPLATES = (
    "a photo of {}", "a photo of {} in the morning", "{} under a cloudy sky", "a painting of {}",
    "a close-up photo of {}", "{} seen from afar", "a black and white photo of {}", "{} in winter",
    "a postcard that shows {}", "a sketch of {}", "{} at night", "a bright picture of {}",
    "{} in the rain", "a film still with {}", "people in front of {}", "an old picture of {}",
    "{} in a quiet place", "a wide shot of {}", "{} at sunset", "a child's drawing of {}",
)  # fmt: skip
INSTRUCTION = (
    "Write {count} prompts for a text-to-image model. Each one asks for {concept} in a scene of "
    "its own. Beside each, write the same prompt with something else where {concept} was, or with "
    "nothing there; everything else stays word for word. Answer with one JSON object per line and "
    'nothing more: {{"original": "...", "modified": "...", "replacement": "..."}}'
)
_PER_ANSWER = 10
_TRIES_PER_ANSWER = 4


def template_pairs(concept: str, replacements: Sequence[str], count: int) -> list[ConceptPair]:
    """Every template with the concept and with each replacement, replacements taking turns.

    Args:
        concept: As prompts have it, such as "a church".
        replacements: What may stand in its place.
        count: At most so many.

    Raises:
        UserError: Without replacements.
    """
    if not replacements:
        raise UserError(
            f'templates need something in the place of "{concept}": --replacements "a school" ...'
        )
    if concept in replacements:
        raise UserError(f'"{concept}" cannot replace itself; take it out of replacements')
    rounds = range(len(replacements))
    every = [
        ConceptPair(t.format(concept), t.format(other), concept, other)
        for start in rounds
        for i, t in enumerate(TEMPLATES)
        for other in (replacements[(start + i) % len(replacements)],)
    ]
    return every[:count]


def written_pairs(concept: str, count: int, write: Write) -> list[ConceptPair]:
    """Pairs that a language model writes, without those that break the rules.

    A pair stays if its original names the concept, its modified prompt does not, and no earlier
    pair has the same original.

    Args:
        concept: As prompts have it.
        count: How many.
        write: The language model.

    Raises:
        UserError: With exit code 1 if it writes too few that can be used; says what came last.
    """
    found: dict[str, ConceptPair] = {}
    answer = ""
    for attempt in range(_TRIES_PER_ANSWER * -(-count // _PER_ANSWER)):
        wanted = min(_PER_ANSWER, count - len(found))
        answer = write(INSTRUCTION.format(count=wanted, concept=concept), attempt)
        for pair in read_answer(answer, concept):
            found.setdefault(str(pair.original), pair)
        if len(found) >= count:
            return list(found.values())[:count]
    raise UserError(
        f'the language model wrote {len(found)} of {count} usable pairs for "{concept}"; its last '
        f"answer began {answer[:80]!r}. Take a larger one, or --pairs templates",
        exit_code=1,
    )


def read_answer(answer: str, concept: str) -> list[ConceptPair]:
    """The usable pairs in an answer; anything around the JSON objects is passed over."""
    pairs = []
    for text in re.findall(r"\{[^{}]*\}", answer):
        try:
            entry = json.loads(text)
            original, modified = entry["original"], entry["modified"]
            other = entry.get("replacement") or ""
        except (ValueError, KeyError, TypeError):
            continue
        if not all(isinstance(part, str) for part in (original, modified, other)):
            continue
        if names(original, concept) and modified and not names(modified, concept):
            pairs.append(ConceptPair(original, modified, concept, other))
    return pairs


def names(prompt: str, concept: str) -> bool:
    """Whether a prompt says the concept, its article aside, as whole words; plurals count."""
    bare = re.sub(r"^(an?|the)\s+", "", concept.strip(), flags=re.IGNORECASE)
    return re.search(rf"\b{re.escape(bare)}(e?s)?\b", prompt, re.IGNORECASE) is not None


def local_writer(model: str, *, seed: int = 0) -> Write:
    """An instruction-tuned model of transformers: a folder, or a hub id.

    Args:
        model: With a chat template.
        seed: Of what it draws.

    Raises:
        UserError: If transformers is missing, or cannot open it.
    """
    try:
        from transformers import pipeline, set_seed
    except ImportError as error:
        raise missing_extra("pairs by a language model need transformers", "align") from error
    try:
        generator = pipeline("text-generation", model=model)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"the language model {model} cannot be opened: {reason}. Give a folder that holds one, "
            "or --pairs templates",
            exit_code=1,
        ) from error

    def write(instruction: str, attempt: int) -> str:
        set_seed(seed + attempt)
        chat = [{"role": "user", "content": instruction}]
        (result,) = generator(
            chat, max_new_tokens=100 * _PER_ANSWER, do_sample=True, return_full_text=False
        )
        return str(result["generated_text"])

    return write
