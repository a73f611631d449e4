"""BERT of transformers: masked words and the next sentence, with word embeddings tied to a head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.models.case import Case, library

WORDS, MASK = 50, 3


def _bert() -> Any:
    transformers = library("transformers")
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model = transformers.BertForPreTraining(config).train()
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    return model


def _case(model: Any, heads: dict[str, Any], own: dict[str, tuple[str, ...]]) -> Case:
    words = torch.randint(4, WORDS, (8, 12))
    masked = torch.rand(words.shape) < 0.3
    follows = torch.randint(2, (8,))

    def losses(model: Any) -> dict[str, Tensor]:
        out = model(input_ids=words.masked_fill(masked, MASK), attention_mask=torch.ones_like(words))
        return {
            "words": F.cross_entropy(out.prediction_logits[masked], words[masked]),
            "next": F.cross_entropy(out.seq_relationship_logits, follows),
        }

    return Case(model, heads, own, losses)


def pooler_shared() -> Case:
    """The heads as the model defines them: they read different tensors."""
    model = _bert()
    return _case(
        model,
        {"words": model.cls.predictions, "next": model.cls.seq_relationship},
        {"words": ("cls.predictions.",), "next": ("cls.seq_relationship.",)},
    )


def pooler_of_a_task() -> Case:
    """The first modules that belong to one task alone: they read one tensor."""
    model = _bert()
    return _case(
        model,
        {"words": model.cls.predictions, "next": model.bert.pooler},
        {"words": ("cls.predictions.",), "next": ("bert.pooler.", "cls.seq_relationship.")},
    )
