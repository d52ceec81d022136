"""Recipes of XQ-GAN's and RobusTok's tokenizers: published sizes, every key and shape, published hyper-parameters."""

from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from conf_commands import composed
from tessera.optim.schedules import epoch_cosine_lr
from tessera.run.build import make
from tessera.zoo.export import build
from tessera.zoo.keys import key_problems
from tessera.zoo.xqgan import architecture
from zoo.published_rows import rows

ROWS = {
    name: row
    for family in ("xqgan", "robustok")
    for name, row in rows(family).items()
    if "v_patch_nums" in row["config"]
}
RECIPES = {
    "VQ-4096": "xqgan/vq_4096",
    "VQ-8192": "xqgan/vq_8192",
    "RobustTok": "robustok/main_train",
    "VP2-4096": "xqgan/vp2_4096",
    "VP2-16384": "xqgan/vp2_16384",
    "MSBR10P2-4096": "xqgan/msbr10p2_4096",
    "MSBR10P2-16384": "xqgan/msbr10p2_16384",
    "MSVR10P2-4096": "xqgan/msvr10p2_4096",
    "MSVR10P2-8192": "xqgan/msvr10p2_8192",
    "MSVR10P2-16384": "xqgan/msvr10p2_16384",
    "IMed-MSVR10P2-4096": "xqgan/msvr10p2_4096_imed",
    "LAION-MSVR10P2-4096": "xqgan/msvr10p2_4096_laion",
    "RobusTok main-train": "robustok/main_train",
    "RobustTok-zero": "robustok/main_train",
    "XQGAN-4096 (no perturbation)": "xqgan/vq_4096",
    "XQGAN-8192 (no perturbation)": "xqgan/vq_8192",
}
# trains the decoder of robustok/main_train only
POST_TRAINED = "RobusTok post-train"


def on_meta(node: Any) -> nn.Module:
    with torch.device("meta"):
        return make(OmegaConf.create(node))


def settings(model: nn.Module) -> list[Any]:
    """What decides the function of a tokenizer besides its weights."""
    ours = [(name, type(m).__name__, m.extra_repr()) for name, m in model.named_modules() if "tessera" in m.__module__]
    return [*ours, model.quantizer.grids, model.resolution]


def test_every_row_has_a_recipe():
    assert {*RECIPES, POST_TRAINED} == set(ROWS)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_builds_the_published_tokenizer(name):
    cfg = composed("train", [f"experiment={RECIPES[name]}"])
    ours = on_meta(cfg.tokenizer)
    with torch.device("meta"):
        published = build(architecture(ROWS[name]["config"]), name)
    assert key_problems(published.state_dict(), ours.state_dict()) == []
    assert settings(ours) == settings(published)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_has_the_published_hyper_parameters(name):
    """xqgan.md, sections 11 and 12; robustok.md, section 7."""
    cfg, config = composed("train", [f"experiment={RECIPES[name]}"]), ROWS[name]["config"]
    binary, scales = bool(config.get("lfq")), len(config["v_patch_nums"])
    epochs, first = 200, 64 if binary else 56
    assert cfg.data.batch_size * cfg.trainer.devices * cfg.trainer.num_nodes == 1024
    assert cfg.trainer.max_steps == epochs * 1251 and cfg.trainer.precision == "bf16-mixed"
    assert cfg.tokenizer.resolution == 256 and cfg.backbone.encoder.drop_path == cfg.backbone.decoder.drop_path == 0.1
    assert cfg.backbone.encoder.pretrained and cfg.backbone.decoder.pretrained
    assert (cfg.optimizer.lr, cfg.optimizer.betas, cfg.optimizer.weight_decay) == (
        3e-5 * 1024 / 128,
        [0.9, 0.95],
        5e-5 if binary else 0.0,
    )
    stage = cfg.stage
    assert stage.discriminator_start * epochs == pytest.approx(first) and stage.gradient_clip is None
    judge = stage.discriminator_optimizer
    assert (judge.lr, judge.betas, judge.weight_decay) == (1e-4 * 1024 / 128, [0.9, 0.95], 5e-4)
    for schedule, length, warm in ((stage.scheduler, epochs, 1), (stage.discriminator_scheduler, epochs - first, 4)):
        assert schedule._target_.endswith("EpochCosineSchedule")
        assert (schedule.epochs, schedule.warmup_epochs) == (length, warm)
        assert (schedule.warmup_lr, schedule.min_lr) == (1e-5, 5e-5)
    assert cfg.callbacks.ema.decay == 0.9999
    assert cfg.discriminator._target_.endswith("DINODiscriminator") and cfg.discriminator.norm == "bn"
    augment = cfg.discriminator_augment
    assert (augment.probability, augment.cutout, augment.blur_fade) == (1.0, 0.2, 0.0)
    dropped = config["codebook_drop"] if scales > 1 else 0.0
    assert cfg.quantizer.get("dropout", 0.0) == dropped
    if dropped:
        assert cfg.quantizer.dropout_start == config["start_drop"]
    weights = {"commitment": 0.25, "semantic": 0.1, **(stage.get("loss_weights") or {})}
    # the multi-scale VQ of the public code sums its commitment over scales
    summed = scales if scales > 1 and not binary else 1
    assert weights["commitment"] == config.get("commit_loss_beta", 0.25) * summed
    assert weights["semantic"] == 0.1
    if binary:
        assert weights["entropy_sample"] == weights["entropy_batch"] == config["entropy_loss_ratio"]
    guide = cfg.alignment.semantic
    assert guide.teacher.model == "vit_base_patch14_dinov2.lvd142m" and guide.teacher.features == "class"
    assert list(guide.branches) == [-1] and guide.scale == 1.0
    assert guide.normalize == binary and guide.get("end_scale") == (100.0 if binary else None)
    assert list(cfg.alignment) == ["semantic"] and cfg.perceptual._target_.endswith("LPIPS")


