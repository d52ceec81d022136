"""Decoder post-training of every kind of tokenizer, and its options."""

from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader

from quantizer_cases import CODEBOOKS
from stage_setup import data, post_training_stage, trainer
from tessera.backbones import CNNDecoder, CNNEncoder, TiTokDecoder, TiTokEncoder, ViTDecoder, ViTEncoder
from tessera.callbacks import EMA
from tessera.errors import ConfigError
from tessera.quantizers import (
    GaussianBottleneck,
    MultiScaleQuantizer,
    ProductQuantizer,
    ResidualQuantizer,
    SingleGridQuantizer,
)
from tessera.tokenizers import Tokenizer

CNN = {"channels": 4, "channel_multipliers": (1, 1, 2), "num_res_blocks": 1, "z_channels": 8, "norm_groups": 2}
ROW = {"resolution": 16, "num_latent_tokens": 16, "width": 16, "layers": 1, "heads": 2, "patch_size": 4}
VIT = {"model": "vit_small_patch14_dinov2", "resolution": 16, "patch_size": 4, "grid": 4, "pretrained": False}
VIT |= {"width": 12, "depth": 1, "num_heads": 3, "layer_scale": 0.5, "position_std": 0.5, "drop_path": 0.3}
BACKBONES = {
    "cnn": lambda branches: (CNNEncoder(**CNN), CNNDecoder(**CNN)),
    "titok": lambda branches: (TiTokEncoder(**ROW), TiTokDecoder(**ROW)),
    "vit": lambda branches: (ViTEncoder(**VIT, groups=branches), ViTDecoder(**VIT)),
}
STRUCTURES = {
    "single": SingleGridQuantizer,
    "residual": partial(ResidualQuantizer, depth=2),
    "multiscale": partial(MultiScaleQuantizer, grids=[1, 2, 4]),
}
TOKENIZERS = [
    *((backbone, "vq", "single", 2) for backbone in BACKBONES),
    *(("cnn", codebook, "single", 1) for codebook in ("vq_ema_l2_revival", "lfq", "bsq", "fsq", "ibq")),
    ("cnn", "vq", "residual", 1),
    ("cnn", "vq_l2", "multiscale", 2),
    ("vit", "bsq", "multiscale", 1),
]


def tokenizer_of(backbone, codebook, structure, branches):
    torch.manual_seed(0)
    case = CODEBOOKS[codebook]
    branch = partial(STRUCTURES[structure], codebook=case.make)
    encoder, decoder = BACKBONES[backbone](branches)
    return Tokenizer(encoder, ProductQuantizer(branch, branches, case.dim * branches), decoder, 16)


def batch(tokenizer, count=4):
    images = torch.rand(count, 3, 16, 16) * 2 - 1
    quantizer = tokenizer.quantizer
    tokens = torch.randint(0, quantizer.codebook_size, (count, quantizer.num_branches, quantizer.num_tokens))
    return {"image": images, "tokens": tokens, "index": torch.arange(count)}


def fit(folder, stage, batches, *callbacks):
    made = trainer(folder, len(batches), list(callbacks))
    made.fit(stage, DataLoader(batches, batch_size=None))
    return made


@pytest.mark.parametrize(("backbone", "codebook", "structure", "branches"), TOKENIZERS)
def test_every_tokenizer(tmp_path, backbone, codebook, structure, branches):
    """Two steps with the discriminator, on generated and on clean tokens: only the decoder changes."""
    tokenizer = tokenizer_of(backbone, codebook, structure, branches)
    stage = post_training_stage(tokenizer=tokenizer, source="reencode", clean_share=0.5, discriminator_warmup_steps=0)
    stage.train()
    assert all(module.training for module in tokenizer.decoder.modules())
    before = {key: value.clone() for key, value in tokenizer.state_dict().items()}
    fingerprint, ema = tokenizer.fingerprint(), EMA(half_life_fraction=0.05)
    fit(tmp_path, stage, [batch(tokenizer)] * 2, ema)
    after = tokenizer.state_dict()
    changed = {key.split(".")[0] for key, value in after.items() if not torch.equal(value, before[key])}
    assert changed == {"decoder", "post_quant_conv"} and tokenizer.fingerprint() == fingerprint
    assert set(ema.averages) == {"tokenizer.decoder", "tokenizer.post_quant_conv"}


