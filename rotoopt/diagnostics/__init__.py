"""Look at what the tasks do to each other: collect the records of all steps, plot them, log them.

.. code-block:: python

    history = History()
    for ...:
        optimizer.step(losses, z)
        history.record(optimizer)
    plot_history(history)

A :class:`History` also warns, once, when the rotations seem to do harm. ``log_step`` writes to TensorBoard, and
``scalars`` makes a flat dict for any other logger. Plots need matplotlib (the extra ``plot``).
"""

from rotoopt.diagnostics.history import History
from rotoopt.diagnostics.loggers import log_step, scalars
from rotoopt.diagnostics.plots import plot_cosines, plot_grad_norms, plot_history, plot_losses, plot_rotations

__all__ = [
    "History",
    "plot_history",
    "plot_losses",
    "plot_grad_norms",
    "plot_cosines",
    "plot_rotations",
    "scalars",
    "log_step",
]
