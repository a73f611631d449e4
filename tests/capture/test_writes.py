"""Heads that write to the containers that they get: the caller sees what they wrote, as without a rotation."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.testing import assert_close

from rotoopt import RotoGradOptimizer
from rotoopt.testing import check_invariants

D = 6

DICT_WRITES = {
    "new key": lambda d, out: d.update(out=out),
    "over z": lambda d, out: d.update(z=out),
    "over another": lambda d, out: d.update(other=out),
    "remove z": lambda d, out: d.pop("z"),
    "remove another": lambda d, out: d.pop("other", None),
    "nested": lambda d, out: d["nested"][0].update(out=out),
    "append": lambda d, out: d["nested"].append(out),
    "over a tuple": lambda d, out: d.update(pair=(out,)),
    "in a tuple": lambda d, out: d.update(pair=(out, d["pair"][1])),
    "nothing": lambda d, out: None,
}
LIST_WRITES = {
    "over z": lambda x, out: x.__setitem__(0, out),
    "append": lambda x, out: x.append(out),
    "pop": lambda x, out: x.pop(),
    "pop first": lambda x, out: x.pop(0),
    "reverse": lambda x, out: x.reverse(),
    "nothing": lambda x, out: None,
}
OBJECT_WRITES = {
    "new attribute": lambda x, out: setattr(x, "out", out),
    "over z": lambda x, out: setattr(x, "z", out),
    "remove another": lambda x, out: delattr(x, "other"),
    "in a list": lambda x, out: x.nested.append(out),
    "nothing": lambda x, out: None,
}
RETURNS = {
    "inputs": lambda inputs, out: inputs,
    "pair": lambda inputs, out: (out, inputs),
    "out": lambda inputs, out: out,
    "new dict": lambda inputs, out: {"out": out},
    "new list": lambda inputs, out: (out, [out]),
    "none": lambda inputs, out: None,
}


@dataclass
class Batch:
    """What goes through all modules of a model."""

    z: Any
    other: Any
    nested: Any


class Writer(nn.Module):
    """Writes to its input, and returns it or not."""

    def __init__(self, write: Any, returned: Any) -> None:
        super().__init__()
        self.layer, self.write, self.returned = nn.Linear(D, 2), write, returned

    def forward(self, inputs: Any) -> Any:
        z = inputs.z if isinstance(inputs, Batch) else inputs["z"] if isinstance(inputs, dict) else inputs[0]
        out = self.layer(z)
        self.write(inputs, out)
        return self.returned(inputs, out)


def described(value: Any, names: dict[int, str]) -> Any:
    """Return ``value`` with tensors replaced by names of the original ones, or by their values."""
    value = vars(value) if isinstance(value, Batch) else value
    if isinstance(value, dict):
        return {key: described(each, names) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *[described(each, names) for each in value]]
    return names.get(id(value), value.tolist()) if isinstance(value, Tensor) else value


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("returned", RETURNS)
@pytest.mark.parametrize(
    "write", [*DICT_WRITES.items(), *LIST_WRITES.items(), *OBJECT_WRITES.items()], ids=lambda each: each[0]
)
def test_callers_see_what_heads_write(write: Any, returned: str, training: bool) -> None:
    name, change = write
    is_dict, is_object = change in DICT_WRITES.values(), change in OBJECT_WRITES.values()
    plain = Writer(change, RETURNS[returned])
    backbone, wrapped = nn.Linear(5, D), copy.deepcopy(plain)
    params = [*backbone.parameters(), *wrapped.parameters()]
    RotoGradOptimizer(SGD(params, lr=0.1), [wrapped, nn.Linear(D, 1)], rotation_size=D)
    z, other, x = backbone(torch.randn(4, 5)), backbone(torch.randn(4, 5)), torch.randn(3)
    names = {id(z): "z", id(other): "other", id(x): "x"}
    found = []
    for head in (plain.train(training), wrapped.train(training)):
        more = {"z": z, "other": other, "x": x, "pair": (z, x), "nested": [{"z": z}, x]}
        inputs: Any = more if is_dict else Batch(z, [other], [x, z]) if is_object else [z, other, x, (z, x)]
        output = head(inputs)
        same = output is inputs or (isinstance(output, tuple) and output[1] is inputs)
        writes = name != "nothing"
        found.append((described(inputs, names), same and writes, described(output, names) if writes else None))
    assert found[0] == found[1]


@pytest.mark.parametrize("key", ["z", 0])
def test_a_head_that_returns_its_input_unchanged_returns_rotated_tensors(key: Any) -> None:
    backbone, head = nn.Linear(5, D), Writer(DICT_WRITES["nothing"], RETURNS["inputs"])
    params = [*backbone.parameters(), *head.parameters()]
    optimizer = RotoGradOptimizer(SGD(params, lr=0.1), [head, nn.Linear(D, 1)], rotation_size=D, init="haar")
    z = backbone(torch.randn(4, 5))
    inputs: Any = {"z": z} if key == "z" else [z]
    assert_close(head(inputs)[key], z @ optimizer.rotations[0].mT)
    assert inputs[key] is z


class Detector(nn.Module):
    """Adds its predictions to the dict that goes through all modules of a model."""

    def __init__(self, name: str, size: int, *, returns: bool) -> None:
        super().__init__()
        self.layer, self.name, self.returns = nn.Linear(D, size), name, returns

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor] | None:
        batch[self.name] = self.layer(batch["features"])
        return batch if self.returns else None


class Pipeline(nn.Module):
    """A model whose modules read from one dict, and write to it."""

    def __init__(self, *, returns: bool) -> None:
        super().__init__()
        self.backbone = nn.Linear(5, D)
        self.boxes, self.scores = Detector("boxes", D, returns=returns), Detector("scores", 3, returns=returns)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        batch = {"x": x}
        batch["features"] = self.backbone(x)
        for head in (self.boxes, self.scores):
            batch = head(batch) or batch
        return batch


@pytest.mark.parametrize("returns", [True, False])
def test_one_dict_for_all_modules(returns: bool) -> None:
    model = Pipeline(returns=returns).double()
    before, x = copy.deepcopy(model), torch.randn(7, 5, dtype=torch.float64)
    optimizer = RotoGradOptimizer(
        SGD(model.parameters(), lr=0.05), {"boxes": model.boxes, "scores": model.scores}, turn_every=1, rotation_lr=0.3
    )
    assert_close(model(x), before(x), rtol=0, atol=0)

    def losses() -> dict[str, Tensor]:
        batch = model(x)
        return {"boxes": (batch["boxes"] - x[:, :1]).square().mean(), "scores": 3 * (batch["scores"] - 1).abs().mean()}

    for _ in range(5):
        optimizer.zero_grad()
        with optimizer.paused():
            grads = [torch.autograd.grad(loss, model.backbone.weight, retain_graph=True) for loss in losses().values()]
        optimizer.backward(losses())
        assert optimizer.last_step is not None
        expected = sum(w * grad for w, (grad,) in zip(optimizer.last_step.weights.tolist(), grads, strict=True))
        assert model.backbone.weight.grad is not None
        assert_close(model.backbone.weight.grad, expected)
        optimizer.step()
    check_invariants(optimizer, losses)
    model.eval()
    batch, z = model(x), model.backbone(x)
    assert_close(batch["features"], z, rtol=0, atol=0)  # not rotated
    for k, head in enumerate((model.boxes, model.scores)):
        rotation = optimizer.rotations.matrices[k].double()
        assert_close(batch[head.name], head.layer(z @ rotation.mT))
    with pytest.warns(UserWarning, match="should begin with a linear layer"):
        optimizer.fold()
    assert_close(model(x), batch)
