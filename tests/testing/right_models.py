"""Small models that are wired correctly, with the structures of users' models."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from rotoopt import RotoGradOptimizer
from tests.testing.wired import Losses, Wired, wire


def mlp() -> Wired:
    """Vectors, a regression and a classification."""
    backbone, price, brand = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8)), nn.Linear(8, 1), mlp_head(3)
    x, y, label = torch.randn(6, 4), torch.randn(6, 1), torch.randint(3, (6,))

    def losses() -> Losses:
        z = backbone(x)
        return [F.mse_loss(price(z), y), F.cross_entropy(brand(z), label)]

    return wire(nn.ModuleList([backbone, price, brand]), losses, heads=[price, brand])


def mlp_head(outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.ReLU(), nn.Linear(8, outputs))


def dense_prediction() -> Wired:
    """Maps: a convolutional encoder with biases that its batch normalization cancels, segmentation and depth."""
    encoder = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3, stride=2))
    segmentation = nn.Sequential(nn.Conv2d(5, 4, 1), nn.Upsample(scale_factor=2))
    depth = nn.ConvTranspose2d(5, 1, 2, stride=2)
    x, label, y = torch.randn(2, 3, 9, 9), torch.randint(4, (2, 8, 8)), torch.rand(2, 1, 8, 8)

    def losses() -> Losses:
        z = encoder(x)
        return [F.cross_entropy(segmentation(z), label), F.l1_loss(depth(z), y)]

    model = nn.ModuleDict({"encoder": encoder, "segmentation": segmentation, "depth": depth})
    return wire(model, losses, heads=[segmentation, depth], dim=1, init="haar")


class Pooled(nn.Module):
    """A head that makes one prediction of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 2)

    def forward(self, z: Tensor, *, mask: Tensor) -> Tensor:
        return self.linear((z * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True))  # type: ignore[no-any-return]


def transformer() -> Wired:
    """Token sequences: a label for every token, and one for the sequence, pooled inside of its head."""
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.1, batch_first=True)
    model = nn.ModuleDict({"embed": nn.Embedding(11, 8), "layer": layer, "tags": nn.Linear(8, 5), "topic": Pooled()})
    x, tags, topic, mask = torch.randint(11, (3, 7)), torch.randint(5, (3, 7)), torch.randint(2, (3,)), torch.ones(3, 7)

    def losses() -> Losses:
        z = model["layer"](model["embed"](x))
        per_token = F.cross_entropy(model["tags"](z).flatten(0, 1), tags.flatten())
        return [per_token, F.cross_entropy(model["topic"](z, mask=mask), topic)]

    return wire(model, losses, heads=[model["tags"], model["topic"]])


class Levels(nn.Module):
    """A head that reads the levels of a pyramid, of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Linear(4, 2), nn.Linear(3, 2)

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        return [self.fine(levels[0]), self.coarse(levels[1])]


def detector() -> Wired:
    """A batch whose boxes are all assigned to a level that is not rotated, so that rotations do not change a loss."""
    fine, coarse, classes, boxes = nn.Linear(4, 4), nn.Linear(4, 3), Levels(), Levels()
    x = torch.randn(6, 4)

    def losses() -> Losses:
        levels = [fine(x), coarse(fine(x))]
        return [torch.cat(classes(levels)).square().mean(), (torch.cat(boxes(levels))[6:] - 1).abs().mean()]

    return wire(nn.ModuleList([fine, coarse, classes, boxes]), losses, heads=[classes, boxes])


def functional_heads() -> Wired:
    """Heads that are functions of plain parameters, fed by ``optimizer.rotate``."""
    model = nn.ParameterDict({name: torch.randn(8, n) for name, n in [("spread", 3), ("decoder", 4)]})
    model["encoder"] = torch.randn(4, 8)
    x = torch.randn(6, 4)

    def losses() -> Losses:
        z_spread, z_decoder = wired.optimizer.rotate(torch.tanh(x @ model["encoder"]))
        return [(z_spread @ model["spread"]).std(), F.mse_loss(z_decoder @ model["decoder"], x)]

    wired = wire(model, losses, num_tasks=2)
    return wired


def batch_norm_and_dropout() -> Wired:
    """Heads that are random, and whose statistics are updated in every forward pass."""
    backbone = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh())
    heads = nn.ModuleList(
        nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, n)) for n in (1, 2)
    )
    x = torch.randn(8, 4)

    def losses() -> Losses:
        z = backbone(x)
        return [head(z).square().mean() for head in heads]

    return wire(nn.ModuleList([backbone, heads]), losses, heads=heads)


def variational() -> Wired:
    """A random representation; reconstruction and classification. Its penalty is passed as backbone_loss."""
    encoder, decoder, classifier = nn.Linear(4, 16), nn.Linear(8, 4), mlp_head(3)
    x, label = torch.randn(6, 4), torch.randint(3, (6,))

    def losses() -> Losses:
        mean, log_std = encoder(x).chunk(2, dim=1)
        z = mean + log_std.exp() * torch.randn_like(mean)
        return [F.mse_loss(decoder(z), x), F.cross_entropy(classifier(z), label)]

    return wire(nn.ModuleList([encoder, decoder, classifier]), losses, heads=[decoder, classifier])


class Perception(nn.Module):
    """A model with nested heads, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 8)
        self.decoders = nn.ModuleDict({name: nn.ModuleDict({"head": mlp_head(2)}) for name in ("near", "far", "sky")})

    def heads(self) -> dict[str, nn.Module]:
        return {name: decoder.get_submodule("head") for name, decoder in self.decoders.items()}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.trunk(x)
        return {name: head(z) for name, head in self.heads().items()}


