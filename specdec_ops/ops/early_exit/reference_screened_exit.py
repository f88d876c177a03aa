"""The definition of the screened forms: what the whole head says. A screen changes no result but `rechecked`."""

from .reference_exit_confidence import exit_confidence


def screened_exit(*arguments) -> None:
    """Write what exit_confidence does, and that every entry was read in full precision.

    Args:
        arguments: those of specdec_ops.ops.early_exit.reference_exit_confidence, its outputs among them; then the
        screen's values int8
            [vocab, dim], scales, error_norms and norms float32 [vocab] and error_gain float32 [1]; a tolerance of
            max_prob and margin; and the output rechecked int32 [rows].
    """
    *exit_arguments, _, _, _, _, _, _, rechecked = arguments
    exit_confidence(*exit_arguments)
    rechecked.fill_(exit_arguments[1].shape[0])
