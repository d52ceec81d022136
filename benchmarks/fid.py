"""FID against torch-fidelity and torchmetrics on the same images, weights and features: speed and agreement.

    python benchmarks/fid.py
    python benchmarks/fid.py --device cuda --images 512 --batch 64 --weights weights-inception-2015-12-05-6726825d.pth

Extraction: images per second from uint8 images to pool_3. Sums: seconds to accumulate features. Figure: seconds from
the sums to the FID. All sides run in one process, the repeats interleaved; ratios are of medians. Without `--weights`
the network has random ones, on which neither speed nor agreement depends.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from tessera.metrics import FrechetDistance, InceptionFeatures
from tessera.metrics.inception_network import InceptionNetwork

SIDES = ("tessera", "torchmetrics", "torch-fidelity")


def random_weights(path: Path) -> None:
    """Weights in the published layout whose activations keep their scale through the network."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    with torch.device("meta"):
        layout = InceptionNetwork().state_dict()
    for key, value in layout.items():
        if key.endswith("conv.weight"):
            draw = torch.randn(value.shape, generator=generator)
            state[key] = draw * (2 / value[0].numel()) ** 0.5
            stem = key.removesuffix("conv.weight") + "bn."
            zeros = {f"{stem}{part}": torch.zeros(len(value)) for part in ("bias", "running_mean")}
            ones = {f"{stem}{part}": torch.ones(len(value)) for part in ("weight", "running_var")}
            state |= zeros | ones | {f"{stem}num_batches_tracked": torch.zeros((), dtype=torch.int64)}
        elif key.startswith("fc."):
            state[key] = 0.05 * torch.randn(value.shape, generator=generator)
    torch.save(state, path)


def spread(
    variants: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, object]]:
    """Seconds of each variant after one run to warm up, the repeats interleaved so that other load hits all alike; and
    the results."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    results = {name: run() for name, run in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            seconds[name].append(time.perf_counter() - start)
    return seconds, results


def report(title: str, seconds: dict[str, list[float]], per: int | None = None) -> None:
    """Print medians, ranges, rates where `per` items were treated, and how many times as fast tessera is."""
    lines = [title]
    own = statistics.median(seconds[SIDES[0]])
    for name, values in seconds.items():
        median = statistics.median(values)
        rate = "" if per is None else f"  {per / median:9.1f} images/s"
        ratio = "" if name == SIDES[0] else f"  tessera is {median / own:.2f} times as fast"
        lines.append(f"  {name:<15}{median:9.4f} s ({min(values):.4f} to {max(values):.4f}){rate}{ratio}")
    sys.stdout.write("\n".join(lines) + "\n")


def relative(a: Tensor | float, b: Tensor | float) -> float:
    """|a - b| / |b|."""
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    return float((a - b).norm() / b.norm())


def extraction(options: argparse.Namespace, device: torch.device, weights: Path) -> None:
    """Images per second of the three extractors."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torchmetrics.image.fid import NoTrainInceptionV3

    generator = torch.Generator().manual_seed(1)
    shape = (options.images, 3, options.size, options.size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
    label = None if options.weights else "random"
    ours = InceptionFeatures(weights, weights_label=label).to(device)
    fidelity = FeatureExtractorInceptionV3("fid", ["2048"], feature_extractor_weights_path=str(weights)).to(device)
    metrics = NoTrainInceptionV3("fid", ["2048"], feature_extractor_weights_path=str(weights)).to(device)
    metrics.use_antialias = False  # else it computes other features

    def run(network: nn.Module, first: bool) -> Callable[[], Tensor]:
        @torch.no_grad()
        def features() -> Tensor:
            parts = [network(batch) for batch in images.split(options.batch)]
            return torch.cat([part[0] if first else part for part in parts])

        return features

    # TF32 off for all: it moves a FID
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "ieee"
    variants = {"tessera": run(ours, False), "torchmetrics": run(metrics, False), "torch-fidelity": run(fidelity, True)}
    seconds, results = spread(variants, options.repeats, device)
    title = f"extraction: {options.images} images of {options.size} pixels in batches of {options.batch}"
    report(f"{title} on {device.type}, {torch.get_num_threads()} threads", seconds, options.images)
    for name in SIDES[1:]:
        difference = relative(results[SIDES[0]], results[name])
        sys.stdout.write(f"  relative difference of the features to {name}: {difference:.1e}\n")


def figures(options: argparse.Namespace, device: torch.device) -> None:
    """Seconds for sums and distance of the same features."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torchmetrics.image.fid import FrechetInceptionDistance

    d, generator = options.d, torch.Generator().manual_seed(2)
    mix = torch.eye(d) + 0.3 * torch.randn(d, d, generator=generator) / d**0.5
    real, fake = (torch.randn(options.n, d, generator=generator) @ mix * scale for scale in (1.0, 1.1))
    real, fake = real.to(device), fake.to(device)

    def fill(metric: nn.Module, features: Tensor, is_real: bool) -> nn.Module:
        for part in features.split(options.batch):
            metric.update(part.double(), real=is_real)
        return metric

    identity = nn.Identity()
    identity.num_features = d
    sides = {
        "tessera": lambda: FrechetDistance(d).to(device),
        "torchmetrics": lambda: FrechetInceptionDistance(feature=identity).to(device).set_dtype(torch.float64),
    }
    seconds, filled = spread(
        {name: lambda make=make: fill(fill(make(), real, True), fake, False) for name, make in sides.items()},
        options.repeats,
        device,
    )
    report(f"sums: {2 * options.n} features of d={d} in batches of {options.batch}", seconds)

    def compute(metric: nn.Module) -> float:
        metric._computed = None  # torchmetrics keeps a result
        return float(metric.compute())

    moments = [fid_features_to_statistics(features.cpu()) for features in (fake, real)]
    variants = {name: lambda metric=metric: compute(metric) for name, metric in filled.items()}
    variants["torch-fidelity"] = lambda: fid_statistics_to_metric(*moments, verbose=False)["frechet_inception_distance"]
    sums = seconds
    seconds, values = spread(variants, options.repeats, device)
    report(f"figure: FID from the sums, d={d}, {options.n} samples per side", seconds)
    both = {name: [a + b for a, b in zip(sums[name], seconds[name], strict=True)] for name in sums}
    report("both: FID from the features", both)
    for name in SIDES[1:]:
        difference = relative(values[SIDES[0]], values[name])
        sys.stdout.write(f"  {values[SIDES[0]]:.8f} and {name}'s {values[name]:.8f} differ by {difference:.1e} of it\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("extraction", "figures"), default=["extraction", "figures"])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--size", type=int, default=256, help="pixels of a side")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--weights", type=Path, help="the published Inception; default: random weights")
    parser.add_argument("--d", type=int, default=2048, help="features of the figure")
    parser.add_argument("--n", type=int, default=4096, help="samples per side of the figure")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="default: torch's, one per core")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if "extraction" in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            weights = options.weights or Path(folder) / "random.pth"
            if options.weights is None:
                random_weights(weights)
            extraction(options, device, weights)
    if "figures" in options.parts:
        figures(options, device)


if __name__ == "__main__":
    main()
