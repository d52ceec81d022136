"""Whole training forwards of XQ-GAN and RobusTok against published numbers: every loss, and gradients of their sum."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from golden_cases import Golden, assert_close, golden
from published_usage import PublishedUsage, assert_usage
from tessera.losses import Alignment, Teacher, dependency_loss, pixel_loss
from tessera.perturbation import NearestCodePerturbation
from tessera.quantizers.multiscale import rows_of
from tessera.quantizers.output import QuantizerOutput
from tessera.tokenizers import Tokenizer
from tessera.zoo import from_public
from tessera.zoo.keys import XQGAN, XQGAN_IGNORED, rename

EPOCHS = 200  # over which the published scale of the contrastive loss rises to 100


def below(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


class Given:
    """The recorded draws of the perturbation, and its selection of the first images of the batch."""

    def __init__(self, site: Tensor, rank: Tensor, alpha: float, beta: float, delta: int, batch: int):
        self.draws = {
            "perturb/image": torch.where(torch.arange(batch) < int(batch * beta), 0.0, 1.0),
            "perturb/site": site.view(batch, 1, -1).double(),
            "perturb/rank": ((rank + 0.5) / delta).view(batch, 1, -1).double(),
        }
        self.strategy = NearestCodePerturbation(alpha, beta, delta)

    def uniform(self, stream: str, *shape: int) -> Tensor:
        return self.draws[stream]


def teacher(weights: dict[str, Tensor], resolution: int, patch_size: int, features: str = "class", **sizes) -> Teacher:
    model = Teacher(
        "vit_small_patch14_dinov2.lvd142m", resolution, patch_size=patch_size, pretrained=False, network=sizes
    )
    model.network.load_state_dict(weights, strict=True)
    if features == "patch":
        # published: patch tokens (B, N, D) read as (B, D, N), then pooled

        def scrambled(images):
            tokens = model.network.forward_features(model.standardise(images))[:, model.network.num_prefix_tokens :]
            return tokens.reshape(len(tokens), model.dim, -1).mean(2)

        model.forward = scrambled
    return model


def published(config: dict, weights: dict[str, Tensor]) -> Tokenizer:
    """The tokenizer in training mode, no path dropped, as the files were made."""
    tokenizer = from_public("xqgan", config, weights).train()
    for module in tokenizer.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    return tokenizer


def published_entropy(tokenizer: Tokenizer, out: QuantizerOutput, options: dict) -> Tensor:
    """The recorded entropy term, from our entropies.

    The published soft form indexes the batch by its 0/1 mask of kept images as integers; the hard form divides its mean
    over kept images by their share once more.
    """
    terms, soft = [], options.get("soft_entropy", True)
    parts = out.latent.chunk(tokenizer.quantizer.num_branches, dim=1)
    sites = parts[0].shape[2] * parts[0].shape[3]
    for number, (branch, latent) in enumerate(zip(tokenizer.quantizer.branches, parts, strict=True)):
        codebook = branch.codebooks[0]
        if not soft:
            codebook.entropy, codebook.temperature = "hard", 0.01
        for scale in range(len(branch.grids)):
            before = branch.decode(out.tokens[:, number], out.depths.clamp(max=scale)).detach()
            mask, gain = out.depths > scale, options.get("scale", 1.0) ** scale
            seen = (latent - before)[mask.long()] if soft else latent - before
            found = codebook.penalties(rows_of(seen), None if soft else mask.repeat_interleave(sites), gain)
            terms.append((found["entropy_sample"] + found["entropy_batch"]) / mask.float().mean())
    return torch.stack(terms).mean() * options.get("entropy_loss_ratio", 0.0)


def compare_usage(file: Golden, tokenizer: Tokenizer, tokens: Tensor) -> None:
    grids = tokenizer.quantizer.grids
    usages, sites = [], len(tokens) * grids[-1][0] * grids[-1][1]
    for branch in range(tokenizer.quantizer.num_branches):
        name = "quantize" if tokenizer.quantizer.num_branches == 1 else f"quantizes.{branch}"
        hits, used = PublishedUsage(file.weights[f"{name}.ema_vocab_hit_SV"]).update(tokens[:, branch], grids)
        assert_close(hits, file.output[f"ema_vocab_hit_SV_b{branch}"])
        usages.append(used)
    assert_usage(torch.stack(usages).mean(0), file.output["usages"], hits, sites)


def compare_gradients(file: Golden, tokenizer: Tokenizer, total: Tensor) -> None:
    total.backward()
    named = dict(tokenizer.named_parameters())
    for name, norm in zip(json.loads(file.metadata["grad_names"]), file.output["grad_norms"], strict=True):
        # published layers that a tokenizer has no use for have no part in the loss either
        ours = next(iter(rename({name: torch.empty(0)}, XQGAN, XQGAN_IGNORED)), None)
        found = None if ours is None else named[ours].grad
        if norm < 0:
            assert found is None or found.abs().max() == 0, name
        else:
            assert_close(found.norm(), norm, atol=1e-6, rtol=1e-3)
    recorded = {name for name in file.output if name.startswith("grad_")} - {"grad_norms"}
    assert recorded <= {"grad_latent_tokens", "grad_quant_conv_weight"}, "every recorded gradient is compared"
    for name in recorded:
        ours = named["encoder.latent_tokens" if name == "grad_latent_tokens" else "quant_conv.weight"]
        assert_close(ours.grad, file.output[name], atol=1e-6, rtol=1e-3)


def semantic_loss(file: Golden, sizes: dict, tokenizer: Tokenizer, z_q: Tensor, keep: Tensor) -> Tensor:
    """The recorded guidance, with its weight; 0 where no teacher was."""
    options = file.config["model"]
    if options.get("semantic_guide", "none") == "none":
        return torch.zeros(())
    align = Alignment(
        teacher(
            below(file.weights, "semantic_model."),
            sizes["img_size"],
            sizes["patch_size"],
            options.get("guide_type_1", "class"),
            **{name: sizes[name] for name in ("embed_dim", "depth", "num_heads")},
        ),
        normalize=options["clip_norm"],
        scale=options["sem_loss_scale"],
        end_scale=100.0 if options["clip_norm"] else None,
    )
    align.bind(tokenizer)
    progress = min(file.config["epoch"] / EPOCHS, 1.0)
    return align(file.input["image"], z_q, tokenizer, progress, keep) * options["sem_loss_weight"]


@pytest.mark.golden
@pytest.mark.parametrize("case", ["xqgan_train_vq", "xqgan_train_msvr_p2", "xqgan_train_msbr_p2"])
def test_xqgan(case):
    file = golden(case)
    options, images, expected = file.config["model"], file.input["image"], file.output
    sizes = {**(file.config.get("tiny_cnn") or {}), **(file.config.get("tiny_backbone") or {})}
    tokenizer = published({**options, **sizes, "lora": file.config.get("lora", {})}, file.weights)
    quantizer, batch = tokenizer.quantizer, len(images)
    scales, dropped = len(quantizer.grids), int(batch * options.get("codebook_drop", 0.0))
    kept = torch.full((batch,), scales)
    if scales > 1:
        kept[:dropped] = file.input["dropout"][:dropped].clamp(max=scales)
        quantizer._draw_depths = lambda z, rng: kept
    noise = None
    if "rand_prob" in file.input:
        noise = Given(
            file.input["rand_prob"],
            file.input["rand_idx"],
            *(file.config[name] for name in ("alpha", "beta", "delta")),
            batch,
        )
    seen = []

    def perturb(quantizer, z, out):
        seen.append(out)
        return (out, {}) if noise is None else noise.strategy(quantizer, z, out, 0.0, noise)

    output = tokenizer(images, perturb)
    assert_close(output.reconstruction, expected["recon"], atol=2e-5)

    beta = options.get("commit_loss_beta", 0.25) if scales == 1 else 0.25
    # published: the commitment of learned codes is a sum over scales
    times = scales if not options.get("lfq") else 1
    # published: the first images of the batch are left out, whether their depth was drawn below the last scale or not
    keep = torch.arange(batch) >= dropped
    terms = {
        "sem_loss": semantic_loss(file, sizes, tokenizer, output.z_q, keep),
        "vq_loss": output.losses["codebook"],
        "commit_loss": output.losses["commitment"] * beta * times,
        "entropy_loss": torch.zeros(()),
        "dependency_loss": torch.zeros(()),
    }
    if options.get("lfq"):
        terms["entropy_loss"] = published_entropy(tokenizer, seen[0], options)
    if options.get("dependency_loss_weight"):
        pooled = output.z_q.mean((2, 3)).chunk(quantizer.num_branches, dim=1)
        terms["dependency_loss"] = options["dependency_loss_weight"] * dependency_loss(pooled, squared=False)
    recorded = {name for name in expected if name.endswith("_loss")}
    assert recorded <= set(terms), "every recorded loss is compared"
    for name in recorded:
        assert_close(terms[name], expected[name])
    total = pixel_loss("mse")(output.reconstruction, images) + sum(terms.values())
    assert_close(total, expected["total"])
    compare_usage(file, tokenizer, output.tokens)
    compare_gradients(file, tokenizer, total)


@pytest.mark.golden
@pytest.mark.parametrize("case", ["robustok_maintrain_fwd"])
def test_robustok(case):
    file = golden(case)
    options, images, expected = file.config, file.input["images"], file.output
    weights, batch = below(file.weights, "vq_model."), len(images)
    sizes = {name: options[name] for name in ("embed_dim", "depth", "num_heads")}
    public = {
        **sizes,
        **{name: options[name] for name in ("image_size", "patch_size", "codebook_size", "codebook_embed_dim")},
        "enc_type": "dinov2",
        "dec_type": "dinov2",
        "v_patch_nums": [options["grid"]],
        "abs_pos_embed": "encoder.lvl_embed.weight" in weights,
    }
    tokenizer = published(public, weights)
    strength = [options["perturb"][name] for name in ("alpha", "beta", "delta")]
    noise = Given(file.input["rand"], file.input["randint"], *strength, batch)
    seen = {}

    def perturb(quantizer, z, out):
        # the recorded choice precedes the selection of images
        everywhere = NearestCodePerturbation(options["perturb"]["alpha"], 1.0, options["perturb"]["delta"])
        seen["selected"] = everywhere(quantizer, z, out, 0.0, noise_for_all)[0].tokens
        return noise.strategy(quantizer, z, out, 0.0, noise)

    noise_for_all = Given(file.input["rand"], file.input["randint"], 1.0, 1.0, options["perturb"]["delta"], batch)
    output = tokenizer(images, perturb)
    assert torch.equal(output.tokens.flatten(), expected["clean_ids"])
    assert torch.equal(seen["selected"].flatten(), expected["selected_ids"])
    ours = {
        "z": output.z,
        "clean_zq": output.z_q_clean,
        "perturbed_zq": output.z_q,
        "recon": output.reconstruction,
        "recon_clean": tokenizer(images).reconstruction,
        "loss.vq": output.losses["codebook"],
        "loss.commit": 0.25 * output.losses["commitment"],
        "loss.rec": F.mse_loss(output.reconstruction, images),
    }
    taught = teacher(below(weights, "semantic_model."), options["image_size"], options["patch_size"], **sizes)
    for semantic_on, latent in (("clean", output.z_q_clean), ("perturbed", output.z_q)):
        align = Alignment(taught)
        align.bind(tokenizer)
        ours[f"loss.sem_on_{semantic_on}"] = 0.1 * align(images, latent, tokenizer, 0.0)
    others = {"clean_ids", "selected_ids", "usage_percent", "codebook_grad_is_none_or_zero"}
    gradients = {name for name in expected if name.startswith("grad_rec.")}
    assert set(expected) == ours.keys() | others | gradients, "every recorded output is compared"
    for name, value in ours.items():
        assert_close(value.detach(), expected[name], atol=2e-5)
    ours["loss.rec"].backward()
    named = dict(tokenizer.named_parameters())
    for name, value in rename(below(expected, "grad_rec."), XQGAN).items():
        assert_close(named[name].grad, value, atol=1e-5, rtol=1e-4)
    codebook = named["quantizer.branches.0.codebooks.0.embedding"].grad
    assert expected["codebook_grad_is_none_or_zero"] == 1
    # the images that were not perturbed pass the codebook by, too: straight through
    assert codebook is None or codebook.abs().max() == 0
    usage = output.tokens.flatten().bincount(minlength=options["codebook_size"]).float()
    threshold = 0.08 * output.tokens.numel() / options["codebook_size"]
    assert_close(100 * (usage >= threshold).float().mean(), expected["usage_percent"], atol=1e-3)
