"""Plots of the claims study."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tessera.run.claims.findings import Value
from tessera.run.claims.measured import Measured
from tessera.run.claims.plan import SIGMAS, ranked_tokenizers, sized

DPI = 90


def _figure(columns: int = 1) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(4.5 * columns, 3.4), squeeze=False, layout="constrained")
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes[0])


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=DPI, metadata={"Software": None})  # equal data, equal bytes
    pyplot.close(figure)


def _mean(values: dict[int, float]) -> float:
    return sum(values.values()) / len(values)


def plot_sigmas(measured: Measured, path: Path) -> None:
    """gFID after post-training against sigma: means as lines, seeds as points, the old decoder dashed."""
    figure, (axis,) = _figure()
    for color, of in enumerate(("plain", "half")):
        after = {s: Value(f"{of}/rar/sigma{s:g}", "gFID", "after_ema").of(measured) for s in SIGMAS}
        after = {sigma: values for sigma, values in after.items() if values}
        before = Value(f"{of}/rar/sigma0.9", "gFID", "before").of(measured)
        if not after or not before:
            continue
        axis.plot(list(after), [_mean(values) for values in after.values()], color=f"C{color}", label=f"{of}, after")
        for sigma, values in after.items():
            axis.plot([sigma] * len(values), list(values.values()), ".", color=f"C{color}")
        axis.axhline(_mean(before), color=f"C{color}", linestyle="--", label=f"{of}, before")
    axis.set(xlabel="preservation ratio sigma", ylabel="gFID")
    if axis.has_data():
        axis.legend(frameon=False, fontsize=8)
    _save(figure, path)


def plot_ranks(measured: Measured, path: Path) -> None:
    """gFID of the RAR against rFID and pFID of its tokenizer, means over seeds."""
    figure, axes = _figure(2)
    for axis, metric in zip(axes, ("rFID", "pFID"), strict=True):
        for name in ranked_tokenizers():
            x, y = Value(name, metric).of(measured), Value(f"{name}/rar", "gFID").of(measured)
            if x and y:
                axis.plot(_mean(x), _mean(y), "o", color="C0")
                axis.annotate(name, (_mean(x), _mean(y)), fontsize=7, xytext=(3, 3), textcoords="offset points")
        axis.set(xlabel=metric, ylabel="gFID", xscale="log")
        if axis.has_data():
            low, high = axis.get_xlim()
            axis.set_xticks([tick for tick in (1, 2, 3, 5, 10, 20, 30, 50) if low < tick < high])
            axis.xaxis.set_major_formatter("{x:g}")
            axis.minorticks_off()
    _save(figure, path)


def plot_usage(measured: Measured, sizes: Sequence[int], path: Path) -> None:
    """Share of the codes in use against the size of the codebook."""
    figure, (axis,) = _figure()
    for color, kind in enumerate(("vq", "ibq")):
        values = {size: Value(sized(kind, size), "usage_branch0").of(measured) for size in sizes}
        values = {size: found for size, found in values.items() if found}
        if values:
            axis.plot(
                list(values), [100 * _mean(found) for found in values.values()], color=f"C{color}", label=kind.upper()
            )
        for size, found in values.items():
            axis.plot([size] * len(found), [100 * v for v in found.values()], ".", color=f"C{color}")
    axis.set(xlabel="codes", ylabel="in use on validation images, %", xscale="log", ylim=(0, 100))
    axis.set_xticks(list(sizes), [str(size) for size in sizes])
    axis.minorticks_off()
    if axis.has_data():
        axis.legend(frameon=False)
    _save(figure, path)
