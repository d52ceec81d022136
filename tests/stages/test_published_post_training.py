"""One step of RobusTok's post-training against published numbers: ours, which trains the decoder, and the public code's
whole loss, which also moves what our post-training keeps."""

import copy
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from golden_cases import Golden, assert_close, golden
from stage_setup import trainer
from stages.test_published_steps import constant, thin_lpips
from stages.test_published_training import below, published, teacher
from tessera.callbacks import EMA
from tessera.callbacks.ema import average
from tessera.data import to_uint8
from tessera.discriminators import DINODiscriminator
from tessera.discriminators.dino import make_head
from tessera.losses import Alignment, adaptive_weight
from tessera.stages import DecoderPostTraining
from tessera.tokenizers import Tokenizer
from tessera.zoo.keys import XQGAN, XQGAN_IGNORED, rename

pytestmark = pytest.mark.golden
CASES = pytest.mark.parametrize("case", ["robustok_posttrain_step"])
ADAM = partial(torch.optim.AdamW, betas=(0.9, 0.95))


def tokenizer_of(file: Golden) -> Tokenizer:
    options = file.config
    weights = below(file.weights, "vq_model.")
    names = ("embed_dim", "depth", "num_heads", "image_size", "patch_size", "codebook_size", "codebook_embed_dim")
    public = {
        **{name: options[name] for name in names},
        "enc_type": "dinov2",
        "dec_type": "dinov2",
        "v_patch_nums": [options["grid"]],
        "abs_pos_embed": "encoder.lvl_embed.weight" in weights,
    }
    return published(public, weights)


def discriminator_of(file: Golden) -> DINODiscriminator:
    sizes, backbone = file.config["loss"], below(file.weights, "frozen_dino.")
    patch = backbone["patch_embed.proj.weight"].shape[-1]
    model = DINODiscriminator(
        pretrained=False,
        readouts=sizes["keyd"],
        norm="bn",
        backbone={
            "img_size": math.isqrt(backbone["pos_embed"].shape[1] - 1) * patch,
            "patch_size": patch,
            "embed_dim": sizes["ddim"],
            "num_heads": sizes["dheads"],
            "depth": sizes["ddepth"],
        },
    )
    model.heads = nn.ModuleList(make_head(sizes["ddim"], "bn", sizes["ks"]) for _ in model.heads)
    assert_close(model.standardise.scale, backbone.pop("x_scale"), atol=1e-7)
    assert_close(model.standardise.shift, backbone.pop("x_shift"), atol=1e-6)
    model.load_state_dict(below(file.weights, "vq_loss.discriminator."), strict=True)
    model.backbone.module.load_state_dict(backbone, strict=True)
    return model.train()


def norm(gradients) -> torch.Tensor:
    return torch.stack([gradient.double().norm() for gradient in gradients]).norm()


def compared(ours: dict, file: Golden, *names: str, **close) -> set[str]:
    """Compare the recorded outputs of these names, or that begin with them; returns which."""
    expected = {key: value for key, value in file.output.items() if key.startswith(names)}
    assert expected
    for key, value in expected.items():
        assert_close(torch.as_tensor(ours[key]).detach(), value, **close)
    return set(expected)


