"""Writes numbers.json and toy.json: results of the official rotograd 0.1.6.0, for tests to compare with.

    python -c 'from tests.benchmarks.official_rotograd import make_environment; make_environment()'
    .venv-official/bin/python -m tests.official.generate

Run it from the root of the repository and as a module: if it is run as a file, numbers.py in this folder hides that of
the standard library. The first line creates the environment, pinned to torch 2.13.0, geotorch 0.3.0 and rotograd
0.1.6.0; it works with any Python that has torch.

Both files are read by :mod:`tests.official.numbers`, whose classes describe every entry. All is float64: torch's
default dtype is set to it, since ``model.double()`` of the official package does not reach the network. What goes in is
exact (3 decimals; all digits of the matrices that rotations start from); what comes out has 10 significant digits.

numbers.json has, for every case of :mod:`tests.official.specs`, six batches and what ``model.backward(losses)`` made of
each. No parameter is updated, and gradients are set to None in between, so a step depends on earlier ones only by the
references that the package takes at the first step and at step ``burn_in_period``, counted from 0.

What to know of the official package when comparing (version 0.1.6.0, R_k the rotations, G_k the gradients at the
representation, B the batch size):

- Its rotations are ``base @ expm(A)``, A the skew matrix that the lower triangle of ``original`` makes. The upper one
  is not zero here, as it is in training, and must not matter.
- The gradient at ``original`` is that of the paper's rotation loss, eq. 3, times 2 ||mean of the G_k||, where
  ``rotation_shape`` stands for all dimensions but the first: (B, d), rotated as a whole or in part, and flattened maps.
  Where there are other dimensions (tokens; channels alone), it is that over B.
- The losses that GradNorm compares are those over their references, whether ``normalize_losses`` is set or not.

toy.json has the package on the example of its repository, in the settings of ``tests.official.networks``: the losses
at every twentieth of 400 steps. All three models of a seed start from the same network and the same rotations.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import ExponentialLR

from tests.official import networks
from tests.official.networks import INPUT_SHAPES, Network
from tests.official.specs import CASES, Spec

FOLDER = Path(__file__).parent
NUM_STEPS = 6
NUM_TOY_SEEDS = 5
TOY_OPTIONS = {"rotation_shape": 2, "normalize_losses": True}


def official(name: str, network: Network, options: dict[str, Any]) -> Any:
    """Return an official model of ``network``, with random rotations."""
    import rotograd  # type: ignore[import-not-found] # only in its own environment

    return getattr(rotograd, name)(network.backbone, list(network.heads), **options)  # it changes the list of heads


def short(tensor: Tensor) -> Tensor:
    return tensor.round(decimals=3)


def rounded(value: Any) -> Any:
    """Return nested lists of numbers with 10 significant digits; what was a tuple is marked as one."""
    if isinstance(value, Tensor):
        return rounded(value.tolist())
    if isinstance(value, tuple):
        return {"tuple": [rounded(each) for each in value]}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.10g}") + 0.0  # the latter makes -0 a 0


def exact(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def gradients(module: nn.Module) -> dict[str, Any]:
    return {name: rounded(param.grad) for name, param in module.named_parameters()}


def run_case(spec: Spec) -> dict[str, Any]:
    """Return the entry of a case: see :class:`tests.official.numbers.Case`."""
    network = networks.build(spec.kind, spec.size, len(spec.loss_scales))
    model = official(spec.model, network, spec.options)
    with torch.no_grad():
        for param in network.parameters():
            param.copy_(short(param))
        for param in model.parameters():
            param.copy_(short(0.3 * torch.randn_like(param)))
    return {
        "model": spec.model,
        "options": spec.options,
        "kind": spec.kind,
        "size": spec.size,
        "loss_scales": spec.loss_scales,
        "parameters": exact(network.state_dict()),
        "state": exact(model.state_dict()),
        "rotations": [rounded(R.detach()) for R in model.rotation] if hasattr(model, "rotation") else None,
        "weights": [rounded(w.item()) for w in model.weight] if hasattr(model, "weight") else None,
        "steps": [run_step(spec, network, model) for _ in range(NUM_STEPS)],
    }


def run_step(spec: Spec, network: Network, model: Any) -> dict[str, Any]:
    """Return the entry of a step on a new batch: see :class:`tests.official.numbers.Step`."""
    network.zero_grad()
    model.zero_grad()
    inputs = short(torch.randn(INPUT_SHAPES[spec.kind]))
    outputs = model(inputs)
    predictions, extra_outputs = outputs if isinstance(outputs, tuple) else (outputs, [])
    targets = [short(torch.randn_like(prediction)) for prediction in predictions]
    losses = networks.task_losses(predictions, targets, spec.loss_scales)
    backbone_loss = networks.backbone_loss(model.rep) if spec.has_backbone_loss else None
    model.backward(losses, backbone_loss=backbone_loss)
    rep_gradients = torch.stack(model.grads if spec.model == "VanillaMTL" else model.original_grads).flatten(1)
    return {
        "inputs": inputs.tolist(),
        "targets": [target.tolist() for target in targets],
        "predictions": rounded(predictions),
        "extra_outputs": rounded(extra_outputs),
        "losses": rounded(losses),
        "backbone_loss": None if backbone_loss is None else rounded(backbone_loss),
        "norms": rounded(rep_gradients.norm(dim=1)),
        "norm_of_mean": rounded(rep_gradients.mean(dim=0).norm()),
        "network_gradients": gradients(network),
        "model_gradients": gradients(model),
    }


def run_toy(seed: int) -> dict[str, Any]:
    """Return the entry of a seed of the toy problem: see :class:`tests.official.numbers.ToyRun`."""
    torch.manual_seed(seed)
    network = networks.build_toy()
    with torch.no_grad():
        for param in network.parameters():
            param.copy_(short(param))
    start = copy.deepcopy(network.state_dict())
    state = official("RotateOnly", network, TOY_OPTIONS).state_dict()
    losses = {}
    for name in ("VanillaMTL", "RotateOnly", "RotoGrad"):
        rotated = name != "VanillaMTL"
        network.load_state_dict(start)
        model = official(name, network, TOY_OPTIONS if rotated else {})
        model.load_state_dict(state if rotated else {})
        losses[name] = rounded(list(train_toy(network, model)))
    return {"seed": seed, "parameters": exact(start), "state": exact(state), "losses": losses}


def train_toy(network: Network, model: Any) -> Iterator[list[Tensor]]:
    """Train as the example of the official repository does, and yield the losses every few steps and at the end."""
    optimizers: list[Optimizer] = [SGD(network.parameters(), lr=networks.TOY_LR)]
    schedulers = []
    if list(model.parameters()):
        optimizers.append(Adam(model.parameters(), lr=networks.TOY_ROTATION_LR))
        schedulers.append(ExponentialLR(optimizers[-1], networks.TOY_ROTATION_DECAY))
    inputs = networks.toy_inputs()
    for step in range(networks.TOY_STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses = networks.toy_losses(model(inputs))
        if step % networks.TOY_RECORD_EVERY == 0:
            yield losses
        model.backward(losses)
        for optimizer in optimizers:
            optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    yield networks.toy_losses(model(inputs))


def write(name: str, entries: Iterable[tuple[str, Any]]) -> None:
    """Write a JSON object, an entry per line."""
    lines = (f"{json.dumps(key)}:{json.dumps(value, separators=(',', ':'))}" for key, value in entries)
    (FOLDER / name).write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    """Write both files."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    entries = []
    for seed, (name, spec) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        entries.append((name, run_case(spec)))
    write("numbers.json", entries)
    write("toy.json", ((f"seed {seed}", run_toy(seed)) for seed in range(NUM_TOY_SEEDS)))


if __name__ == "__main__":
    main()
