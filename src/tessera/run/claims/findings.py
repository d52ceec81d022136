"""Comparisons of runs over seeds, and what they say of a claim."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tessera.run.claims.measured import Measured
from tessera.run.results import mean_and_half_range

HOLDS, FAILS, OPEN = "holds", "fails", "undecided"


@dataclass(frozen=True)
class Value:
    """A metric of a run, by seed.

    Attributes:
        run, metric: names.
        state: of the decoder: "" outside of post-training; before, after_raw, after_ema.
    """

    run: str
    metric: str
    state: str = ""

    def of(self, measured: Measured) -> dict[int, float]:
        """Values by seed; seeds that weren't measured are absent."""
        found = measured.get(self.run, {})
        return {
            seed: states[self.state][self.metric]
            for seed, states in found.items()
            if self.metric in states.get(self.state, {})
        }


@dataclass(frozen=True)
class Comparison:
    """A statement about two values of each seed.

    Attributes:
        text: the statement.
        left, right: what is compared.
        accept: (left, right) -> whether the statement is true of one seed.
        show_ratio: report left / right instead of left - right.
    """

    text: str
    left: Value
    right: Value
    accept: Callable[[float, float], bool]
    show_ratio: bool = False

    def verdict(self, measured: Measured) -> str:
        """Holds where every seed agrees, fails where every seed disagrees, undecided otherwise."""
        outcomes = [self.accept(*pair) for pair in self._pairs(measured)]
        if not outcomes:
            return "not measured"
        return HOLDS if all(outcomes) else OPEN if any(outcomes) else FAILS

    def numbers(self, measured: Measured) -> str:
        """Means of both sides, and of their difference or ratio over seeds."""
        pairs = self._pairs(measured)
        if not pairs:
            return "-"
        left, right = (sum(side) / len(side) for side in zip(*pairs, strict=True))
        changes = [a / b if self.show_ratio else a - b for a, b in pairs]
        mean, spread = mean_and_half_range(changes)
        change = f"x {mean:.3g} ± {spread:.2g}" if self.show_ratio else f"{mean:+.3g} ± {spread:.2g}"
        return f"{left:.3g} against {right:.3g} ({change})"

    def _pairs(self, measured: Measured) -> list[tuple[float, float]]:
        left, right = self.left.of(measured), self.right.of(measured)
        return [(left[seed], right[seed]) for seed in sorted(left.keys() & right.keys())]


def lower(text: str, left: Value, right: Value) -> Comparison:
    """left < right."""
    return Comparison(text, left, right, lambda a, b: a < b)


def higher(text: str, left: Value, right: Value) -> Comparison:
    """left > right."""
    return Comparison(text, left, right, lambda a, b: a > b)


def at_most(text: str, left: Value, right: Value, ratio: float) -> Comparison:
    """left <= ratio * right."""
    return Comparison(text, left, right, lambda a, b: a <= ratio * b, show_ratio=True)


def combined(verdicts: Sequence[str]) -> str:
    """Verdict on a claim of several statements: fails where one fails, holds where all hold."""
    if FAILS in verdicts:
        return FAILS if set(verdicts) == {FAILS} else "fails in part"
    return HOLDS if set(verdicts) == {HOLDS} else OPEN


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rho."""
    import torch
    from torchmetrics.functional import spearman_corrcoef

    # its denominator has an epsilon
    rho = spearman_corrcoef(*(torch.tensor(values, dtype=torch.float64) for values in (x, y)))
    return round(float(rho), 4)


def rank_correlations(
    measured: Measured, tokenizers: Sequence[str], metric: str, target: str = "gFID"
) -> dict[int, float]:
    """Per seed, Spearman's rho over tokenizers between their metric and the gFID of the RAR on them.

    Seeds of which a tokenizer is missing are left out.
    """
    found = {}
    for seed in sorted({seed for run in measured.values() for seed in run}):
        x = [Value(name, metric).of(measured).get(seed) for name in tokenizers]
        y = [Value(f"{name}/rar", target).of(measured).get(seed) for name in tokenizers]
        if None not in x and None not in y:
            found[seed] = rank_correlation(x, y)
    return found
