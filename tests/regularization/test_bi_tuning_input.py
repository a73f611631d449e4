"""Arguments that Bi-Tuning rejects, with its errors, and unusual ones that it accepts."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from rotoopt import RotoGradOptimizer
from rotoopt.regularization import BiTuning
from rotoopt.regularization.bi_tuning import Classifier
from tests.contract.models import assert_same
from tests.regularization.bi_tuning_cases import (
    C,
    P,
    batch,
    encoder,
    fill,
    make,
)
from tests.regularization.networks import FEATURES, INPUTS, Backbone, state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"K": 0}, "`K` must be at least 1"),
        ({"m": 1.5}, r"`m` in \[0, 1\]"),
        ({"m": -0.1}, r"`m` in \[0, 1\]"),
        ({"T": 0.0}, "`T` positive"),
        ({"T": math.nan}, "`T` positive"),
    ],
)
def test_options_out_of_range_are_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def sharing_a_layer() -> tuple[Any, Any]:
    query, key = encoder(), encoder(1)
    key.projector = query.projector
    return query, key


def with_another_head() -> tuple[Any, Any]:
    query = encoder()
    query.head = nn.Linear(FEATURES, C, bias=False)  # type: ignore[assignment]
    return query, encoder(1)


def copied_with_rotations() -> tuple[Any, Any]:
    query = encoder()
    RotoGradOptimizer(SGD(query.parameters(), lr=0.1), heads=query.heads)
    return query, copy.deepcopy(query)


SAME = encoder()
BAD_ENCODERS: dict[str, tuple[Callable[[], tuple[Any, Any]], type[Exception], str]] = {
    "one module": (
        lambda: (SAME, SAME),
        ValueError,
        r"^`encoder_k` must have parameters of its own, got some .* Make a copy: copy.deepcopy\(encoder_q\)",
    ),
    "a shared layer": (sharing_a_layer, ValueError, "`encoder_k` must have parameters of its own"),
    "another projection": (
        lambda: (encoder(), Classifier(Backbone(), C, 9)),
        ValueError,
        r"got projector.weight: \(4, 6\) and \(9, 6\), projector.bias: \(4,\) and \(9,\). Use the same backbone",
    ),
    "another backbone": (
        lambda: (encoder(), Classifier(nn.Linear(INPUTS, FEATURES), C, P)),
        ValueError,
        r"must have the same parameters and buffers, got backbone.0.weight: \(6, 4\) and None",
    ),
    "other classes": (lambda: (encoder(), Classifier(Backbone(), 5, P)), ValueError, "`encoder_k` must have num_cl"),
    "no classifier": (
        lambda: (encoder(), nn.Linear(3, 3)),
        TypeError,
        "`encoder_k` must be a bi_tuning.Classifier with its own head, got a Linear. Bi-Tuning needs the outputs of",
    ),
    "another head": (with_another_head, TypeError, "`encoder_q` must be a bi_tuning.Classifier with its own head"),
    "rotations": (
        copied_with_rotations,
        ValueError,
        r"^`encoder_k` must not have rotations, got a copy .* Copy the encoder before RotoGradOptimizer is built, or",
    ),
}


@pytest.mark.parametrize("name", BAD_ENCODERS)
def test_encoders_that_do_not_fit_are_an_error_that_changes_nothing(name: str) -> None:
    encoders, error, message = BAD_ENCODERS[name]
    query, key = encoders()
    before = state(query), state(key)
    with pytest.raises(error, match=message):
        BiTuning(query, key, C)
    assert_same((state(query), state(key)), before)
    assert all(param.requires_grad for each in (query, key) for param in each.parameters())


BAD_BATCHES: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]], str]] = {
    "negative label": (lambda q, k, y: (q, k, y - 1), r"`labels` must be in 0\.\.2, got \[-1"),
    "large label": (lambda q, k, y: (q, k, y + 1), r"`labels` must be in 0\.\.2, got \[3\]"),
    "column of labels": (lambda q, k, y: (q, k, y[:, None]), r"of shape \(8,\), got torch.int64 of shape \(8, 1\)"),
    "too few labels": (lambda q, k, y: (q, k, y[:5]), r"of shape \(8,\), got torch.int64 of shape \(5,\)"),
    "soft labels": (lambda q, k, y: (q, k, F.one_hot(y).double()), "`labels` must be one class number per sample"),
    "fewer keys": (lambda q, k, y: (q, k[:5], y), "must be views of the same samples, got 8 and 5"),
}


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_batch_that_does_not_fit_is_an_error_that_changes_nothing(name: str) -> None:
    change, message = BAD_BATCHES[name]
    bi_tuning = make()
    fill(bi_tuning)
    before = state(bi_tuning)
    with pytest.raises(ValueError, match=message):
        bi_tuning(*change(*batch(9)))
    assert_same(state(bi_tuning), before)


@pytest.mark.parametrize("which", ["whole", "encoder_q"])
def test_eval_mode_is_an_error_that_says_what_to_call(which: str) -> None:
    bi_tuning = make()
    (bi_tuning if which == "whole" else bi_tuning.encoder_q).eval()
    message = "^BiTuning must be called in training mode, got eval mode. .* for predictions, call its encoder_q"
    with pytest.raises(RuntimeError, match=message):
        bi_tuning(*batch(0))


def test_empty_batch_is_no_error() -> None:
    bi_tuning = make()
    fill(bi_tuning)
    queues = bi_tuning.queue_h.clone(), bi_tuning.queue_ptr.clone()
    outputs = bi_tuning(*(each[:0] for each in batch(9)))
    assert [tuple(each.shape) for each in outputs] == [(0, C), *[(0, 1 + C * 4)] * 3]
    assert_same((bi_tuning.queue_h, bi_tuning.queue_ptr), queues)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_of_any_integer_type(dtype: torch.dtype) -> None:
    bi_tuning, other = make(), make()
    x_q, x_k, labels = batch(0)
    assert_same(other(x_q, x_k, labels.to(dtype)), bi_tuning(x_q, x_k, labels))
