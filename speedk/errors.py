"""The errors a user is meant to read: one line that names the value and the mend."""

from __future__ import annotations


class SpeedkError(Exception):
    """Something the user can mend. The command line prints its text on one line and exits with `exit_code`."""

    exit_code = 1


class ConfigError(SpeedkError, ValueError):
    """A recipe, an option or a combination of the two that cannot be run."""


class DataError(SpeedkError):
    """Real data that is missing, unreadable, or not fit for what was asked."""


class ArtifactError(SpeedkError):
    """A distilled file that is damaged, of another version, or not what it says it is."""

    exit_code = 2


class TrainingError(SpeedkError):
    """A run that cannot go on (a loss that is not finite, no memory, no space); what it had is saved."""


class Interrupted(Exception):
    """A run that was asked to stop and has saved what it had."""


def one_line(value: object, limit: int = 200) -> str:
    """`value` as text that can do a terminal no harm: white space folded, unprintable characters escaped, cut."""
    text = " ".join(str(value).split())
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: limit + 1])
    return text if len(text) <= limit else text[: limit - 3] + "..."
