"""Conflicts between tasks: collect the measurements of all steps, plot and log them.

.. code-block:: python

    history = History()
    for ...:
        optimizer.step(losses, z)
        history.record(optimizer)
    plot_history(history)

A :class:`History` also warns, once, if the rotations seem to be harmful. ``log_step`` writes to TensorBoard, and
``scalars`` returns a flat dict for any other logger. Plots need matplotlib (the extra ``plot``). Two metrics compare
whole networks: Delta-m and the mean rank.
"""

from rotoopt.diagnostics._history import History
from rotoopt.diagnostics._loggers import log_step, scalars
from rotoopt.diagnostics._metrics import mean_rank, mean_relative_change
from rotoopt.diagnostics._plots import plot_cosines, plot_grad_norms, plot_history, plot_losses, plot_rotations

__all__ = [
    "History",
    "plot_history",
    "plot_losses",
    "plot_grad_norms",
    "plot_cosines",
    "plot_rotations",
    "scalars",
    "log_step",
    "mean_relative_change",
    "mean_rank",
]
