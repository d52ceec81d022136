"""Impossible combinations end a command with one line that names the key and the remedy, before training starts."""

import pytest

from conf_commands import CONF, composed
from tessera import cli
from tessera.run.build import make

TEACHER = ["backbone=vit_small", "alignment=dinov2"]
CASES = [
    (["quantizer=multiscale", "quantizer.branch.grids=[1,2,8]"], ["quantizer.branch.grids", "(4, 4)", "last entry"]),
    (["quantizer.branches=3"], ["quantizer.branches=3 does not divide quantizer.dim=64", "choose quantizer.dim"]),
    (["quantizer/codebook=bsq", "quantizer.branch.codebook.bits=9"], ["codebook.bits=9", "set quantizer.dim=9"]),
    (["quantizer/codebook=fsq"], ["quantizer.branch.codebook.levels", "set quantizer.dim=6"]),
    (["tokenizer.encoder_tuning=lora"], ["tokenizer.encoder_tuning=lora", "CNNEncoder", "backbone=vit"]),
    (["tokenizer.decoder_tuning=lora"], ["tokenizer.decoder_tuning=lora", "CNNDecoder", "backbone=vit"]),
    (["+quantizer.dropout=0.1"], ["quantizer.dropout=0.1", "quantizer=multiscale"]),
    (
        ["backbone=vit_small", "backbone.encoder.pretrained=true", "backbone.encoder.weights=/absent.safetensors"],
        ["backbone.encoder.weights=/absent.safetensors does not exist", "backbone.encoder.pretrained=false"],
    ),
    (
        [*TEACHER, "alignment.semantic.teacher.weights=/absent.safetensors"],
        ["teacher.weights=/absent.safetensors does not exist", "teacher.pretrained=false"],
    ),
    (
        [*TEACHER, "alignment.semantic.teacher.pretrained=false", "alignment.semantic.teacher.resolution=32"],
        ["alignment.*.teacher.resolution=32", "patch grid", "set it to data.dataset.resolution"],
    ),
    (
        [*TEACHER, "alignment.semantic.teacher.pretrained=false", "alignment.semantic.teacher.patch_size=5"],
        ["alignment.*.teacher.patch_size=5 does not divide data.dataset.resolution=16", "choose a patch size"],
    ),
]


@pytest.mark.parametrize(("overrides", "expected"), CASES, ids=[" ".join(case[0]) for case in CASES])
def test_refused_in_one_line(overrides, expected):
    cfg = composed("train", overrides)
    with pytest.raises(Exception) as caught:
        make(cfg.stage)(tokenizer=make(cfg.tokenizer))
    message = cli.user_message(caught.value, CONF, "train")
    assert message is not None and "\n" not in message
    for text in expected:
        assert text in message
