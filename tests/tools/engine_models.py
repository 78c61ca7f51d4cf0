"""The models that the tests of serving engines serve, trained in some seconds each, and what
transformers makes of their prompts.

    python -m tests.tools.engine_models build/engines/models

Writes for each backbone NAME: the folder NAME with its memory, NAME-bare without it, NAME-other
with another table, and NAME.json with prompts and the tokens and log-probabilities that follow in
each, one prompt at a time in float32.
Engines have other versions of transformers, so their tests read files.

The text is one in which three tokens say what comes next, by a rule without any pattern. Only a
memory can hold it: the little model cannot.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

import engraphy
from engraphy import EngramConfig, EngramMemory, hf
from engraphy.train import OptimizerPair, RowAdam, warmup_cosine

SYMBOLS, FIRST_ID = 24, 3
"""The ids of the text are FIRST_ID to FIRST_ID + SYMBOLS - 1."""
NEW_TOKENS = 100
PROMPTS = 8
STEPS = 300
_SIZES: dict[str, Any] = dict(
    vocab_size=32,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    max_position_embeddings=1024,
)
BACKBONES = {"llama": LlamaConfig, "qwen3": Qwen3Config}


class Text:
    """A text that goes on by a rule, and at every tenth place as it likes."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.rule = self.random.integers(0, SYMBOLS, (SYMBOLS,) * 3)

    def sample(self, batch: int, tokens: int) -> Tensor:
        """Ids int64 [batch, tokens]."""
        out = self.random.integers(0, SYMBOLS, (batch, tokens))
        free = self.random.random((batch, tokens)) < 0.1
        for at in range(3, tokens):
            ruled = self.rule[out[:, at - 3], out[:, at - 2], out[:, at - 1]]
            out[:, at] = np.where(free[:, at], out[:, at], ruled)
        return torch.from_numpy(out + FIRST_ID)


def main(target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in BACKBONES:
        if not (target / f"{name}.json").exists():
            make(target, name)


def make(target: Path, name: str) -> None:
    text = Text()
    model = train(name, text)
    prompts = make_prompts(text)
    hf.save_pretrained(model, target / name)
    type(model).save_pretrained(model, target / f"{name}-bare")
    with_memory = generate(model, prompts)
    with model.engraphy.disabled():
        without = generate(model, prompts)
    loss, bare_loss = losses(model, text)
    model.engraphy.init_rows(1.0, seed=1)
    hf.save_pretrained(model, target / f"{name}-other")
    other = generate(model, prompts)
    print(f"{name}: {loss:.3f} nats a token with the memory, {bare_loss:.3f} without")
    assert loss < bare_loss - 1, "the memory has to matter"
    body = {"prompts": prompts, "with_memory": with_memory, "bare": without, "other": other}
    (target / f"{name}.json").write_text(json.dumps(body))


def train(name: str, text: Text) -> Any:
    """A model that was trained together with its memory."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(BACKBONES[name](**_SIZES))
    config = EngramConfig.for_model(
        model.config, layers=(0, 2), heads=2, orders=(2, 3), rows_per_head=20_011, dim=8
    )
    memory = engraphy.attach(model, config)
    dense = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    pair = OptimizerPair(dense, RowAdam(memory, 3e-2), warmup_cosine(), clip=1.0)
    model.train()
    for step in range(1, STEPS + 1):
        token_losses(model, text.sample(16, 128)).mean().backward()
        pair.step(step / STEPS)
    return model.eval()


def token_losses(model: Any, ids_BT: Tensor) -> Tensor:
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none")


@torch.no_grad()
def losses(model: Any, text: Text) -> tuple[float, float]:
    """Nats a token with and without the memory."""
    ids_BT = text.sample(16, 128)
    with_memory = token_losses(model, ids_BT).mean().item()
    memory: EngramMemory = model.engraphy
    with memory.disabled():
        return with_memory, token_losses(model, ids_BT).mean().item()


def make_prompts(text: Text) -> list[list[int]]:
    """Prompts that begin alike, and go on differently; the last ones begin differently."""
    (shared,) = text.sample(1, 300).tolist()
    lengths = [5, 17, 40, 1, 90, 33]
    prompts = [shared + text.sample(1, length)[0].tolist() for length in lengths]
    prompts += [text.sample(1, length)[0].tolist() for length in (2, 150)]
    assert len(prompts) == PROMPTS
    return prompts


@torch.no_grad()
def generate(model: Any, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """The tokens that follow each prompt, and their log-probabilities."""
    answers = []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = out.sequences[0, len(prompt) :].tolist()
        logits_TV = torch.cat(out.logits).double()
        chosen = logits_TV.log_softmax(-1)[torch.arange(len(tokens)), tokens]
        answers.append({"tokens": tokens, "logprobs": chosen.tolist()})
    return answers


if __name__ == "__main__":
    main(Path(sys.argv[1]))
