"""Did it help? Train with several options on the same seeds, and compare what they reach.

.. code-block:: python

    from rotoopt.comparison import compare

    def train(seed, **options):
        model = ...
        optimizer = RotoGradOptimizer(adam, heads, **options)
        ...
        return {"accuracy": 0.91, "depth error": 0.13}

    result = compare(train, seeds=5, higher_is_better={"accuracy": True, "depth error": False}, path="comparison.json")
    print(result)

:func:`compare` runs the plain sum, the default with and without rotations, equal norms and GradNorm, or whatever
candidates it is given; it resumes after an interruption, and runs in several processes. A :class:`Comparison` has the
numbers, paired by seed, a table and a picture.
"""

from rotoopt.comparison._candidates import CANDIDATES
from rotoopt.comparison._compare import compare
from rotoopt.comparison._comparison import Comparison

__all__ = ["compare", "CANDIDATES", "Comparison"]
