"""Computes row ids in a released model's layout, without its table: the 384,006,168 rows of
DeepSeek-V4.1 follow from a few numbers.

python examples/addresses.py
"""

import numpy as np

from engraphy import Addresser, HashSpec, VocabMap

spec = HashSpec.deepseek_v41()
rows = {layer: f"{spec.row_count(layer):,} rows" for layer in spec.layer_ids}
print(rows, "digest", spec.digest()[:12])

# With the real tokenizer:
# VocabMap.from_tokenizer(tokenizers.Tokenizer.from_file("tokenizer.json")).
vocab = VocabMap.identity(spec.vocab_size)
addresser = Addresser(spec, vocab)
prompt = np.array([[10, 20, 30, 40, 50]])
whole = addresser.all_rows(prompt)  # [layers, batch, tokens, columns]
print("shape", whole.shape)

# The end of the prompt alone, with the three ids before it as history.
chunk = addresser.all_rows(prompt[:, 3:], history=prompt[:, :3])
same = bool((chunk == whole[:, :, 3:]).all())
print("the end of a prompt, after its history, has the same rows:", same)

rows_BTC = addresser.rows(prompt, layer=14)
print("first columns of the last token in layer 14:", rows_BTC[0, -1, :4].tolist())