@pytest.mark.parametrize("recipe", sorted(set(RECIPES.values())))
def test_only_robustok_perturbs(recipe):
    part = composed("train", [f"experiment={recipe}"]).perturbation
    if recipe != "robustok/main_train":
        assert part._target_ is None
        return
    published = ROWS["RobusTok main-train"]["train"]
    assert (part.alpha, part.beta, part.delta) == (published["alpha"], published["beta"], published["delta"])
    schedule, epochs = part.schedule, published["epochs"]
    assert schedule.start * epochs == pytest.approx(published["anneal_start"])
    assert schedule.end * epochs == pytest.approx(published["anneal_end"])
    assert schedule.end_ratio == published["end_ratio"]


def test_post_training():
    """robustok.md, section 10."""
    overrides = ["experiment=robustok/post_train_b", "tokenizer.path=x", "generator.path=y"]
    cfg = composed("post_train", overrides)
    assert cfg.pairs.num_images == 200_000 and cfg.pairs.sigma == 0.7
    assert cfg.data.batch_size * cfg.trainer.devices * cfg.trainer.num_nodes == 1024
    assert cfg.trainer.max_steps == 100 * (200_000 // 1024)
    assert (cfg.optimizer.lr, cfg.optimizer.weight_decay) == (5e-5, 0.0)
    judge, stage = cfg.stage.discriminator_optimizer, cfg.stage
    assert (judge.lr, judge.betas, judge.weight_decay) == (5e-5, [0.9, 0.95], 5e-4)
    rates = {
        epoch: [
            epoch_cosine_lr(epoch, 5e-5, s.warmup_epochs, s.epochs, s.min_lr, s.warmup_lr)
            for s in (stage.scheduler, stage.discriminator_scheduler)
        ]
        for epoch in (0, 1, 10, 50, 99)
    }
    assert rates[0] == [1e-5, 1e-5] and rates[1][1] == pytest.approx(3e-5)
    recorded = {1: 4.99901e-5, 10: 4.90211e-5, 50: 3e-5, 99: 1.00099e-5}
    assert {e: rates[e][0] for e in recorded} == pytest.approx(recorded, rel=1e-5)
    assert cfg.discriminator._target_.endswith("DINODiscriminator") and cfg.discriminator.norm == "bn"
    augment = cfg.discriminator_augment
    assert (augment.probability, augment.cutout, augment.blur_fade) == (1.0, 0.2, 0.0)
    assert cfg.perceptual._target_.endswith("LPIPS") and cfg.load_discriminator and stage.gradient_clip is None
    assert cfg.callbacks.ema.decay == 0.9999
    assert (cfg.sampling.temperature, cfg.sampling.guidance_scale, cfg.sampling.guidance_power) == (1.02, 6.0, 1.15)


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("backbone", ["vit", "vit_cnn", "cnn_vit", "cnn"])
@pytest.mark.parametrize("tuning", ["full", "frozen"])
def test_backbone_choices_build_at_full_size(backbone, branches, tuning):
    choices = ["data=imagenet", f"backbone={backbone}", f"quantizer.branches={branches}"]
    cfg = composed("train", [*choices, f"tokenizer.encoder_tuning={tuning}", f"tokenizer.decoder_tuning={tuning}"])
    tokenizer = on_meta(cfg.tokenizer)
    assert tokenizer.grid == (16, 16) and tokenizer.quantizer.num_branches == branches
    assert tokenizer.encoder.groups == (branches if backbone.startswith("vit") else 1)
    trained = sum(p.numel() for p in tokenizer.parameters() if p.requires_grad)
    assert trained > 70e6 if tuning == "full" else trained < 3e6
