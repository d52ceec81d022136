"""RAR against the recorded numbers of the public modules."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from generators.rar_reference import golden_rar, plain_generate, public_sampling
from golden_cases import assert_close, golden
from tessera.generators import RAR
from tessera.generators.guidance import guidance_weights
from tessera.generators.orders import random_ratio, raster_orders
from tessera.generators.rar_decoder import RARDecoder
from tessera.generators.sampling import SamplingConfig

FORWARD = pytest.mark.parametrize("case", ["rar_forward"])
GENERATE = pytest.mark.parametrize("case", ["rar_generate"])
TEACHER_FORCED = pytest.mark.parametrize("case", ["robustok_gen_tf"])
pytestmark = pytest.mark.golden


def forward_inputs(data, model: RAR) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (B, 1, L), condition ids (B,) and orders (B, L)."""
    conditions = model.condition_ids(data.input["class_ids"], data.input["drop"].bool())
    return data.input["token_ids"][:, None], conditions, data.input["orders"]


@FORWARD
def test_conditions(case):
    data = golden(case)
    model = golden_rar(data)
    classes = data.input["class_ids"]
    assert torch.equal(model.condition_ids(classes, data.input["drop"].bool()), data.output["condition_ids"])
    assert torch.equal(model.condition_ids(classes), data.output["condition_ids_p0"])
    assert torch.equal(model.condition_ids(classes, torch.ones_like(classes).bool()), data.output["condition_ids_p1"])


@FORWARD
def test_forward(case):
    data = golden(case)
    model = golden_rar(data)
    tokens, conditions, orders = forward_inputs(data, model)
    permuted = tokens.gather(2, orders[:, None])
    assert torch.equal(permuted[:, 0], data.output["labels"])

    seen: dict[str, Tensor] = {}
    block = model.blocks[0]
    block.register_forward_hook(lambda _, args, out: seen.update(block0_input=args[0], block0_output=out))
    block.attn.register_forward_hook(lambda _, args, out: seen.update(block0_attn_out=out))
    model.adaln_before_head.register_forward_hook(lambda _, args, out: seen.update(before_head=out))
    logits = model(permuted, conditions, orders)
    seen["block0_condition"] = model.conditioning(conditions, tokens.shape[2] + 2)

    assert_close(logits[:, :, 0], data.output["logits"])
    for name in ("block0_input", "block0_condition", "block0_attn_out", "block0_output", "before_head"):
        assert_close(seen[name], data.output[name])


@FORWARD
def test_raster_and_partial_logits(case):
    data = golden(case)
    model = golden_rar(data)
    tokens, conditions, _ = forward_inputs(data, model)
    assert_close(model(tokens, conditions)[:, :, 0], data.output["logits_raster"])
    prefix = tokens[:, :, : data.config["partial"]]
    assert_close(model(prefix, conditions)[:, :, 0], data.output["logits_sampling_partial"])


@FORWARD
@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_loss_and_gradients(case, checkpoint_blocks):
    data = golden(case)
    model = golden_rar(data)
    if checkpoint_blocks:
        model.checkpoint_blocks = True
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        for block in model.blocks:
            block.attn.attention_dropout = 0.0
    result = model.loss_in_order(*forward_inputs(data, model))
    assert_close(result["loss"], data.output["loss"])
    assert_close(result["accuracy"], data.output["correct_tokens"])

    result["loss"].backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    named = [key for key in data.output if key.startswith("grad/")]
    sliced = [key for key in data.output if key.startswith("grad_slice/")]
    assert set(data.config["grads"]) == {key.removeprefix("grad/") for key in named}
    for key in named:
        assert_close(gradients[key.removeprefix("grad/")], data.output[key], atol=2e-5)
    for key in sliced:
        gradient = gradients[key.removeprefix("grad_slice/")]
        rows = data.output[key].shape[1]
        assert_close(gradient[:, :rows], data.output[key], atol=2e-5)
        assert not gradient[:, rows:].any()


@FORWARD
def test_random_ratio(case):
    data = golden(case)
    anneal = data.config["anneal"]
    steps = data.input["anneal_steps"].tolist()
    ratios = torch.tensor([random_ratio(step, anneal["start"], anneal["end"]) for step in steps])
    assert_close(ratios, data.output["random_ratio"], atol=1e-6)
    # the model's schedule is the same one in shares of training
    total = data.config["lr"]["total"]
    shares = [random_ratio(step / total, anneal["start"] / total, anneal["end"] / total) for step in steps]
    assert_close(torch.tensor(shares), data.output["random_ratio"], atol=1e-6)


