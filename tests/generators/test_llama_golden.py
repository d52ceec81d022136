"""Llama against the recorded numbers of the public modules."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from generators.llama_reference import plain_generate
from golden_cases import Golden, assert_close, assert_outputs, golden
from tessera.generators import Llama, SamplingConfig, scores
from tessera.generators.llama_decoder import LlamaDecoder
from tessera.zoo import from_public

CASE = pytest.mark.parametrize("case", ["ibq_gpt"])
pytestmark = pytest.mark.golden


def published(file: Golden, weights: dict[str, Tensor] | None = None) -> Llama:
    return from_public("ibq", file.config, file.weights if weights is None else weights)


def settings(options: list) -> tuple[SamplingConfig, bool]:
    """Ours for the public [cfg_scale, temperature, top_k, top_p, greedy]."""
    scale, temperature, top_k, top_p, greedy = options
    sampling = SamplingConfig(temperature, scale, top_k=top_k, top_p=top_p, guidance_schedule="constant")
    return sampling, greedy


def drawing(uniforms: Tensor, greedy: bool, seen: list[Tensor]) -> Callable[[Tensor, int], Tensor]:
    """The file's rule: argmax, or the first index whose cumulative probability in float64 exceeds u (B, L)."""

    def draw(probs: Tensor, step: int) -> Tensor:
        seen.append(probs[:, 0])
        if greedy:
            return probs.argmax(-1)
        above = probs.double().cumsum(-1) > uniforms[:, step].double()[:, None, None]
        return above.to(torch.int64).argmax(-1)

    return draw


def cached_logits(model: Llama, labels: Tensor, tokens: Tensor) -> Tensor:
    """Logits (2B, L, K) of both halves, from the decoder with its cache."""
    decoder = LlamaDecoder(model, torch.cat([labels, torch.full_like(labels, model.none_id)]))
    features = [decoder.start(), *(decoder.step(tokens[:, :, step], step) for step in range(model.num_tokens - 1))]
    return decoder.logits(torch.stack(features, 1))[:, :, 0]


def loss_and_gradients(model: Llama, file: Golden) -> dict[str, Tensor]:
    loss = model.loss(file.input["tokens"][:, None], file.input["labels"].flatten())["loss"]
    model.zero_grad()
    loss.backward()
    return {"loss_ce": loss} | {f"grad/{name}": model.get_parameter(name).grad for name in file.config["grads"]}


def outputs(model: Llama, file: Golden, cached: bool = True) -> dict[str, Tensor]:
    """Every recorded output of the file."""
    labels, tokens = file.input["labels"].flatten(), file.input["tokens"][:, None]
    cos, sin = model.rotation()
    found = {
        "logits_teacher_forcing": model(tokens[:, :, :-1], labels)[:, :, 0],
        "logits_teacher_forcing_null_class": model(tokens[:, :, :-1], torch.full_like(labels, model.none_id))[:, :, 0],
        "freqs_cis": torch.stack([cos[:, ::2], sin[:, 1::2]], -1),
    }
    found |= loss_and_gradients(model, file)
    for run, options in file.config["sampling"].items():
        sampling, greedy = settings(options)
        probs: list[Tensor] = []
        draw = drawing(file.input["uniforms"], greedy, probs)
        if cached:
            drawn = model.generate(labels, sampling, rng=draw)
            with torch.no_grad():
                raw = cached_logits(model, labels, drawn)
        else:
            drawn, logits = plain_generate(model, labels, sampling, draw)
            raw = torch.stack(logits, 1)[:, :, 0]
        found |= {f"{run}/tokens": drawn[:, 0], f"{run}/raw_logits_cond_then_uncond": raw}
        if f"{run}/probs" in file.output:  # greedy runs have none
            found[f"{run}/probs"] = torch.stack(probs, 1)
    return {name: value.detach() for name, value in found.items()}


@CASE
@pytest.mark.parametrize("cached", [True, False])
def test_published_generator(case, cached):
    file = golden(case)
    assert_outputs(outputs(published(file), file, cached), file)


@CASE
def test_recomputed_blocks_and_tiled_logits_give_the_recorded_gradients(case, monkeypatch):
    file = golden(case)
    model = published(file).train()
    model.checkpoint_blocks, model.class_dropout = True, 0.0
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for block in model.blocks:
        block.attention.attention_dropout = 0.0
    monkeypatch.setattr(scores, "TILE_BYTES", 4 * file.input["tokens"].numel() * (model.codebook_size // 3))
    for name, value in loss_and_gradients(model, file).items():
        assert_close(value, file.output[name])


@pytest.mark.usefixtures("shipped_files")
@CASE
def test_parity_fails_when_a_weight_changes(case):
    """Every tensor of the file matters by far more than the tolerance."""
    file = golden(case)
    labels, tokens = file.input["labels"].flatten(), file.input["tokens"][:, None, :-1]
    for key in file.weights:
        changed = file.weights[key] + 0.1 * torch.linspace(-1, 1, file.weights[key].shape[-1])
        model = published(file, {**file.weights, key: changed})
        with torch.no_grad():
            logits = model(tokens, labels)[:, :, 0]
        assert (logits - file.output["logits_teacher_forcing"]).abs().max() > 1e-4, key