def nested_heads() -> Wired:
    model, x = Perception(), torch.randn(6, 4)
    return wire(model, lambda: {name: output.abs().mean() for name, output in model(x).items()}, heads=model.heads())


def absent_task() -> Wired:
    """The labels of one of three tasks are missing."""
    model, x = Perception(), torch.randn(6, 4)
    return wire(
        model,
        lambda: {name: None if name == "far" else output.square().mean() for name, output in model(x).items()},
        heads=model.heads(),
    )


def groups_and_frozen_layers() -> Wired:
    """Fine-tuning: the first layer is frozen, the backbone has its own learning rate."""
    frozen, backbone = nn.Sequential(nn.Linear(4, 8), nn.ReLU()).requires_grad_(False), nn.Linear(8, 8)
    heads, x = nn.ModuleList([mlp_head(1), mlp_head(2)]), torch.randn(6, 4)

    def losses() -> Losses:
        z = backbone(frozen(x))
        return [head(z).square().mean() for head in heads]

    groups = [{"params": backbone.parameters(), "lr": 1e-3}, {"params": heads.parameters(), "weight_decay": 1e-2}]
    optimizer = RotoGradOptimizer(SGD(groups, lr=0.1, momentum=0.9), heads=heads)
    return Wired(nn.ModuleList([frozen, backbone, heads]), optimizer, losses)


def some_rotations() -> Wired:
    """One task of three is not rotated, the others in their first features only."""
    model, x = Perception(), torch.randn(6, 4)
    heads = model.heads()
    return wire(
        model,
        lambda: {name: output.abs().mean() for name, output in model(x).items()},
        heads=heads,
        rotate=[True, False, True],
        rotation_size=5,
        init="haar",
    )


def activation_checkpointing() -> Wired:
    """The backbone, and one head, run again in the backward pass; the input requires grad, as is usual for that."""
    backbone, heads = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8)), [mlp_head(1), mlp_head(2)]
    x = torch.randn(6, 4, requires_grad=True)

    def losses() -> Losses:
        z = checkpoint(backbone, x, use_reentrant=False)
        again = checkpoint(heads[1], z, use_reentrant=False)
        return [heads[0](z).square().mean(), again.square().mean()]

    return wire(nn.ModuleList([backbone, *heads]), losses, heads=heads)


def recurrent() -> Wired:
    """A GRU, whose states are the representation: the next input, and whether there is one."""
    gru, following, end = nn.GRU(4, 8, batch_first=True), nn.Linear(8, 4), nn.Linear(8, 1)
    x = torch.randn(3, 5, 4)

    def losses() -> Losses:
        z, _ = gru(x)
        ends = torch.zeros(3, 5, 1)
        return [F.mse_loss(following(z)[:, :-1], x[:, 1:]), F.binary_cross_entropy_with_logits(end(z), ends)]

    return wire(nn.ModuleList([gru, following, end]), losses, heads=[following, end])


def tied_weights() -> Wired:
    """A block that runs twice, and embeddings that are tied to an output layer."""
    embedding, block, words, topic = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11), nn.Linear(8, 2)
    words.weight = embedding.weight
    x, label = torch.randint(11, (3, 5)), torch.randint(2, (3, 5))

    def losses() -> Losses:
        z = block(torch.tanh(block(embedding(x))))
        per_word = F.cross_entropy(words(z).flatten(0, 1), x.roll(1, 1).flatten())
        return [per_word, F.cross_entropy(topic(z).flatten(0, 1), label.flatten())]

    return wire(nn.ModuleList([embedding, block, words, topic]), losses, heads=[words, topic])


def shared_layers() -> Wired:
    """A layer that two heads share, each in its own wrapper, as the optimizer requires."""
    backbone, shared = nn.Linear(4, 8), nn.Linear(8, 2)
    heads, x = [nn.Sequential(shared), nn.Sequential(shared, nn.Tanh())], torch.randn(6, 4)

    def losses() -> Losses:
        z = backbone(x)
        return [(heads[0](z) - 1).square().mean(), heads[1](z).square().mean()]

    return wire(nn.ModuleList([backbone, *heads]), losses, heads=heads)


