"""What can go wrong, and the exit code that tells a caller which.

    MpdeployError            what happened, where, what was expected; `hint` says how to mend it
     ├ RecipeError        2  the recipe, the command line or an input the user named is wrong
     ├ Unavailable        3  a package, GPU, driver, provider or hub is missing here
     ├ StageFailed        5  a stage could not do its work, or broke its own promise
     └ CorruptArtifact    5  a file is not what was written

A failed gate (1) and an inconclusive one (4) are results, not exceptions. Only `cli` turns an error into a code.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class MpdeployError(Exception):
    """Base of every error that mpdeploy raises on purpose.

    Args:
        what: One or more full sentences: what happened, where, what was expected.
        hint: How to mend it, or empty where there is nothing to say.
    """

    exit_code = 5

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what}\n  hint: {self.hint}" if self.hint else self.what


class RecipeError(MpdeployError):
    """The recipe, the command line, or a file that the user named can't be used."""

    exit_code = 2


class Unavailable(MpdeployError):
    """Something that this machine lacks: a package, a GPU, a driver, a provider, a hub."""

    exit_code = 3


class StageFailed(MpdeployError):
    """A stage could not do its work, or what it wrote breaks its promise."""


class CorruptArtifact(MpdeployError):
    """A file on disk is not what was written."""


@contextmanager
def reworded(words: Sequence[tuple[str, str]]) -> Iterator[None]:
    """Let errors speak of a command's own options where the library speaks of a recipe's keys."""
    try:
        yield
    except MpdeployError as error:
        what, hint = error.what, error.hint
        for old, new in words:
            what, hint = what.replace(old, new), hint.replace(old, new)
        raise type(error)(what, hint) from error
