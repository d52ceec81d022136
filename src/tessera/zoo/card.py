"""The model card (`README.md`) of an export: what the model is, how good, by which protocol, how to use it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tessera.generators.base import Generator

# the files of an export
WEIGHTS, CONFIG, CARD = FILES = "model.safetensors", "config.json", "README.md"


@dataclass(frozen=True)
class ModelCard:
    """What the weights don't tell. None and empty ones are left out.

    Attributes:
        name: title.
        licence: of the weights, an SPDX id, e.g. "Apache-2.0".
        dataset: what it was trained on.
        figures: as `tessera.metrics.Figure.to_dict` gives them: `label`, which names the protocol, `value`, `protocol`
            (of published ones in words).
        weights: "ema" (averaged) or "raw".
        command: that trained it.
        commit: of the code that trained it.
        note: anything else, in a sentence.
    """

    name: str | None = None
    licence: str | None = None
    dataset: str | None = None
    figures: Sequence[Mapping[str, Any]] = ()
    weights: str | None = None
    command: str | None = None
    commit: str | None = None
    note: str | None = None


def _facts(model: nn.Module) -> dict[str, Any]:
    count = sum(parameter.numel() for parameter in model.parameters())
    facts: dict[str, Any] = {"kind": type(model).__name__, "parameters": f"{count:,}".replace(",", " ")}
    if isinstance(model, Generator):
        branches = f"{model.num_branches} x " if model.num_branches > 1 else ""
        facts |= {"tokens": f"{branches}{model.num_tokens} of {model.codebook_size} codes"}
        return facts | {"classes": model.num_classes}
    size = f"{model.resolution} x {model.resolution}"
    facts |= {"images": f"{size} pixels, RGB in [-1, 1]", "latent": " x ".join(map(str, model.grid))}
    quantizer = model.quantizer
    if getattr(quantizer, "num_tokens", 0):
        branches = f"{quantizer.num_branches} x " if quantizer.num_branches > 1 else ""
        facts["tokens"] = f"{branches}{quantizer.num_tokens} of {quantizer.codebook_size} codes"
    return facts


def _protocol(figure: Mapping[str, Any]) -> str:
    """The parts of a figure's protocol that a reader compares first."""
    protocol = figure.get("protocol") or {}
    if isinstance(protocol, str):  # a publisher's words
        return protocol
    parts = [protocol.get("extractor"), protocol.get("reference") and f"reference {protocol['reference']}"]
    if protocol.get("samples"):
        parts.append(f"{protocol['samples']} images")
    return ", ".join(part for part in parts if part)


def _usage(model: nn.Module) -> list[str]:
    load = ["from tessera import zoo", ""]
    if isinstance(model, Generator):
        return [
            "import torch",
            *load,
            'generator = zoo.from_pretrained("<this folder, or its id on the hub>")',
            'tokenizer = zoo.from_pretrained("<that of the tokenizer>")',
            "generator.bind(tokenizer.quantizer)",
            "images = tokenizer.detokenize(generator.generate(torch.arange(8), generator.sampling))  # in [-1, 1]",
        ]
    return [
        *load,
        'tokenizer = zoo.from_pretrained("<this folder, or its id on the hub>")',
        "tokens = tokenizer.tokenize(images)  # of (B, 3, H, W) in [-1, 1]: (B, P, L) int64",
        "images = tokenizer.detokenize(tokens)",
    ]


def card_text(model: nn.Module, card: ModelCard) -> str:
    """Markdown with the header that the Hugging Face hub reads.

    Args:
        model: tokenizer or generator; its sizes are listed.
        card: what its weights don't tell.
    """
    header = ["library_name: tessera", "tags: [image-generation, image-tokenizer]"]
    if card.licence:
        header.insert(0, f"license: {card.licence.lower()}")
    facts = _facts(model) | {
        "data": card.dataset,
        "weights": {"ema": "averaged (EMA)", "raw": "not averaged"}.get(card.weights or "", card.weights),
        "trained by": card.command and f"`{card.command}`",
        "commit": card.commit,
        "licence": card.licence or "not stated",
    }
    lines = ["---", *header, "---", "", f"# {card.name or type(model).__name__}", ""]
    lines += [card.note, ""] if card.note else []
    lines += ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in facts.items() if value), ""]
    if card.figures:
        lines += ["## Figures", "", "| figure | value | protocol |", "| --- | --- | --- |"]
        for figure in card.figures:
            lines.append(f"| {figure['label']} | {figure['value']:.4g} | {_protocol(figure)} |")
        lines += ["", "`config.json` has the protocols in full.", ""]
    lines += ["## Use", "", "```python", *_usage(model), "```", ""]
    return "\n".join(lines)
