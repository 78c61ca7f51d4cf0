"""Gives a transformers model a memory, trains it on a text while the model stays frozen, generates
text, saves the memory and loads it.

    python examples/attach.py [MODEL [TEXT]]

MODEL: folder or hub name of a model; without it, a tiny model with random weights is made.
TEXT: a text file; by default this one.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

import engraphy
from engraphy import EngramConfig, Trace, VocabMap
from engraphy.data.tokens import train_tokenizer
from engraphy.hf import cost
from engraphy.train import OptimizerPair, RowAdam, warmup_cosine

STEPS = 30
ROWS = 8  # of the batch
LENGTH = 128  # tokens of a row
text = Path(sys.argv[2] if len(sys.argv) > 2 else __file__).read_text()
torch.manual_seed(0)
model: Any
if len(sys.argv) > 1:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
else:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer([text], 384), eos_token="<|endoftext|>"
    )
    sizes = LlamaConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(sizes).eval()

# The memory hashes compressed ids: tokens that differ only in case, accents or blanks share one.
vocab = VocabMap.from_tokenizer(tokenizer, raw_size=model.config.vocab_size)
config = EngramConfig.for_model(model.config, rows_per_head=2_000, vocab_size=len(vocab))
print(f"layers {list(config.hash.layer_ids)}:", cost(config))

ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
ids = ids[: min(ROWS, len(ids) // LENGTH) * LENGTH].view(-1, LENGTH)
before = model(ids, labels=ids).logits
memory = engraphy.attach(model.requires_grad_(False), config, vocab)
print("a fresh memory changes nothing:", torch.equal(model(ids, labels=ids).logits, before))

memory.train()
dense = torch.optim.AdamW(memory.parameters(), lr=3e-3, weight_decay=0.0)
pair = OptimizerPair(dense, RowAdam(memory, lr=1.5e-2), warmup_cosine(), clip=1.0)
for step in range(STEPS):
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    pair.step(progress=(step + 1) / STEPS)
    if step % 10 == 0 or step == STEPS - 1:
        print(f"step {step:2d}  loss {loss.item():.3f}")
memory.eval()

prompt = tokenizer("from engraphy import", return_tensors="pt")["input_ids"]
new = model.generate(
    prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False
)
print(repr(tokenizer.decode(new[0])))
trace = Trace()
model(new, engraphy_trace=trace)  # records how far each token opens the gates
for layer, gates in trace.gates.items():
    print(f"gates of layer {layer}:", [round(float(gate), 2) for gate in gates[0, :6, 0]])

after = model(ids).logits
with tempfile.TemporaryDirectory() as folder:
    memory.save(Path(folder) / "memory")  # dense weights and the table, without the model
    engraphy.detach(model)
    print("detached, the model is what it was:", torch.equal(model(ids).logits, before))
    engraphy.load(model, Path(folder) / "memory", tokenizer=tokenizer)
    print("loaded, equal bit for bit:", torch.equal(model(ids).logits, after))
