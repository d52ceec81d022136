"""Writes docs/claims.md and its plots from what the study measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tessera.run.claims.claims import CLAIMS, STRUCTURES, Claim
from tessera.run.claims.findings import FAILS, HOLDS, OPEN, Value, combined, rank_correlations
from tessera.run.claims.measured import Measured
from tessera.run.claims.plan import CODEBOOK_SIZES, FAMILIES, SIGMA, SIGMAS, all_runs, ranked_tokenizers
from tessera.run.claims.plots import plot_ranks, plot_sigmas, plot_usage
from tessera.run.results import mean_and_half_range

INTRO = """# Which of the papers' claims hold here

A study on Fashion-MNIST at 24 x 24 pixels (the first 12 000 training images), with tokenizers and generators that one
CPU core trains in a minute each. It can show whether an effect exists in this small setting, not its size on ImageNet.
Whatever is compared has the same number of steps, images per step, learning rates and generator.

- A tokenizer makes 36 tokens per image, of 512 codes unless its name says otherwise. *plain* is VQ on 6 x 6 cells.
  *constant*, *half* and *zero* add RobusTok's latent perturbation (alpha 1, half of the images, 20 neighbours), not
  annealed, annealed to half and to nothing. *revival* is Euclidean VQ that redraws dead codes. *product*, *residual*
  and *multiscale* spend their tokens on 3 x 3 cells.
- Generators: a RAR and a Llama of 3 blocks of width 96, guidance 1.5.
- Figures: {labels}. They are taken on features of the Fashion-MNIST classifier that comes with this package, so they
  compare models on this page only.
- Each is the mean of {seeds} seeds ± half their range. A statement **holds** where all seeds agree with it, **fails**
  where all contradict it, and is **undecided** otherwise; of three seeds, chance alone decides one statement in four.

`make claims` trains what is not trained yet ({count} runs per seed; {hours}) and writes this page;
`make claims ARGS=--from-summary` writes it from [claims/results.json](claims/results.json). The commands at the end
repeat single runs.
"""


def cell(values: dict[int, float], digits: int = 2) -> str:
    """Mean ± half range over seeds."""
    if not values:
        return "-"
    mean, spread = mean_and_half_range(list(values.values()))
    return f"{mean:.{digits}f} ± {spread:.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = ["| " + " | ".join(headings) + " |", "| --- |" + " ---: |" * (len(headings) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def verdict_of(claim: Claim, measured: Measured) -> str:
    """The verdict on a claim as a whole."""
    if claim.key == "e":
        by_metric = [rank_correlations(measured, ranked_tokenizers(), metric) for metric in ("pFID", "rFID")]
        outcomes = [by_metric[0][seed] > by_metric[1][seed] for seed in by_metric[0]]
        return HOLDS if outcomes and all(outcomes) else OPEN if any(outcomes) or not outcomes else FAILS
    return combined([comparison.verdict(measured) for comparison in claim.comparisons])


def statements(claim: Claim, measured: Measured) -> str:
    """Table of a claim's statements."""
    rows = [[c.text, c.numbers(measured), f"**{c.verdict(measured)}**"] for c in claim.comparisons]
    return table(["statement", "means (difference or ratio over seeds)", "verdict"], rows)


def tokenizer_table(measured: Measured, names: Sequence[str]) -> str:
    """Figures of tokenizers and of the RAR on them."""
    rows = []
    for name in names:
        own = [cell(Value(name, metric).of(measured)) for metric in ("PSNR", "rFID", "pFID")]
        usage = {seed: 100 * value for seed, value in _usage(measured, name).items()}
        rows.append([name, *own, cell(usage, 0), cell(Value(f"{name}/rar", "gFID").of(measured))])
    return table(["tokenizer", "PSNR", "rFID", "pFID", "usage, %", "gFID of the RAR"], rows)


def _usage(measured: Measured, name: str) -> dict[int, float]:
    """Usage by seed, of several branches their mean."""
    found = {}
    for seed, states in measured.get(name, {}).items():
        values = [v for key, v in states[""].items() if key.startswith("usage_branch") and "scale" not in key]
        if values:
            found[seed] = sum(values) / len(values)
    return found


