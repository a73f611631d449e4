"""Wrong losses and wrong calls of ``step`` and ``backward``."""

from functools import partial

import torch

from rotoopt import GradNorm
from tests.bad_input.cases import Case, check, parametrize, representation

KIND = "`losses` must be a sequence with one loss per task, or a mapping from task names, got"
SCALAR = r"Every loss must be a scalar, got shape \(5, 2\) for"
GRAPH = "Every loss must have a graph, got one without for"
COUNT = "`losses` must have one entry per task, got"
SEE = r"(GradNorm\(alpha=1\.5\)|normalize_losses=True) must see the losses, got none\. Call optimizer\.step"

LOSSES = {
    "too few": Case(ValueError, f"{COUNT} 1 for 2 tasks. Put None", lambda m, o: lambda: o.step(m.losses(5)[0][:1])),
    "too many": Case(
        ValueError,
        f"{COUNT} 4 for 2 tasks. Add the losses of one head. To weight them against each other, list the modules that",
        lambda m, o: lambda: o.step(m.losses(5)[0] * 2),
    ),
    "empty": Case(ValueError, f"{COUNT} 0 for 2 tasks", lambda m, o: lambda: o.step([])),
    "all absent": Case(
        ValueError, "must have at least one loss, got only None", lambda m, o: lambda: o.step([None, None])
    ),
    "no names": Case(ValueError, "must have at least one loss", lambda m, o: lambda: o.step({})),
    "unknown names": Case(
        ValueError,
        r"`losses` must be named after the tasks \['left', 'right'\], got \['lfet'\] as well. To name tasks",
        lambda m, o: lambda: o.step({"lfet": m.losses(5)[0][0], "right": m.losses(5)[0][1]}),
    ),
    "numbered": Case(
        ValueError,
        r"named after the tasks .*, got \[0, 1\]",
        lambda m, o: lambda: o.step(dict(enumerate(m.losses(5)[0]))),
    ),
    "sum": Case(
        TypeError,
        r"`losses` must be a sequence .* or a tensor of shape \(K,\), got a tensor of shape \(\). Pass the K losses",
        lambda m, o: lambda: o.step(sum(m.losses(5)[0])),
    ),
    "stacked too many": Case(
        ValueError, f"{COUNT} 4 for 2 tasks", lambda m, o: lambda: o.step(torch.stack(m.losses(5)[0] * 2))
    ),
    "one by one": Case(TypeError, r"got a tensor of shape \(\)", lambda m, o: lambda: o.step(*m.losses(5)[0])),
    "rep first": Case(TypeError, r"got a tensor of shape \(5, 6\)", lambda m, o: lambda: o.step(*m.losses(5)[::-1])),
    "number": Case(TypeError, f"{KIND} a float", lambda m, o: lambda: o.step(0.5)),
    "none": Case(TypeError, f"{KIND} a NoneType", lambda m, o: lambda: o.backward(None)),
    "set": Case(TypeError, f"{KIND} a set", lambda m, o: lambda: o.step(set(m.losses(5)[0]))),
    "text": Case(TypeError, f"{KIND} a str", lambda m, o: lambda: o.step("losses")),
    "numbers": Case(
        TypeError,
        r"`losses` must be tensors or None, got a float for left\. Pass the loss itself, not loss\.item\(\); None if",
        lambda m, o: lambda: o.step([loss.item() for loss in m.losses(5)[0]]),
    ),
    "class": Case(
        TypeError, "got the class Tensor for right", lambda m, o: lambda: o.step([m.losses(5)[0][0], torch.Tensor])
    ),
    "per sample": Case(
        ValueError,
        f"{SCALAR} right. Reduce it, as with loss.mean",
        lambda m, o: lambda: o.step([m.losses(5)[0][0], m(m.inputs(5))[1]]),
    ),
    "detached": Case(
        ValueError,
        rf"{GRAPH} left. Either \(a\) it was detached or read with .item\(\)",
        lambda m, o: lambda: o.step([loss.detach() for loss in m.losses(5)[0]]),
    ),
    "by position and by keyword": Case(
        TypeError,
        "`losses` must be given once, got them by position and by keyword",
        lambda m, o: lambda: o.step(m.losses(5)[0], losses=m.losses(5)[0]),
    ),
    "rep alone": Case(
        TypeError,
        "`rep` and `backbone_loss` must come with `losses`, got none",
        lambda m, o: lambda: o.step(rep=representation(m)),
    ),
    "backbone_loss alone": Case(
        TypeError, "must come with `losses`", lambda m, o: lambda: o.step(backbone_loss=representation(m).sum())
    ),
    "rep with a closure": Case(
        TypeError, "must come with `losses`", lambda m, o: lambda: o.step(lambda: 0.0, representation(m))
    ),
    "rep is a number": Case(
        TypeError,
        "`rep` must be the shared representation, a tensor or several in lists, tuples and dicts, got a list",
        lambda m, o: lambda: o.step(m.losses(5)[0], [1.0]),
    ),
    "rep is the input": Case(
        ValueError,
        r"`rep` must be what entered the heads, got a tensor of shape \(5, 3\) that did not. What did: left: \(5, 6\)",
        lambda m, o: lambda: o.step(m.losses(5)[0], m.inputs(5)),
    ),
    "rep is made of the representation": Case(
        ValueError,
        r"`rep` must be what entered the heads, got a tensor of shape \(5, 6\) that did not. What did: left: \(5, 6\)",
        lambda m, o: lambda: o.step((made := m.losses(5))[0], 2 * made[1]),
    ),
    "backbone_loss is a number": Case(
        TypeError,
        "`backbone_loss` must be a tensor or None, got a float",
        lambda m, o: lambda: o.step(*m.losses(5), backbone_loss=0.0),
    ),
    "backbone_loss per sample": Case(
        ValueError,
        r"must be a scalar, got shape \(5, 6\) for `backbone_loss`",
        lambda m, o: lambda: o.step(*m.losses(5), backbone_loss=representation(m)),
    ),
    "backbone_loss without graph": Case(
        ValueError,
        f"{GRAPH} `backbone_loss`",
        lambda m, o: lambda: o.backward(*m.losses(5), backbone_loss=torch.tensor(1.0)),
    ),
    "GradNorm without losses": Case(
        RuntimeError,
        SEE,
        lambda m, o: lambda: torch.autograd.backward(m.losses(5)[0]),
        {"weighting": GradNorm},
        inside=True,
    ),
    "normalize_losses without losses": Case(
        RuntimeError,
        SEE,
        lambda m, o: lambda: torch.autograd.backward(m.losses(5)[0]),
        {"normalize_losses": lambda: True},
        inside=True,
    ),
    "weighting returns a matrix": Case(
        ValueError,
        r"`weighting` must map a \(K, n\) tensor to an \(n,\) tensor, got \(2, 30\) for \(2, 30\)",
        lambda m, o: partial(o.step, *m.losses(5)),
        {"weighting": lambda: lambda grads: grads},
        later=False,
        inside=True,
        fatal=True,
    ),
    "weighting returns weights": Case(
        ValueError,
        r"to an \(n,\) tensor, got list for \(2, 30\)",
        lambda m, o: partial(o.step, *m.losses(5)),
        {"weighting": lambda: lambda grads: [0.5, 0.5]},
        later=False,
        inside=True,
        fatal=True,
    ),
}


@parametrize(LOSSES)
def test_losses(case: Case, steps: int) -> None:
    check(case, steps)
