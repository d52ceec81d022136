from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from forked import run_forked
from golden_cases import assert_close, golden
from tessera.backbones import CNNDecoder, CNNEncoder
from tessera.errors import ConfigError, MissingFileError
from tessera.losses import Alignment, Teacher, contrastive_loss, dependency_loss
from tessera.losses.alignment import logit_scale
from tessera.quantizers import ProductQuantizer, SingleGridQuantizer
from tessera.quantizers.codebooks import VQCodebook
from tessera.tokenizers import Tokenizer

EPOCHS = 200  # over which the published scale rises to 100
TINY = {"embed_dim": 8, "depth": 1, "num_heads": 2}


@pytest.mark.golden
@pytest.mark.parametrize("case", ["xqgan_semantic_contrastive"])
def test_published_loss(case):
    file = golden(case)
    teacher, student = (file.input[f"feat_{side}"].clone().requires_grad_() for side in ("teacher", "quant"))
    for number, scale in enumerate(file.config["scales"]):
        loss = contrastive_loss(teacher, student, scale)
        assert_close(loss, file.output[f"loss_scale_{scale}"], atol=1e-6)
        if number == 0:
            gradients = torch.autograd.grad(loss, (teacher, student))
            assert_close(gradients[0], file.output["grad_teacher"], atol=1e-6)
            assert_close(gradients[1], file.output["grad_quant"], atol=1e-6)
    units = F.normalize(teacher, dim=1), F.normalize(student, dim=1)
    for epoch in file.config["epochs"]:
        scale = logit_scale(epoch / EPOCHS, file.config["s0"], 100.0)
        assert_close(torch.tensor(scale), file.output[f"clipnorm_scale_epoch_{epoch}"])
        assert_close(contrastive_loss(*units, scale), file.output[f"clipnorm_loss_epoch_{epoch}"], atol=1e-5)


def joint_batch():
    draws = torch.Generator().manual_seed(0)
    keep = torch.tensor([True, False, True, True, False, True])
    return torch.randn(6, 4, generator=draws), torch.randn(6, 4, generator=draws), keep


def test_excluded_images_are_neither_positive_nor_negative():
    teacher, student, keep = joint_batch()
    student.requires_grad_()
    loss = contrastive_loss(teacher, student, 2.0, keep)
    torch.testing.assert_close(loss, contrastive_loss(teacher[keep], student[keep], 2.0))
    loss.backward()
    assert (student.grad[~keep] == 0).all() and student.grad[keep].abs().sum() > 0
    student.grad = None
    nobody = contrastive_loss(teacher, student, 2.0, torch.zeros_like(keep))
    nobody.backward()
    assert nobody == 0 and (student.grad == 0).all()


def _loss_on_rank(rank, world):
    part = slice(3 * rank, 3 * rank + 3)
    teacher, student, keep = (side[part].clone() for side in joint_batch())
    layer = nn.Linear(4, 4, bias=False)
    nn.init.eye_(layer.weight)
    student.requires_grad_()
    loss = contrastive_loss(layer(teacher), student, 2.0, keep)
    loss.backward()
    return loss.item(), student.grad.tolist(), layer.weight.grad.tolist()


def test_two_processes_equal_one_with_the_joint_batch():
    """Uneven numbers of excluded images: 1 of the first process, 1 of the second, at other places."""
    teacher, student, keep = joint_batch()
    layer = nn.Linear(4, 4, bias=False)
    nn.init.eye_(layer.weight)
    student.requires_grad_()
    loss = contrastive_loss(layer(teacher), student, 2.0, keep)
    loss.backward()
    (first, grad0, weight0), (second, grad1, weight1) = run_forked(_loss_on_rank)
    assert first == second == pytest.approx(loss.item(), rel=1e-5)
    # DistributedDataParallel takes the mean over processes
    torch.testing.assert_close(torch.tensor(grad0 + grad1) / 2, student.grad)
    torch.testing.assert_close((torch.tensor(weight0) + torch.tensor(weight1)) / 2, layer.weight.grad)


def test_float32_under_autocast():
    teacher, student, _ = joint_batch()
    with torch.autocast("cpu", torch.bfloat16):
        found = contrastive_loss(teacher, student, 2.0)
    assert found.dtype == torch.float32 and torch.equal(found, contrastive_loss(teacher, student, 2.0))


def test_dependency():
    a, b = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[-2.0, 0.0], [0.0, 3.0]])
    assert dependency_loss([a, b], squared=False).item() == pytest.approx((-1 + 0.5**0.5) / 2)
    assert dependency_loss([a, b]).item() == pytest.approx((1 + 0.5) / 2)
    assert dependency_loss([a, b, a]).item() == pytest.approx((0.75 + 1 + 0.75) / 3)


