"""Float16 training with a GradScaler, which also runs on the CPU; and gradient clipping."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from stage_setup import STAGES, data, tokenizer_stage, trainer
from tessera.errors import ConfigError
from tessera.losses import balanced_gradient

SGD = partial(torch.optim.SGD, lr=0.05)  # unlike Adam, sees the size of gradients


def float16(**settings) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **settings))


def scaled32(**settings) -> MixedPrecision:
    """A GradScaler around float32 computations: exact but for what goes wrong with the scale."""
    plugin = float16(**settings)
    plugin.autocast_context_manager = nullcontext
    return plugin


def constant(optimizer, total):
    return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)


def changes(tmp_path, plugin, steps=3, **settings):
    """How the weights of tokenizer and discriminator moved, and the stage."""
    stage = tokenizer_stage(optimizer=SGD, scheduler=constant, discriminator_start=0.0, **settings)
    parts = (stage.tokenizer, stage.discriminator)
    before = [torch.cat([p.detach().flatten().clone() for p in part.parameters()]) for part in parts]
    plugins = [plugin] if plugin else []
    trainer(tmp_path, steps, plugins=plugins).fit(stage, data("images", None, batch_size=16))
    after = [torch.cat([p.detach().flatten() for p in part.parameters()]) for part in parts]
    return [b - a for a, b in zip(before, after, strict=True)], stage


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("windows", [1, 2])
def test_the_loss_scale_leaves_no_trace(tmp_path, clip, windows):
    settings = {"gradient_clip": clip, "accumulate_grad_batches": windows, "perturbation": None}
    expected, _ = changes(tmp_path, None, **settings)
    # the scale doubles with every optimizer step: between the two optimizers of one window, too
    found, stage = changes(tmp_path, scaled32(init_scale=2.0**10, growth_interval=1), **settings)
    assert float(stage.loss_scale()) == 2.0**16
    for moved, reference in zip(found, expected, strict=True):
        assert (moved - reference).norm() < 1e-3 * reference.norm()


@pytest.mark.parametrize("windows", [1, 2])
def test_float16_stays_near_float32(tmp_path, windows):
    settings = {"gradient_clip": 0.05, "accumulate_grad_batches": windows, "perturbation": None}
    expected, _ = changes(tmp_path, None, **settings)
    found, _ = changes(tmp_path, float16(init_scale=2.0**13), **settings)
    for moved, reference in zip(found, expected, strict=True):
        assert (moved - reference).norm() < 0.25 * reference.norm()


def test_an_overflow_skips_the_update_and_lowers_the_scale(tmp_path):
    moved, stage = changes(tmp_path, float16(init_scale=2.0**40), steps=2, perturbation=None)
    assert float(stage.loss_scale()) == 2.0**36
    assert not any(part.any() for part in moved)
    assert all(p.isfinite().all() for p in stage.parameters())


def test_the_adaptive_weight_survives_half_precision():
    torch.manual_seed(0)
    conv, features = torch.nn.Conv2d(16, 3, 3, padding=1), torch.randn(4, 16, 256, 256)
    noise = 0.02 * torch.randn(4, 3, 256, 256)
    likelihood, adversarial = 2 * noise / noise.numel(), 1e-8 * torch.randn(4, 3, 256, 256)

    def weight(scale):
        return float(
            balanced_gradient(conv(features).float(), likelihood, adversarial, conv.weight, 1.0, True, scale)[1]
        )

    exact = weight(1.0)
    with torch.autocast("cpu", torch.float16):
        assert weight(2.0**14) == pytest.approx(exact, rel=0.01)
        assert weight(1.0) != pytest.approx(exact, rel=0.2)  # why there is a scale


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", STAGES)
def test_every_stage_runs_in_half_precision(tmp_path, name, precision):
    build, serve = STAGES[name]
    stage = build(**({"discriminator_start": 0.0} if name == "tokenizer" else {}))
    plugin = float16(init_scale=2.0**8) if precision == "float16" else MixedPrecision("bf16-mixed", "cpu")
    fit = trainer(tmp_path, 3, plugins=[plugin])
    fit.fit(stage, data(serve, tmp_path, batch_size=16))
    assert fit.global_step == 3
    assert all(value.isfinite() for value in fit.callback_metrics.values())


def test_clipping_bounds_the_update_of_both_optimizers(tmp_path):
    moved, _ = changes(tmp_path, None, steps=1, gradient_clip=1e-3)
    for part in moved:
        assert float(part.norm()) == pytest.approx(0.05 * 1e-3, rel=1e-3)


def test_fused_optimizers_cannot_be_clipped_in_float16(tmp_path):
    stage = tokenizer_stage(optimizer=partial(torch.optim.AdamW, lr=1e-3, fused=True), scheduler=constant)
    with pytest.raises(ConfigError, match=r"optimizer\.fused=false"):
        trainer(tmp_path, 2, plugins=[float16()]).fit(stage, data("images", None))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "32-true"])
@pytest.mark.parametrize("name", STAGES)
def test_every_stage_runs_on_a_gpu(tmp_path, name, precision):
    build, serve = STAGES[name]
    stage = build(**({"discriminator_start": 0.0} if name == "tokenizer" else {}))
    fit = trainer(tmp_path, 4, accelerator="gpu", precision=precision)
    fit.fit(stage, data(serve, tmp_path, batch_size=16))
    assert fit.global_step == 4
    assert all(value.isfinite() for value in fit.callback_metrics.values())
