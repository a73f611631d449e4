"""Fine-tuning on few labels: from the digits 0-4 to the digits 5-9, with and without regularizers.

A network is pretrained on scikit-learn's digits 0-4, then fine-tuned on 8 samples each of 5-9. Terms on the backbone
(L2-SP, DELTA, BSS) go into `backbone_loss`; terms with a head of their own (LWF, Co-Tuning, Bi-Tuning) are tasks.

    python examples/fine_tuning.py

Takes a minute on one CPU core. It prints accuracies, mean and standard deviation of 5 seeds, and saves fine_tuning.png.
The source accuracy is that of the original source head on the fine-tuned backbone. Output: docs/examples.md.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from rotoopt import RotoGradOptimizer
from rotoopt.regularization import bi_tuning, bss, co_tuning, delta, lwf

FEATURES, SHOTS = 64, 8
METHODS = ("plain", "L2-SP", "DELTA", "BSS", "LWF", "Co-Tuning", "Bi-Tuning")


class Backbone(nn.Sequential):
    """A small convolutional backbone of 8 x 8 images."""

    out_features = FEATURES

    def __init__(self) -> None:
        convolutions = (nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU())
        super().__init__(*convolutions, nn.Flatten(), nn.Linear(32 * 16, FEATURES), nn.ReLU())


Data = tuple[Tensor, Tensor]


def draw(seed: int) -> tuple[Data, Data, Data, Data]:
    """Return training and test images with labels: of the source 0-4, and of the target 5-9, numbered from 0."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images / 16).float().unsqueeze(1), torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    images, labels = images[order], labels[order]
    source, target = labels < 5, labels >= 5
    few = torch.cat([(labels == digit).nonzero().flatten()[:SHOTS] for digit in range(5, 10)])
    rest = target.clone()
    rest[few] = False
    x, y = images[source], labels[source]
    return (x[100:], y[100:]), (x[:100], y[:100]), (images[few], labels[few] - 5), (images[rest], labels[rest] - 5)


def pretrain(data: Data) -> tuple[nn.Module, nn.Linear]:
    """Return a backbone and a head trained on the source digits."""
    backbone, head = Backbone(), nn.Linear(FEATURES, 5)
    optimizer = torch.optim.Adam([*backbone.parameters(), *head.parameters()], lr=2e-3)
    for _ in range(15):
        for rows in torch.split(torch.randperm(len(data[0])), 64):
            loss = F.cross_entropy(head(backbone(data[0][rows])), data[1][rows])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    return backbone, head


def fine_tune(method: str, backbone: nn.Module, head: nn.Linear, data: Data, steps: int) -> Any:
    """Return the classifier of the target; ``backbone`` is changed."""
    x, y = data
    start = copy.deepcopy(backbone)
    if method == "Bi-Tuning":
        both = (backbone, copy.deepcopy(backbone))
        encoders = [bi_tuning.Classifier(each, 5, projection_dim=32, finetune=False) for each in both]
        contrast = bi_tuning.BiTuning(encoders[0], encoders[1], 5, K=8)
        model: Any = encoders[0]
    else:
        cls = co_tuning.Classifier if method == "Co-Tuning" else lwf.Classifier
        model = cls(backbone, 5, copy.deepcopy(head), finetune=False)
    adam = torch.optim.Adam(model.get_parameters(2e-3))
    rotate = method == "Bi-Tuning" or [method == "Co-Tuning", True]  # a frozen head needs unrotated inputs
    optimizer = RotoGradOptimizer(adam, heads=model.heads, rotate=rotate)
    start_point, spectrum = delta.SPRegularization(start, backbone), bss.BatchSpectralShrinkage()
    kl = nn.KLDivLoss(reduction="batchmean")
    recorded = lwf.record_logits([x], model, "cpu") if method == "LWF" else None
    relationship = co_tuning.Relationship([(x, y)], model, "cpu") if method == "Co-Tuning" else None
    getters = [delta.IntermediateLayerGetter(each, ["2"]) for each in (start, backbone)]
    for _ in range(steps):
        optimizer.zero_grad()
        if method == "Bi-Tuning":
            noisy = [x + 0.1 * torch.randn_like(x) for _ in range(2)]
            output, logits_z, logits_y, labels_c = contrast(noisy[0], noisy[1], y)
            optimizer.step([F.cross_entropy(output, y) + kl(logits_y, labels_c), kl(logits_z, labels_c)])
            continue
        maps = [getter(x)[0] for getter in getters] if method == "DELTA" else []
        rep = model.represent(x)
        source, target = model.predict(rep)
        losses: list[Tensor | None] = [None, F.cross_entropy(target, y)]
        if recorded is not None:
            losses[0] = lwf.distillation_loss(source, recorded, T=2.0)
        elif relationship is not None:
            losses[0] = co_tuning.CoTuningLoss()(source, relationship[y])
        backbone_loss = None
        if method == "L2-SP":
            backbone_loss = 0.1 * start_point()
        elif method == "BSS":
            backbone_loss = 1e-3 * spectrum(rep)
        elif method == "DELTA":
            backbone_loss = 1e-3 * delta.BehavioralRegularization()(*maps)
        optimizer.step(losses, rep, backbone_loss=backbone_loss)
    return model


@torch.no_grad()
def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the accuracy in percent."""
    return 100 * float((logits.argmax(1) == labels).float().mean())


def main() -> None:
    """Fine-tune with every method and seed, print the table and save the picture."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path("fine_tuning.png"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, list[tuple[float, float]]] = {method: [] for method in METHODS}
    for seed in range(args.seeds):
        training, test, few, rest = draw(seed)
        torch.manual_seed(seed)
        backbone, head = pretrain(training)
        for method in METHODS:
            torch.manual_seed(seed)
            own = copy.deepcopy(backbone)
            model = fine_tune(method, own, head, few, args.steps).eval()
            results[method].append((accuracy(model(rest[0]), rest[1]), accuracy(head(own(test[0])), test[1])))
    print("             target, %      source, %")
    figure, axes = plt.subplots(figsize=(6, 4.5), layout="constrained")
    for method, pairs in results.items():
        columns = [(statistics.fmean(each), statistics.pstdev(each)) for each in zip(*pairs, strict=True)]
        print(f"{method:<10}" + "".join(f"{mean:9.1f} ± {spread:3.1f}" for mean, spread in columns))
        (target, target_spread), (source, source_spread) = columns
        # A large circle, because another method may give the same accuracies.
        marker: dict[str, Any] = {"fillstyle": "none", "markersize": 12} if method == "plain" else {}
        axes.errorbar(source, target, target_spread, source_spread, "o", capsize=2, label=method, **marker)
    axes.set(xlabel="source accuracy, % (digits 0-4)", ylabel="target accuracy, % (digits 5-9)")
    axes.legend(loc="lower left", frameon=False)
    figure.savefig(args.out, dpi=120)


if __name__ == "__main__":
    main()
