"""Errors that are meant for the person at the keyboard, not for a debugger."""

from __future__ import annotations


class UserError(ValueError):
    """Something the person can put right: the message says what, which value, and what to do.

    The command line prints the message as one plain line and ends with `exit_code`.

    Attributes:
        exit_code: 2 for bad input, 1 when the input was fine and the work failed.
    """

    def __init__(self, message: str, *, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class MissingExtraError(UserError, ImportError):
    """An optional dependency is absent.

    It is an `ImportError` too, so that `except ImportError` and `pytest.importorskip` see it.
    """

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(message, exit_code=exit_code)


def missing_extra(need: str, extra: str) -> MissingExtraError:
    """Build the error for a missing optional dependency; the caller raises it.

    Args:
        need: Who needs what, as the first half of a sentence: "nextscale eval needs
            torch-fidelity".
        extra: The extra of this package that installs it, such as "eval".

    Returns:
        An error whose message ends in the command that installs the extra.
    """
    return MissingExtraError(f'{need}. Install it with: pip install "nextscale[{extra}]"')


def require(name: str, value: object, holds: bool, rule: str) -> None:
    """Raise a UserError unless a setting's rule holds; `rule` goes on after "must"."""
    if not holds:
        raise UserError(f"{name} is {value}, but must {rule}.")
