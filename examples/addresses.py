"""Row ids of a released model's layout, without its table: DeepSeek-V4.1's 384,006,168 rows from a
few numbers.

python examples/addresses.py
"""

import numpy as np

from engraphy import Addresser, HashSpec, VocabMap

spec = HashSpec.deepseek_v41()
print(
    {layer: f"{spec.row_count(layer):,} rows" for layer in spec.layer_ids},
    "digest",
    spec.digest()[:12],
)

# With the real tokenizer:
# VocabMap.from_tokenizer(tokenizers.Tokenizer.from_file("tokenizer.json")).
vocab = VocabMap.identity(spec.vocab_size)
addresser = Addresser(spec, vocab)
prompt = np.array([[10, 20, 30, 40, 50]])
whole = addresser.all_rows(prompt)  # [layers, batch, tokens, columns]
chunk = addresser.all_rows(prompt[:, 3:], history=prompt[:, :3])
print(
    "shape",
    whole.shape,
    "- the rest of a prompt, given the three ids before it, has the same rows:",
    bool((chunk == whole[:, :, 3:]).all()),
)
print(
    "first columns of the last token in layer 14:",
    addresser.rows(prompt, layer=14)[0, -1, :4].tolist(),
)
