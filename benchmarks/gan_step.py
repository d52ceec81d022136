"""Claim: a full GAN step of a ViT tokenizer repeats no backward pass, at equal gradients.

The public code computes the adaptive weight by two backward passes from the losses to the decoder's last layer, which
the main backward pass then repeats through the perceptual network and the discriminator, whose weights get gradients
that are thrown away. Here each loss is differentiated once, down to the reconstruction. Both sides run in one process
on the same networks (random weights of the published sizes, but for the tokenizer's) and data.

    python benchmarks/gan_step.py [--device cuda] [--model vit_base_patch14_dinov2] [--repeats 3] [--json results.json]
"""

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from measure import peak_bytes, seconds

from tessera.backbones import ViTDecoder, ViTEncoder
from tessera.discriminators import DINODiscriminator
from tessera.losses import LPIPS, adaptive_weight, balanced_gradient
from tessera.quantizers import ProductQuantizer, SingleGridQuantizer, VQCodebook
from tessera.stages.reconstruction import gradient_at
from tessera.tokenizers import Tokenizer

WEIGHT = 0.5


def random_lpips(folder: Path) -> LPIPS:
    """LPIPS of the real size, without its weights."""
    from torchvision.models import vgg16

    torch.save({f"features.{k}": v for k, v in vgg16(weights=None).features.state_dict().items()}, folder / "vgg.pth")
    return LPIPS(folder / "vgg.pth")


def build(model: str, resolution: int) -> Tokenizer:
    sizes = {"model": model, "resolution": resolution, "pretrained": False, "grid": resolution // 16}
    branch = partial(SingleGridQuantizer, codebook=partial(VQCodebook, codebook_size=4096))
    return Tokenizer(ViTEncoder(**sizes), ProductQuantizer(branch, 1, 64), ViTDecoder(**sizes), resolution)


def public_way(model: Tokenizer, perceptual: nn.Module, judge: nn.Module, images: Tensor) -> Tensor:
    """Two backward passes for the weight, a third one for the step; returns the weight."""
    made = model(images).reconstruction
    likelihood = F.mse_loss(made, images) + perceptual(made, images).mean()
    adversarial = -judge(made).mean()
    norms = [torch.autograd.grad(loss, model.last_layer, retain_graph=True)[0] for loss in (likelihood, adversarial)]
    weight = adaptive_weight(*norms)
    (likelihood + WEIGHT * weight * adversarial).backward()
    return weight


def our_way(model: Tokenizer, perceptual: nn.Module, judge: nn.Module, images: Tensor) -> Tensor:
    """As `ReconstructionStage.generator_step` does it; returns the weight."""
    made = model(images).reconstruction
    leaf = made.detach().requires_grad_()
    likelihood = gradient_at(F.mse_loss(leaf, images) + perceptual(leaf, images).mean(), leaf)
    judge.requires_grad_(False)
    adversarial = gradient_at(-judge(leaf).mean(), leaf)
    judge.requires_grad_(True)
    gradient, weight = balanced_gradient(made, likelihood, adversarial, model.last_layer, WEIGHT)
    (made * gradient).sum().backward()
    return weight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--model", default="vit_small_patch14_dinov2", help="of encoder and decoder")
    parser.add_argument("--resolution", default=256, type=int)
    parser.add_argument("--batch", default=2, type=int)
    parser.add_argument("--repeats", default=2, type=int)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    device = options.device
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        perceptual = random_lpips(Path(folder)).to(device)
    # in evaluation mode, in which neither paths are dropped nor spectral norms move, so that both ways agree
    model = build(options.model, options.resolution).to(device).eval()
    judge = DINODiscriminator(pretrained=False).to(device).eval()
    images = torch.rand(options.batch, 3, options.resolution, options.resolution, device=device) * 2 - 1

    weights, gradients = {}, {}
    ways = {"public": public_way, "ours": our_way}

    def step(name: str) -> None:
        model.zero_grad()
        judge.zero_grad()
        # the same crop or scale on both sides
        torch.manual_seed(1)
        weights[name] = ways[name](model, perceptual, judge, images)

    figures = {}
    for name in ways:
        figures[name] = {
            "seconds": seconds(lambda name=name: step(name), options.repeats, device),
            "peak_MB": peak_bytes(lambda name=name: step(name), device) / 2**20,
        }
        gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    difference = (gradients["ours"] - gradients["public"]).norm() / gradients["public"].norm()
    figures["ratio"] = figures["public"]["seconds"] / figures["ours"]["seconds"]
    figures["weights"] = {name: float(weight) for name, weight in weights.items()}
    figures["relative_difference_of_gradients"] = float(difference)
    for name in ways:
        print(f"{name:>7}: {figures[name]['seconds']:8.3f} s, peak {figures[name]['peak_MB']:8.1f} MB")
    print(f"public / ours: {figures['ratio']:.2f} in time; gradients differ by {difference:.1e} (relative)")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
