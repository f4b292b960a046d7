"""The errors a user can cause: each message is one line that names the thing, its value and the mend.

Command-line programs print such a message to stderr and exit with status 2; any other exception is a bug and keeps its
traceback.
"""

import sys
from collections.abc import Callable


class HumanOmniError(ValueError):
    """Base class of every error whose cause is an input, a path or a setting."""


class MediaError(HumanOmniError):
    """A clip, an audio file or an image cannot be read, or holds nothing to read."""


class PromptError(HumanOmniError):
    """The question, the modal or their combination is not one the model can be asked."""


class CheckpointError(HumanOmniError):
    """A checkpoint, one of its towers or its configuration is missing, incomplete or does not fit."""


def exit_status(program: Callable[[], object]) -> int:
    """Runs a command-line program; returns its exit status: 0, or 2 after the line that tells a user's mistake."""
    try:
        program()
    except HumanOmniError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
