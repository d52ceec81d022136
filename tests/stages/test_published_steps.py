"""One generator and discriminator step against published numbers: the whole loss, its weights and its gradients."""

import copy
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

from golden_cases import assert_close, golden
from stage_setup import trainer
from tessera.callbacks import EMA
from tessera.callbacks.ema import average
from tessera.discriminators import PatchGAN
from tessera.losses import LPIPS, AdversarialLoss, LeCam
from tessera.stages import TokenizerTraining
from tessera.tokenizers import Tokenizer, TokenizerOutput
from tessera.zoo import from_public, ibq
from tessera.zoo.keys import rename

TERMS = ("codebook", "commitment", "joint", "entropy_sample", "entropy_batch", "kl")


class Painter(nn.Module):
    """A tokenizer's last layer alone: fixed features, given losses."""

    def __init__(self, features, weight, losses, resolution):
        super().__init__()
        self.decoder = nn.Conv2d(*weight.shape[:2][::-1], weight.shape[-1], padding=weight.shape[-1] // 2, bias=False)
        self.decoder.weight.data.copy_(weight)
        self.features, self.losses, self.resolution = features, losses, resolution
        self.quantizer = SimpleNamespace(num_branches=1, grids=[(1, 1)])
        self.gradients = []  # at the pictures

    @property
    def last_layer(self):
        return self.decoder.weight

    def forward(self, images, perturb=None, rng=None):
        made = self.decoder(self.features)
        if made.requires_grad:
            made.register_hook(self.gradients.append)
        return TokenizerOutput(made, made, made, torch.zeros(1, 1, 1), losses=self.losses, z_q_clean=made)


def thin_lpips(weights, folder):
    save_file({k: v for k, v in weights.items() if k.startswith("net.")}, folder / "vgg.safetensors")
    save_file({k: v for k, v in weights.items() if k.startswith("lin")}, folder / "lin.safetensors")
    return LPIPS(folder / "vgg.safetensors", folder / "lin.safetensors")


def below(weights, prefix):
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def run(stage, images, steps, folder, callbacks=()):
    """Logged values, and gradients by (optimizer, parameter), of each step."""
    seen = []

    def gradients(optimizer):
        ours = {id(parameter) for parameter in stage.tokenizer.parameters()}
        number = int(id(optimizer.param_groups[0]["params"][0]) not in ours)
        found[number] = [p.grad.clone() for p in optimizer.param_groups[0]["params"]]

    def end(*_):
        values = {key.removeprefix("train/"): float(v) for key, v in stage.trainer.callback_metrics.items()}
        seen.append((values, dict(found), (stage.lecam.mean_real.clone(), stage.lecam.mean_fake.clone())))
        found.clear()

    found = {}
    stage.on_before_optimizer_step, stage.on_train_batch_end = gradients, end
    batch = {"image": images, "index": torch.arange(len(images))}
    trainer(folder, steps, list(callbacks)).fit(stage, DataLoader([batch] * steps, batch_size=None))
    return seen


def frozen_rate(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


def constant(optimizer, total):
    return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)


def weighted(values, weights, adaptive):
    """The generator's loss from its logged terms."""
    total = sum(weight * values[f"loss/{name}"] for name, weight in weights.items() if f"loss/{name}" in values)
    return total + weights["adversarial"] * (adaptive - 1) * values.get("loss/adversarial", 0.0)


def published_adversarial(discriminator, generator):
    """The published pair; of the non-saturating forms, those whose inputs and targets are swapped."""
    pair, constant = AdversarialLoss("vanilla" if discriminator == "vanilla" else "hinge"), 1 + math.log1p(math.exp(-1))
    if discriminator == "non-saturating":
        pair.discriminator = lambda real, fake: 0.5 * (constant - real.mean() + math.log(2))
    if generator == "non-saturating":
        pair.generator = lambda fake: constant - fake.mean()
    return pair


@pytest.mark.golden
@pytest.mark.parametrize("case", ["xqgan_vqloss"])
def test_xqgan(case, tmp_path):
    file = golden(case)
    options, expected = file.config, file.output
    discriminator = PatchGAN(3, options["ndf"], options["n_layers"])
    discriminator.load_state_dict(below(file.weights, "discriminator."), strict=True)
    losses = dict(zip(TERMS, [*file.input["codebook_terms"], *file.input["sem_detail_dep"]], strict=True))
    features = F.interpolate(file.input["feat"], scale_factor=2, mode="nearest")
    weights = {
        "reconstruction": options["reconstruction_weight"],
        "perceptual": options["perceptual_weight"],
        "adversarial": options["disc_weight"],
        "discriminator": options["disc_weight"],
        "lecam": options["lecam_loss_weight"] or 0.0,
        **dict.fromkeys(TERMS, 1.0),
    }
    stage = TokenizerTraining(
        tokenizer=Painter(features, file.input["last_layer"], losses, file.input["image"].shape[-1]),
        optimizer=frozen_rate,
        scheduler=constant,
        discriminator=discriminator,
        discriminator_start_steps=1,
        perceptual=thin_lpips(below(file.weights, "perceptual_loss."), tmp_path),
        adversarial=published_adversarial(options["disc_loss"], options["gen_adv_loss"]),
        reconstruction_loss={"l2": "mse", "l1": "l1"}[options["reconstruction_loss"]],
        loss_weights=weights,
        use_adaptive_weight=options["disc_adaptive_weight"],
    )
    # the published means move before the discriminator's start, too, when ours does not run
    stage.lecam.mean_real, stage.lecam.mean_fake = expected["lecam_ema_step0"].unbind()
    steps = sum(name.startswith("gen_loss_step") for name in expected)
    by_step = ("gen_loss", "grad_last_layer", "disc_loss", "disc_grad_norms", "lecam_ema")
    compared = {"rec_loss", "perceptual_loss", *(f"{name}_step{step}" for name in by_step for step in range(steps))}
    assert steps > 1 and set(expected) == compared, "every recorded output is compared"
    seen = run(stage, file.input["image"], steps, tmp_path)
    for step, (values, gradients, means) in enumerate(seen):
        total = weighted(
            values,
            {k: v for k, v in weights.items() if k not in ("discriminator", "lecam")},
            values.get("adaptive_weight", 1.0),
        )
        assert_close(torch.tensor(total), expected[f"gen_loss_step{step}"])
        assert_close(torch.tensor(values["loss/reconstruction"]), expected["rec_loss"])
        assert_close(torch.tensor(values["loss/perceptual"]), expected["perceptual_loss"])
        assert_close(gradients[0][0], expected[f"grad_last_layer_step{step}"])
        if step == 0:
            assert 1 not in gradients and "loss/discriminator" not in values
            assert (expected["disc_grad_norms_step0"] == 0).all() and expected["disc_loss_step0"] == 0
            continue
        loss = values["loss/discriminator"] + weights["lecam"] * values["loss/lecam"]
        assert_close(torch.tensor(weights["discriminator"] * loss), expected[f"disc_loss_step{step}"])
        norms = torch.stack([gradient.norm() for gradient in gradients[1]])
        assert_close(norms, expected[f"disc_grad_norms_step{step}"])
        assert_close(torch.stack(means), expected[f"lecam_ema_step{step}"], atol=1e-7)


def ibq_stage(file, folder, **changes):
    options = file.config
    discriminator = PatchGAN(3, options["disc_ndf"], options["disc_num_layers"])
    discriminator.load_state_dict(below(file.weights, "discriminator."), strict=True)
    quantizer, _, _, entropy = file.input["codebook_loss"]
    losses = {"codebook": quantizer, "entropy_sample": entropy}
    weights = {
        "perceptual": options["perceptual_weight"],
        "adversarial": options["gen_loss_weight"],
        "discriminator": 1.0,
        "lecam": options["lecam_loss_weight"],
        "codebook": options["quant_loss_weight"],
        "entropy_sample": options["entropy_loss_weight"],
    }
    settings = {
        "tokenizer": Painter(file.input["feat"], file.input["last_layer"], losses, file.input["x"].shape[-1]),
        "optimizer": frozen_rate,
        "scheduler": constant,
        "discriminator": discriminator,
        "discriminator_first": True,
        "perceptual": thin_lpips(below(file.weights, "perceptual_loss."), folder),
        "adversarial": AdversarialLoss(options["disc_loss"], "non_saturating", per_image=True),
        "reconstruction_loss": "l1",
        "use_adaptive_weight": False,
        **changes,
    }
    settings["loss_weights"] = {**weights, **changes.get("loss_weights", {})}
    return TokenizerTraining(**settings)


def compare(ours, expected, **close):
    assert expected and set(expected) <= set(ours), "every recorded output is compared"
    for name, value in expected.items():
        assert_close(torch.as_tensor(ours[name]).detach(), value, **close)


def published_logs(file, reconstruction, perceptual):
    """What IBQ logs besides its adversarial terms, under the recorded names."""
    options = file.config
    quantizer, sample, average, entropy = (value.item() for value in file.input["codebook_loss"])
    return {
        "log/codebook_quant_loss": quantizer,
        "log/codebook_sample_entropy_loss": sample,
        "log/codebook_avg_entropy_loss": average,
        "log/codebook_entropy_loss": entropy,
        "log/codebook_loss": options["quant_loss_weight"] * quantizer + options["entropy_loss_weight"] * entropy,
        "log/reconstruct_loss": reconstruction,
        "log/perceptual_loss": perceptual,
        "log/nll_loss": reconstruction + options["perceptual_weight"] * perceptual,
        "log/d_weight": options["gen_loss_weight"],
        "log/disc_factor": 1.0,
    }


def generator_loss(stage, values):
    weights = {k: v for k, v in stage.weights.items() if k not in ("discriminator", "lecam")}
    return torch.tensor(weighted(values, weights, values["adaptive_weight"]))


@pytest.mark.golden
@pytest.mark.parametrize("case", ["ibq_losses"])
def test_ibq(case, tmp_path):
    file = golden(case)
    expected, close = file.output, {"atol": 5e-6, "rtol": 1e-5}
    stage = ibq_stage(file, tmp_path)
    names = [name for name, _ in stage.discriminator.named_parameters()]
    weight = file.config["gen_loss_weight"]
    for step, (values, gradients, means) in enumerate(run(stage, file.input["x"], 2, tmp_path), start=1):
        before = f"train/disc_step{step}/"
        loss = values["loss/discriminator"] + stage.weights["lecam"] * values["loss/lecam"]
        ours = {
            "loss": loss,
            "log/disc_loss": loss,
            "log/lecam_loss": values["loss/lecam"],
            "log/logits_real": values["logits_real"],
            "log/logits_fake": values["logits_fake"],
            "log/disc_factor": 1.0,
            "lecam_ema_real": means[0],
            "lecam_ema_fake": means[1],
            **{f"grad/{name}": gradient for name, gradient in zip(names, gradients[1], strict=True)},
        }
        compare(ours, below(expected, before), **close)
        adversarial = values["loss/adversarial"]
        ours = {
            "loss": generator_loss(stage, values),
            "grad_last_layer": gradients[0][0],
            "grad_xrec": stage.tokenizer.gradients[step - 1],
            **published_logs(file, values["loss/reconstruction"], values["loss/perceptual"]),
            "log/unsacled_g_loss": adversarial,
            "log/g_loss": weight * adversarial,
            "log/total_loss": generator_loss(stage, values),
        }
        compare(ours, below(expected, "train/gen/"), **close)
    # a quantizer without entropy: one number, which has its own weight
    quantizer = file.input["codebook_loss"][0].item() * file.config["codebook_weight"]
    images_only = generator_loss(stage, values | {"loss/entropy_sample": 0.0, "loss/codebook": 0.0})
    assert_close(images_only + quantizer, expected["train/gen_scalar_codebook/loss"], **close)
    # the adaptive weight, which the published configuration does not use
    adaptive = {"adversarial": file.config["disc_weight"]}
    stage = ibq_stage(file, tmp_path, use_adaptive_weight=True, loss_weights=adaptive)
    values, _, _ = run(stage, file.input["x"], 1, tmp_path)[0]
    weight = values["adaptive_weight"] * file.config["disc_weight"]
    assert_close(torch.tensor(weight), expected["train/gen_adaptive/d_weight"], **close)
    assert_close(generator_loss(stage, values), expected["train/gen_adaptive/loss"], **close)


@pytest.mark.golden
@pytest.mark.parametrize("case", ["ibq_losses"])
def test_ibq_in_evaluation(case, tmp_path):
    """Terms of clamped reconstructions, with the running statistics that the recorded calls left behind."""
    file = golden(case)
    expected, close = file.output, {"atol": 5e-6, "rtol": 1e-5}
    stage, real = ibq_stage(file, tmp_path), file.input["x"]
    with torch.no_grad():
        made = stage.tokenizer(real).reconstruction
        assert_close(made, expected["xrec"], **close)
        stage.discriminator.train()
        for images in (real, made, real, made, made, made, made):
            stage.discriminator(images)
        stage.discriminator.eval()
        fake = made.clamp(-1, 1)
        terms = stage.image_losses(fake, real)
        logits = stage.discriminator(fake)
        assert_close(logits, expected["val/logits_fake"], **close)
        assert_close(stage.discriminator(real), expected["val/logits_real"], **close)
        terms["adversarial"] = stage.adversarial.generator(logits)
        terms |= stage.tokenizer.losses
        per_image = stage._perceptual.module(fake, real)
        assert_close(per_image, expected["val/perceptual_per_image"].flatten(), **close)
        total = sum(stage.weights[name] * value for name, value in terms.items())
        without = total - stage.weights["adversarial"] * terms["adversarial"]
        assert_close(without, expected["val/gen_before_start/loss"], **close)
        assert expected["val/disc_before_start/loss"] == 0  # where ours does not run
        ours = {
            "loss": total,
            **published_logs(file, terms["reconstruction"], terms["perceptual"]),
            "log/g_loss": terms["adversarial"],  # in evaluation without its weight
            "log/total_loss": total,
        }
        compare(ours, below(expected, "val/gen/"), **close)
        lecam = LeCam(update_first=False)
        lecam.mean_real, lecam.mean_fake = (torch.tensor(file.config[f"lecam_{kind}"]) for kind in ("real", "fake"))
        both = expected["val/logits_real"], expected["val/logits_fake"]
        assert_close(lecam(*both), expected["val/lecam_reg_fixed_ema"], **close)


def ibq_tokenizer(file) -> Tokenizer:
    """The published tokenizer, whose halves two other files hold, for the images of this one."""
    halves = {**golden("ibq_tokenizer_enc").weights, **golden("ibq_tokenizer_dec").weights}
    tokenizer = from_public("ibq", file.config, halves).train()
    height, width = file.input["image"].shape[-2:]
    if (height, width) != (tokenizer.resolution,) * 2:  # pictures that aren't square
        tokenizer.encode = lambda images: tokenizer.quant_conv(tokenizer.encoder(images))
        tokenizer.quantizer.branches[0]._grid = None  # any
    return tokenizer


def ibq_training(file, folder, optimizer) -> TokenizerTraining:
    options, published = file.config, below(file.weights, "loss.")
    discriminator = PatchGAN(3, options["disc_ndf"], options["disc_num_layers"])
    discriminator.load_state_dict(below(published, "discriminator."), strict=True)
    for name, value in below(file.input, "bn/").items():
        discriminator.state_dict()[name].copy_(value)
    weights = {
        "perceptual": options.get("perceptual_weight", 1.0),
        "adversarial": options["gen_loss_weight"],
        "discriminator": 1.0,
        "lecam": options["lecam_loss_weight"],
    }
    # published: a quantizer without entropy has a weight of its own
    with_entropy = options.get("use_entropy_loss", True)
    quantizer = options["quant_loss_weight"] if with_entropy else options.get("codebook_weight", 1.0)
    weights |= {"joint": quantizer, "commitment": quantizer, "codebook": options.get("beta", 0.25) * quantizer}
    if with_entropy:
        for ours, name in (("sample", "sample_minimization"), ("batch", "batch_maximization")):
            weights[f"entropy_{ours}"] = options["entropy_loss_weight"] * options.get(f"{name}_weight", 1.0)
    return TokenizerTraining(
        tokenizer=ibq_tokenizer(file),
        optimizer=optimizer,
        scheduler=constant,
        discriminator=discriminator,
        discriminator_first=True,
        perceptual=thin_lpips(below(published, "perceptual_loss."), folder),
        adversarial=AdversarialLoss(options.get("disc_loss", "hinge"), "non_saturating", per_image=True),
        reconstruction_loss="l1",
        use_adaptive_weight=False,
        loss_weights=weights,
    )


def ibq_logs(stage, values, options) -> dict[str, dict[str, float]]:
    """What the public code logs, from what ours does."""
    loss = {name.removeprefix("loss/"): value for name, value in values.items() if name.startswith("loss/")}
    quantizer = (
        loss["joint"] + loss["commitment"] + stage.weights["codebook"] / stage.weights["joint"] * loss["codebook"]
    )
    disc = {
        "disc_loss": loss["discriminator"] + stage.weights["lecam"] * loss["lecam"],
        "lecam_loss": loss["lecam"],
        "logits_real": values["logits_real"],
        "logits_fake": values["logits_fake"],
        "disc_factor": 1.0,
    }
    gen = {
        "codebook_quant_loss": quantizer,
        "codebook_loss": stage.weights["joint"] * quantizer,
        "reconstruct_loss": loss["reconstruction"],
        "perceptual_loss": loss["perceptual"],
        "nll_loss": loss["reconstruction"] + stage.weights["perceptual"] * loss["perceptual"],
        "unsacled_g_loss": loss["adversarial"],
        "g_loss": stage.weights["adversarial"] * loss["adversarial"],
        "d_weight": stage.weights["adversarial"],
        "disc_factor": 1.0,
        "total_loss": float(generator_loss(stage, values)),
    }
    if "entropy_sample" in loss:
        parts = (("sample_minimization", loss["entropy_sample"]), ("batch_maximization", loss["entropy_batch"]))
        entropy = sum(options.get(f"{name}_weight", 1.0) * value for name, value in parts)
        gen["codebook_loss"] += options["entropy_loss_weight"] * entropy
        gen |= {
            "codebook_entropy_loss": entropy,
            "codebook_sample_entropy_loss": loss["entropy_sample"],
            "codebook_avg_entropy_loss": -loss["entropy_batch"],
        }
    return {"disc": disc, "gen": gen}


@pytest.mark.golden
@pytest.mark.parametrize("case", ["ibq_train_step"])
def test_ibq_training(case, tmp_path):
    file = golden(case)
    expected, images = file.output, file.input["image"]
    # before any update
    stage = ibq_training(file, tmp_path, frozen_rate)
    values, gradients, _ = run(stage, images, 1, tmp_path)[0]
    assert_close(generator_loss(stage, values), expected["init/gen_loss"], rtol=1e-4)
    names = [name for name, _ in stage.tokenizer.named_parameters()]
    found = dict(zip(names, gradients[0], strict=True))
    recorded = below(expected, "init/grad_norm_sum/")
    ours = rename(recorded, ibq.rules(len(file.config["ddconfig"]["ch_mult"])))
    assert set(ours) == set(found)
    for name, value in ours.items():
        # sums of many entries of both signs: to the precision of the norm
        tolerance = 1e-5 + 1e-4 * value[0].item()
        assert_close(torch.stack([found[name].norm(), found[name].sum()]), value, atol=tolerance, rtol=1e-4)
    # iterations
    adam = partial(torch.optim.Adam, lr=file.config["learning_rate"], betas=(0.5, 0.9))
    stage, ema = ibq_training(file, tmp_path, adam), EMA(decay=0.999)
    shadow = copy.deepcopy(stage.discriminator)  # which we have no use for
    steps = file.config["iterations"]

    class Shadow(Callback):
        def on_train_batch_end(self, *_):
            average(shadow, stage.discriminator, 0.999)

    tolerances = [1e-5, 1e-4, 2e-3]
    seen = run(stage, images, steps, tmp_path, [ema, Shadow()])
    for number, (values, _, _) in enumerate(seen):
        tolerance = tolerances[min(number, 2)]
        for side, ours in ibq_logs(stage, values, file.config).items():
            logged = below(expected, f"iter{number + 1}/{side}/")
            assert logged and set(logged) <= set(ours), "every recorded value is compared"
            for name, value in logged.items():
                assert_close(torch.tensor(ours[name]), value, atol=tolerance)
    for mean, name in zip(seen[-1][2], ("real", "fake"), strict=True):
        assert_close(mean, expected[f"lecam_ema_{name}"], atol=1e-4)
    averaged = ibq_tokenizer(file).eval()
    averaged.load_state_dict(ema.averaged_state_dict()["tokenizer"])
    for part, tokenizer, judge, tolerance in (
        ("final/", stage.tokenizer, stage.discriminator, 1e-3),
        ("final_ema/", averaged, shadow, 1e-4),
    ):
        state = {f"loss.discriminator.{name}": value for name, value in judge.state_dict().items()}
        state |= tokenizer.state_dict()
        for name, value in below(expected, part).items():
            if name in ("indices", "reconstruction"):
                continue
            (key,) = rename({name: value}, ibq.rules(len(file.config["ddconfig"]["ch_mult"])))
            assert_close(state[key], value, atol=tolerance)
    with torch.no_grad():
        quantized = averaged.quantizer(averaged.encode(images))
        assert torch.equal(quantized.tokens.flatten(), expected["final_ema/indices"])
        assert_close(averaged.decode(quantized.z_q), expected["final_ema/reconstruction"], atol=1e-3)
