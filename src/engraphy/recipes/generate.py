"""`engraphy generate`: text from a model with its memory, and how far each token opened the
memory's gates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from ..errors import ConfigError, InputError
from ..hf import load
from ..hf.hub import adapter_of, find_memory
from ..hf.pretrained import load_adapter, load_model, load_tokenizer
from ..memory.memory import Trace
from ..train.dtype import AUTO, check_dtype

_FAINT, _FULL = (237, 243, 251), (8, 69, 148)  # the ends of a layer's colour scale


@dataclass(frozen=True)
class Token:
    """gates: layer -> one value from 0 to 1 for each residual stream, how much of what the memory
    holds for the n-gram that ends here is let in."""

    id: int
    text: str
    generated: bool
    gates: dict[int, list[float]]

    def gate(self, layer: int) -> float:
        """Mean over the streams."""
        return sum(self.gates[layer]) / len(self.gates[layer])


@dataclass(frozen=True)
class Generation:
    """What was generated for a prompt. tokens: of both."""

    prompt: str
    text: str
    layers: tuple[int, ...]
    tokens: tuple[Token, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            **asdict(self),
            "layers": list(self.layers),
            "tokens": [asdict(token) for token in self.tokens],
        }


@dataclass(frozen=True)
class GenerateConfig:
    """model: folder or hub name. memory: folder that `memory.save` or `finetune` wrote, or its name
    on the hub; adapters in it are loaded too. tokens: the most to generate. temperature: 0 = the
    likeliest token each time, else samples drawn by `seed`. dtype: as `choose_dtype`
    takes it."""

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
    """Generate, then read the gates off one forward over prompt and text together.

    say: is given the dtype that was chosen and why, as one line. Raises DataUnavailable for a model
    or tokenizer that is not there, DigestMismatch for a memory of another tokenizer, InputError for
    a prompt without tokens.
    """
    tokenizer = load_tokenizer(config.model)
    model, dtype = load_model(config.model, config.dtype)
    say(str(dtype))
    folder = find_memory(config.memory)
    if (adapter := adapter_of(folder)) is not None:
        model = load_adapter(model, adapter)
    memory = load(model, folder, tokenizer=tokenizer).eval()
    prompt_BT = torch.tensor(
        [tokenizer(config.prompt)["input_ids"]], dtype=torch.long, device=model.device
    )
    if not prompt_BT.numel():
        raise InputError(f"prompt: expected at least one token, {config.prompt!r} has none")
    torch.manual_seed(config.seed)
    sampling = (
        {"do_sample": True, "temperature": config.temperature}
        if config.temperature
        else {"do_sample": False}
    )
    ids_BT = model.generate(
        prompt_BT,
        attention_mask=torch.ones_like(prompt_BT),
        max_new_tokens=config.tokens,
        pad_token_id=_pad_id(tokenizer),
        **sampling,
    )
    trace = Trace()
    model(input_ids=ids_BT, use_cache=False, engraphy_trace=trace)
    ids, given = ids_BT[0].tolist(), prompt_BT.shape[1]
    texts = _pieces(tokenizer, ids)
    tokens = tuple(
        Token(
            ids[t],
            texts[t],
            t >= given,
            {layer: trace.gates[layer][0, t].tolist() for layer in memory.layers},
        )
        for t in range(len(ids))
    )
    return Generation(config.prompt, "".join(texts[given:]), tuple(memory.layers), tokens)


def show(generation: Generation, gates: bool, console: Console) -> None:
    """Print the text, what was generated in bold; with `gates` once for each layer, coloured by its
    gate.

    A terminal without colours gets a table of numbers.
    """
    if not gates:
        pieces = ((token.text, "bold" if token.generated else "") for token in generation.tokens)
        console.print(Text.assemble(*pieces), soft_wrap=True)
    elif console.color_system is None:
        table = Table("token", *(f"layer {layer}" for layer in generation.layers), box=None)
        for token in generation.tokens:
            table.add_row(
                Text(repr(token.text)), *(f"{token.gate(layer):.3f}" for layer in generation.layers)
            )
        console.print(table)
    else:
        for layer in generation.layers:
            console.print(_coloured(generation, layer), soft_wrap=True)


def _coloured(generation: Generation, layer: int) -> Text:
    """A line that tells the layer's scale, lowest to highest gate of these tokens, and the text on
    that scale."""
    values = [token.gate(layer) for token in generation.tokens]
    low, high = min(values), max(values)
    text = Text.assemble(
        f"layer {layer}  gate {low:.3f} ",
        *((" ", _style(step / 9, False)) for step in range(10)),
        f" {high:.3f}\n",
    )
    for token, value in zip(generation.tokens, values, strict=True):
        share = (value - low) / (high - low) if high > low else 0.0
        text.append(token.text.replace("\n", "↵\n"), _style(share, token.generated))
    return text.append("\n")


def _style(share: float, bold: bool) -> Style:
    """A background between _FAINT and _FULL, and text that can be read on it, whatever the
    terminal's own colours."""
    red, green, blue = (
        round(low + share * (high - low)) for low, high in zip(_FAINT, _FULL, strict=True)
    )
    color = "rgb(255,255,255)" if share > 0.5 else "rgb(0,0,0)"
    return Style(color=color, bgcolor=f"rgb({red},{green},{blue})", bold=bold)


def _pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text that each token adds; a character of several tokens comes with the last of them."""
    texts, shown = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        whole = end == len(ids) or not text.endswith("\ufffd")
        texts.append(text[len(shown) :] if whole else "")
        shown = text if whole else shown
    return texts


def _pad_id(tokenizer: Any) -> int | None:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
