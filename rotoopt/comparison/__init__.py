"""Compare options: train with each of them on the same seeds, and compare the test metrics.

.. code-block:: python

    from rotoopt.comparison import compare

    def train(seed, **options):
        model = ...
        optimizer = RotoGradOptimizer(adam, heads, **options)
        ...
        return {"accuracy": 0.91, "depth error": 0.13}

    result = compare(train, seeds=5, higher_is_better={"accuracy": True, "depth error": False}, path="comparison.json")
    print(result)

:func:`compare` runs the plain sum, the default with and without rotations, equal norms and GradNorm, or your own
candidates. It resumes after an interruption, and can run in several processes. A :class:`Comparison` contains the
numbers, paired by seed, a table and a plot.
"""

from rotoopt.comparison._candidates import CANDIDATES
from rotoopt.comparison._compare import compare
from rotoopt.comparison._comparison import Comparison

__all__ = ["compare", "CANDIDATES", "Comparison"]
