"""The model that bench/engine_load.py serves: a small Llama, trained with its memory on Wikipedia.

    python bench/engine_model.py DIR [--steps 300]

Writes DIR/whole (the model with its memory), DIR/bare (without it), the tokenizer in both, and
DIR/prompts.jsonl, beginnings of held-out summaries. It takes some minutes, and the network once.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import engraphy
from engraphy import EngramConfig, hf
from engraphy.data.corpus import Corpus, CorpusConfig, prepare
from engraphy.data.tokens import END
from engraphy.train import OptimizerPair, RowAdam, warmup_cosine

PROMPT, PROMPTS = 48, 256
"""Tokens of a prompt, and number of prompts."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    corpus = prepare(CorpusConfig("wiki", vocab_size=4096, batch=16, length=128))
    model = train(corpus, options.steps)
    loss, bare = heldout(model, corpus)
    print(f"held-out: {loss:.3f} nats a token, {bare:.3f} with the memory switched off")
    if loss > bare - 0.05:
        raise SystemExit("expected a memory that matters; train for more steps")
    save(options.folder, model, corpus)


def train(corpus: Corpus, steps: int) -> Any:
    """The model and its memory, trained together."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=corpus.vocab_size,
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            bos_token_id=corpus.end_id,
            eos_token_id=corpus.end_id,
            pad_token_id=corpus.end_id,
        )
    )
    config = EngramConfig.for_model(
        model.config,
        layers=(1, 3),
        orders=(2, 3),
        heads=8,
        rows_per_head=100_000,
        dim=16,
        vocab_size=len(corpus.vocab),
    )
    memory = engraphy.attach(model, config, corpus.vocab)
    dense = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    pair = OptimizerPair(dense, RowAdam(memory, 1e-2), warmup_cosine(), clip=1.0)
    model.train()
    batches = corpus.batches()
    for step in range(steps):
        ids_BT = batches[step].ids_BT
        model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
        pair.step((step + 1) / steps)
    return model.eval()


@torch.no_grad()
def heldout(model: Any, corpus: Corpus) -> tuple[float, float]:
    """Nats a token of some held-out rows, with the memory and without it."""

    def loss() -> float:
        rows = [batch.ids_BT for batch in itertools.islice(corpus.heldout_batches(), 4)]
        losses = [model(input_ids=ids, labels=ids, use_cache=False).loss for ids in rows]
        return float(torch.stack(losses).mean())

    with_memory = loss()
    with model.engraphy.disabled():
        return with_memory, loss()


def save(folder: Path, model: Any, corpus: Corpus) -> None:
    """Both models, and the prompts."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=corpus.tokenizer, eos_token=END)
    hf.save_pretrained(model, folder / "whole")
    type(model).save_pretrained(model, folder / "bare")
    for name in ("whole", "bare"):
        tokenizer.save_pretrained(folder / name)
    starts = (ids[:PROMPT].tolist() for ids in corpus.heldout if len(ids) >= PROMPT)
    lines = [
        json.dumps({"prompt": tokenizer.decode(ids)}) for ids in itertools.islice(starts, PROMPTS)
    ]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
