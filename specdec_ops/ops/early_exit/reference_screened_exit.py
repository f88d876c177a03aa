"""The definition of the screened forms: what the whole head says. A screen changes no result but `rechecked`."""

from .reference_exit_confidence import exit_confidence


def screened_exit(arguments, outputs) -> None:
    """Write what exit_confidence does, and that every entry was read in full precision."""
    exit_confidence(arguments, outputs)
    outputs.rechecked.fill_(len(arguments.head))
