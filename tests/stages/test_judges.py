"""Every discriminator with every guidance and perturbation, and the options of the tokenizer's training."""

import math
from itertools import product

import pytest
import torch

from stage_setup import data, dino, guided_stage, teacher, tokenizer, tokenizer_stage, trainer
from tessera.discriminators import BlurPatchGAN, DiffAug, PatchGAN, StyleGANDiscriminator
from tessera.errors import ConfigError
from tessera.losses import Alignment, LeCam
from tessera.perturbation import NearestCodePerturbation
from tessera.tokenizers import TokenizerOutput

DISCRIMINATORS = {
    "none": lambda: None,
    "patchgan": lambda: PatchGAN(3, 4, 2),
    "stylegan": lambda: StyleGANDiscriminator(16, capacity=64, max_channels=8),
    "blur_patchgan": lambda: BlurPatchGAN(4, 2, norm_groups=2, logits_size=4),
    "dino_bn": lambda: dino("bn"),
    "dino_sbn": lambda: dino("sbn"),
    "dino_gn": lambda: dino("gn"),
}
CLIP = {"model": "vit_base_patch16_clip_quickgelu_224.openai", "normalisation": "clip", "features": "patch"}
ALIGNMENTS = {
    "none": lambda: None,
    "dinov2": lambda: {"semantic": Alignment(teacher())},
    "clip": lambda: {"detail": Alignment(teacher(**CLIP), [0], True, 1.0, 100.0, projection="own")},
    "both": lambda: {"semantic": Alignment(teacher()), "detail": Alignment(teacher(**CLIP), None)},
}
PERTURBATIONS = {
    "none": lambda: None,
    "open": lambda: NearestCodePerturbation(0.8, 0.5, 5),
    "code": lambda: NearestCodePerturbation(0.8, 0.5, 5, neighbors_of="code"),
}
AUGMENTS = {"none": lambda: None, "diffaug": lambda: DiffAug(blur_fade=0.0)}


@pytest.mark.parametrize("discriminator", DISCRIMINATORS)
def test_one_step_of_every_choice(tmp_path, discriminator):
    """Losses are finite, every trained parameter gets a gradient (DistributedDataParallel needs that), and moves."""
    module = data("images", None, batch_size=8)
    for alignment, perturbation, augment in product(ALIGNMENTS, PERTURBATIONS, AUGMENTS):
        judge = DISCRIMINATORS[discriminator]()
        if augment != "none" and (judge is None or perturbation == "code"):
            continue
        stage = tokenizer_stage(
            tokenizer=tokenizer(branches=2),
            discriminator=judge,
            discriminator_start=0.0,
            discriminator_augment=AUGMENTS[augment](),
            alignment=ALIGNMENTS[alignment](),
            perturbation=PERTURBATIONS[perturbation](),
            loss_weights={"dependency": 0.1},
        )
        choice = (discriminator, alignment, perturbation, augment)
        trained = [*stage.trained_parameters(), *(judge.parameters() if judge is not None else ())]
        assert {id(p) for p in stage.parameters()} == {id(p) for p in trained}, choice
        without, before = [], [p.detach().clone() for p in trained]

        def gradients(optimizer, without=without):
            without += [p.shape for group in optimizer.param_groups for p in group["params"] if p.grad is None]

        stage.on_before_optimizer_step = gradients
        stage.scheduler_factory = lambda optimizer, total: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        stage.discriminator_scheduler_factory = stage.scheduler_factory
        fit = trainer(tmp_path, 1)
        fit.fit(stage, module)
        assert fit.global_step == 1 and not without, choice
        names = {"reconstruction", "codebook", "commitment", "dependency", *stage.alignment}
        names |= {"adversarial", "discriminator", "lecam"} if judge is not None else set()
        logged = {k.removeprefix("train/loss/"): float(v) for k, v in fit.callback_metrics.items() if "/loss/" in k}
        assert set(logged) == names and all(map(math.isfinite, logged.values())), choice
        moved = [not torch.equal(p, old) for p, old in zip(trained, before, strict=True)]
        assert sum(moved) > 0.9 * len(moved), choice
        frozen = [key for key in stage.state_dict() if "network" in key or "backbone" in key or "teacher" in key]
        assert not frozen, choice


def guidance(stage, output, images, progress=0.0):
    """Losses of alignment and dependency outside of a trainer."""
    type(stage).progress, kept = property(lambda self: progress), type(stage).progress
    try:
        return stage.guidance(images, output)
    finally:
        type(stage).progress = kept


def output_of(z_q, clean=None, depths=None):
    return TokenizerOutput(z_q, z_q, z_q, torch.zeros(1), depths=depths, z_q_clean=z_q if clean is None else clean)


