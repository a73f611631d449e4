"""Heads with different kinds of inputs: skips, queries, lists of levels, nested containers, conditions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rotoopt.testing._branching.model import Branching, Call, Sizes, conv, square


def unet_skips(s: Sizes) -> Branching:
    """Two decoders that take the bottleneck and a list of skips."""
    stem, down, bottom = s.maps(4), conv(4, 6, stride=2), conv(6, s.features, stride=2)

    def decode(layers: nn.ModuleDict, z: Tensor, skips: list[Tensor]) -> Tensor:
        up = nn.functional.interpolate(layers["up"](z), scale_factor=2)
        up = torch.tanh(layers["mid"](torch.cat([up, skips[1]], dim=1)))
        up = nn.functional.interpolate(up, scale_factor=2)
        out: Tensor = layers["out"](torch.cat([up, skips[0]], dim=1))
        return out

    def decoder(outputs: int) -> nn.Module:
        return Call(decode, up=conv(s.features, 6), mid=conv(12, 4), out=conv(8, outputs))

    heads = {"seg": decoder(3), "depth": decoder(1)}

    def losses(x: Tensor) -> dict[str, Tensor]:
        first = stem(x)
        second = down(first).tanh()
        z = bottom(second).tanh()
        return {name: square(h(z, [first, second])) for name, h in heads.items()}

    return Branching([stem, down, bottom], heads, losses, {"dim": 1})


def detr_decoder(s: Sizes) -> Branching:
    """Decoders with their own queries and a shared memory."""
    encoder = s.sequences()

    def decode(layers: nn.ModuleDict, query: Tensor, memory: Tensor) -> Tensor:
        attended, _ = layers["attention"](query, memory, memory)
        out: Tensor = layers["out"](attended)
        return out

    heads = {
        name: Call(
            decode, attention=nn.MultiheadAttention(s.features, 2, batch_first=True), out=nn.Linear(s.features, 2)
        )
        for name in ("boxes", "masks")
    }
    queries = nn.Embedding(2, s.features)  # shared by both

    def losses(x: Tensor) -> dict[str, Tensor]:
        memory = encoder(x)
        return {name: square(h(queries.weight.expand(len(x), -1, -1), memory)) for name, h in heads.items()}

    return Branching([encoder, queries], heads, losses)


def self_attention_heads(s: Sizes) -> Branching:
    """``mha(z, z, z)``: one tensor, three times."""
    encoder = s.sequences()
    heads = {name: nn.MultiheadAttention(s.features, 2, batch_first=True) for name in ("one", "two")}

    def losses(x: Tensor) -> dict[str, Tensor]:
        z = encoder(x)
        return {name: square(h(z, z, z)[0]) for name, h in heads.items()}

    return Branching([encoder], heads, losses)


def keyword_attention_heads(s: Sizes) -> Branching:
    """``mha(query=q, key=z, value=z)``: keyword arguments, of which the first is not z."""
    encoder, query = s.sequences(), nn.Linear(5, s.features)
    heads = {name: nn.MultiheadAttention(s.features, 2, batch_first=True) for name in ("one", "two")}

    def losses(x: Tensor) -> dict[str, Tensor]:
        z, q = encoder(x), query(x)[:, None]
        return {name: square(h(query=q, key=z, value=z)[0]) for name, h in heads.items()}

    return Branching([encoder, query], heads, losses)


def list_of_levels(s: Sizes) -> Branching:
    """Heads that take all levels of a pyramid as a list."""
    stem, down = s.maps(), conv(s.features, s.features, stride=2)

    def read(layers: nn.ModuleDict, levels: list[Tensor]) -> Tensor:
        return torch.cat([layers["conv"](level).flatten(2) for level in levels], dim=2)

    heads = {"cls": Call(read, conv=conv(s.features, 3)), "box": Call(read, conv=conv(s.features, 4))}

    def losses(x: Tensor) -> dict[str, Tensor]:
        first = stem(x)
        return {name: square(h([first, down(first.tanh())])) for name, h in heads.items()}

    return Branching([stem, down], heads, losses, {"dim": 1})


def nested_inputs(s: Sizes) -> Branching:
    """Dicts of tuples, with a mask and a number among the features."""
    backbone, more = s.vectors(), nn.Linear(5, s.features)

    def read(layers: nn.ModuleDict, inputs: dict[str, Any], *, scale: float) -> Tensor:
        (z, w), mask = inputs["features"], inputs["mask"]
        out: Tensor = layers["out"](torch.cat([z, w], dim=1) * mask) * scale
        return out

    heads = {name: Call(read, out=s.head(2 * s.features)) for name in ("left", "right")}

    def losses(x: Tensor) -> dict[str, Tensor]:
        inputs = {"features": (backbone(x), more(x)), "mask": torch.ones(1, 2 * s.features, dtype=x.dtype)}
        return {name: square(h(inputs, scale=0.5)) for name, h in heads.items()}

    return Branching([backbone, more], heads, losses)


def condition_first(s: Sizes) -> Branching:
    """A condition without gradient comes before z."""
    backbone = s.vectors()

    def read(layers: nn.ModuleDict, condition: Tensor, z: Tensor) -> Tensor:
        out: Tensor = layers["out"](torch.cat([condition, z], dim=1))
        return out

    heads = {name: Call(read, out=s.head(s.features + 1)) for name in ("left", "right")}

    def losses(x: Tensor) -> dict[str, Tensor]:
        z = backbone(x)
        return {name: square(h(x[:, :1], z)) for name, h in heads.items()}

    return Branching([backbone], heads, losses)


def lstm_state(s: Sizes) -> Branching:
    """Heads that take hidden and cell state as a tuple."""
    lstm = nn.LSTM(5, s.features, batch_first=True)

    def read(layers: nn.ModuleDict, state: tuple[Tensor, Tensor]) -> Tensor:
        out: Tensor = layers["out"](torch.cat([state[0][0], state[1][0]], dim=1))
        return out

    heads = {name: Call(read, out=s.head(2 * s.features)) for name in ("next", "end")}

    def losses(x: Tensor) -> dict[str, Tensor]:
        _, state = lstm(torch.stack([x, x.flip(1)], dim=1))
        return {name: square(h(state)) for name, h in heads.items()}

    return Branching([lstm], heads, losses)


def siamese(s: Sizes) -> Branching:
    """Heads that compare the representations of two inputs."""
    backbone = s.vectors()

    def compare(layers: nn.ModuleDict, first: Tensor, second: Tensor) -> Tensor:
        out: Tensor = layers["out"](torch.cat([first, second, first * second], dim=1))
        return out

    heads = {name: Call(compare, out=s.head(3 * s.features)) for name in ("same", "order")}

    def losses(x: Tensor) -> dict[str, Tensor]:
        first, second = backbone(x), backbone(x.flip(1))
        return {name: square(h(first, second)) for name, h in heads.items()}

    return Branching([backbone], heads, losses)


def decoder_loop(s: Sizes) -> Branching:
    """A speech recognizer: for each symbol, a decoder reads the encoder with a state that it has computed itself."""
    encoder, cell, out = s.sequences(), nn.GRUCell(s.features, s.features), nn.Linear(s.features, 3)

    def attend(layers: nn.ModuleDict, state: Tensor, memory: Tensor) -> Tensor:
        scores = torch.einsum("bd,btd->bt", layers["query"](state), layers["key"](memory))
        return torch.einsum("bt,btd->bd", scores.softmax(1), memory)

    attention = Call(attend, query=nn.Linear(s.features, s.features), key=nn.Linear(s.features, s.features))
    alignment = s.head(outputs=3)

    def losses(x: Tensor) -> dict[str, Tensor]:
        memory, state, symbols = encoder(x), x.new_zeros(len(x), s.features), []
        for _ in range(3):
            state = cell(attention(state, memory), state)
            symbols.append(out(state))
        return {"alignment": square(alignment(memory)), "symbols": square(torch.stack(symbols))}

    return Branching([encoder], {"alignment": alignment, "symbols": (attention, cell, out)}, losses)


def decoder_layers(s: Sizes) -> Branching:
    """A model of images and captions: all layers of a text decoder read the image, and are listed one by one."""
    encoder, words = s.sequences(), nn.Embedding(2, s.features)

    def attend(layers: nn.ModuleDict, text: Tensor, image: Tensor) -> Tensor:
        attended, _ = layers["attention"](text, image, image)
        return text + torch.tanh(attended)

    layers = [Call(attend, attention=nn.MultiheadAttention(s.features, 2, batch_first=True)) for _ in range(2)]
    out, match = nn.Linear(s.features, 4), s.head()

    def losses(x: Tensor) -> dict[str, Tensor]:
        image = encoder(x)
        text = words.weight.expand(len(x), -1, -1)
        for layer in layers:
            text = layer(text, image)
        return {"caption": square(out(text)), "match": square(match(image))}

    return Branching([encoder, words], {"caption": (*layers, out), "match": match}, losses)


def joined_outputs(s: Sizes) -> Branching:
    """A tracker: one map has the boxes and the embeddings, and a classifier of identities reads the embeddings."""
    backbone, boxes, embeddings = s.maps(), nn.Conv2d(s.features, 4, 1), nn.Conv2d(s.features, s.features, 1)
    classifier = nn.Linear(s.features, 3)

    def losses(x: Tensor) -> dict[str, Tensor]:
        z = backbone(x)
        joined = torch.cat([boxes(z), embeddings(z)], 1)
        found = nn.functional.normalize(joined[:, 4:].movedim(1, 3).flatten(0, 2)[::2])
        return {"boxes": square(joined[:, :4]), "identities": square(classifier(found))}

    return Branching([backbone], {"boxes": boxes, "identities": (embeddings, classifier)}, losses, {"dim": 1})
