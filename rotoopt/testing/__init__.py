"""Checks of your own model for your own test suite, and hypothesis strategies.

.. code-block:: python

    from rotoopt.testing import check_invariants

    def test_wiring():
        model, optimizer, batch = ...
        check_invariants(optimizer, lambda: model.losses(batch))

:func:`check_invariants` runs all checks. Each can also be called by name; its error says what is wrong and how to fix
it. ``rotoopt.testing.strategies`` needs ``hypothesis`` (the extra ``hypothesis``).
"""

from rotoopt.testing._checks import check_invariants, check_losses_repeat, check_resume, check_rotations
from rotoopt.testing._gradients import check_backbone_gradients, check_head_gradients
from rotoopt.testing._wiring import (
    check_heads_are_fed,
    check_losses_pass_through_their_heads,
    check_parameters_are_optimized,
    check_rotations_reach_their_heads,
)

__all__ = [
    "check_invariants",
    "check_rotations",
    "check_losses_repeat",
    "check_heads_are_fed",
    "check_losses_pass_through_their_heads",
    "check_parameters_are_optimized",
    "check_rotations_reach_their_heads",
    "check_head_gradients",
    "check_backbone_gradients",
    "check_resume",
]