def learned_loss_weights() -> Wired:
    """Homoscedastic uncertainty: the weights of the losses are parameters, and belong to no module."""
    model, x = Perception(), torch.randn(6, 4)
    log_variances = nn.ParameterDict({name: torch.zeros(()) for name in model.heads()})

    def losses() -> Losses:
        outputs = model(x)
        return {name: (-s).exp() * outputs[name].square().mean() + s for name, s in log_variances.items()}

    return wire(nn.ModuleList([model, log_variances]), losses, heads=model.heads())


def probe_on_stopped_gradients() -> Wired:
    """A head that is trained without training the backbone."""
    backbone, left, right, probe = nn.Linear(4, 8), nn.Linear(8, 1), nn.Linear(8, 2), nn.Linear(8, 2)
    x = torch.randn(6, 4)

    def losses() -> Losses:
        z = backbone(x)
        return [(left(z) - 1).square().mean(), right(z).square().mean(), (probe(z.detach()) - 1).square().mean()]

    return wire(nn.ModuleList([backbone, left, right, probe]), losses, heads=[left, right, probe])


def columns_of_one_matrix() -> Wired:
    """The outputs of all heads in one matrix, and a loss for each of its columns."""
    backbone, heads, x = nn.Linear(4, 8), [nn.Linear(8, 1) for _ in range(3)], torch.randn(6, 4)

    def losses() -> Losses:
        z = backbone(x)
        errors = (torch.cat([head(z) for head in heads], 1) - torch.arange(3)).square()
        return [errors[:, k].mean() for k in range(3)]

    return wire(nn.ModuleList([backbone, *heads]), losses, heads=heads)


def probes_in_one_matrix() -> Wired:
    """The outputs of a head and of two probes in one matrix: the losses of the probes do not depend on the head."""
    backbone, heads, x = nn.Linear(4, 8), [nn.Linear(8, 1) for _ in range(3)], torch.randn(6, 4)

    def losses() -> Losses:
        z = backbone(x)
        outputs = torch.cat([head(z.detach() if number else z) for number, head in enumerate(heads)], 1).sigmoid()
        return [(outputs[:, k] - k).square().mean() for k in range(3)]

    return wire(nn.ModuleList([backbone, *heads]), losses, heads=heads)


def zero_output_layers() -> Wired:
    """Heads whose outputs do not depend on the representation until they have been trained."""
    backbone, heads, x = nn.Linear(4, 8), [nn.Linear(8, 1), nn.Linear(8, 2)], torch.randn(6, 4)
    for head in heads:
        nn.init.zeros_(head.weight)

    def losses() -> Losses:
        z = backbone(x)
        return [(head(z) - 1).square().mean() for head in heads]

    return wire(nn.ModuleList([backbone, *heads]), losses, heads=heads)


def consistency() -> Wired:
    """A head with dropout that runs twice on z, with a loss on the difference of its outputs."""
    backbone, left, right = nn.Linear(4, 8), nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 2)), nn.Linear(8, 1)
    x = torch.randn(6, 4)

    def losses() -> Losses:
        z = backbone(x)
        return [F.mse_loss(left(z), left(z)), right(z).square().mean()]

    return wire(nn.ModuleList([backbone, left, right]), losses, heads=[left, right])


def sparse_embeddings() -> Wired:
    """An embedding with sparse gradients."""
    table, click, price, x = nn.Embedding(11, 8, sparse=True), nn.Linear(8, 1), mlp_head(1), torch.randint(11, (6,))
    model = nn.ModuleList([table, click, price])

    def losses() -> Losses:
        z = table(x)
        return [F.softplus(click(z)).mean(), price(z).square().mean()]

    return Wired(model, RotoGradOptimizer(SGD(model.parameters(), lr=0.1), heads=[click, price]), losses)


def weighting_of_maps() -> Wired:
    """Maps without rotations: there are none, since it is not known which dimension has the features."""
    encoder, segmentation, depth = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1), nn.Conv2d(6, 1, 1)
    x = torch.randn(2, 3, 8, 8)

    def losses() -> Losses:
        z = encoder(x)
        return [segmentation(z).square().mean(), (depth(z) - 1).abs().mean()]

    model = nn.ModuleList([encoder, segmentation, depth])
    return wire(model, losses, heads=[segmentation, depth], rotate=False)


RIGHT: dict[str, Callable[[], Wired]] = {
    build.__name__: build
    for build in (
        mlp,
        dense_prediction,
        transformer,
        detector,
        functional_heads,
        batch_norm_and_dropout,
        variational,
        nested_heads,
        absent_task,
        groups_and_frozen_layers,
        some_rotations,
        activation_checkpointing,
        recurrent,
        tied_weights,
        shared_layers,
        learned_loss_weights,
        probe_on_stopped_gradients,
        columns_of_one_matrix,
        probes_in_one_matrix,
        zero_output_layers,
        consistency,
        sparse_embeddings,
        weighting_of_maps,
    )
}
