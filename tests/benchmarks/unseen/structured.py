"""Unseen problems on sequences, images and graphs."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from tests.benchmarks.unseen.base import Losses, Problem
from tests.benchmarks.unseen.parts import average_precision, head

Sample = tuple[Tensor, ...]


class Transformer(Problem):
    """A causal transformer predicts the next token of a Markov chain, which of four chains it is, and repeated tokens.

    AdamW, with a linear warm-up and a cosine schedule.
    """

    about = "transformer: next token, sequence class, tags"
    metrics = ("lm", "cls", "tag")
    lr = 1e-2
    num_steps = 300
    one_representation = False
    num_tokens, length, num_chains, width = 16, 24, 4, 32

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.chains = torch.softmax(2.0 * self.randn(self.num_chains, self.num_tokens, self.num_tokens), dim=-1)
        self.embedding = nn.Embedding(self.num_tokens, self.width)
        self.positions = nn.Parameter(0.1 * torch.randn(self.length, self.width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(self.width, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        sizes = {"lm": self.num_tokens, "cls": self.num_chains, "tag": 1}
        self.heads = nn.ModuleDict({name: nn.Linear(self.width, size) for name, size in sizes.items()})
        self.model = nn.ModuleList([self.embedding, self.layers, self.heads])
        self.model.register_parameter("positions", self.positions)
        self.mask = nn.Transformer.generate_square_subsequent_mask(self.length)
        training, self.generator = self.generator, torch.Generator().manual_seed(7)
        self.test = self._sample(512)
        self.generator = training

    def optimizer(self) -> Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.model.parameters(), lr=self.lr, weight_decay=0.05)

    def scheduler(self, optimizer: Optimizer) -> LambdaLR:
        """Warm up for 40 steps."""
        return LambdaLR(
            optimizer, lambda t: min((t + 1) / 40, 0.5 * (1 + math.cos(math.pi * min(t / self.num_steps, 1))))
        )

    def _sample(self, count: int) -> Sample:
        chain = self.randint(self.num_chains, count)
        drawn = [self.randint(self.num_tokens, count)]
        for _ in range(self.length):
            drawn.append(torch.multinomial(self.chains[chain, drawn[-1]], 1, generator=self.generator)[:, 0])
        tokens = torch.stack(drawn, dim=1)
        seen = [(tokens[:, :t] == tokens[:, t : t + 1]).any(1) for t in range(self.length)]
        return tokens, chain, torch.stack(seen, dim=1).float()

    def _cross_entropies(self, sample: Sample) -> dict[str, Tensor]:
        tokens, chain, seen = sample
        z = self.embedding(tokens[:, :-1]) + self.positions
        for layer in self.layers:
            z = layer(z, src_mask=self.mask)
        return {
            "lm": F.cross_entropy(self.heads["lm"](z).flatten(0, 1), tokens[:, 1:].flatten()),
            "cls": F.cross_entropy(self.heads["cls"](z[:, -1]), chain),
            "tag": F.binary_cross_entropy_with_logits(self.heads["tag"](z)[..., 0], seen),
        }

    def losses(self) -> Losses:
        """Return the cross entropies of 32 new sequences."""
        return self._cross_entropies(self._sample(32))

    def errors(self) -> dict[str, float]:
        """Return the cross entropies."""
        return {name: of.item() for name, of in self._cross_entropies(self.test).items()}


class Detection(Problem):
    """Maps of 12 x 12 pixels with a blob or none: is its center here, its height and width, its class.

    Only the centers have the last two; most of the batches of four images have one or two, and some have none.
    """

    about = "detection in maps, few positives, batches of 4"
    metrics = ("obj 1-AP", "box L1", "cls %")
    lr = 1e-2
    num_steps = 900
    dim = 1
    size = 12

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.backbone = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 5, padding=2), nn.ReLU()),
            nn.Conv2d(24, 24, 3, padding=1),
        )
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(nn.ReLU(), nn.Conv2d(24, channels, 1))
                for name, channels in {"obj": 1, "box": 2, "cls": 3}.items()
            }
        )
        self.model = nn.ModuleList([self.backbone, self.heads])
        training, self.generator = self.generator, torch.Generator().manual_seed(11)
        self.test = self._sample(256)
        self.generator = training

    def _sample(self, count: int) -> Sample:
        images = 0.3 * self.randn(count, 1, self.size, self.size)
        centers, sizes = torch.zeros(count, self.size, self.size), torch.zeros(count, 2, self.size, self.size)
        classes = torch.zeros(count, self.size, self.size, dtype=torch.long)
        for k in range(count):
            if self.rand() < 0.4:
                y, x = (2 + self.randint(8, 2)).tolist()
                height, width = (1 + 2 * self.rand(2)).tolist()
                label = int(self.randint(3))
                images[k, 0] += self._blob(y, x, height, width, label)
                centers[k, y, x], classes[k, y, x] = 1, label
                sizes[k, :, y, x] = torch.tensor([height, width])
        return images, centers, sizes, classes

    def _blob(self, y: int, x: int, height: float, width: float, label: int) -> Tensor:
        """Return a rectangle, a diamond or a cross. Shape ``(12, 12)``."""
        places = torch.arange(float(self.size))
        dy, dx = ((places - y).abs() / height)[:, None], ((places - x).abs() / width)[None]
        if label == 0:
            return ((dy <= 1) & (dx <= 1)).float()
        if label == 1:
            return (dy + dx <= 1.2).float()
        return (((dy <= 1) & (dx < 0.4)) | ((dx <= 1) & (dy < 0.4))).float()

    def losses(self) -> Losses:
        """Return a cross entropy and an absolute error, summed per image, and the cross entropy of the positives.

        In a batch without positives, the second is zero, and there is no third.
        """
        images, centers, sizes, classes = self._sample(4)
        z = self.backbone(images)
        positive = centers > 0
        score, labels = self.heads["obj"](z)[:, 0], self.heads["cls"](z).permute(0, 2, 3, 1)
        return {
            "obj": F.binary_cross_entropy_with_logits(score, centers, reduction="sum") / 4,
            "box": ((self.heads["box"](z) - sizes).abs() * positive[:, None]).sum() / 4,
            "cls": F.cross_entropy(labels[positive], classes[positive]) if positive.any() else None,
        }

    def errors(self) -> dict[str, float]:
        """Return one minus the average precision of the centers, the error of the size and of the class."""
        images, centers, sizes, classes = self.test
        z, positive = self.backbone(images), centers > 0
        sizes_off = (self.heads["box"](z) - sizes).abs() * positive[:, None]
        labels = self.heads["cls"](z).permute(0, 2, 3, 1)[positive].argmax(1)
        return {
            "obj 1-AP": 1 - average_precision(self.heads["obj"](z)[:, 0].flatten(), centers.flatten()),
            "box L1": (sizes_off.sum() / positive.sum()).item(),
            "cls %": 100 * (labels != classes[positive]).float().mean().item(),
        }


class Graphs(Problem):
    """The communities of 16 nodes in 400 graphs, and the number of triangles of 40 others, which is soon overfitted."""

    about = "graph network: many labelled nodes, 40 graphs"
    metrics = ("node CE", "graph MSE")
    lr = 1e-2
    num_steps = 400
    one_representation = False
    num_nodes, width = 16, 32

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.with_nodes, self.with_numbers, self.test = self._sample(400), self._sample(40), self._sample(300)
        self.inputs = nn.Linear(4, self.width)
        self.layers = nn.ModuleList(nn.Linear(2 * self.width, self.width) for _ in range(3))
        self.heads = nn.ModuleDict({"node": head(self.width, 3), "graph": head(self.width, 32, 1)})
        self.model = nn.ModuleList([self.inputs, self.layers, self.heads])

    def _sample(self, count: int) -> Sample:
        community = self.randint(3, count, self.num_nodes)
        density = 0.15 + 0.3 * self.rand(count, 1, 1)
        together = community[:, :, None] == community[:, None]
        probability = torch.where(together, 2 * density, density * 0.4)
        upper = (self.rand(count, self.num_nodes, self.num_nodes) < probability).float().triu(1)
        edges = upper + upper.transpose(1, 2)
        noisy = 1.0 * F.one_hot(community, 3) + 0.8 * self.randn(count, self.num_nodes, 3)
        nodes = torch.cat([noisy, torch.ones(count, self.num_nodes, 1)], dim=2)
        triangles = torch.einsum("bij,bjk,bki->b", edges, edges, edges) / 6
        return edges, nodes, community, torch.log1p(triangles)

    def _embedded(self, edges: Tensor, nodes: Tensor) -> Tensor:
        z = self.inputs(nodes)
        for layer in self.layers:
            z = layer(torch.cat([F.relu(z), edges / 4 @ F.relu(z)], dim=2))
        return torch.as_tensor(z)

    def losses(self) -> Losses:
        """Return the cross entropy of the nodes of 16 graphs, and the squared error of all 40 numbers."""
        rows = self.randint(400, 16)
        both = zip(self.with_nodes, self.with_numbers, strict=True)
        edges, nodes, community, number = (torch.cat([nodes[rows], numbers]) for nodes, numbers in both)
        z = self._embedded(edges, nodes)
        return {
            "node": F.cross_entropy(self.heads["node"](z[:16]).flatten(0, 1), community[:16].flatten()),
            "graph": F.mse_loss(self.heads["graph"](z[16:].sum(1))[:, 0], number[16:]),
        }

    def errors(self) -> dict[str, float]:
        """Return the cross entropy and the squared error."""
        edges, nodes, community, number = self.test
        z = self._embedded(edges, nodes)
        return {
            "node CE": F.cross_entropy(self.heads["node"](z).flatten(0, 1), community.flatten()).item(),
            "graph MSE": F.mse_loss(self.heads["graph"](z.sum(1))[:, 0], number).item(),
        }
