"""VAR against the recorded numbers of the public modules: original, and ImageFolder's with two branches."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from generators.var_reference import branch_key, recorded, recorded_tokens
from golden_cases import Golden, assert_close, assert_outputs, golden
from optim.test_schedules import HELD
from tessera.generators import VAR, SamplingConfig
from tessera.generators.var_decoder import VARDecoder
from tessera.optim import HeldSchedule, decay_groups, decayed_names
from tessera.zoo import from_public
from tessera.zoo.var_generator import decoder

FORWARD = ["var_p1_forward", "var_p1_saln_forward", "var_p1_noqknorm_forward", "var_pq2_forward"]
SAMPLE = ["var_p1_sample", "var_pq2_sample"]


def forward_outputs(model: VAR, file: Golden, **options: bool) -> dict[str, Tensor]:
    """Every recorded output, ours."""
    tokens, labels = recorded_tokens(file, model), file.input["label"]
    for name, value in options.items():
        setattr(model, name, value)
    result = model.teacher_forced_loss(tokens, labels)
    result["loss"].backward()
    logits = model(tokens, labels)
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 2), tokens.flatten(), reduction="none")
    losses = losses.view_as(tokens)
    ours = {
        "loss": result["loss"],
        "logits": logits.transpose(1, 2).flatten(2),
        "var_input": model.latents(tokens),
    }
    for branch in range(model.num_branches):
        ours["loss_per_token" if model.num_branches == 1 else f"loss_per_token_p{branch}"] = losses[:, branch]
    for name in file.output:
        kind, _, parameter = name.partition("/")
        if kind.startswith("loss_label_smoothing_"):
            smoothing = float(name.rpartition("_")[2])
            ours[name] = model.teacher_forced_loss(tokens, labels, label_smoothing=smoothing)["loss"]
        elif kind == "grad":
            ours[name] = model.get_parameter(parameter).grad
        elif kind == "grad_norm":
            ours[name] = model.get_parameter(parameter).grad.norm()
    torch.testing.assert_close(result["site_loss"], losses.sum(0))
    return ours


@pytest.mark.golden
@pytest.mark.parametrize("case", FORWARD)
def test_forward(case):
    file = golden(case)
    model = from_public("var", file.config, file.weights)
    assert_outputs(forward_outputs(model, file), file)


@pytest.mark.golden
@pytest.mark.parametrize("case", FORWARD)
def test_gradients_with_recomputed_blocks(case):
    file = golden(case)
    model = from_public("var", file.config, file.weights).train()
    assert_outputs(forward_outputs(model, file, checkpoint_blocks=True), file)


@pytest.mark.usefixtures("shipped_files")
@pytest.mark.parametrize("case", FORWARD)
def test_every_parameter_matters(case):
    """A changed parameter changes the logits by far more than the tolerance: the comparison above can fail."""
    file = golden(case)
    model = from_public("var", file.config, file.weights)
    tokens, labels = recorded_tokens(file, model), file.input["label"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            before = parameter.clone()
            parameter += 0.2 * torch.linspace(-1, 1, parameter.numel()).view_as(parameter)
            logits = model(tokens, labels).transpose(1, 2).flatten(2)
            assert (logits - file.output["logits"]).abs().max() > 1e-4, name
            parameter.copy_(before)


def scale_of(noise: Tensor, batch: int) -> Tensor:
    """(B l, P, K) or (B, P, l, K) recorded noise -> (B, P, l, K)."""
    return noise if noise.ndim == 4 else noise.unflatten(0, (batch, -1)).transpose(1, 2)


def recorded_noise(file: Golden, model: VAR, name: str) -> Callable[[Tensor, int], Tensor] | None:
    """A run's noise of a kind as a function of (probs, scale); None where the run has none."""
    if branch_key(name, model.num_branches, 0, 0) not in file.input:
        return None
    return lambda probs, scale: scale_of(recorded(file.input, name, model, scale), len(probs))


