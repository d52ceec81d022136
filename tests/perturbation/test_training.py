"""Perturbations in the tokenizer's training: one that fits trains and logs its rates, one that doesn't is refused."""

from functools import partial

import pytest
import torch

from stage_setup import data, tokenizer, tokenizer_stage, trainer
from tessera.backbones import CNNDecoder, CNNEncoder
from tessera.errors import ConfigError
from tessera.perturbation import (
    GaussianPerturbation,
    LinearAnneal,
    NearestCodePerturbation,
    RandomCodePerturbation,
)
from tessera.quantizers import GaussianBottleneck
from tessera.rng import IndexedRng
from tessera.tokenizers import Tokenizer

HALF = LinearAnneal(0.0, 1.0, 0.5)
STRATEGIES = {
    "code": (partial(NearestCodePerturbation, 0.8, 0.5, 8, neighbors_of="code"), {"tokens_redrawn", "tokens_changed"}),
    "random": (partial(RandomCodePerturbation, 0.8, 0.5), {"tokens_redrawn", "tokens_changed"}),
    "noise": (partial(GaussianPerturbation, 0.8, 0.5, std=0.3), {"cells_noised"}),
    "matched": (partial(GaussianPerturbation, 0.8, 0.5, matched_delta=8), {"cells_noised"}),
}


def continuous_tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    size = {"channels": 8, "channel_multipliers": (1, 2, 2), "num_res_blocks": 1, "z_channels": 8, "norm_groups": 4}
    return Tokenizer(CNNEncoder(**size), GaussianBottleneck(4), CNNDecoder(**size), 16)


def logged(folder, steps: int = 2, **changes) -> list[dict[str, float]]:
    """What a training logs at each step about its perturbation."""
    stage = tokenizer_stage(discriminator=None, **changes)
    values = []

    def record(*_):
        found = stage.trainer.callback_metrics
        values.append({k.removeprefix("train/perturbation/"): float(v) for k, v in found.items() if "/perturb" in k})

    stage.on_train_batch_end = record
    trainer(folder, steps).fit(stage, data("images", None, batch_size=16))
    return values


@pytest.mark.parametrize("name", STRATEGIES)
def test_strengths_and_realised_rates_are_logged(tmp_path, name):
    build, rates = STRATEGIES[name]
    strategy = build(schedule=HALF, beta_schedule=HALF)
    steps = logged(tmp_path, perturbation=strategy)
    for step, values in enumerate(steps):
        strength = strategy.strength(step / 2)
        assert set(values) == {*strength, "images", "displacement", *rates}
        assert {key: values[key] for key in strength} == pytest.approx(strength)
    assert any(values["images"] > 0 for values in steps)
    for values in steps:
        assert all((values[key] > 0) == (values["images"] > 0) for key in (*rates, "displacement"))


def test_nothing_is_logged_without_a_perturbation(tmp_path):
    assert logged(tmp_path, perturbation=None) == [{}, {}]


def test_rates_are_those_of_the_step(tmp_path):
    seen = []

    class Spy(NearestCodePerturbation):
        def __call__(self, quantizer, z, output, progress, rng=None):
            seen.append(rng)
            return super().__call__(quantizer, z, output, progress, rng)

    steps = logged(tmp_path, perturbation=Spy(0.7, 0.5, 8))
    for values, rng in zip(steps, seen, strict=True):
        assert isinstance(rng, IndexedRng)
        selected = rng.uniform("perturb/image") < 0.5
        hit = (rng.uniform("perturb/site", 1, 16) < 0.7) & selected[:, None, None]
        assert values["images"] == pytest.approx(selected.float().mean().item())
        assert values["tokens_redrawn"] == pytest.approx(hit.float().mean().item())
        assert 0 < values["tokens_changed"] <= values["tokens_redrawn"]


def test_noise_trains_a_continuous_tokenizer(tmp_path):
    settings = {"tokenizer": continuous_tokenizer(), "loss_weights": {"kl": 1e-3}}
    steps = logged(tmp_path, perturbation=GaussianPerturbation(1.0, 1.0, std=0.5), **settings)
    assert steps[0]["displacement"] == pytest.approx(0.25, rel=0.2) and steps[0]["cells_noised"] == 1.0


@pytest.mark.parametrize(
    ("strategy", "model", "message"),
    [
        (NearestCodePerturbation(1.0, 0.1, 33), tokenizer, r"perturbation\.delta=33 exceeds the 32 codes"),
        (GaussianPerturbation(1.0, 0.1, matched_delta=33), tokenizer, r"perturbation\.matched_delta=33 exceeds the 32"),
        (NearestCodePerturbation(1.0, 0.1, 4), continuous_tokenizer, "has none; choose perturbation=gaussian"),
        (RandomCodePerturbation(1.0, 0.1), continuous_tokenizer, "has none; choose perturbation=gaussian"),
        (GaussianPerturbation(1.0, 0.1, matched_delta=4), continuous_tokenizer, r"set it to null and give"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(strategy, model, message):
    with pytest.raises(ConfigError, match=message):
        tokenizer_stage(tokenizer=model(), perturbation=strategy)


def test_an_unknown_latent_for_alignment_is_refused():
    with pytest.raises(ConfigError, match=r"stage\.semantic_on='noisy' is unknown; choose one of clean, perturbed"):
        tokenizer_stage(semantic_on="noisy")