def post_training_table(measured: Measured, runs: Sequence[tuple[str, str, float]]) -> str:
    """Figures of decoders before and after post-training; runs are (tokenizer, family, sigma)."""
    rows = []
    for of, family, sigma in runs:
        name = f"{of}/{family}/sigma{sigma:g}"
        values = [
            cell(Value(name, metric, state).of(measured))
            for metric in ("gFID", "rFID")
            for state in ("before", "after_ema")
        ]
        raw = cell(Value(name, "gFID", "after_raw").of(measured))
        rows.append([of, family, f"{sigma:g}", values[0], values[1], raw, values[2], values[3]])
    headings = [
        "tokenizer",
        "generator",
        "sigma",
        "gFID before",
        "gFID after",
        "raw weights",
        "rFID before",
        "rFID after",
    ]
    return table(headings, rows)


def correlation_table(measured: Measured) -> str:
    """Spearman's rho of tokenizer figures with gFID."""
    rows = []
    for metric in ("pFID", "rFID", "PSNR"):
        found = rank_correlations(measured, ranked_tokenizers(), metric)
        rows.append([metric, cell(found), ", ".join(f"{value:.2f}" for value in found.values())])
    return table(["figure", "Spearman's rho with gFID", "by seed"], rows)


def section(claim: Claim, measured: Measured) -> str:
    """One claim: its text, verdict, statements and figures."""
    parts = [f"## ({claim.key}) {claim.text}", f"{claim.source}. Here: **{verdict_of(claim, measured)}**."]
    if claim.comparisons:
        parts.append(statements(claim, measured))
    if claim.key in "ab":
        names = ("plain", "half") if claim.key == "a" else ("constant", "half", "zero")
        parts.append(tokenizer_table(measured, names))
    elif claim.key == "c":
        parts.append(post_training_table(measured, [(of, f, SIGMA) for of in ("plain", "half") for f in FAMILIES]))
    elif claim.key == "d":
        parts.append(post_training_table(measured, [(of, "rar", s) for of in ("plain", "half") for s in SIGMAS]))
        parts.append("![gFID after post-training against sigma](claims/sigma.png)")
    elif claim.key == "e":
        parts += [correlation_table(measured), tokenizer_table(measured, ranked_tokenizers())]
        parts.append("![gFID against rFID and pFID](claims/ranks.png)")
    elif claim.key == "f":
        rows = [[n, cell(Value(f"plain/{n}", "gFID").of(measured))] for n in ("rar", "rar_raster")]
        parts.append(table(["generator", "gFID"], rows))
    elif claim.key == "g":
        parts.append("![codebook usage against size](claims/usage.png)")
    elif claim.key == "h":
        parts.append(tokenizer_table(measured, ("plain", *STRUCTURES)))
    return "\n\n".join(parts)


def commands(seed: int = 0) -> str:
    """Commands of every run of a seed."""
    lines = [f"python {run.script}.py {' '.join(run.arguments(seed, 'outputs'))}" for run in all_runs()]
    return "```bash\n" + "\n".join(lines) + "\n```"


def write_report(docs: Path, measured: Measured, facts: dict[str, Any]) -> Path:
    """Write `claims.md` and its plots into `docs`.

    Args:
        docs: the folder.
        measured: the values.
        facts: `labels` of the metrics and `seconds` that all runs took, see `measured.collect`.

    Returns:
        Path of the page.
    """
    folder = docs / "claims"
    folder.mkdir(parents=True, exist_ok=True)
    plot_sigmas(measured, folder / "sigma.png")
    plot_ranks(measured, folder / "ranks.png")
    plot_usage(measured, CODEBOOK_SIZES, folder / "usage.png")
    labels = ", ".join(f"`{label}`" for name in ("rFID", "pFID", "gFID") for label in facts["labels"].get(name, []))
    seeds = max((len(found) for found in measured.values()), default=0)
    hours = f"{facts['seconds'] / 3600:.1f} hours of one core for all of them, on a busy machine"
    parts = [
        INTRO.format(labels=labels, seeds=seeds, count=len(all_runs()), hours=hours),
        "## Summary",
        table(["claim", "verdict"], [[f"({c.key}) {c.text}", f"**{verdict_of(c, measured)}**"] for c in CLAIMS]),
        *(section(claim, measured) for claim in CLAIMS),
        "## Commands",
        "Of seed 0; the other seeds replace `seed0` and `seed=0`.",
        commands(),
    ]
    path = docs / "claims.md"
    path.write_text("\n\n".join(part.strip() for part in parts) + "\n")
    return path