def test_what_it_trains_on(tmp_path):
    """The generated tokens, as sampling decodes them; re-encoded ones; and clean ones where these are drawn."""
    made = partial(tokenizer_of, "cnn", "vq", "residual", 2)
    tokenizer = made().eval()
    given = batch(tokenizer, 64)
    with torch.no_grad():
        again = tokenizer.tokenize(tokenizer.detokenize(given["tokens"]))
        clean = tokenizer.tokenize(given["image"])
    seen = {}

    def tokens_of(**options):
        stage = post_training_stage(tokenizer=made().eval(), discriminator=None, **options)
        decode = stage.decoded_tokens
        stage.decoded_tokens = lambda batch: seen.setdefault("tokens", decode(batch))
        fit(tmp_path, stage, [given])
        return seen.pop("tokens"), stage

    found, stage = tokens_of(clean_share=0.0)
    assert torch.equal(found, given["tokens"]) and stage.reencoded_agreement() is None
    found, stage = tokens_of(clean_share=0.0, source="reencode")
    assert torch.equal(found, again)
    assert stage.reencoded_agreement() == pytest.approx((again == given["tokens"]).float().mean().item(), rel=1e-6)
    found, _ = tokens_of(clean_share=0.4)
    mixed = (found == clean).flatten(1).all(1)
    assert 0.2 < mixed.float().mean() < 0.6
    assert torch.equal(found, torch.where(mixed[:, None, None], clean, given["tokens"]))


def test_agreement_is_counted_over_the_whole_training(tmp_path):
    made = partial(tokenizer_of, "cnn", "vq", "single", 1)
    sizes = made()
    batches = [batch(sizes) for _ in range(4)]
    settings = {"discriminator": None, "clean_share": 0.0, "source": "reencode"}
    whole, first, rest = (post_training_stage(tokenizer=made(), **settings) for _ in range(3))
    fit(tmp_path, whole, batches)
    fit(tmp_path, first, batches[:3])
    checkpoint = {}
    first.on_save_checkpoint(checkpoint)
    rest.trainer = first.trainer
    rest.on_load_checkpoint({key: checkpoint[key] for key in ("warmup_done", "reencoded")})
    fit(tmp_path, rest, batches[3:])
    assert 0 < whole.reencoded_agreement() == rest.reencoded_agreement() < 1


def test_l2_keeps_the_decoder_near_its_start(tmp_path):
    def train(weight):
        tokenizer = tokenizer_of("cnn", "vq", "single", 1)
        start = [p.detach().clone() for p in (*tokenizer.post_quant_conv.parameters(), *tokenizer.decoder.parameters())]
        stage = post_training_stage(tokenizer=tokenizer, discriminator=None, l2_start=weight)
        made = fit(tmp_path, stage, [batch(tokenizer)] * 12)
        now = (*tokenizer.post_quant_conv.parameters(), *tokenizer.decoder.parameters())
        distance = sum((a - b).square().sum() for a, b in zip(now, start, strict=True)) / 2
        return distance.item(), stage, made.callback_metrics

    free, stage, metrics = train(0.0)
    assert "train/loss/l2_start" not in metrics
    near, stage, metrics = train(30.0)
    assert 0 < near < 0.5 * free
    assert stage.distance_to_start().item() == pytest.approx(near, rel=1e-4)
    assert 0 < metrics["train/loss/l2_start"] < free  # that of the last step's beginning


def test_continuing_keeps_the_start(tmp_path):
    settings = {"discriminator": None, "l2_start": 0.1}
    first = post_training_stage(**settings)
    fit_first = trainer(tmp_path, 3)
    fit_first.fit(first, data("pairs", tmp_path))
    fit_first.save_checkpoint(tmp_path / "a.ckpt")
    again = post_training_stage(**settings)
    trainer(tmp_path, 3).fit(again, data("pairs", tmp_path), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(again.distance_to_start(), first.distance_to_start()) and first.distance_to_start() > 0


def test_impossible_tokenizers_and_settings():
    continuous = Tokenizer(CNNEncoder(**CNN), GaussianBottleneck(4), CNNDecoder(**CNN), 16)
    with pytest.raises(ConfigError, match=r"latents are continuous .*give one with a codebook in tokenizer\.path"):
        post_training_stage(tokenizer=continuous)
    with pytest.raises(ConfigError, match=r"stage\.l2_start=-1"):
        post_training_stage(l2_start=-1.0)
