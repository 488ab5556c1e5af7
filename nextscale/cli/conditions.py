"""Which prompts or class labels `nextscale generate` was given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nextscale.errors import UserError

if TYPE_CHECKING:
    from nextscale.cli.generate import GenerateConfig
    from nextscale.cli.loading import ModelFiles


NO_PROMPT = ""  # of guess mode, where control stands alone


def read_conditions(config: GenerateConfig, model: ModelFiles) -> tuple[str, ...]:
    """Prompts or labels of a run; `NO_PROMPT` for guess mode without any.

    Raises:
        UserError: If there are none, both, or the kind that the model does not take.
    """
    given = config.prompts or config.prompt
    if config.prompt_file is not None:
        if given:
            raise UserError("pass prompts or --prompt_file, not both.")
        try:
            lines = Path(config.prompt_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read prompt_file {config.prompt_file}: {error}") from error
        given = tuple(line.strip() for line in lines if line.strip())
        if not given:
            raise UserError(f"prompt_file {config.prompt_file} is empty. One prompt per line.")
    if config.guess_mode and not given and not config.class_labels:
        return (NO_PROMPT,)
    if given and config.class_labels:
        raise UserError("pass prompts or class_labels, not both.")
    if model.takes_prompts and not given:
        what = "takes prompts, not class_labels" if config.class_labels else "needs a prompt"
        raise UserError(f'the model {config.model} {what}. Example: nextscale generate "..."')
    if not model.takes_prompts and not config.class_labels:
        if config.preset == "fid" and not given:
            return tuple(str(i) for i in range(model.num_classes or 0))
        what = "takes class_labels, not prompts" if given else "needs class_labels"
        raise UserError(
            f"the model {config.model} {what}. Example: nextscale generate --class_labels 0 1"
        )
    return given or config.class_labels