def our_step(file: Golden, folder) -> SimpleNamespace:
    """Our post-training's only step on the recorded batch, whose tokens are those of the generated images."""
    options, tokenizer = file.config["hp"], tokenizer_of(file)
    stage = DecoderPostTraining(
        tokenizer=tokenizer,
        optimizer=partial(ADAM, lr=options["lr"], weight_decay=0.0),
        scheduler=constant,
        discriminator=discriminator_of(file),
        discriminator_optimizer=partial(ADAM, lr=options["lr"], weight_decay=5e-4),
        perceptual=thin_lpips(below(file.weights, "vq_loss.perceptual_loss."), folder),
    )
    stage.lecam.mean_real, stage.lecam.mean_fake = (torch.tensor(options[f"lecam_{name}"]) for name in ("real", "fake"))
    stage.train()
    with torch.no_grad():
        tokens = tokenizer.tokenize(file.input["generated"])
    found, logits, pictures = {}, [], []

    def gradients(optimizer):
        parameters = optimizer.param_groups[0]["params"]
        found[parameters[0] is stage.trained_parameters()[0]] = [p.grad.clone() for p in parameters]

    stage.on_before_optimizer_step = gradients
    stage.discriminator.register_forward_hook(lambda module, inputs, output: logits.append(output.detach()))
    stage.tokenizer.decoder.register_forward_hook(lambda module, inputs, output: pictures.append(output.detach()))
    ema = EMA(decay=options["ema_decay"])
    batch = {"image": file.input["gt"], "tokens": tokens, "index": torch.arange(len(tokens))}
    fit = trainer(folder, 1, [ema])
    fit.fit(stage, DataLoader([batch], batch_size=None))
    values = {key.removeprefix("train/"): float(value) for key, value in fit.callback_metrics.items()}
    names = [name for name, p in stage.tokenizer.named_parameters() if p.requires_grad]
    averages = {f"{part}.{key}": value for part, own in ema.averaged_state_dict().items() for key, value in own.items()}
    return SimpleNamespace(
        stage=stage,
        values=values,
        logits=logits,
        pictures=pictures,
        gradients=dict(zip(names, found[True], strict=True)),
        judge_gradients=found[False],
        averages={key.removeprefix("tokenizer."): value for key, value in averages.items()},
    )


def ours_by_recorded_name(file: Golden, prefix: str, values: dict) -> dict:
    """Those of our values, by our names, that the file records behind a prefix, under the recorded names."""
    recorded = {}
    for name in below(file.output, prefix):
        (ours,) = rename({name: torch.empty(0)}, XQGAN)
        if ours in values:
            recorded[prefix + name] = values[ours]
    return recorded


@CASES
def test_our_step(case, tmp_path):
    file = golden(case)
    made = our_step(file, tmp_path)
    values = made.values
    loss = {name.removeprefix("loss/"): value for name, value in values.items() if name.startswith("loss/")}
    stage, lecam = made.stage, made.stage.weights["lecam"]
    ours = {
        "recon": made.pictures[0],
        "logits_fake_gstep": made.logits[0],
        "logits_fake": made.logits[1],
        "logits_real": made.logits[2],
        "loss.rec": loss["reconstruction"],
        "loss.perceptual": loss["perceptual"],
        "loss.gen_adv": loss["adversarial"],
        "loss.adaptive_weight": values["adaptive_weight"],
        "loss.disc_hinge": loss["discriminator"],
        "loss.lecam": loss["lecam"],
        "loss.disc_total": stage.weights["discriminator"] * (loss["discriminator"] + lecam * loss["lecam"]),
        "lecam_ema_after": torch.stack([stage.lecam.mean_real, stage.lecam.mean_fake]),
        "disc_grad_norm_total": norm(made.judge_gradients),
        **ours_by_recorded_name(file, "grad.", made.gradients),
        **ours_by_recorded_name(file, "updated.", dict(stage.tokenizer.named_parameters())),
        **ours_by_recorded_name(file, "ema.", made.averages),
    }
    judge = dict(stage.discriminator.named_parameters())
    ours |= {f"updated_disc.{name}": judge[name] for name in below(file.output, "updated_disc.")}
    seen = compared(ours, file, "recon", "logits", "loss.rec", "loss.perc", "loss.gen_adv", atol=2e-5)
    seen |= compared(ours, file, "loss.adaptive_weight", "loss.disc", "loss.lecam", "lecam_ema", "disc_grad", atol=2e-5)
    decoder = [f"{kind}.{part}" for kind in ("grad", "updated", "ema") for part in ("decoder", "post_quant_conv")]
    seen |= compared(ours, file, *decoder, "updated_disc", atol=2e-6, rtol=1e-4)
    # the frozen parts: bit-identical, where the public code's drift
    start = tokenizer_of(file)
    for part in ("encoder", "quant_conv", "quantizer"):
        for key, value in getattr(start, part).state_dict().items():
            assert torch.equal(getattr(stage.tokenizer, part).state_dict()[key], value), key
    drifting = {name for name in file.output if name.split(".")[0] in ("grad", "updated", "ema")} - seen
    assert {name.split(".", 1)[1].split(".")[0] for name in drifting} <= {"encoder", "quant_conv", "quantize"}
    whole = {"loss.vq", "loss.commit", "loss.entropy", "loss.sem", "loss.generator_total", "grad_norm_total"}
    evaluation = {"eval_z", "eval_ids", "eval_recon", "eval_decode_tokens", "eval_decode_uint8"}
    assert set(file.output) == seen | drifting | whole | evaluation, "every recorded output is compared"


