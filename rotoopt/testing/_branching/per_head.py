"""Heads that read different tensors: other sizes and depths, several tensors, several modules for one task."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rotoopt.testing._branching.model import Branching, Call, Head, Sizes, conv, square


def pooled_and_dense(s: Sizes) -> Branching:
    """A head on the pooled map, and one on the map."""
    backbone, heads = s.maps(), {"cls": s.head(), "seg": conv(s.features, 2)}

    def losses(x: Tensor) -> dict[str, Tensor]:
        z = backbone(x)
        return {"cls": square(heads["cls"](z.mean((2, 3)))), "seg": square(heads["seg"](z))}

    return Branching([backbone], heads, losses, {"dim": 1})


def dropout_per_head(s: Sizes) -> Branching:
    """Dropout in front of each head, as in a language model."""
    backbone, dropout, heads = s.sequences(), nn.Dropout(0.3), {"tokens": s.head(), "pairs": s.head(outputs=3)}

    def losses(x: Tensor) -> dict[str, Tensor]:
        z = backbone(x)
        return {name: square(h(dropout(z))) for name, h in heads.items()}

    return Branching([backbone], heads, losses)


def cast_per_head(s: Sizes) -> Branching:
    """One head uses double precision."""
    backbone, heads = s.vectors(), {"single": s.head(), "double": s.head().double()}

    def losses(x: Tensor) -> dict[str, Tensor]:
        z = backbone(x)
        return {"single": square(heads["single"](z)), "double": square(heads["double"](z.double())).to(x.dtype)}

    return Branching([backbone], heads, losses)


def auxiliary_head(s: Sizes) -> Branching:
    """An auxiliary head of another size, in the middle of the backbone."""
    early, late = s.maps(6), conv(6, s.features, stride=2)
    heads = {"main": conv(s.features, 3), "aux": conv(6, 3)}

    def losses(x: Tensor) -> dict[str, Tensor]:
        middle = early(x).tanh()
        return {"aux": square(heads["aux"](middle)), "main": square(heads["main"](late(middle)))}

    return Branching([early, late], heads, losses, {"dim": 1})


def sequence_and_last_state(s: Sizes) -> Branching:
    """A head on all outputs of a recurrent network, and one on its last state."""
    gru, heads = nn.GRU(5, s.features, batch_first=True), {"steps": s.head(), "end": s.head()}

    def losses(x: Tensor) -> dict[str, Tensor]:
        outputs, last = gru(torch.stack([x, x.flip(1), -x], dim=1))
        return {"steps": square(heads["steps"](outputs)), "end": square(heads["end"](last[0]))}

    return Branching([gru], heads, losses)


def encoder_and_decoder(s: Sizes) -> Branching:
    """A head on the encoder, and a decoder that also reads the encoder."""
    encoder, targets = s.sequences(), nn.Embedding(s.length, s.features)

    def decode(layers: nn.ModuleDict, target: Tensor, memory: Tensor) -> Tensor:
        attended, _ = layers["attention"](target, memory, memory)
        out: Tensor = layers["out"](target + attended)
        return out

    attention = nn.MultiheadAttention(s.features, 2, batch_first=True)
    heads = {"encode": s.head(), "decode": Call(decode, attention=attention, out=nn.Linear(s.features, 3))}

    def losses(x: Tensor) -> dict[str, Tensor]:
        memory = encoder(x)
        target = targets.weight.expand(len(x), -1, -1)
        return {"encode": square(heads["encode"](memory[:, 0])), "decode": square(heads["decode"](target, memory))}

    return Branching([encoder, targets], heads, losses)


def experts_and_gates(s: Sizes) -> Branching:
    """MMoE: each head reads its own mixture of experts."""
    experts = nn.ModuleList(s.vectors() for _ in range(3))
    gates, heads = nn.ModuleDict({"a": nn.Linear(5, 3), "b": nn.Linear(5, 3)}), {"a": s.head(), "b": s.head()}

    def losses(x: Tensor) -> dict[str, Tensor]:
        outputs = torch.stack([expert(x) for expert in experts], dim=1)
        return {name: square(h((gates[name](x).softmax(1)[:, :, None] * outputs).sum(1))) for name, h in heads.items()}

    return Branching([experts, gates], heads, losses)


def attention_per_task(s: Sizes) -> Branching:
    """MTAN: every task masks shared features of two depths."""
    early, late = s.maps(), conv(s.features, s.features)

    def attend(layers: nn.ModuleDict, first: Tensor, second: Tensor) -> Tensor:
        masked = torch.sigmoid(layers["first"](first)) * first
        out: Tensor = layers["out"](torch.sigmoid(layers["second"](masked)) * second)
        return out

    heads = {
        name: Call(
            attend, first=conv(s.features, s.features), second=conv(s.features, s.features), out=conv(s.features, 2)
        )
        for name in ("seg", "depth", "normal")
    }

    def losses(x: Tensor) -> dict[str, Tensor]:
        first = early(x)
        second = late(first.tanh())
        return {name: square(h(first, second)) for name, h in heads.items()}

    return Branching([early, late], heads, losses, {"dim": 1})


def distillation(s: Sizes) -> Branching:
    """PAD-Net without deep supervision: final decoders also read features that were made for the other task."""
    backbone, first = (
        s.maps(),
        nn.ModuleDict({"seg": conv(s.features, s.features), "depth": conv(s.features, s.features)}),
    )

    def decode(layers: nn.ModuleDict, own: Tensor, other: Tensor) -> Tensor:
        out: Tensor = layers["out"](own + torch.sigmoid(layers["gate"](other)) * other)
        return out

    heads = {
        "seg": Call(decode, gate=conv(s.features, s.features), out=conv(s.features, 3)),
        "depth": Call(decode, gate=conv(s.features, s.features), out=conv(s.features, 1)),
    }

    def losses(x: Tensor) -> dict[str, Tensor]:
        z = backbone(x)
        seg, depth = first["seg"](z).tanh(), first["depth"](z).tanh()
        return {"seg": square(heads["seg"](seg, depth)), "depth": square(heads["depth"](depth, seg))}

    return Branching([backbone, first], heads, losses, {"dim": 1})


def pyramid_with_shared_heads(s: Sizes) -> Branching:
    """RetinaNet: each head is called on every level."""
    stem, down = s.maps(), conv(s.features, s.features, stride=2)
    heads = {"cls": conv(s.features, 3), "box": conv(s.features, 4)}

    def losses(x: Tensor) -> dict[str, Tensor]:
        first = stem(x)
        levels = [first, down(first.tanh()), down(down(first.tanh()).tanh())]
        return {name: torch.stack([square(h(level)) for level in levels]).sum() for name, h in heads.items()}

    return Branching([stem, down], heads, losses, {"dim": 1})


def actor_and_critic(s: Sizes) -> Branching:
    """Heads that are called at every time step of a recurrent core."""
    core, heads = nn.GRUCell(5, s.features), {"actor": s.head(outputs=3), "critic": s.head(outputs=1)}

    def losses(x: Tensor) -> dict[str, Tensor]:
        state, sums = x.new_zeros(len(x), s.features), dict.fromkeys(heads, x.new_zeros(()))
        for step in range(3):
            state = core(x * (step + 1), state)
            sums = {name: total + square(heads[name](state)) for name, total in sums.items()}
        return sums

    return Branching([core], heads, losses)


def variational(s: Sizes) -> Branching:
    """A task with two modules, mean and log-variance, and two decoders of a sample."""
    encoder = s.vectors()
    mean, log_variance, first, second = (
        nn.Linear(s.features, 4),
        nn.Linear(s.features, 4),
        nn.Linear(s.features, 5),
        nn.Linear(s.features, 2),
    )

    def losses(x: Tensor) -> dict[str, Tensor]:
        z = encoder(x)
        mu, log_var = mean(z), log_variance(z)
        kl = 0.5 * (mu.square() + log_var.exp() - log_var - 1).mean()
        noisy = z + 0.1 * torch.randn_like(z)
        return {"latent": kl, "x": (first(noisy) - x).square().mean(), "y": square(second(noisy))}

    heads: dict[str, Head] = {"latent": (mean, log_variance), "x": first, "y": second}
    return Branching([encoder], heads, losses)


def nodes_and_graph(s: Sizes) -> Branching:
    """A graph network: one head on every node, one on the whole graph."""
    embed, message, heads = (
        nn.Linear(5, s.features),
        nn.Linear(s.features, s.features),
        {"node": s.head(), "graph": s.head(outputs=1)},
    )

    def losses(x: Tensor) -> dict[str, Tensor]:
        nodes = embed(torch.stack([x, x.flip(1), -x], dim=1)).tanh()
        nodes = nodes + message(nodes).tanh().mean(1, keepdim=True)
        return {"node": square(heads["node"](nodes)), "graph": square(heads["graph"](nodes.sum(1)))}

    return Branching([embed, message], heads, losses)


def other_sizes(s: Sizes) -> Branching:
    """Heads on representations of two sizes."""
    trunk, small, heads = s.vectors(), nn.Linear(s.features, 3), {"large": s.head(), "small": s.head(3)}

    def losses(x: Tensor) -> dict[str, Tensor]:
        z = trunk(x)
        return {"large": square(heads["large"](z)), "small": square(heads["small"](small(z.tanh())))}

    return Branching([trunk, small], heads, losses)


def detached_and_not(s: Sizes) -> Branching:
    """One head reads z, the other one detached features."""
    backbone = s.vectors()

    def read(layers: nn.ModuleDict, z: Tensor, other: Tensor) -> Tensor:
        out: Tensor = layers["out"](torch.cat([z, other], dim=1))
        return out

    first, second = s.head(outputs=s.features), Call(read, out=s.head(2 * s.features))

    def losses(x: Tensor) -> dict[str, Tensor]:
        z = backbone(x)
        output = first(z)
        return {"first": square(output), "second": square(second(z, output.detach()))}

    heads: dict[str, Head] = {"first": first, "second": second}
    return Branching([backbone], heads, losses)


def losses_as_heads(s: Sizes) -> Branching:
    """A loss of the product of the outputs of two towers, which both losses train. The heads compute the losses."""
    backbone, click, buy = s.vectors(), s.head(outputs=1), s.head(outputs=1)
    click_loss, both_loss = nn.BCELoss(), nn.BCELoss()

    def losses(x: Tensor) -> dict[str, Tensor]:
        z = backbone(x)
        clicks, buys = click(z).squeeze(1).sigmoid(), buy(z).squeeze(1).sigmoid()
        clicked, bought = (x[:, 0] > 0).to(z), (x[:, 0] + x[:, 1] > 0).to(z)
        return {
            "click": click_loss(clicks, clicked),
            "click and buy": both_loss(clicks * buys, bought * clicked),
        }

    heads: dict[str, Head] = {"click": click_loss, "click and buy": both_loss}
    return Branching([backbone, click, buy], heads, losses, {"rotate": False})
