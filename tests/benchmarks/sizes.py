"""The operations and bytes that RotoGradOptimizer adds, which do not depend on the machine. A Markdown table.

python -m tests.benchmarks.sizes
"""

from __future__ import annotations

import statistics

import torch

from rotoopt.optimizer import TURN_EVERY
from tests.benchmarks.cases import NAMED, PLAIN, ROTOOPT, Case, Training
from tests.benchmarks.timing import peak_bytes
from tests.operations import Count

CPU = torch.device("cpu")
BURN_IN = 20  # steps in which references may still change, which takes one operation more
FLOAT_BYTES = 4


def operations(case: Case, variant: str, steps: int) -> list[int]:
    """Return the number of operations of every step."""
    training, counts = Training(case, variant, CPU), []
    for _ in range(steps):
        with Count() as count:
            training.step()
        counts.append(count.found.total())
    return counts


def row(name: str, case: Case) -> str:
    """Return the row of a case: operations of the median and the worst step but the first; megabytes at the peak."""
    plain = operations(case, PLAIN, 2)[-1]
    own = [count - plain for count in operations(case, ROTOOPT, BURN_IN + 2 * TURN_EVERY)]
    added = peak_bytes(case, ROTOOPT, CPU, TURN_EVERY + 2) - peak_bytes(case, PLAIN, CPU, TURN_EVERY + 2)
    rep = Training(case, PLAIN, CPU).forward()[1]
    d, K = rep.shape[case.dim], case.num_tasks
    megabytes = [size / 1e6 for size in (added, FLOAT_BYTES * K * rep.numel(), FLOAT_BYTES * K * d**2)]
    median, worst = statistics.median(own[BURN_IN:]), max(own[1:])
    cells = [name, str(K), f"{median:.0f}", str(worst), *(f"{size:.1f}" for size in megabytes)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print("| case | K | operations, median step | worst step | MB added | K representations, MB | K rotations, MB |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, case in NAMED.items():
        print(row(name, case), flush=True)


if __name__ == "__main__":
    main()
