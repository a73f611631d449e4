"""The page on compatibility lists what is refused; each of it raises the error whose beginning is quoted there."""

from __future__ import annotations

import re
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from rotoopt import RotoGradOptimizer
from rotoopt.testing._branching.model import Call, square
from tests.contract.models import back_propagate

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"


class Model:
    """A backbone and the heads a and b.

    Args:
        shape: That of the features of a sample.
        make: Makes a head.
        options: Those of the optimizer.
    """

    def __init__(
        self, shape: tuple[int, ...] = (6,), make: Callable[[], nn.Module] = lambda: nn.Linear(6, 6), **options: Any
    ) -> None:
        self.backbone = nn.Sequential(nn.Linear(5, torch.Size(shape).numel()), nn.Unflatten(1, shape))
        self.a, self.b = make(), make()
        params = [*self.backbone.parameters(), *self.a.parameters(), *self.b.parameters()]
        self.optimizer = RotoGradOptimizer(SGD(params, lr=0.1), {"a": self.a, "b": self.b}, **options)
        self.x = torch.randn(4, 5)

    def z(self) -> Tensor:
        z: Tensor = self.backbone(self.x)
        return z

    def step(self, *outputs: Tensor) -> None:
        self.optimizer.step([square(output) for output in outputs])

    def run(self) -> None:
        z = self.z()
        self.step(self.a(z), self.b(z))


def consistency() -> None:
    model = Model()
    z = model.z()
    model.step(model.a(z) - model.b(z), model.b(z))


def cascade() -> None:
    model = Model()
    z = model.z()
    output = model.a(z)
    model.step(output, model.b(output))


def bypass() -> None:
    model = Model()
    z = model.z()
    model.step(model.a(z) + z, model.b(z))


def picked() -> None:
    model = Model()
    z = model.z()
    outputs = torch.stack([model.a(z), model.b(z)], dim=1)
    back_propagate([outputs[torch.arange(4), torch.arange(4) % 2].square().mean()])


def sparse() -> None:
    Model().a(Model().z().to_sparse())


def container(pack: Callable[[Tensor], Any]) -> None:
    head = Call(lambda layers, packed: layers["out"](packed["z"] if isinstance(packed, UserDict) else packed.z))
    head.layers["out"] = nn.Linear(6, 2)
    RotoGradOptimizer(SGD(head.parameters(), lr=0.1), [head, nn.Linear(6, 2)])
    head(pack(Model().z()))


class Fixed(dict[str, Tensor]):
    """A dict that cannot be changed."""

    def __setitem__(self, key: str, value: Tensor) -> None:
        raise TypeError("fixed")


def reentrant() -> None:
    model, middle = Model(), nn.Linear(6, 6)
    model.optimizer.add_param_group({"params": middle.parameters()})
    model.x.requires_grad_()
    early = checkpoint(model.backbone, model.x, use_reentrant=True)
    z = middle(early)
    model.step(model.a(z) + early, model.b(z))


class UPGrad(nn.Module):
    """An aggregator."""

    def forward(self, gradients: Tensor) -> Tensor:
        return gradients.sum(0)

    def __repr__(self) -> str:
        return "UPGrad()"


def aggregator() -> None:
    model = Model(weighting=UPGrad())
    z = model.z()
    model.step(model.a(z), model.b(z * 2))


def discriminator() -> None:
    model, other = Model(), Model()
    a, b = model.a(model.z()), model.b(model.z())
    model.step(other.a(a), b)


def recurrent() -> None:
    model = Model()
    z = model.z()
    model.step(model.a(model.a(z)), model.b(z))


def one_by_one() -> None:
    model = Model()
    z = model.z()
    losses = [square(model.a(z)), square(model.b(z))]
    losses[0].backward(retain_graph=True)  # type: ignore[no-untyped-call]
    losses[1].backward()  # type: ignore[no-untyped-call]


