"""Decodes with a SequenceState, the only thing a decoder has to carry: one token at a time gives
the same result as one forward pass, and tokens can be taken back.

python examples/decode.py
"""

import torch

from engraphy import EngramConfig, EngramMemory, HashSpec, LayerSpec, Trace, VocabMap

spec = HashSpec.demo(
    layer_ids=(0,), orders=(2, 3), heads=4, rows_per_head=1_000, vocab_size=500, pad_id=0
)
config = EngramConfig(spec, LayerSpec(hidden_size=16, width=spec.columns * 8), dim=8)
torch.manual_seed(0)
memory = EngramMemory(config, VocabMap.identity(500)).eval()
memory.init_rows(std=1.0, seed=0)
torch.nn.init.normal_(
    memory.blocks["0"].get_parameter("conv")
)  # it starts at zero; training would change it

ids = torch.randint(0, 500, (1, 12))
x = torch.randn(1, 12, 1, 16)  # [batch, tokens, streams, hidden]
with torch.no_grad():
    trace = Trace()
    whole = memory.fuse(0, x, memory.lookup(ids, trace=trace))

    state = memory.state(batch=1, margin=4)
    prompt = memory.fuse(0, x[:, :8], memory.lookup(ids[:, :8], state=state))
    draft = torch.randint(0, 500, (1, 3))  # is rejected
    memory.fuse(0, x[:, 8:11], memory.lookup(draft, state=state))
    state.crop(3)
    steps = []
    for t in range(8, 12):
        lookup = memory.lookup(ids[:, t : t + 1], state=state)
        steps.append(memory.fuse(0, x[:, t : t + 1], lookup))

print("largest difference:", float((torch.cat([prompt, *steps], dim=1) - whole).abs().max()))
print("gates:", [round(float(gate), 3) for gate in trace.gates[0][0, :, 0]])
print("rows of the last token:", trace.row_ids[0][0, -1].tolist())
