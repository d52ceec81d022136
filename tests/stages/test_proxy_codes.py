"""TiTok's two stages: training on proxy codes, then fine-tuning of the decoder on pixels."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from stage_setup import ADAM, data, tokenizer, tokenizer_stage, trainer
from tessera.backbones import MaskGITDecoder, MaskGITEncoder, TiTokEncoder, TiTokProxyDecoder
from tessera.callbacks import EMA
from tessera.errors import ConfigError
from tessera.optim import CosineSchedule
from tessera.quantizers import ProductQuantizer, SingleGridQuantizer, VQCodebook
from tessera.stages import ProxyCodeTraining
from tessera.tokenizers import Tokenizer

PIXELS = {"channels": 4, "channel_multipliers": (1, 2, 2), "num_res_blocks": 1, "z_channels": 6, "norm_groups": 2}


def vq(dim: int, size: int, branches: int = 1) -> ProductQuantizer:
    codebook = partial(VQCodebook, codebook_size=size, l2_normalize=False)
    return ProductQuantizer(partial(SingleGridQuantizer, codebook=codebook), branches=branches, dim=dim)


def teacher(codes: int = 20, resolution: int = 16, **changes) -> Tokenizer:
    torch.manual_seed(5)
    sizes = {**PIXELS, **changes}
    quantizer = vq(6, codes)
    with torch.no_grad():
        quantizer.branches[0].codebooks[0].embedding.normal_()
    return Tokenizer(MaskGITEncoder(**sizes), quantizer, MaskGITDecoder(**sizes), resolution, projection_kernel=None)


def student(codes: int = 20) -> Tokenizer:
    torch.manual_seed(6)
    size = {"resolution": 16, "num_latent_tokens": 4, "width": 16, "layers": 1, "heads": 2, "patch_size": 4}
    decoder = TiTokProxyDecoder(**size, proxy_codebook_size=codes, pixel_decoder=MaskGITDecoder(**PIXELS))
    return Tokenizer(TiTokEncoder(**size), vq(8, 16), decoder, 16)


def stage(**changes) -> ProxyCodeTraining:
    arguments = {"tokenizer": student(), "teacher": teacher(), "optimizer": ADAM, "scheduler": CosineSchedule()}
    return ProxyCodeTraining(**{**arguments, **changes})


def test_loss_is_the_cross_entropy_with_the_teachers_codes():
    model, guide = stage(), teacher()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    codes = model.proxy_codes(images)
    assert torch.equal(codes.flatten(1), guide.tokenize(images)[:, 0])
    z_q = model.tokenizer.quantizer(model.tokenizer.encode(images)).z_q
    cross_entropy, accuracy = model.proxy_losses(z_q, codes)
    logits = model.tokenizer.decoder.proxy_logits(model.tokenizer.post_quant_conv(z_q))
    rows = logits.permute(0, 2, 3, 1).reshape(-1, 20)
    torch.testing.assert_close(cross_entropy, F.cross_entropy(rows, codes.flatten()))
    assert accuracy == (rows.argmax(1) == codes.flatten()).float().mean()
    assert abs(cross_entropy.item() - math.log(20)) < 0.5  # at the start


def test_trains_all_but_the_teachers_part(tmp_path):
    model, guide = stage(), teacher()
    before = {key: value.clone() for key, value in model.tokenizer.state_dict().items()}
    first = []
    log = model.log_losses
    model.log_losses = lambda losses: (first.append(losses["proxy_codes"].item()), log(losses))
    fit = trainer(
        tmp_path, 30, [EMA(decay=0.5)], limit_val_batches=1, val_check_interval=30, check_val_every_n_epoch=None
    )
    fit.fit(model, data("images", None))
    after = model.tokenizer.state_dict()
    for key, value in after.items():
        assert torch.equal(value, before[key]) == ("pixel_" in key), key
    for key, value in guide.decoder.state_dict().items():
        assert torch.equal(after[f"decoder.pixel_decoder.{key}"], value)
    assert torch.equal(after["decoder.pixel_embedding"], guide.quantizer.branches[0].codebooks[0].embedding)
    assert first[-1] < 0.95 * first[0]
    assert 0 <= fit.callback_metrics["val/proxy_accuracy"] <= 1
    assert fit.callback_metrics["val/loss/proxy_codes"] < first[0]
    assert not any("teacher" in key for key in model.state_dict())


def test_stage_two_trains_the_decoder_only(tmp_path):
    model = stage().tokenizer
    model.requires_grad_(True)  # as loaded from stage 1's checkpoint
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tokens = model.fingerprint()
    second = tokenizer_stage(tokenizer=model, perturbation=None, trained_parts=["post_quant_conv", "decoder"])
    trainer(tmp_path, 3, [EMA(decay=0.5)]).fit(second, data("images", None))
    assert model.fingerprint() == tokens
    for key, value in model.state_dict().items():
        frozen = key.startswith(("encoder.", "quant_conv.", "quantizer."))
        assert torch.equal(value, before[key]) == frozen, key
    second.train()
    assert not model.encoder.training and not model.quantizer.training and model.decoder.training


def test_trained_parts_are_checked():
    for parts in (["decoder", "transformer"], []):
        with pytest.raises(ConfigError, match=r"stage\.trained_parts=.*post_quant_conv, decoder"):
            tokenizer_stage(trained_parts=parts)
    stage = tokenizer_stage(trained_parts=["encoder"])
    trained = {id(p) for p in stage.trained_parameters()}
    assert trained == {id(p) for p in stage.tokenizer.encoder.parameters()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": tokenizer}, "not CNNDecoder; choose backbone=titok_two_stage"),
        ({"teacher": partial(teacher, 21)}, r"21 codes, but backbone\.decoder\.proxy_codebook_size=20"),
        ({"teacher": partial(teacher, resolution=32)}, r"codes of images of 32 pixels"),
        ({"teacher": partial(teacher, channel_multipliers=(1, 2))}, r"predicts 4 x 4 for 16"),
        ({"teacher": partial(teacher, num_res_blocks=2)}, "another architecture"),
        ({"loss_weights": dict(adversarial=1.0)}, "adversarial is unknown"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ConfigError, match=message):
        stage(**{key: value() if callable(value) else value for key, value in changes.items()})


def test_weight_decay_by_rule():
    model = stage(decay_rule="public")
    ((optimizer,), _) = configured(model)
    decayed, free = optimizer.param_groups
    assert decayed["weight_decay"] == 0.01 and free["weight_decay"] == 0.0
    names = {id(p): name for name, p in model.tokenizer.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} | {names[id(p)] for p in free["params"]} == {
        name for name, p in model.tokenizer.named_parameters() if p.requires_grad
    }
    assert "encoder.latent_tokens" in {names[id(p)] for p in free["params"]}
    ((optimizer,), _) = configured(stage())
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ConfigError, match=r"stage\.decay_rule='none'"):
        stage(decay_rule="none")


def configured(model: ProxyCodeTraining):
    model.trainer = trainer(Path(), 4)
    return model.configure_optimizers()