def sample_outputs(model: VAR, file: Golden, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Every recorded output of every run, ours. A run without noise is greedy."""
    labels, branches, ours = file.input["label"], model.num_branches, {}
    seen: list[Tensor] = []
    logits = VARDecoder.logits
    monkeypatch.setattr(VARDecoder, "logits", lambda *arguments: seen.append(logits(*arguments)) or seen[-1])
    for run in sorted({name.split("/")[0] for name in file.output}):
        noise = recorded_noise(file, model, f"{run}/exp_noise")
        filters = {"top_k": file.config["top_k"], "top_p": file.config["top_p"] or None} if noise else {"top_k": 1}
        sampling = SamplingConfig(guidance_scale=1 + file.config["cfg"], guidance_schedule="ramp", **filters)

        def draw(probs: Tensor, scale: int, noise=noise) -> Tensor:
            return (probs if noise is None else probs / noise(probs, scale)).argmax(-1)

        seen.clear()
        smooth = recorded_noise(file, model, f"{run}/gumbel_noise") or False
        tokens, latent = model.generate_latent(labels, sampling, rng=draw, smooth=smooth)
        ours[f"{run}/f_hat"] = latent
        for scale, part in enumerate(tokens.split(model.scale_sizes, 2)):
            for branch in range(branches):
                ours[f"{run}/{branch_key('idx', branches, branch, scale)}"] = part[:, branch]
                ours[f"{run}/{branch_key('cfg_logits', branches, branch, scale)}"] = seen[scale][:, branch]
        if f"{run}/image" in file.output:
            with torch.no_grad():
                image = decoder(file.config, file.weights)(latent)
            ours[f"{run}/image"] = (image.clamp(-1, 1) + 1) / 2
        if not smooth:
            assert torch.equal(model.generate(labels, sampling, rng=draw), tokens)
    return ours


@pytest.mark.golden
@pytest.mark.parametrize("case", SAMPLE)
def test_sampling(case, monkeypatch):
    file = golden(case)
    model = from_public("var", file.config, file.weights)
    assert_outputs(sample_outputs(model, file, monkeypatch), file, atol=5e-5)


def train_outputs(model: VAR, file: Golden) -> dict[str, Tensor]:
    """Every recorded output of the training steps: rates and figures by step, parameters after the last."""
    options, steps = file.config, {}
    groups = decay_groups(model, options["twd"], "var")
    optimizer = torch.optim.AdamW(groups, lr=options["tlr"], betas=(0.9, 0.95), eps=1e-8)
    kind = options["sche"]
    schedule = HeldSchedule(
        **HELD.get(kind) or {"hold": 0.0, "knee": float(kind.removeprefix("lin"))},
        warmup_factor=options["wp0"],
        warmup_steps=options["wp_it"],
        end_factor=options["wpe"],
        end_weight_decay=options["twde"] or options["twd"],
    )(optimizer, options["max_it"])
    model.class_dropout, model.drop_path, model.label_smoothing = 0.0, 0.0, options["ls"]
    last = slice(-model.scale_sizes[-1], None)
    for step in range(options["steps"]):
        tokens, labels = recorded_tokens(file, model, f"step{step}/"), file.input[f"step{step}/label"]
        with torch.no_grad():
            plain = model.eval().loss(tokens, labels)
        means = {name: plain[name] / plain["site_count"] for name in ("site_loss", "site_hits")}
        optimizer.zero_grad()
        model.train().loss(tokens, labels)["loss"].backward()
        found = {
            "lr": optimizer.param_groups[0]["lr"],
            "wd": optimizer.param_groups[0]["weight_decay"],
            "grad_norm": torch.nn.utils.clip_grad_norm_(model.parameters(), options["tclip"]),
            "Lm": means["site_loss"].mean(),
            "Lt": means["site_loss"][:, last].mean(),
            "Accm": 100 * means["site_hits"].mean(),
            "Acct": 100 * means["site_hits"][:, last].mean(),
        }
        for name, value in found.items():
            steps.setdefault(name, []).append(torch.as_tensor(value, dtype=torch.float64))
        optimizer.step()
        schedule.step()
    ours = {name: torch.stack(values) for name, values in steps.items()}
    return ours | {f"final/{name}": parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.golden
@pytest.mark.parametrize("case", ["var_p1_train"])
def test_training_steps(case):
    file = golden(case)
    model = from_public("var", file.config, file.weights)
    parameters = {name for name, _ in model.named_parameters()}
    assert parameters - decayed_names(model, "var") == set(file.config["no_decay"])
    ours = train_outputs(model, file)
    assert_outputs(ours, file)
    for name in ("lr", "wd"):  # smaller than the tolerance of the others
        assert_close(ours[name], file.output[name], atol=0, rtol=1e-9)
