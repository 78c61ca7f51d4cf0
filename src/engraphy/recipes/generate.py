"""`engraphy generate`: text from a model with its memory, and how far each token opened the
memory's gates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ..errors import ConfigError, InputError
from ..hf.pretrained import decoder
from ..memory.memory import Trace
from ..train.dtype import AUTO, check_dtype
from .loading import load_all
from .painting import painted, pieces


@dataclass(frozen=True)
class Token:
    """One token of a text.

    Attributes:
        id: Its id.
        text: What it adds to the text.
        generated: False for a token of the prompt.
        gates: By layer, one value from 0 to 1 for each residual stream: how much the memory adds
            of what it holds for the n-grams that end here.
    """

    id: int
    text: str
    generated: bool
    gates: dict[int, list[float]]

    def gate(self, layer: int) -> float:
        """Returns the mean gate of a layer over the streams."""
        return sum(self.gates[layer]) / len(self.gates[layer])


@dataclass(frozen=True)
class Generation:
    """What was generated for a prompt.

    Attributes:
        prompt: The prompt.
        text: What follows it.
        layers: Layers with a memory, 0-based.
        tokens: Tokens of prompt and text.
    """

    prompt: str
    text: str
    layers: tuple[int, ...]
    tokens: tuple[Token, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns the generation as plain JSON values."""
        return {
            **asdict(self),
            "layers": list(self.layers),
            "tokens": [asdict(token) for token in self.tokens],
        }


@dataclass(frozen=True)
class GenerateConfig:
    """What to generate, and with what.

    Attributes:
        model: Folder or hub name of the model.
        memory: Folder that `memory.save` or `finetune` wrote, or its name on the hub. Adapters in
            it are loaded too.
        prompt: Text to go on from.
        tokens: Largest number of tokens to generate.
        temperature: 0 = the likeliest token each time; above 0 = samples.
        seed: Seed of the samples.
        dtype: As `choose_dtype` takes it.
    """

    model: str
    memory: str
    prompt: str
    tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    dtype: str = AUTO

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        if self.tokens < 1:
            raise ConfigError(f"tokens: expected 1 or more, found {self.tokens}")
        if not self.temperature >= 0:
            raise ConfigError(f"temperature: expected 0 or more, found {self.temperature}")


@torch.no_grad()
def generate(config: GenerateConfig, say: Callable[[str], None] = lambda line: None) -> Generation:
    """Generates text, then reads the gates from one forward pass over prompt and text.

    Args:
        config: Model, memory, prompt and settings.
        say: Called with one line: the dtype that was chosen, and why.

    Returns:
        The text, and the gates of each token.

    Raises:
        DataUnavailable: If the model, its tokenizer or the memory does not exist.
        DigestMismatch: If the memory was made for another tokenizer.
        InputError: If the prompt has no tokens.
    """
    loaded = load_all(config.model, config.memory, config.dtype)
    say(str(loaded.dtype))
    model, tokenizer = loaded.model, loaded.tokenizer
    prompt_ids = tokenizer(config.prompt)["input_ids"]
    prompt_BT = torch.tensor([prompt_ids], dtype=torch.long, device=model.device)
    if not prompt_BT.numel():
        raise InputError(f"prompt: expected at least one token, found none in {config.prompt!r}")
    ids_BT = _generated(model, prompt_BT, config, _pad_id(tokenizer))
    trace = Trace()
    model(input_ids=ids_BT, use_cache=False, engraphy_trace=trace)
    layers = tuple(sorted(trace.gates))
    begin = prompt_BT.shape[1]
    ids = ids_BT[0].tolist()
    texts = pieces(decoder(tokenizer), ids)
    tokens = []
    for t, (token_id, text) in enumerate(zip(ids, texts, strict=True)):
        gates = {layer: trace.gates[layer][0, t].tolist() for layer in layers}
        tokens.append(Token(token_id, text, t >= begin, gates))
    return Generation(config.prompt, "".join(texts[begin:]), layers, tuple(tokens))


def _generated(model: Any, prompt_BT: Tensor, config: GenerateConfig, pad_id: int | None) -> Tensor:
    """Ids of prompt and text, int64 [1, T]."""
    torch.manual_seed(config.seed)
    sampling: dict[str, Any] = {"do_sample": False}
    if config.temperature:
        sampling = {"do_sample": True, "temperature": config.temperature}
    return model.generate(
        prompt_BT,
        attention_mask=torch.ones_like(prompt_BT),
        max_new_tokens=config.tokens,
        pad_token_id=pad_id,
        **sampling,
    )


def show(generation: Generation, gates: bool, console: Console) -> None:
    """Prints the text, with what was generated in bold.

    Args:
        generation: What `generate` returned.
        gates: True prints the text once for each layer, coloured by its gate; a console without
            colours gets a table of numbers.
        console: Where to print.
    """
    if not gates:
        pieces = ((token.text, "bold" if token.generated else "") for token in generation.tokens)
        console.print(Text.assemble(*pieces), soft_wrap=True)
    elif console.color_system is None:
        console.print(_gate_table(generation))
    else:
        for layer in generation.layers:
            console.print(_coloured(generation, layer), soft_wrap=True)


def _gate_table(generation: Generation) -> Table:
    """A row for each token, a column for each layer."""
    table = Table("token", *(f"layer {layer}" for layer in generation.layers), box=None)
    for token in generation.tokens:
        gates = [f"{token.gate(layer):.3f}" for layer in generation.layers]
        table.add_row(Text(repr(token.text)), *gates)
    return table


def _coloured(generation: Generation, layer: int) -> Text:
    """The text on the scale of a layer's gates; what was generated in bold."""
    texts = [token.text for token in generation.tokens]
    values = [token.gate(layer) for token in generation.tokens]
    bold = [token.generated for token in generation.tokens]
    return painted(f"layer {layer}  gate", texts, values, bold)


def _pad_id(tokenizer: Any) -> int | None:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
