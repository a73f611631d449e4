"""RotoGrad in a LightningModule: automatic optimization, schedulers, checkpoints and logging work as before.

Three tasks on scikit-learn's digits: which digit it is, whether it is even, and how much ink it has. Training stops
after half of the epochs and resumes from the checkpoint, which includes the rotations.

    python examples/with_lightning.py

Takes some twenty seconds on one CPU core, and prints the metrics on test digits. Output: docs/examples.md.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from rotoopt import RotoGradOptimizer

Batch = tuple[Tensor, Tensor]

warnings.filterwarnings("ignore", module="lightning")  # number of workers, deprecations of torch 2.13
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Digits(LightningModule):
    """A network for three tasks, and the optimizer that it is trained with."""

    def __init__(self, epochs: int, *, rotograd: bool) -> None:
        super().__init__()
        self.epochs = epochs
        self.backbone = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
        sizes = {"digit": 10, "even": 1, "ink": 1}
        self.heads = nn.ModuleDict({name: nn.Sequential(nn.ReLU(), nn.Linear(32, n)) for name, n in sizes.items()})
        self.optimizer: torch.optim.Optimizer = torch.optim.Adam(self.parameters(), lr=2e-3)
        if rotograd:  # not in configure_optimizers, which runs at every fit
            self.optimizer = RotoGradOptimizer(self.optimizer, heads=self.heads)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the outputs of the heads by name."""
        z = self.backbone(images)
        return {name: head(z) for name, head in self.heads.items()}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the sum of the losses: Lightning's backward and step do the rest."""
        images, labels = batch
        outputs = self(images)
        losses = [
            F.cross_entropy(outputs["digit"], labels),
            F.binary_cross_entropy_with_logits(outputs["even"].squeeze(1), (labels % 2 == 0).float()),
            F.mse_loss(outputs["ink"].squeeze(1), images.sum(1)),
        ]
        return torch.stack(losses).sum()

    def on_train_batch_end(self, *args: Any) -> None:
        """Log the conflict rate: the share of pairs of tasks with a negative cosine."""
        record = self.optimizer.last_step if isinstance(self.optimizer, RotoGradOptimizer) else None
        if record is not None:
            self.log("conflict_rate", record.conflict_rate, on_step=False, on_epoch=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log both accuracies and the error."""
        images, labels = batch
        outputs = self(images)
        self.log("digit, %", 100 * (outputs["digit"].argmax(1) == labels).float().mean())
        self.log("even, %", 100 * ((outputs["even"].squeeze(1) > 0) == (labels % 2 == 0)).float().mean())
        self.log("ink, MSE", F.mse_loss(outputs["ink"].squeeze(1), images.sum(1)))

    def configure_optimizers(self) -> Any:
        """Return the optimizer and its scheduler."""
        return [self.optimizer], [CosineAnnealingLR(self.optimizer, self.epochs)]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load the rotations even if Lightning loads only weights, as for a test of the best checkpoint."""
        self.optimizer.load_state_dict(checkpoint["optimizer_states"][0])


def loaders() -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
    """Return training and test batches."""
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data / 16).float(), torch.tensor(digits.target))
    training, test = torch.utils.data.random_split(data, [1200, 597], torch.Generator().manual_seed(0))
    return DataLoader(training, batch_size=32, shuffle=True), DataLoader(test, batch_size=597)


def train(epochs: int, folder: Path, *, rotograd: bool) -> dict[str, float]:
    """Train, save halfway, resume with a new model, and return what the test logs."""
    seed_everything(0, verbose=False)
    training, test = loaders()
    quiet: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "default_root_dir": folder}
    first = Trainer(max_epochs=epochs // 2, **quiet)
    first.fit(Digits(epochs, rotograd=rotograd), training)
    first.save_checkpoint(folder / "half.ckpt")
    trainer = Trainer(max_epochs=epochs, **quiet)
    model = Digits(epochs, rotograd=rotograd)
    trainer.fit(model, training, ckpt_path=folder / "half.ckpt", weights_only=True)
    logged: dict[str, Any] = {**trainer.callback_metrics, **trainer.test(model, test, verbose=False)[0]}
    return {name: float(value) for name, value in logged.items()}


def main() -> None:
    """Train with the plain sum and with RotoGrad, and print the test metrics."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("                 digit, %   even, %   ink, MSE   conflict rate")
    for name, rotograd in (("plain sum", False), ("RotoGrad", True)):
        with tempfile.TemporaryDirectory() as folder:
            logged = train(args.epochs, Path(folder), rotograd=rotograd)
        metrics = f"{logged['digit, %']:9.1f} {logged['even, %']:9.1f} {logged['ink, MSE']:10.3f}"
        print(f"{name:<16}{metrics}" + (f"{logged['conflict_rate']:16.2f}" if rotograd else ""), flush=True)


if __name__ == "__main__":
    main()