REFUSED: dict[str, Callable[[], object]] = {
    "The loss of a must be computed from the output of its own head, got one that passes through that of b, too": (
        consistency
    ),
    "Heads must read the backbone, got b, which reads an output of the head of a": cascade,
    "A loss must pass through heads of the optimizer that it is given to": discriminator,
    "A parameter that tasks share must be reached through their heads, got backbone.0.weight": bypass,
    "The loss of a must be computed from the output of its own head": picked,
    "The representation must be a dense tensor": sparse,
    "A floating-point tensor must enter a head": lambda: container(lambda z: SimpleNamespace(z=z)),
    "A dict or dataclass with inputs of a head must support copy.copy() and setting items": lambda: container(
        lambda z: Fixed(z=z)
    ),
    "Losses must reach shared parameters through their heads, got the output of a re-entrant checkpoint": reentrant,
    "The weighting UPGrad() must see the gradients of all tasks at one tensor": aggregator,
    "An input of a head must always be the representation, or never": recurrent,
    "The losses of one forward pass must be back-propagated together and once": one_by_one,
    "`dim` must be given for a representation of four or more dimensions": lambda: Model((2, 2, 6)).run(),
    "`dim` must be given for a representation whose features are not in its last dimension": lambda: Model(
        (6, 4), lambda: nn.Conv1d(6, 2, 1)
    ).run(),
    "`dim` must be given for a representation of one dimension": lambda: Model().a(torch.ones(6)),
}


def quoted() -> list[str]:
    _, _, section = PAGE.read_text(encoding="utf-8").partition("These models raise an error")
    table, _, _ = section.partition("\n\nWhich inputs")
    return re.findall(r" \| ([^|]*) \|$", table, re.MULTILINE)[1:]


def test_page_quotes_these_errors() -> None:
    assert sorted(quoted()) == sorted(REFUSED)


@pytest.mark.parametrize("message", REFUSED, ids=lambda message: re.sub(r"\W+", " ", message)[:60])
def test_error_is_raised(message: str) -> None:
    name = re.escape(message).replace("backbone\\.0\\.weight", r"[\w.]*0\.(weight|bias)")
    with pytest.raises((RuntimeError, TypeError, ValueError), match=f"^{name}"):
        REFUSED[message]()


def test_stages_that_read_the_predictions_of_all_tasks_name_another_task() -> None:
    """The second module of each task reads the outputs of both first ones: a cascade rather than a loop."""
    backbone, first, second = (
        nn.Linear(5, 6),
        [nn.Linear(6, 6) for _ in range(2)],
        [nn.Linear(6, 6) for _ in range(2)],
    )
    heads = dict(zip("ab", zip(first, second, strict=True), strict=True))
    params = nn.ModuleList([backbone, *first, *second]).parameters()
    optimizer = RotoGradOptimizer(SGD(params, lr=0.1), heads)
    z = backbone(torch.randn(4, 5))
    predictions = [head(z) for head in first]
    refined = [head(z + sum(predictions)) for head in second]
    with pytest.raises(RuntimeError, match=r"^Heads must read the backbone, got a, which reads .* of the head of b"):
        optimizer.step([square(p) + square(r) for p, r in zip(predictions, refined, strict=True)])


def test_a_head_that_reads_what_a_hook_has_taken_from_another_one() -> None:
    """As a second classifier on the features of the first one: they are rotated there."""
    model, taken = Model(), []
    model.a.register_forward_hook(lambda _, args, __: taken.append(args[0]))
    out = model.a(model.z())
    with pytest.raises(RuntimeError, match="if a hook takes what enters a, which is rotated there, take the output of"):
        model.step(out, model.b(taken[0]))


def test_losses_that_were_added_up_in_place() -> None:
    """As for a log: the first loss is then the sum."""
    model = Model()
    z = model.z()
    losses = [square(model.a(z)), square(model.b(z))]
    total = losses[0]
    total += losses[1]
    with pytest.raises(RuntimeError, match=r"The loss of a must be .* \(e\) if losses were added up in place"):
        model.optimizer.step(losses)
