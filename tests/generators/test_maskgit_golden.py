"""MaskGIT against the recorded numbers of the public modules."""

import pytest
import torch
from torch import Tensor

from generators.maskgit_reference import RecordedUniforms, golden_maskgit, public_sampling
from golden_cases import Golden, assert_outputs, golden
from tessera.generators.maskgit import MaskGIT

CASES = pytest.mark.parametrize("case", ["maskgit_imagebert", "maskgit_uvitbert"])
pytestmark = pytest.mark.golden


class RecordedMasks:
    """The two draws that a training mask takes."""

    def __init__(self, data: Golden):
        self.draws = {"mask/share": data.input["mask_time"], "mask/order": data.input["mask_rand"][:, None]}

    def uniform(self, stream: str, *shape: int) -> Tensor:
        draws = self.draws[stream]
        assert tuple(draws.shape[1:]) == shape
        return draws


def public_ids(model: MaskGIT, tokens: Tensor, masked: Tensor) -> Tensor:
    """(B, L) tokens with the mask's id where masked."""
    return torch.where(masked, model.mask_id, tokens)[:, 0]


def sampled(model: MaskGIT, data: Golden, run: str) -> dict[str, Tensor]:
    """What a run of `generate` records, ours."""
    sampling = public_sampling(data.config["runs"][run])
    entering, halves, first_logits = [], 0, None
    features = model.features

    def watched(tokens: Tensor, masked: Tensor, conditions: Tensor) -> Tensor:
        nonlocal halves, first_logits
        out = features(tokens, masked, conditions)
        batch = len(data.input["class_ids"])
        halves += len(tokens) // batch
        entering.append(public_ids(model, tokens[:batch], masked[:batch]))
        if first_logits is None:
            first_logits = model.head(out[:batch])[:, :, 0]
        return out

    model.features = watched
    uniforms = RecordedUniforms(sample=data.input["u_tokens"], confidence=data.input["u_confidence"])
    ids = model.generate(data.input["class_ids"], sampling, rng=uniforms)[:, 0]
    del model.features
    if sampling.guidance_schedule == "power_cosine":  # the public code also runs both halves where the weight is 1
        halves += (sampling.guidance_weights(len(entering)) or [1] * len(entering)).count(1)
    found = {
        "ids": ids,
        "ids_before_step": torch.stack(entering),
        "first_step_logits": first_logits,
        "n_forward_passes": torch.tensor(halves),
    }
    return {f"{run}/{name}": value for name, value in found.items()}


def trained(model: MaskGIT, data: Golden) -> dict[str, Tensor]:
    """What a training step records, ours; the model is in eval mode.

    The published accuracy is the mean of the samples' accuracies; ours is that of the batch's masked tokens.
    """
    tokens, labels = data.input["token_ids"][:, None], data.input["class_ids"]
    masked = model.draw_masks(RecordedMasks(data), tokens.device)
    inputs = (tokens, masked, model.condition_ids(labels))
    alone = [model.masked_loss(*(value[i : i + 1] for value in inputs)) for i in range(len(labels))]
    return {
        "train_mask": masked[:, 0].long(),
        "train_masked_ids": public_ids(model, tokens, masked),
        "train_logits": model(*inputs)[:, :, 0],
        "train_loss": model.masked_loss(*inputs)["loss"],
        "train_correct_tokens": torch.stack([result["accuracy"] for result in alone]).mean(),
    }


def logits(model: MaskGIT, data: Golden) -> dict[str, Tensor]:
    """The recorded logits of given tokens, ours."""
    ids, labels = data.input["masked_ids"][:, None], data.input["class_ids"]
    masked = ids == model.mask_id
    tokens, dropped = ids.masked_fill(masked, 0), torch.ones_like(labels).bool()
    return {
        "logits_cond": model(tokens, masked, model.condition_ids(labels))[:, :, 0],
        "logits_uncond": model(tokens, masked, model.condition_ids(labels, dropped))[:, :, 0],
    }


@CASES
@torch.no_grad()
def test_every_output(case):
    data = golden(case)
    model = golden_maskgit(data)
    ours = {**logits(model, data), **trained(model, data)}
    for run in data.config["runs"]:
        ours |= sampled(model, data, run)
    assert_outputs(ours, data)


@pytest.mark.usefixtures("shipped_files")
@CASES
@torch.no_grad()
def test_every_weight_matters(case):
    """A changed weight changes the logits by far more than the tolerance: the comparison above can fail.

    Softmax doesn't see the bias of keys, and of the token types only the first is used.
    """
    data = golden(case)
    model = golden_maskgit(data)
    for name, parameter in model.named_parameters():
        before = parameter.clone()
        changed = parameter[0] if name == "type_embed" else parameter
        changed += 0.1 * torch.linspace(-1, 1, changed.numel()).view_as(changed)
        found = logits(model, data)
        assert max((found[key] - data.output[key]).abs().max() for key in found) > 1e-4, name
        parameter.copy_(before)
