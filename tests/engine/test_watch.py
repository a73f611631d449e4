"""Who is warned of: heads that fall silent, and parameters that stay as they were, neither sooner nor twice."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD

from rotoopt._engine.arguments import Parts
from rotoopt._engine.watch import SILENT_STEPS, UNTRAINED_STEPS, SilentHeads, UntrainedHeads

NAMES = ("a", "b", "c")
BLOCK = st.tuples(st.integers(1, SILENT_STEPS + 2), st.booleans(), st.sets(st.integers(0, 2)))


def warned(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in record]


@given(blocks=st.lists(BLOCK, min_size=1, max_size=6))
def test_each_silence_of_a_head_in_backward_passes_of_ones_own_is_reported_once(
    blocks: list[tuple[int, bool, set[int]]],
) -> None:
    watch, silence = SilentHeads(NAMES), dict.fromkeys(range(3), 0)
    for own, tasks in [(own, tasks) for length, own, tasks in blocks for _ in range(length)]:
        # A step of ours beside one of the user's is still one in which nobody said who is absent.
        passes: Any = [
            SimpleNamespace(tasks=tasks, number=None),
            SimpleNamespace(tasks=set(), number=3 if own else None),
        ]
        expected = []
        for task in range(3):
            silence[task] = 0 if task in tasks else silence[task] + own
            if own and task not in tasks and silence[task] == SILENT_STEPS:
                expected.append(f"Every head should deliver a gradient, got none from {NAMES[task]} in {SILENT_STEPS} ")
        found = warned(lambda passes=passes: watch.observe(passes))  # type: ignore[misc]
        assert len(found) == len(expected)
        assert all(message.startswith(start) for message, start in zip(found, expected, strict=True))


FATE = st.sampled_from(["ours", "another's", "data", "frozen", "frozen later", "nobody's"])
FATES = st.lists(FATE, min_size=6, max_size=6)


@given(fates=FATES)
def test_parameters_of_heads_that_nobody_updates_are_named_after_some_steps(fates: list[str]) -> None:
    heads: list[Parts] = [
        (nn.Linear(2, 2),),
        (nn.Linear(2, 2, bias=False), nn.Parameter(torch.ones(2))),
        (nn.Linear(2, 1),),
    ]
    named: dict[str, nn.Parameter] = {}
    for name, parts in zip(NAMES, heads, strict=True):
        for number, part in enumerate(parts):
            of = f" of {name}" if len(parts) == 1 else f" of {name}[{number}]"
            inside = [("a parameter", part)] if isinstance(part, nn.Parameter) else part.named_parameters()
            named |= {key + of: param for key, param in inside}
    by_fate = {
        fate: [param for param, its in zip(named.values(), fates, strict=True) if its == fate] for fate in set(fates)
    }
    for param in by_fate.get("frozen", []):
        param.requires_grad_(False)
    backbone = nn.Parameter(torch.ones(1))
    watch = UntrainedHeads(SGD([backbone, *by_fate.get("ours", [])], lr=0.1), heads, NAMES)
    for step in range(2 * UNTRAINED_STEPS):
        if step == 1:
            for param in by_fate.get("frozen later", []):
                param.requires_grad_(False)
        if step == 2:  # once is enough
            with torch.no_grad():
                for param in by_fate.get("another's", []):
                    param.mul_(2)
            for param in by_fate.get("data", []):
                param.data.mul_(2)
        expected = [key for key, its in zip(named, fates, strict=True) if its == "nobody's"]
        found = warned(watch.observe)
        if step == UNTRAINED_STEPS - 1 and expected:
            assert len(found) == 1
            assert f"got {', '.join(expected)} as they were {UNTRAINED_STEPS} steps ago" in found[0]
        else:
            assert found == []
