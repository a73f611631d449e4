"""Compare: train with every candidate and every seed, and store the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from rotoopt.comparison._candidates import CANDIDATES, Options, check_unused
from rotoopt.comparison._comparison import Baseline, Comparison, check_baseline
from rotoopt.comparison._processes import check_importable
from rotoopt.comparison._run import Train
from rotoopt.comparison._search import choose_lr, yardstick
from rotoopt.comparison._trainings import Trainings

SEARCH_SEEDS = (1000, 1001, 1002)


def compare(
    train: Train,
    *,
    higher_is_better: Mapping[str, bool],
    candidates: Mapping[str, Options] = CANDIDATES,
    seeds: int | Sequence[int] = 5,
    baseline: Baseline = "plain sum",
    lrs: Sequence[float] | None = None,
    search_seeds: Sequence[int] = SEARCH_SEEDS,
    path: str | Path | None = None,
    processes: int = 1,
    quiet: bool = False,
) -> Comparison:
    r"""Train with every candidate on the same seeds, and compare the test metrics.

    A candidate is a set of options of :class:`~rotoopt.RotoGradOptimizer`, and any other arguments of ``train``.
    Torch's generator is seeded before every run; ``train`` must seed any other generator that it uses.

    Time per step is the time from one step of an optimizer to the next, so it includes the data, the forward and the
    backward pass, and other load on the machine: compare times of one process on an idle machine. It is the median of
    the means over blocks of 32 steps.

    Args:
        train: Called as ``train(seed, **options)``, or ``train(seed, lr=lr, **options)`` with ``lrs``. Builds a
            network, trains it with ``RotoGradOptimizer(..., **options)``, and returns its test metrics by name.
        higher_is_better: Whether higher is better, for each metric.
        candidates: Options by name. Every run gets its own copy.
        seeds: The seeds, or their number: ``5`` is ``range(5)``.
        baseline: The reference of Delta-m: a candidate, or one number per metric, such as those of one network per
            task.
        lrs: Learning rates to choose from. Each candidate uses the one with the best mean change of the metrics, each
            clipped to 100 %, over ``search_seeds``. One rate for all would favor the candidate that it suits best.
        search_seeds: Seeds of these runs, different from ``seeds``.
        path: A JSON file, written after every run. An interrupted call resumes from it; runs whose options or metrics
            have changed are repeated. Changes of ``train`` itself are not detected: use another path.
        processes: Number of runs at a time, each in its own process; they share the threads of this one. ``train``
            and the candidates must then be importable, and a script must call this below ``if __name__ ==
            "__main__":``.
        quiet: Whether to omit the line per run on standard error.

    Returns:
        The results: ``print(result)`` and ``result.plot()`` show them. A run that raised an error is in ``failures``,
        and one whose metrics are not finite is reported as diverged; neither affects the others.

    Raises:
        ValueError: If an argument is out of range, or ``path`` is not a file of a comparison.
        RuntimeError: If as many runs fail as there are candidates before any succeeds, or a process exits abruptly.

    Example:
        >>> from torch import nn
        >>> from rotoopt import RotoGradOptimizer
        >>> def train(seed, **options):
        ...     backbone, left, right = nn.Linear(4, 8), nn.Linear(8, 1), nn.Linear(8, 1)
        ...     sgd = torch.optim.SGD([*nn.ModuleList([backbone, left, right]).parameters()], lr=0.1)
        ...     optimizer = RotoGradOptimizer(sgd, heads=[left, right], **options)
        ...     for _ in range(20):
        ...         z = backbone(torch.randn(32, 4))
        ...         losses = [(left(z) - 1).square().mean(), (10 * right(z) + 1).square().mean()]
        ...         optimizer.zero_grad()
        ...         optimizer.step(losses)
        ...     return {"left": losses[0], "right": losses[1]}
        >>> result = compare(train, seeds=2, higher_is_better={"left": False, "right": False}, quiet=True)
        >>> list(result.metrics)
        ['plain sum', 'scale only', 'GradNorm', 'default, rotate=False', 'default']
    """
    numbers = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    _check(candidates, higher_is_better, numbers, lrs, search_seeds, processes)
    check_baseline(baseline, candidates, higher_is_better)
    if processes > 1:
        check_importable("train", train)
        for name in candidates:
            check_importable(f"candidates[{name!r}]", candidates[name])
    where = None if path is None else Path(path)
    trainings = Trainings(train, candidates, list(higher_is_better), where, processes, quiet=quiet)
    chosen = {} if lrs is None else _search(trainings, list(candidates), higher_is_better, baseline, lrs, search_seeds)
    runs = {name: [trainings.run(name, chosen.get(name), seed) for seed in numbers] for name in candidates}
    # Seed by seed, so that an interrupted comparison is a comparison of fewer seeds.
    trainings.finish("Comparison", [run for of_seed in zip(*runs.values(), strict=True) for run in of_seed])
    values = {name: trainings.values(of_seeds) for name, of_seeds in runs.items()}
    failures = trainings.failures
    return Comparison(
        metrics={name: dict(zip(higher_is_better, of.unbind(dim=1), strict=True)) for name, of in values.items()},
        higher_is_better=dict(higher_is_better),
        seeds=numbers,
        baseline=baseline,
        ms_per_step={name: trainings.ms_per_step(of_seeds) for name, of_seeds in runs.items()},
        learning_rates=chosen,
        failures={(run.candidate, run.seed): failures[run] for of in runs.values() for run in of if run in failures},
    )


def _search(
    trainings: Trainings,
    candidates: Sequence[str],
    higher_is_better: Mapping[str, bool],
    baseline: Baseline,
    lrs: Sequence[float],
    seeds: Sequence[int],
) -> dict[str, float]:
    """Return the learning rate of each candidate."""
    runs = {name: {lr: [trainings.run(name, lr, seed) for seed in seeds] for lr in lrs} for name in candidates}
    order = [runs[name][lr][place] for place in range(len(seeds)) for lr in lrs for name in candidates]
    trainings.finish("Search of learning rates", order)
    values = {name: {lr: trainings.values(of) for lr, of in of_lrs.items()} for name, of_lrs in runs.items()}
    signs = torch.tensor([1.0 if higher else -1.0 for higher in higher_is_better.values()])
    if isinstance(baseline, str):
        reference = yardstick(values[baseline])
    else:
        reference = torch.tensor([float(baseline[name]) for name in higher_is_better], dtype=torch.float64)
    return {name: choose_lr(of_lrs, reference, signs) for name, of_lrs in values.items()}


def _check(
    candidates: Mapping[str, Options],
    higher_is_better: Mapping[str, bool],
    seeds: Sequence[int],
    lrs: Sequence[float] | None,
    search_seeds: Sequence[int],
    processes: int,
) -> None:
    if not candidates:
        raise ValueError("`candidates` must have at least one entry, got none.")
    for name in candidates:
        check_unused(name, candidates[name])
    if not higher_is_better or not all(isinstance(flag, bool) for flag in higher_is_better.values()):
        raise ValueError(f"`higher_is_better` must have one bool per metric, got {dict(higher_is_better)!r}.")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"`seeds` must be a positive number, or different seeds, got {list(seeds)}.")
    if processes < 1:
        raise ValueError(f"`processes` must be at least 1, got {processes}.")
    if lrs is None:
        return
    if not lrs or not all(lr > 0 for lr in lrs) or len(set(lrs)) < len(lrs):
        raise ValueError(f"`lrs` must be different positive learning rates, got {list(lrs)}.")
    if not search_seeds or set(search_seeds) & set(seeds):
        raise ValueError(
            f"`search_seeds` must be seeds that the comparison does not use, got {list(search_seeds)} beside "
            f"{list(seeds)}. A learning rate chosen on the seeds of the table makes its results too optimistic."
        )
