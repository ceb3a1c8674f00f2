"""The number of calls of a learning-rate scheduler that Lightning makes in a number of optimizer steps."""

from __future__ import annotations

import math


def count_calls(steps: int, frequency: int, batches: float, accumulate: int) -> int:
    """Returns how often Lightning calls a scheduler of the interval ``"step"``.

    Lightning calls it after an optimizer step if ``frequency`` divides the number of the batch within its epoch.

    Args:
        steps: the number of optimizer steps.
        frequency: the frequency of the scheduler.
        batches: the number of batches of an epoch; infinity for data without a length.
        accumulate: the number of batches of an optimizer step.
    """
    if frequency == 1:
        return steps

    def calls(count: int) -> int:
        """Returns the number of calls in the first ``count`` batches of an epoch."""
        whole = count // math.lcm(frequency, accumulate)
        # The last batch of an epoch ends a step, too.
        return whole + (count == batches and count % accumulate != 0 and count % frequency == 0)

    if math.isinf(batches):
        return calls(steps * accumulate)
    epochs, rest = divmod(steps, math.ceil(batches / accumulate))
    return epochs * calls(int(batches)) + calls(rest * accumulate)