def tokenizer(branches=2, width=8):
    torch.manual_seed(0)
    size = {"channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1, "z_channels": width, "norm_groups": 4}
    branch = partial(SingleGridQuantizer, codebook=partial(VQCodebook, codebook_size=16))
    return Tokenizer(CNNEncoder(**size), ProductQuantizer(branch, branches, 6 * branches), CNNDecoder(**size), 16)


def teacher(**changes):
    torch.manual_seed(1)
    settings = {"model": "vit_small_patch14_dinov2.lvd142m", "resolution": 16, "patch_size": 4, "pretrained": False}
    return Teacher(**{**settings, "network": TINY, **changes})


def test_teacher_features():
    images = torch.randn(2, 3, 16, 16)
    model = teacher().eval()
    by_hand = (images / 2 + 0.5 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
        [0.229, 0.224, 0.225]
    )[:, None, None]
    tokens = model.network.forward_features(by_hand)
    assert tokens.shape == (2, 17, 8)
    torch.testing.assert_close(model(images), tokens[:, 0])
    model.features = "patch"
    torch.testing.assert_close(model(images), tokens[:, 1:].mean(1))
    registers = teacher(model="vit_small_patch14_reg4_dinov2.lvd142m", features="patch").eval()
    tokens = registers.network.forward_features(by_hand)
    assert tokens.shape == (2, 21, 8)
    torch.testing.assert_close(registers(images), tokens[:, 5:].mean(1))


def test_clip_has_its_own_statistics_and_activation():
    clip = teacher(model="vit_base_patch16_clip_quickgelu_224.openai", normalisation="clip")
    white = clip.standardise(torch.ones(1, 3, 1, 1)).flatten()
    torch.testing.assert_close(
        white,
        (1 - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor([0.26862954, 0.26130258, 0.27577711]),
    )
    assert "QuickGELU" in type(clip.network.blocks[0].mlp.act).__name__
    assert clip(torch.zeros(1, 3, 16, 16)).shape == (1, 8)


@pytest.mark.parametrize("width", [8, 16])
def test_alignment_by_hand(width):
    """Teacher of the encoder's width: through quant_conv, by branch; of another one: through a layer of its own."""
    model = tokenizer(width=width)
    align = Alignment(teacher(), branches=None, normalize=True, scale=2.0, end_scale=10.0)
    align.bind(model)
    assert (align.own is None) == (width == 8) and align.branches == (0, 1)
    images = torch.randn(5, 3, 16, 16)
    z_q = torch.randn(5, 12, 8, 8, requires_grad=True)
    keep = torch.tensor([True, True, False, True, True])
    feature = teacher().eval()(images)
    expected = []
    for branch in range(2):
        if width == 8:
            taught = (feature @ model.quant_conv.weight[..., 0, 0].T + model.quant_conv.bias)[:, 6 * branch :][:, :6]
        else:
            taught = align.own(feature)
        learnt = z_q[:, 6 * branch : 6 * branch + 6].mean((2, 3))
        expected.append(contrastive_loss(F.normalize(taught[keep]), F.normalize(learnt[keep]), 6.0))
    loss = align(images, z_q, model, 0.5, keep)
    torch.testing.assert_close(loss, sum(expected) / 2)
    loss.backward()
    trained = align.own.weight if width == 16 else model.quant_conv.weight
    assert trained.grad.abs().sum() > 0 and z_q.grad.abs().sum() > 0
    # no parameter without use, and nothing of the teacher
    assert all(p.grad is not None for p in align.parameters())
    assert [name for name in align.state_dict()] == ([] if width == 8 else ["own.weight", "own.bias"])


@pytest.mark.parametrize(("branches", "others"), [((-1,), slice(0, 6)), ((0,), slice(6, 12))])
def test_only_the_chosen_branches_are_aligned(branches, others):
    model = tokenizer()
    align = Alignment(teacher(), branches)
    align.bind(model)
    z_q = torch.randn(4, 12, 8, 8, requires_grad=True)
    align(torch.randn(4, 3, 16, 16), z_q, model, 0.0).backward()
    assert (z_q.grad[:, others] == 0).all() and z_q.grad.abs().sum() > 0


def test_the_teacher_stays_frozen():
    align = Alignment(teacher(), projection="own")
    align.bind(tokenizer())
    align.requires_grad_(True).train()
    network = align._teacher.module
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert len(list(align.parameters())) == 2


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: teacher(features="mean"), r"teacher\.features='mean'"),
        (lambda: teacher(normalisation="dino"), r"teacher\.normalisation='dino' is unknown; choose one of imagenet"),
        (lambda: teacher(patch_size=5), r"teacher\.patch_size=5 does not divide data\.dataset\.resolution=16"),
        (lambda: teacher(patch_size=None), r"patches of 14 pixels.*set alignment\.\*\.teacher\.patch_size"),
        (lambda: teacher(model="dino_of_nobody"), r"teacher\.model='dino_of_nobody'"),
        (lambda: Alignment(teacher(), projection="linear"), r"projection='linear'"),
        (lambda: Alignment(teacher(), scale=0.0), r"alignment\.\*\.scale=0\.0 must be positive"),
        (lambda: Alignment(teacher(), end_scale=-1.0), r"alignment\.\*\.end_scale=-1\.0"),
        (lambda: Alignment(teacher(resolution=20)).bind(tokenizer()), r"resolution=20: the teacher's patch grid"),
        (lambda: Alignment(teacher(), branches=[2]).bind(tokenizer()), r"branches=\[2\].*0 to 1"),
        (lambda: Alignment(teacher(), branches=[1, -1]).bind(tokenizer()), r"branches=\[1, -1\]"),
        (
            lambda: Alignment(teacher(), projection="quant_conv").bind(tokenizer(width=16)),
            r"projection=quant_conv needs a teacher of 16 channels.*has 8",
        ),
    ],
)
def test_impossible_settings(build, match):
    with pytest.raises(ConfigError, match=match):
        build()


def test_weights_from_disk(tmp_path):
    with pytest.raises(MissingFileError, match=r"alignment\.\*\.teacher\.weights=.*teacher\.pretrained=false"):
        teacher(pretrained=True, weights=tmp_path / "nothing.pth")
    saved = teacher()
    torch.save(saved.network.state_dict(), tmp_path / "teacher.pth")
    torch.manual_seed(5)
    loaded = Teacher(
        "vit_small_patch14_dinov2.lvd142m", 16, patch_size=4, weights=tmp_path / "teacher.pth", network=TINY
    )
    images = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(loaded(images), saved(images))