@FORWARD
def test_every_output_is_compared(case):
    """By name: what the tests above look at is all there is; the rates (lr) are a test of the schedules."""
    compared = """before_head block0_attn_out block0_condition block0_input block0_output condition_ids condition_ids_p0
        condition_ids_p1 correct_tokens labels logits logits_raster logits_sampling_partial loss lr random_ratio"""
    others = {name for name in golden(case).output if not name.startswith(("grad/", "grad_slice/"))}
    assert others == set(compared.split())


@pytest.mark.usefixtures("shipped_files")
@FORWARD
@pytest.mark.parametrize(
    "part",
    [
        "cls_token",
        "pos_embed",
        "target_aware_pos_embed",
        "timesteps_embeddings",
        "embeddings.weight",
        "blocks.0.norm1.bias",
        "blocks.0.norm2.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.0.attn.q_norm.bias",
        "blocks.0.attn.k_norm.weight",
        "blocks.0.attn.proj.bias",
        "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc2.bias",
        "blocks.0.adaLN_modulation.1.bias",
        "adaln_before_head.adaLN_modulation.1.bias",
        "lm_head.bias",
    ],
)
def test_every_part_matters(case, part):
    """A changed weight changes the logits by far more than the tolerance: the comparison above can fail."""
    data = golden(case)
    model = golden_rar(data)
    tokens, conditions, orders = forward_inputs(data, model)
    with torch.no_grad():
        parameter = model.get_parameter(part)
        parameter += 0.1 * torch.linspace(-1, 1, parameter.shape[-1])
        logits = model(tokens.gather(2, orders[:, None]), conditions, orders)
    assert (logits[:, :, 0] - data.output["logits"]).abs().max() > 1e-4


def racing_draw(noise: Tensor, seen: list[Tensor]) -> Callable[[Tensor, int], Tensor]:
    """The golden file's rule, argmax p / q, on recorded noise (L, B, K); keeps the probabilities."""

    def draw(probs: Tensor, step: int) -> Tensor:
        seen.append(probs[:, 0])
        return (probs / noise[step][:, None]).argmax(-1)

    return draw


