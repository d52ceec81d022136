"""Recipes of published tokenizers build exactly the published architectures."""

from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from conf_commands import CONF, composed
from tessera.run.build import make
from zoo.published_rows import ROWS, millions, published_model, registered, rows

# published row -> recipe that builds its architecture
RECIPES = {
    ("ibq", "ibq-tokenizer-1024"): "ibq/tokenizer_1024",
    ("ibq", "ibq-tokenizer-8192"): "ibq/tokenizer_8192",
    ("ibq", "ibq-tokenizer-16384"): "ibq/tokenizer_16384",
    ("ibq", "ibq-tokenizer-262144"): "ibq/tokenizer_262144",
    ("ibq", "ibq-tokenizer-16384-pretrain"): "ibq/tokenizer_16384_pretrain",
    ("ibq", "ibq-tokenizer-262144-pretrain"): "ibq/tokenizer_262144_pretrain",
    ("titok", "titok_l32"): "titok/l32_stage1",
    ("titok", "titok_b64"): "titok/b64_stage1",
    ("titok", "titok_s128"): "titok/s128_stage1",
    ("titok", "titok_bl64_vq8k"): "titok/bl64_vq8k",
    ("titok", "titok_bl128_vq8k"): "titok/bl128_vq8k",
    ("titok", "titok_sl256_vq8k"): "titok/sl256_vq8k",
    ("titok", "titok_ll32_vae_c16"): "titok/ll32_vae_c16",
    ("titok", "titok_bl64_vae_c16"): "titok/bl64_vae_c16",
    ("titok", "titok_bl128_vae_c16"): "titok/bl128_vae_c16",
    ("titok", "maskgit_vqgan_imagenet_f16_256"): "titok/maskgit_vqgan",
    ("var", "VAR-VQVAE-ch160v4096z32"): "var/vqvae",
}
IN_A_GENERATORS_FILE = ("var", "MSVR10P2-4096-in-VAR-ckpt")  # that of xqgan/msvr10p2_4096
STAGE_TWO = ("titok/l32_stage2", "titok/b64_stage2", "titok/s128_stage2")


def settings(module: torch.nn.Module) -> dict[str, str]:
    """What decides the function besides the weights."""
    ours = ((name, part) for name, part in module.named_modules() if type(part).__module__.startswith("tessera."))
    return {name: f"{type(part).__name__}({part.extra_repr()})" for name, part in ours}


def test_every_row_has_a_recipe():
    families = {family for family, _ in RECIPES}
    tokenizers = {row for row in ROWS if row[0] in families and registered(*row).kind == "tokenizer"}
    assert set(RECIPES) == tokenizers - {IN_A_GENERATORS_FILE}


@pytest.mark.parametrize(("family", "name"), RECIPES)
def test_recipe_builds_the_published_architecture(family, name):
    published = published_model(family, name)
    cfg = composed("train", [f"experiment={RECIPES[family, name]}"])
    with torch.device("meta"):
        ours = make(cfg.tokenizer)
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in published.state_dict().items()}
    assert millions(ours) == rows(family)[name]["params_millions"]
    assert (ours.grid, ours.quantizer.grids) == (published.grid, published.quantizer.grids)
    assert settings(ours) == settings(published)
    assert cfg.data.batch_size * cfg.trainer.devices * cfg.trainer.get("num_nodes", 1) == 256
    if family == "ibq":
        check_ibq_training(cfg, rows(family)[name]["config"])


def check_ibq_training(cfg: DictConfig, published: dict[str, Any]) -> None:
    """The hyper-parameters of training that IBQ publishes with a row."""
    training, losses, weights = published["training"], published["lossconfig"], cfg.stage.loss_weights
    assert cfg.trainer.max_steps == (training.get("max_steps") or training["max_epochs"] * 5005)
    assert list(cfg.scheduler.drop_steps) == [epoch * 5005 for epoch in training.get("lr_drop_epoch", [])]
    assert cfg.optimizer.lr == training["learning_rate"] and cfg.callbacks.ema.decay == published["ema_decay"]
    # the public loss of the discriminator has no factor of its own
    assert weights.discriminator == 1.0 and cfg.stage.discriminator_start == losses["disc_start"]
    assert weights.adversarial == losses["gen_loss_weight"] and weights.lecam == losses["lecam_loss_weight"]
    assert weights.joint == weights.commitment == losses["quant_loss_weight"] and weights.codebook == published["beta"]
    assert weights.entropy_sample == losses["entropy_loss_weight"] * published["sample_minimization_weight"]
    assert weights.entropy_batch == losses["entropy_loss_weight"] * published["batch_maximization_weight"]
    assert cfg.quantizer.branch.codebook.entropy_temperature == published["entropy_temperature"]


@pytest.mark.parametrize("recipe", STAGE_TWO)
def test_stage_two_trains_the_decoder_of_stage_one(recipe):
    cfg = composed("train", [f"experiment={recipe}", "tokenizer.path=somewhere.ckpt"])
    assert cfg.stage.trained_parts == ["post_quant_conv", "decoder"] and cfg.tokenizer.path == "somewhere.ckpt"
    assert cfg.trainer.max_steps == 500_000 and cfg.stage.discriminator_start_steps == 20_000
    command = next(line for line in (CONF / "experiment" / f"{recipe}.yaml").open() if line.startswith("# Command"))
    assert f"outputs/{recipe.replace('stage2', 'stage1')}/checkpoints/last.ckpt" in command


def judged(cfg: DictConfig) -> tuple[Any, ...]:
    """What TiTok's trainings on pixels say of the discriminator."""
    stage = cfg.stage
    weights = {name: stage.loss_weights[name] for name in ("reconstruction", "perceptual", "adversarial")}
    assert stage.loss_weights.discriminator == 1.0 and stage.loss_weights.lecam == 0.001  # titok.md, section 7
    assert not stage.use_adaptive_weight and cfg.discriminator._target_.endswith("BlurPatchGAN")
    return tuple(weights.values()), stage.discriminator_start_steps, stage.loss_weights.get("kl")


@pytest.mark.parametrize("recipe", STAGE_TWO)
def test_stage_two_weighs_its_losses_as_published(recipe):
    cfg = composed("train", [f"experiment={recipe}", "tokenizer.path=somewhere.ckpt"])
    assert judged(cfg) == ((0.25, 0.1, 0.01), 20_000, None)  # the pixel loss on [0, 1] has weight 1


SINGLE_STAGE = [recipe for recipe in RECIPES.values() if "_vq8k" in recipe or "_vae_" in recipe]


@pytest.mark.parametrize("recipe", SINGLE_STAGE)
def test_single_stages_weigh_their_losses_as_published(recipe):
    cfg = composed("train", [f"experiment={recipe}"])
    assert judged(cfg) == ((0.25, 1.1, 0.1), 200_000, 1e-6 if "_vae_" in recipe else None)
