import math

import pytest
import torch

from stage_setup import (
    STAGES,
    data,
    generator,
    generator_stage,
    post_training_stage,
    standard_callbacks,
    tokenizer,
    tokenizer_stage,
    trainer,
)
from tessera.discriminators import PatchGAN
from tessera.errors import CheckpointError, ConfigError
from tessera.perturbation import NearestCodePerturbation
from tessera.stages.finite import DivergedError


@pytest.mark.parametrize("name", STAGES)
def test_one_training_step_is_one_global_step(tmp_path, name):
    build, serve = STAGES[name]
    changes = {"discriminator_start": 0.0} if name == "tokenizer" else {}
    stage = build(**changes)
    batches = []
    stage.on_train_batch_end = lambda *_: batches.append(stage.trainer.global_step)
    trainer(tmp_path, 6).fit(stage, data(serve, tmp_path))
    warmup = [0, 0] if name == "post_training" else []
    assert batches == [*warmup, 1, 2, 3, 4, 5, 6]


def test_steps_of_the_discriminator_alone_have_draws_of_their_own(tmp_path):
    stage, steps = post_training_stage(), []
    judge = stage.judge
    stage.judge = lambda images, rng: steps.append(rng.step) or judge(images, rng)
    trainer(tmp_path, 2).fit(stage, data("pairs", tmp_path))
    # real and generated images in each of two steps alone; then once more for the generator
    assert steps == [0, 0, 1, 1, 2, 2, 2, 3, 3, 3]


def test_accumulation_counts_windows_and_matches_the_joint_batch(tmp_path):
    settings = {"discriminator": None, "perturbation": None, "gradient_clip": None}
    small = tokenizer_stage(accumulate_grad_batches=4, **settings)
    large = tokenizer_stage(**settings)
    fit = trainer(tmp_path, 3)
    fit.fit(small, data("images", None, batch_size=16))
    assert fit.global_step == 3
    trainer(tmp_path, 3).fit(large, data("images", None, batch_size=64))
    for a, b in zip(small.tokenizer.parameters(), large.tokenizer.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-2)


def test_nothing_of_the_discriminator_runs_before_its_start(tmp_path):
    stage = tokenizer_stage(discriminator_start=1.0)
    before = {key: value.clone() for key, value in stage.discriminator.state_dict().items()}
    stage.discriminator.forward = lambda images: pytest.fail("the discriminator ran")
    trainer(tmp_path, 3).fit(stage, data("images", None))
    assert all(torch.equal(value, before[key]) for key, value in stage.discriminator.state_dict().items())


def test_the_discriminator_is_frozen_in_the_generator_step(tmp_path):
    stage = tokenizer_stage(discriminator_start=0.0)
    calls = []
    stage.discriminator.register_forward_pre_hook(
        lambda module, _: calls.append({p.requires_grad for p in module.parameters()})
    )
    step = stage.discriminator_step

    def discriminator_step(*arguments):
        assert all(p.grad is None for p in stage.discriminator.parameters())
        step(*arguments)

    stage.discriminator_step = discriminator_step
    trainer(tmp_path, 2).fit(stage, data("images", None, batch_size=16))
    assert calls == [{False}, {True}, {True}] * 2


def test_post_training_optimizes_the_decoder_only():
    stage = post_training_stage()
    decoder = {id(p) for module in stage.tokenizer.decoder_modules().values() for p in module.parameters()}
    assert {id(p) for p in stage.trained_parameters()} == decoder
    assert {id(p) for p in stage.tokenizer.parameters() if p.requires_grad} == decoder
    stage.train()
    assert not any(module.training for part in stage.frozen_parts() for module in part.modules())


@pytest.mark.parametrize("source", ["tokens", "reencode"])
def test_post_training_changes_the_decoder_only(tmp_path, source):
    stage = post_training_stage(source=source, discriminator_warmup_steps=0)
    before = {key: value.clone() for key, value in stage.tokenizer.state_dict().items()}
    fit = trainer(tmp_path, 3, standard_callbacks())
    fit.fit(stage, data("pairs", tmp_path))
    changed = {
        key.split(".")[0] for key, value in stage.tokenizer.state_dict().items() if not torch.equal(value, before[key])
    }
    assert changed == {"decoder", "post_quant_conv"}
    if source == "reencode":
        assert 0 < fit.callback_metrics["train/reencoded_agreement"] <= 1
    with torch.no_grad():
        stage.tokenizer.quant_conv.bias += 1e-3
    with pytest.raises(CheckpointError, match="lost their meaning"):
        stage.on_save_checkpoint({})