def test_guidance_sees_the_latent_it_is_told_to_and_leaves_out_dropped_depths():
    images, z_q, clean = torch.randn(6, 3, 16, 16), torch.randn(6, 8, 4, 4), torch.randn(6, 8, 4, 4)
    depths = torch.tensor([1, 1, 0, 1, 0, 1])  # a single grid: depth 1 is complete
    kept = depths == 1
    for semantic_on, latent in (("clean", clean), ("perturbed", z_q)):
        align = Alignment(teacher())
        choice = {"alignment": {"semantic": align}, "semantic_on": semantic_on}
        stage = tokenizer_stage(tokenizer=tokenizer(branches=2), **choice)
        losses = guidance(stage, output_of(z_q, clean), images)
        assert set(losses) == {"semantic"}
        torch.testing.assert_close(losses["semantic"], align(images, latent, stage.tokenizer, 0.0))
        some = guidance(stage, output_of(z_q, clean, depths), images)["semantic"]
        torch.testing.assert_close(some, align(images[kept], latent[kept], stage.tokenizer, 0.0))


def test_the_scale_rises_with_training():
    images, z_q = torch.randn(6, 3, 16, 16), torch.randn(6, 8, 4, 4)
    align = Alignment(teacher(), normalize=True, scale=1.0, end_scale=21.0)
    stage = tokenizer_stage(tokenizer=tokenizer(branches=2), alignment={"semantic": align})
    early, late = (guidance(stage, output_of(z_q), images, progress)["semantic"] for progress in (0.0, 0.5))
    align.end_scale = None
    torch.testing.assert_close(early, align(images, z_q, stage.tokenizer, 0.0))
    align.scale = 11.0
    torch.testing.assert_close(late, align(images, z_q, stage.tokenizer, 0.0))


@pytest.mark.parametrize("kind", ["squared", "signed"])
def test_dependency_is_off_until_it_weighs(kind):
    images, z_q = torch.randn(2, 3, 16, 16), torch.randn(2, 8, 4, 4)
    off = tokenizer_stage(tokenizer=tokenizer(branches=2), dependency=kind)
    assert guidance(off, output_of(z_q), images) == {}
    on = tokenizer_stage(tokenizer=tokenizer(branches=2), dependency=kind, loss_weights={"dependency": 0.5})
    a, b = z_q.mean((2, 3)).chunk(2, dim=1)
    cosine = torch.cosine_similarity(a, b)
    expected = cosine.square().mean() if kind == "squared" else cosine.mean()
    torch.testing.assert_close(guidance(on, output_of(z_q), images)["dependency"], expected)


def started(stage, tmp_path, steps=10):
    """Global steps at which the discriminator was updated, and the strengths of the blur it was asked for."""
    seen, strengths = [], []
    stage.augment = DiffAug(blur_fade=0.2)
    strength = stage.augment.strength
    stage.augment.strength = lambda *now: strengths.append(strength(*now)) or strengths[-1]
    step = stage.discriminator_step
    stage.discriminator_step = lambda *a: (seen.append(stage.trainer.global_step), step(*a))
    trainer(tmp_path, steps).fit(stage, data("images", None, batch_size=8))
    return seen, strengths


@pytest.mark.parametrize("start", [{"discriminator_start": 0.6}, {"discriminator_start_steps": 6}])
def test_the_discriminator_starts_by_fraction_or_steps_and_the_blur_fades_from_there(tmp_path, start):
    stage = tokenizer_stage(**start)
    seen, strengths = started(stage, tmp_path)
    assert stage.discriminator_steps() == 4
    assert seen == [7, 8, 9, 10]  # counted after the generator's step
    # the same for the generator and both sides of the discriminator
    assert strengths == pytest.approx([1.0] * 3 + [2 / 3] * 3 + [1 / 3] * 3 + [0.0] * 3)


def test_never(tmp_path):
    assert started(tokenizer_stage(discriminator_start_steps=99), tmp_path, 3) == ([], [])


def test_the_discriminator_first(tmp_path):
    order = []
    stage = tokenizer_stage(discriminator_start=0.0, discriminator_first=True)
    for name in ("generator_step", "discriminator_step"):
        method = getattr(stage, name)
        setattr(stage, name, lambda *a, name=name, method=method: (order.append(name), method(*a)))
    trainer(tmp_path, 2).fit(stage, data("images", None, batch_size=8))
    assert order == ["discriminator_step", "generator_step"] * 2


