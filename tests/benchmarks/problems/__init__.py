"""The problems of the quality studies; none of them needs a download or more than a few seconds."""

from tests.benchmarks.problems.base import Metric, Outputs, Problem, Trial
from tests.benchmarks.problems.digits import DIGITS
from tests.benchmarks.problems.maps import MAPS
from tests.benchmarks.problems.regression import REGRESSION
from tests.benchmarks.problems.tokens import TOKENS
from tests.benchmarks.problems.toy import TOY

PROBLEMS: dict[str, Problem] = {problem.name: problem for problem in (*DIGITS, *REGRESSION, MAPS, TOKENS, TOY)}

__all__ = ["PROBLEMS", "Metric", "Outputs", "Problem", "Trial"]
