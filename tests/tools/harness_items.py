"""A model, items, and what lm-evaluation-harness finds them to be worth: `harness_items.json`.

`python -m tests.tools.harness_items --update` writes the numbers anew; it needs the extra `eval`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from engraphy.data.tokens import train_tokenizer
from engraphy.eval.choices import Item
from tests.tools.tiny_model import lives

FILE = Path(__file__).with_suffix(".json")

ITEMS = (
    Item("Ada Lovelace was born in", (" London", " Vienna", " New York in 1815"), 0, "choice"),
    Item("Kurt Gödel ", ("studied machines", "found a theorem on symmetry"), 1, "choice"),
    Item(
        "Question: who measured information?\nAnswer:",
        (" Claude Shannon", " Emmy Noether", " Grace Hopper", " Alan Turing"),
        0,
        "choice",
    ),
    Item("Zürich", (", and later", " is not"), 0, "choice"),
    Item("", ("Alan Turing was born in London.", "London was born in Alan Turing."), 0, "pair"),
    Item("", ("She wrote about engines.", "Engines she about wrote of."), 0, "pair"),
)


def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(lives(200), 300),
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
    )


def model() -> LlamaForCausalLM:
    """Its weights are a formula, so that no generator of random numbers has a say."""
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for index, weight in enumerate(model.parameters()):
            if weight.ndim == 2:
                at = torch.arange(weight.numel(), dtype=torch.float64)
                values = torch.sin(12.9898 * at + 78.233 * (index + 1)) * 0.25
                weight.copy_(values.view_as(weight))
    return model


def harness_log_likelihoods(batch: int) -> list[list[float]]:
    """What the harness finds, in nats, by item and option."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    judge = HFLM(pretrained=model(), tokenizer=tokenizer(), batch_size=batch)
    pairs = [(item.question, option) for item in ITEMS for option in item.options]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    values = iter(judge.loglikelihood(requests, disable_tqdm=True))
    return [[next(values)[0] for _ in item.options] for item in ITEMS]


def saved() -> dict[str, Any]:
    return json.loads(FILE.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", required=True)
    parser.parse_args()
    from importlib import metadata

    versions = {name: metadata.version(name) for name in ("lm_eval", "transformers", "torch")}
    text = json.dumps(
        {"versions": versions, "log_likelihood": harness_log_likelihoods(4)}, indent=1
    )
    FILE.write_text(text + "\n")


if __name__ == "__main__":
    main()