def test_fresh_draws_for_real_and_generated_images(tmp_path):
    stage, seen = tokenizer_stage(discriminator_start=0.0, discriminator_augment=DiffAug()), []
    augment = stage.augment

    class Watching(DiffAug):
        def __call__(self, images, strength=0.0, rng=None):
            seen.append(rng.uniform("augment/how", 7))
            return augment(images, strength, rng)

    stage.augment = Watching()
    trainer(tmp_path, 2).fit(stage, data("images", None, batch_size=8))
    assert len(seen) == 6
    assert len({tuple(draws.flatten().tolist()) for draws in seen}) == 6


def test_a_loss_without_a_weight_is_named(tmp_path):
    stage = tokenizer_stage(discriminator=None)
    forward = stage.tokenizer.forward

    def with_another(*arguments):
        output = forward(*arguments)
        output.losses["novel"] = torch.ones(())
        return output

    stage.tokenizer.forward = with_another
    with pytest.raises(ConfigError, match=r"loss 'novel', for which stage\.loss_weights"):
        trainer(tmp_path, 2).fit(stage, data("images", None, batch_size=8))


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: tokenizer_stage(discriminator_start_steps=-1), r"stage\.discriminator_start_steps=-1"),
        (lambda: tokenizer_stage(dependency="cubed"), r"stage\.dependency='cubed'"),
        (lambda: tokenizer_stage(loss_weights={"dependency": 1.0}), r"loss_weights\.dependency=1\.0.*branches"),
        (lambda: tokenizer_stage(loss_weights={"semantic": 1.0}), r"loss_weights\.semantic is unknown"),
        (lambda: tokenizer_stage(alignment={"lecam": Alignment(teacher())}), r"alignment\.lecam: .* name already"),
        (lambda: tokenizer_stage(alignment={"semantic": Alignment(teacher(), [1])}), r"branches=\[1\].*1 branches"),
        (lambda: tokenizer_stage(alignment={"a": Alignment(teacher(resolution=32))}), r"patch grid.*tokenizer's 16"),
        (lambda: tokenizer_stage(lecam=LeCam(decay=1.0)), r"stage\.lecam\.decay=1\.0"),
        (lambda: tokenizer_stage(loss_limit=-1.0), r"stage\.loss_limit=-1\.0"),
        (
            lambda: tokenizer_stage(discriminator=StyleGANDiscriminator(32, 64, 8)),
            r"discriminator\.resolution=32 is",
        ),
    ],
)
def test_impossible_arguments(build, match):
    with pytest.raises(ConfigError, match=match):
        build()


def test_the_guided_stage_counts_weights_of_its_own():
    stage = guided_stage(loss_weights={"detail": 0.7})
    assert stage.weights["semantic"] == 0.1 and stage.weights["detail"] == 0.7
    assert "detail" not in type(stage).default_weights


def test_every_network_runs_backward_once_for_each_time_forward(tmp_path):
    """The adaptive weight costs no second backward pass through encoder, perceptual network or discriminator."""

    class Distance(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Conv2d(3, 2, 3)

        def forward(self, x, y):
            return (self.layer(x) - self.layer(y)).square().mean((1, 2, 3))

    stage = guided_stage(discriminator_start=0.0, perceptual=Distance())
    networks = {
        "encoder": stage.tokenizer.encoder,
        "decoder": stage.tokenizer.decoder.mid if hasattr(stage.tokenizer.decoder, "mid") else stage.tokenizer.decoder,
        "perceptual": stage._perceptual.module.layer,
        "judge": stage.discriminator.heads[0],
    }
    counts = dict.fromkeys(networks, 0)

    def count(name):
        def hook(*_):
            counts[name] += 1

        return hook

    for name, network in networks.items():
        network.register_full_backward_hook(count(name))
    trainer(tmp_path, 2).fit(stage, data("images", None, batch_size=8))
    # per step: the judge sees a generated image for the generator, then generated and real ones for itself
    assert counts == {"encoder": 2, "decoder": 2, "perceptual": 2, "judge": 6}


@pytest.mark.parametrize("precision", ["bf16-mixed"])
def test_guided_training_in_half_precision(tmp_path, precision):
    stage, seen = guided_stage(discriminator_start=0.0), []
    stage.on_train_batch_end = lambda *_: seen.append(dict(stage.trainer.callback_metrics))
    trainer(tmp_path, 3, precision=precision).fit(stage, data("images", None, batch_size=8))
    exact = guided_stage(discriminator_start=0.0)
    first = []
    exact.on_train_batch_end = lambda *_: first.append(dict(exact.trainer.callback_metrics))
    trainer(tmp_path, 3).fit(exact, data("images", None, batch_size=8))
    for name in ("reconstruction", "semantic", "detail", "discriminator"):
        key = f"train/loss/{name}"
        assert float(seen[0][key]) == pytest.approx(float(first[0][key]), rel=0.1), name
        assert math.isfinite(float(seen[-1][key]))
