"""Every generator learns: one batch by heart, and digits in the tokens of different tokenizers better than chance."""

import math
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F

from generators.generator_cases import CASES, batch, build
from tessera.data import DigitsImages
from tessera.quantizers import BSQCodebook, MultiScaleQuantizer, ProductQuantizer, SingleGridQuantizer, VQCodebook
from tessera.rng import IndexedRng

SIZES = {"hidden_size": 32, "num_heads": 2, "class_dropout": 0.0, "mlp_size": 64}
KINDS = {
    "rar": {"order_anneal": (0.3, 0.6)},
    "llama": {},
    "maskgit": {"label_smoothing": 0.0, "unmasked_weight": 0.0},
    "maskgit_uvit": {"label_smoothing": 0.0, "unmasked_weight": 0.0},
    "var": {"drop_path": 0.0, "init_gate": 0.1, "init_head": 1.0},
}


def train(model, tokens, labels, steps, lr, batch_size=None):
    """AdamW for a number of steps, on all samples or random batches of them; the model ends in eval mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95))
    chosen = torch.arange(len(labels))
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, 0.05 + 2 * (1 - step / steps))
        if batch_size:
            chosen = torch.randint(0, len(labels), (batch_size,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        rng = IndexedRng(0, chosen, step)
        model.loss(tokens[chosen], labels[chosen], progress=step / steps, rng=rng)["loss"].backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def mean_loss(model, tokens, labels):
    result = model.loss(tokens, labels)
    return (result["site_loss"].sum() / result["site_count"].sum()).item()


@pytest.mark.parametrize("name", KINDS)
def test_learns_one_batch(name):
    model = build(name, 2, random=False, **SIZES, **KINDS[name])
    tokens, _ = batch(model, 4)
    labels = torch.arange(4)
    assert mean_loss(model, tokens, labels) > 2.0  # ln 11 = 2.4
    steps = 80 if CASES[name].sequential else 260  # a step of the others teaches a part of the tokens
    assert mean_loss(train(model, tokens, labels, steps, 5e-3), tokens, labels) < 0.2


def vq(patches, codes, branches):
    """Factory of VQ codebooks whose codes are spread over parts of the data, so that no training is needed."""
    parts = iter(patches[:: len(patches) // codes][:codes].chunk(branches, 1))

    def make(dim):
        codebook = VQCodebook(dim=dim, codebook_size=codes, l2_normalize=False)
        codebook.embedding.data.copy_(next(parts))
        return codebook

    return make


@cache
def digits(tokenizer):
    """(quantizer, train tokens, train labels, val tokens, val labels): 2 x 2 patches of 8 x 8 digits are the latent."""
    splits = []
    for split in ("train", "val"):
        samples = DigitsImages(split, resolution=8)[list(range(1438 if split == "train" else 359))]
        splits.append((F.pixel_unshuffle(samples["image"][:, :1], 2), samples["label"]))
    patches = splits[0][0].permute(0, 2, 3, 1).flatten(0, 2)
    order = torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))
    grids, branches = [1, 2, 4], 1
    if tokenizer == "vq":
        branch = partial(SingleGridQuantizer, codebook=vq(patches[order], 32, 1))
    elif tokenizer == "msvr_p2":
        branches = 2
        branch = partial(MultiScaleQuantizer, grids=grids, phi_convs=0, codebook=vq(patches[order] / 2, 16, 2))
    else:
        branch = partial(MultiScaleQuantizer, grids=grids, phi_convs=0, codebook=partial(BSQCodebook, bits=4))
    quantizer = ProductQuantizer(branch, branches, dim=4).eval()
    quantizer.bind_grid((4, 4))
    with torch.no_grad():
        (train_tokens, train_labels), (val_tokens, val_labels) = ((quantizer(z).tokens, y) for z, y in splits)
    return quantizer, train_tokens, train_labels, val_tokens, val_labels


def unigram_loss(tokens, val_tokens, codes):
    """Mean loss of the model that knows each site's frequencies of codes, and nothing else."""
    counts = F.one_hot(tokens, codes).sum(0) + 1.0  # (P, L, K)
    logs = (counts / counts.sum(-1, keepdim=True)).log()
    return -logs.expand(len(val_tokens), -1, -1, -1).gather(-1, val_tokens[..., None]).mean().item()


TOKENIZERS = {"llama": ("vq", "msbr"), "var": ("msvr_p2", "msbr")}


@pytest.mark.parametrize(
    ("name", "tokenizer"), [(name, kind) for name in KINDS for kind in TOKENIZERS.get(name, ("vq", "msvr_p2"))]
)
def test_learns_digits(name, tokenizer):
    quantizer, tokens, labels, val_tokens, val_labels = digits(tokenizer)
    torch.manual_seed(0)
    case = CASES[name]
    options = {**case.options, **SIZES, **KINDS[name]}
    model = case.make(**options, **case.make.sizes(quantizer, 10))
    model.bind(quantizer)
    unigram = unigram_loss(tokens, val_tokens, quantizer.codebook_size)
    assert unigram > 0.4 * math.log(quantizer.codebook_size)  # the codes are in use
    assert mean_loss(model.eval(), val_tokens, val_labels) > unigram
    steps, lr = (120, 8e-3) if case.sequential else (220, 4e-3)
    learned = mean_loss(train(model, tokens, labels, steps, lr, 64), val_tokens, val_labels)
    assert learned < 0.9 * unigram
    # and it's the image's own class that helps
    assert mean_loss(model, val_tokens, (val_labels + 1) % 10) > learned + 0.05