def cached_logits(model: RAR, labels: Tensor, tokens: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Conditional and unconditional logits (S, B, K) of the first steps, from the decoder with its cache."""
    conditions = torch.cat([model.condition_ids(labels), torch.full_like(labels, model.none_id)])
    decoder = RARDecoder(model, conditions)
    features = [decoder.start()]
    features += [decoder.step(tokens[:, :, step], step) for step in range(steps - 1)]
    conditional, unconditional = model.head(torch.stack(features))[:, :, 0].chunk(2, 1)
    return conditional, unconditional


@GENERATE
def test_runs(case):
    data = golden(case)
    model = golden_rar(data)
    labels = data.input["class_ids"]
    for run, options in data.config["runs"].items():
        sampling = public_sampling(options)
        prefix = f"{run}/"
        expected = {key.removeprefix(prefix): value for key, value in data.output.items() if key.startswith(prefix)}
        assert {name.removesuffix("_nocache") for name in expected} <= {
            "cfg_scale", "cond_logits", "ids", "probs", "uncond_logits",
        }  # fmt: skip
        weights = guidance_weights(options["guidance_scale"], options["guidance_scale_pow"], model.num_tokens)
        assert_close(torch.tensor(weights), expected["cfg_scale"], atol=2e-5)
        probs: list[Tensor] = []
        tokens = model.generate(labels, sampling, rng=racing_draw(data.input["exp_noise"], probs))
        assert torch.equal(tokens[:, 0], expected["ids"])
        assert_close(torch.stack(probs), expected["probs"], atol=2e-5)

        with torch.no_grad():
            conditional, unconditional = cached_logits(model, labels, tokens, data.config["store_steps"])
        assert_close(conditional, expected["cond_logits"], atol=2e-5)
        if "uncond_logits" in expected:
            assert_close(unconditional, expected["uncond_logits"], atol=2e-5)


@GENERATE
def test_runs_without_cache(case):
    data = golden(case)
    model = golden_rar(data)
    labels = data.input["class_ids"]
    compared = 0
    for run, options in data.config["runs"].items():
        probs: list[Tensor] = []
        draw = racing_draw(data.input["exp_noise"], probs)
        tokens, conditional, unconditional = plain_generate(model, labels, public_sampling(options), draw)
        assert torch.equal(tokens[:, 0], data.output[f"{run}/ids"])
        assert_close(torch.stack(probs), data.output[f"{run}/probs"], atol=2e-5)
        for name, logits in (("cond_logits", conditional), ("uncond_logits", unconditional)):
            for key in (f"{run}/{name}", f"{run}/{name}_nocache"):
                if key in data.output:
                    expected = data.output[key]
                    assert_close(torch.stack(logits)[: len(expected), :, 0], expected, atol=2e-5)
                    compared += key.endswith("nocache")
    assert compared == sum(key.endswith("nocache") for key in data.output)


@GENERATE
def test_teacher_run(case):
    data = golden(case)
    model = golden_rar(data)
    options = data.config["teacher"]
    teacher = data.input["teacher_tokens"].transpose(1, 2)
    keep = data.input["teacher_u"].transpose(1, 2) < options["prob"]
    for generate in (model.generate, plain_generate):
        probs: list[Tensor] = []
        draw = racing_draw(data.input["exp_noise"], probs)
        arguments = (data.input["class_ids"], public_sampling(options))
        if generate is plain_generate:
            tokens = plain_generate(model, *arguments, draw, teacher, keep)[0]
        else:
            tokens = model.generate(*arguments, teacher=teacher, keep=keep, rng=draw)
        assert torch.equal(tokens[:, 0], data.output["teacher/ids"])
        assert_close(torch.stack(probs), data.output["teacher/probs"], atol=2e-5)


def inverse_cdf(uniform: Tensor, seen: list[Tensor]) -> Callable[[Tensor, int], Tensor]:
    """The golden file's sampler: number of entries of the float64 cumulative sum that are <= u (B, L)."""

    def draw(probs: Tensor, step: int) -> Tensor:
        seen.append(probs[:, 0])
        below = probs.double().cumsum(-1) <= uniform[:, step].double()[:, None, None]
        return below.sum(-1).clamp(max=probs.shape[-1] - 1)

    return draw


def most_probable(seen: list[Tensor]) -> Callable[[Tensor, int], Tensor]:
    def draw(probs: Tensor, step: int) -> Tensor:
        seen.append(probs[:, 0])
        return probs.argmax(-1)

    return draw


@TEACHER_FORCED
@pytest.mark.parametrize("cached", [True, False])
def test_teacher_forced(case, cached):
    data = golden(case)
    model = golden_rar(data)
    sampling = public_sampling(data.config["generate"])
    labels, teacher = data.input["labels"], data.input["tf_tokens"].transpose(1, 2)
    runs = sorted(key.removesuffix(".ids") for key in data.output if key.endswith(".ids"))
    assert runs
    for name, recorded in data.output.items():
        if name.startswith("mask_p"):
            share = int(name.removeprefix("mask_p")) / 100
            assert torch.equal(data.input["mask_draw"][..., 0] < share, recorded.bool()), name
    for run in runs:
        share, *rule = run.removeprefix("p").split("_")
        keep = data.input["mask_draw"].transpose(1, 2) < int(share) / 100
        probs: list[Tensor] = []
        draw = most_probable(probs) if rule == ["argmax"] else inverse_cdf(data.input["sample_draw"], probs)
        if cached:
            tokens = model.generate(labels, sampling, teacher=teacher, keep=keep, rng=draw)
        else:
            tokens = plain_generate(model, labels, sampling, draw, teacher, keep)[0]
        assert torch.equal(tokens[:, 0], data.output[f"{run}.ids"]), run
        if f"{run}.probs" in data.output:
            assert_close(torch.stack(probs), data.output[f"{run}.probs"])
        if share == "0":
            assert torch.equal(tokens, model.generate(labels, sampling, rng=draw))
        if share == "100":
            assert torch.equal(tokens, teacher)


@pytest.mark.usefixtures("shipped_files")
@TEACHER_FORCED
def test_argmax_is_top_k_one(case):
    data = golden(case)
    model = golden_rar(data)
    options = public_sampling(data.config["generate"])
    greedy = SamplingConfig(options.temperature, options.guidance_scale, options.guidance_power, top_k=1)
    tokens = model.generate(data.input["labels"], greedy)
    assert torch.equal(tokens[:, 0], data.output["p0_argmax.ids"])


@FORWARD
def test_training_forward_is_causal_in_any_order(case):
    """A prefix gives the logits it has inside the whole sequence, whatever the order."""
    data = golden(case)
    model = golden_rar(data)
    tokens, conditions, orders = forward_inputs(data, model)
    permuted = tokens.gather(2, orders[:, None])
    for length in (0, 1, tokens.shape[2] - 1):
        logits = model(permuted[:, :, :length], conditions, orders)
        assert_close(logits[:, :, 0], data.output["logits"][:, : length + 1])
    assert_close(
        model(tokens, conditions, raster_orders(len(tokens), tokens.shape[2]))[:, :, 0],
        data.output["logits_raster"],
    )