@CASES
def test_the_public_codes_whole_loss(case, tmp_path):
    """It re-encodes the generated image, keeps the quantizer's and the semantic loss, and moves everything."""
    file = golden(case)
    options, images, target = file.config["hp"], file.input["generated"], file.input["gt"]
    tokenizer, judge = tokenizer_of(file), discriminator_of(file).requires_grad_(False)
    named = dict(tokenizer.named_parameters())
    for key in below(file.weights, "vq_model."):
        if key.startswith("encoder.model."):  # all that the published `frozen` freezes
            for name in rename({key: torch.empty(0)}, XQGAN, XQGAN_IGNORED):
                named[name].requires_grad_(False)
    perceptual = thin_lpips(below(file.weights, "vq_loss.perceptual_loss."), tmp_path)
    sizes = {name: file.config[name] for name in ("embed_dim", "depth", "num_heads")}
    guide = below(file.weights, "vq_model.semantic_model.")
    align = Alignment(teacher(guide, file.config["image_size"], file.config["patch_size"], **sizes))
    align.bind(tokenizer)

    out = tokenizer(images)
    terms = {
        "loss.rec": F.mse_loss(out.reconstruction, target),
        "loss.perceptual": perceptual(out.reconstruction, target).mean(),
        "loss.vq": out.losses["codebook"],
        "loss.commit": 0.25 * out.losses["commitment"],
        "loss.sem": 0.1 * align(images, out.z_q, tokenizer, 0.0),
        "loss.entropy": torch.zeros(()),
    }
    adversarial = -judge(out.reconstruction).mean()
    likelihood = terms["loss.rec"] + terms["loss.perceptual"]
    gradients = [
        torch.autograd.grad(term, tokenizer.last_layer, retain_graph=True)[0] for term in (likelihood, adversarial)
    ]
    total = sum(terms.values()) + 0.5 * adaptive_weight(*gradients) * adversarial
    ours = {**terms, "loss.generator_total": total}
    compared(ours, file, *ours, atol=2e-5)

    total.backward()
    averaged = copy.deepcopy(tokenizer)
    moved = {name: p.grad for name, p in named.items() if p.grad is not None}
    assert_close(norm(moved.values()), file.output["grad_norm_total"], rtol=1e-4)
    ADAM([named[name] for name in moved], lr=options["lr"], weight_decay=0.0).step()
    average(averaged, tokenizer, options["ema_decay"])
    for prefix, values in (("grad.", moved), ("updated.", named), ("ema.", dict(averaged.named_parameters()))):
        found = ours_by_recorded_name(file, prefix, values)
        # a latent's position that has no use in ours is left
        assert {name for name in below(file.output, prefix)} - {name.removeprefix(prefix) for name in found} == set()
        compared(found, file, prefix, atol=2e-6, rtol=1e-4)


@CASES
def test_evaluation(case):
    file = golden(case)
    tokenizer = tokenizer_of(file).eval()
    with torch.no_grad():
        images = file.input["gt"]
        tokens = file.input["token_ids"][:, None]
        made = tokenizer.decode(tokenizer.quantizer.decode(tokens))
        assert torch.equal(tokenizer.tokenize(images)[:, 0], file.output["eval_ids"])
        ours = {
            "eval_z": tokenizer.encode(images),
            "eval_recon": tokenizer.reconstruct(images),
            "eval_decode_tokens": made,
        }
        compared(ours, file, *ours, atol=2e-5)
        pixels = to_uint8(tokenizer.detokenize(tokens), "truncate").permute(0, 2, 3, 1)
        assert (pixels.int() - file.output["eval_decode_uint8"].int()).abs().max() <= 1
