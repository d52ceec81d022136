"""Tiny stages on digits for tests of the trainings."""

from functools import partial
from pathlib import Path

import lightning
import torch

from tessera.backbones import CNNDecoder, CNNEncoder
from tessera.callbacks import EMA, ResumeState
from tessera.data import DigitsImages, ImageDataModule, build_token_cache
from tessera.discriminators import DiffAug, DINODiscriminator, PatchGAN
from tessera.generators import RAR
from tessera.losses import Alignment, Teacher
from tessera.optim import CosineSchedule
from tessera.perturbation import NearestCodePerturbation
from tessera.quantizers import ProductQuantizer, SingleGridQuantizer
from tessera.quantizers.codebooks import VQCodebook
from tessera.stages import DecoderPostTraining, GeneratorTraining, TokenizerTraining
from tessera.tokenizers import Tokenizer

DIGITS = partial(DigitsImages, resolution=16)
ADAM = partial(torch.optim.AdamW, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01)
TOKENS = 16  # 4 x 4


def tokenizer(seed: int = 0, branches: int = 1) -> Tokenizer:
    torch.manual_seed(seed)
    size = {"channels": 8, "channel_multipliers": (1, 2, 2), "num_res_blocks": 1, "z_channels": 8, "norm_groups": 4}
    codebook = partial(VQCodebook, codebook_size=32)
    quantizer = ProductQuantizer(partial(SingleGridQuantizer, codebook=codebook), branches=branches, dim=8)
    return Tokenizer(CNNEncoder(**size), quantizer, CNNDecoder(**size), 16)


def generator(dropout: float = 0.1) -> RAR:
    torch.manual_seed(1)
    return RAR(
        codebook_size=32, num_tokens=TOKENS, num_classes=10, hidden_size=16, depth=1, num_heads=2, mlp_size=32,
        dropout=dropout, attention_dropout=dropout, extra_positions=2, extra_timesteps=2,
    )  # fmt: skip


def tokenizer_stage(**changes) -> TokenizerTraining:
    torch.manual_seed(2)
    arguments = {
        "tokenizer": tokenizer(),
        "optimizer": ADAM,
        "scheduler": CosineSchedule(warmup_steps=2),
        "discriminator": PatchGAN(3, 4, 2),
        "discriminator_start": 0.3,
        "perturbation": NearestCodePerturbation(alpha=0.8, beta=0.5, delta=5),
        "gradient_clip": 1.0,
        **changes,
    }
    return TokenizerTraining(**arguments)


def teacher(**changes) -> Teacher:
    """A tiny random DINOv2 of the encoder's width."""
    torch.manual_seed(4)
    sizes = {"embed_dim": 8, "depth": 1, "num_heads": 2}
    settings = {"model": "vit_small_patch14_dinov2.lvd142m", "resolution": 16, "patch_size": 4, "pretrained": False}
    return Teacher(**{**settings, "network": sizes, **changes})


def dino(norm: str = "sbn") -> DINODiscriminator:
    torch.manual_seed(5)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return DINODiscriminator(pretrained=False, readouts=(0, 1), norm=norm, backbone=sizes)


def guided_stage(**changes) -> TokenizerTraining:
    """Two branches, a teacher for each and independence of both, and augmented images before a DINO discriminator."""
    arguments = {
        "tokenizer": tokenizer(branches=2),
        "discriminator": dino(),
        "discriminator_start": 0.3,
        "discriminator_augment": DiffAug(blur_fade=0.5),
        "alignment": {
            "semantic": Alignment(teacher()),
            "detail": Alignment(teacher(features="patch"), [0], normalize=True, end_scale=9.0, projection="own"),
        },
        "loss_weights": {"dependency": 0.1},
        **changes,
    }
    return tokenizer_stage(**arguments)


def generator_stage(**changes) -> GeneratorTraining:
    arguments = {
        "generator": generator(),
        "tokenizer": tokenizer(),
        "optimizer": ADAM,
        "scheduler": CosineSchedule(),
        **changes,
    }
    return GeneratorTraining(**arguments)


def post_training_stage(**changes) -> DecoderPostTraining:
    model = tokenizer()
    torch.manual_seed(3)
    arguments = {
        "tokenizer": model,
        "optimizer": ADAM,
        "scheduler": CosineSchedule(),
        "discriminator": PatchGAN(3, 4, 2),
        "discriminator_warmup_steps": 2,
        "clean_share": 0.3,
        **changes,
    }
    return DecoderPostTraining(**arguments)


def token_cache(folder: Path) -> Path:
    """The tiny tokenizer's tokens of the training digits."""
    model = tokenizer().eval()
    with torch.inference_mode():
        return build_token_cache(
            folder, DIGITS(split="train"), lambda batch: model.tokenize(batch["image"]), batch_size=256,
            tokenizer_fingerprint=model.fingerprint(), codebook_size=32, shape=(1, TOKENS),
        )  # fmt: skip


def data(serve: str, folder: Path | None, batch_size: int = 64, workers: int = 0) -> ImageDataModule:
    cache = None if serve == "images" else token_cache(folder / "tokens")
    return ImageDataModule(DIGITS, batch_size, eval_batch_size=120, num_workers=workers, serve=serve, token_cache=cache)


def trainer(folder: Path, max_steps: int, callbacks: list | None = None, **changes) -> lightning.Trainer:
    arguments = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": max_steps,
        "max_epochs": -1,
        "logger": False,
        "callbacks": callbacks or [],
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "default_root_dir": folder,
        **changes,
    }
    return lightning.Trainer(**arguments)


STAGES = {
    "tokenizer": (tokenizer_stage, "images"),
    "generator": (generator_stage, "tokens"),
    "post_training": (post_training_stage, "pairs"),
}


def standard_callbacks() -> list:
    return [EMA(decay=0.9), ResumeState()]