def test_validation_sees_averaged_weights_and_training_goes_on_with_the_raw_ones(tmp_path):
    stage = tokenizer_stage(discriminator=None)
    callbacks = standard_callbacks()
    seen = {}

    def on_validation_epoch_end():
        seen["validation"] = stage.tokenizer.quant_conv.weight.clone()

    stage.on_validation_epoch_end = on_validation_epoch_end
    trainer(tmp_path, 4, callbacks, limit_val_batches=1, val_check_interval=4, check_val_every_n_epoch=None).fit(
        stage, data("images", None)
    )
    average = callbacks[0].averaged_state_dict()["tokenizer"]["quant_conv.weight"]
    assert torch.equal(seen["validation"], average) and not torch.equal(average, stage.tokenizer.quant_conv.weight)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_overfits_one_batch(tmp_path, precision):
    stage = tokenizer_stage(discriminator=None, perturbation=None)
    stage.scheduler_factory = lambda optimizer, total: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    stage.optimizer_factory = lambda parameters: torch.optim.AdamW(parameters, lr=3e-3)
    values = []
    stage.on_train_batch_end = lambda *_: values.append(
        float(stage.trainer.callback_metrics["train/loss/reconstruction"])
    )
    module = data("images", None, batch_size=16)
    batches = module.train_batches
    module.train_batches = lambda: (batches()[0], 16)
    trainer(tmp_path, 80, precision=precision).fit(stage, module)
    assert values[-1] < 0.25 * values[0] and values[-1] < 0.12


def test_a_loss_that_is_not_finite_stops_with_its_name(tmp_path):
    stage = tokenizer_stage(discriminator=None, perturbation=None)
    with torch.no_grad():
        stage.tokenizer.decoder.last_layer.fill_(math.nan)
    with pytest.raises(DivergedError, match=r"train/loss/reconstruction is not finite at step 0"):
        trainer(tmp_path, 3).fit(stage, data("images", None))


def test_generated_tokens_do_not_depend_on_the_batch():
    stage = generator_stage().eval()
    labels, index = torch.arange(6), torch.arange(6) + 100
    whole = stage.generate_tokens(labels, index)
    parts = torch.cat([stage.generate_tokens(labels[i : i + 2], index[i : i + 2]) for i in (0, 2, 4)])
    assert torch.equal(whole, parts)
    assert not any(key.startswith("tokenizer") for key in stage.state_dict())
    assert not any(name.startswith("tokenizer") for name, _ in stage.named_parameters())


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (
            lambda: tokenizer_stage(loss_weights={"comitment": 1.0}),
            r"loss_weights\.comitment is unknown; did you mean commitment",
        ),
        (lambda: tokenizer_stage(loss_weights={"codebook": -1.0}), r"loss_weights\.codebook=-1\.0"),
        (lambda: tokenizer_stage(discriminator_start=2.0), r"stage\.discriminator_start=2\.0"),
        (lambda: tokenizer_stage(discriminator=PatchGAN(3, 4, 3)), r"resolution=16 is too small.*needs 24"),
        (
            lambda: tokenizer_stage(perturbation=NearestCodePerturbation(0.5, 0.5, 33)),
            r"perturbation\.delta=33 exceeds",
        ),
        (lambda: tokenizer_stage(gradient_clip=0.0), r"stage\.gradient_clip=0\.0"),
        (lambda: tokenizer_stage(accumulate_grad_batches=0), r"accumulate_grad_batches=0"),
        (lambda: post_training_stage(source="pixels"), r"stage\.source='pixels'"),
        (lambda: post_training_stage(clean_share=-0.1), r"stage\.clean_share=-0\.1"),
    ],
)
def test_impossible_arguments(build, match):
    with pytest.raises(ConfigError, match=match):
        build()


def test_a_generator_of_other_tokens_is_refused():
    model = tokenizer()
    other = generator()
    other.num_tokens = 9
    with pytest.raises(CheckpointError, match="num_tokens=9 where the tokenizer has 16"):
        generator_stage(generator=other, tokenizer=model)
