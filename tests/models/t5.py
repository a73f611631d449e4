"""T5 of transformers: the decoder is a head, as well as a classifier; embeddings are tied on both sides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models.case import Case, library

WORDS, SIZE, CLASSES = 50, 32, 3


def generate_and_classify() -> Case:
    transformers = library("transformers")
    config = transformers.T5Config(
        vocab_size=WORDS, d_model=SIZE, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    t5 = transformers.T5ForConditionalGeneration(config)
    assert t5.encoder.embed_tokens.weight is t5.decoder.embed_tokens.weight is t5.lm_head.weight
    model = nn.ModuleDict({"t5": t5, "classifier": nn.Linear(SIZE, CLASSES)}).train()
    words, answers = torch.randint(2, WORDS, (8, 10)), torch.randint(2, WORDS, (8, 6))
    classes = torch.randint(CLASSES, (8,))

    def losses(model: Any) -> dict[str, Tensor]:
        out = model["t5"](input_ids=words, attention_mask=torch.ones_like(words), labels=answers)
        logits = model["classifier"](out.encoder_last_hidden_state.mean(1))
        return {"generate": out.loss, "classify": F.cross_entropy(logits, classes)}

    return Case(
        model,
        {"generate": t5.decoder, "classify": model["classifier"]},
        {"generate": ("t5.decoder.", "t5.lm_head."), "classify": ("classifier.",)},
        losses,
    )
