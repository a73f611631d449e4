"""Inputs: heads get containers of the types that they were called with."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.optim import SGD
from torch.testing import assert_close

from rotoopt import RotoGradOptimizer
from tests.asserts import assert_reads_well

D = 6


class Output(OrderedDict[str, Tensor]):
    """A dict like the ``ModelOutput`` of transformers."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError("You cannot use update()")


class EasyDict(dict[str, Tensor]):
    """A dict whose items are attributes."""

    note = "nothing"

    def __getattr__(self, name: str) -> Tensor:
        return self[name]


class Levels(list[Tensor]):
    """A list with an attribute."""

    names: tuple[str, ...] = ()


class Pair(NamedTuple):
    """Two tensors."""

    z: Tensor
    other: Tensor


@dataclass
class Features:
    """A class that is registered as a pytree."""

    z: Any
    scale: float = 2.0


torch.export.register_dataclass(Features, serialized_type_name="tests.Features")


@dataclass(frozen=True)
class Record:
    """A dataclass that torch does not know, with a field that may be missing."""

    z: Any
    scale: float = 2.0
    made: Tensor = field(init=False)


@dataclass(slots=True)
class Slots:
    """A dataclass without a dict of attributes."""

    z: Tensor
    scale: float = 2.0


class OwnPair(Pair):
    """A named tuple with another constructor."""

    def __new__(cls, z: Tensor) -> OwnPair:
        return super().__new__(cls, z, torch.ones(1))


class Boxes(tuple[Tensor, ...]):
    """A tuple with another constructor, and with an attribute."""

    scale: float

    def __new__(cls, first: Tensor, second: Tensor) -> Boxes:
        made = super().__new__(cls, (first, second))
        made.scale = 2.0
        return made


def levels(z: Tensor) -> Levels:
    made = Levels([z])
    made.names = ("p3",)
    return made


CONTAINERS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "list": (lambda z: [z], lambda x: x[0]),
    "list with attribute": (levels, lambda x: x[x.names.index("p3")]),
    "tuple": (lambda z: (z, None), lambda x: x[0]),
    "named tuple": (lambda z: Pair(z, torch.ones(1)), lambda x: x.z * x.other),
    "named tuple that is made otherwise": (OwnPair, lambda x: x.z * x.other),
    "tuple that is made otherwise": (lambda z: Boxes(z, torch.ones(1)), lambda x: x[0] * x[1] * x.scale),
    "tuple of torch": (lambda z: z.topk(D), lambda x: x.values),
    "packed sequence": (lambda z: pack_sequence(list(z[:, None])), lambda x: x.data),
    "dict": (lambda z: {"z": z, 3: "three"}, lambda x: x["z"]),
    "ordered dict": (lambda z: OrderedDict(other=1, z=z), lambda x: x["z"]),
    "default dict": (lambda z: defaultdict(list, z=z), lambda x: x["z"] + sum(x["none"])),
    "model output": (lambda z: Output(last=z), lambda x: x.last),
    "user dict": (lambda z: UserDict(z=z), lambda x: x["z"]),
    "easy dict": (lambda z: EasyDict(z=z), lambda x: x.z),
    "dataclass": (Features, lambda x: x.z * x.scale),
    "dict in a dataclass": (lambda z: Features({"a": z}), lambda x: x.z["a"] * x.scale),
    "dataclass with slots": (Slots, lambda x: x.z * x.scale),
    "frozen dataclass": (Record, lambda x: x.z * x.scale),
    "dataclass in a dataclass": (lambda z: Record(Features([z])), lambda x: x.z.z[0] * x.scale),
    "deque": (lambda z: deque([z], maxlen=2), lambda x: x[0]),
    "nested": (lambda z: [{"a": (Output(last=z), 1)}], lambda x: x[0]["a"][0].last),
}


class Head(nn.Module):
    """Records its arguments."""

    def __init__(self, read: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.out, self.read = nn.Linear(D, 2), read

    def forward(self, inputs: Any) -> Tensor:
        self.got = inputs
        out: Tensor = self.out(self.read(inputs))
        return out


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_keep_their_types(name: str, keyword: bool) -> None:
    make, read = CONTAINERS[name]
    backbone, heads = nn.Linear(5, D), [Head(read), Head(read)]
    params = [*backbone.parameters(), *nn.ModuleList(heads).parameters()]
    optimizer = RotoGradOptimizer(SGD(params, lr=0.01), heads, init="haar", rotation_size=D)
    for _ in range(2):
        inputs = make(backbone(torch.randn(4, 5)))
        z = read(inputs).detach().clone()
        optimizer.zero_grad()
        losses = [(head(inputs=inputs) if keyword else head(inputs)).square().mean() for head in heads]
        assert_close(read(heads[0].got), z @ optimizer.rotations[0].mT)
        assert_close(read(inputs), z)  # the user's containers are unchanged
        optimizer.step(losses)
        assert backbone.weight.grad is not None
        for head in heads:
            assert type(head.got) is type(inputs)
    heads[0].eval()(inputs)
    assert type(heads[0].got) is type(inputs)
    assert_close(read(heads[0].got), z @ optimizer.rotations[0].mT)


@pytest.mark.parametrize("name", [name for name in CONTAINERS if name not in ("deque", "tuple of torch")])
def test_rep_may_be_what_the_heads_got(name: str) -> None:
    make, read = CONTAINERS[name]
    backbone, heads = nn.Linear(5, D), [Head(read), Head(read)]
    params = [*backbone.parameters(), *nn.ModuleList(heads).parameters()]
    optimizer = RotoGradOptimizer(SGD(params, lr=0.01), heads, rotation_size=D)
    inputs, others = make(backbone(torch.randn(4, 5))), make(torch.randn(4, D))
    losses = [head(inputs).square().mean() for head in heads]
    with pytest.raises(ValueError, match=r"^`rep` must be what entered the heads, got a tensor of shape"):
        optimizer.step(losses, others)
    optimizer.step(losses, inputs)


class Frozen(dict[str, Tensor]):
    """A dict whose items cannot be set."""

    def __setitem__(self, key: str, value: Tensor) -> NoReturn:
        raise TypeError("it is frozen")


def test_a_dict_that_cannot_be_copied_is_rejected_if_it_would_change() -> None:
    heads = [Head(lambda x: x["z"]), Head(lambda x: x["z"])]
    optimizer = RotoGradOptimizer(SGD(nn.ModuleList(heads).parameters(), lr=0.1), heads, init="haar", rotation_size=D)
    z = torch.randn(4, D, requires_grad=True)
    with pytest.raises(TypeError, match=r"^A dict or .* got a Frozen \(it is frozen\)\. Pass a dict") as raised:
        heads[0](Frozen(z=z))
    assert_reads_well(str(raised.value))
    masks, names = Frozen(mask=torch.ones(4, 1)), [deque(["first"])]
    heads[0]({"z": z, "masks": masks, "names": names})
    assert heads[0].got["masks"] is masks
    assert heads[0].got["names"] is names
    assert optimizer.rotations.size == D
