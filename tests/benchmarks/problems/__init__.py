"""The problems of the quality studies. None of them needs a download, or takes more than a few seconds."""

from tests.benchmarks.problems.base import Metric, Outputs, Problem, Trial
from tests.benchmarks.problems.capacity import CAPACITY
from tests.benchmarks.problems.digits import DIGITS
from tests.benchmarks.problems.direction import DIRECTION
from tests.benchmarks.problems.kinds import KINDS
from tests.benchmarks.problems.maps import MAPS
from tests.benchmarks.problems.noise import LABEL_NOISE, WITHOUT_LABEL_NOISE
from tests.benchmarks.problems.rates import RATES
from tests.benchmarks.problems.regression import REGRESSION
from tests.benchmarks.problems.tokens import TOKENS
from tests.benchmarks.problems.toy import TOY

_ALL = (DIGITS, REGRESSION, MAPS, TOKENS, TOY, KINDS, RATES, LABEL_NOISE, WITHOUT_LABEL_NOISE, CAPACITY, DIRECTION)
PROBLEMS: dict[str, Problem] = {problem.name: problem for problem in _ALL}

__all__ = ["PROBLEMS", "Metric", "Outputs", "Problem", "Trial"]
