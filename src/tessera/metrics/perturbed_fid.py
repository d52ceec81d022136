"""pFID: how much reconstructions suffer when tokens are replaced by near neighbours."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tessera.distributed import all_reduce_sum, share
from tessera.metrics.checks import extractor_warnings, sample_warnings
from tessera.metrics.features import FeatureExtractor
from tessera.metrics.fid import FrechetDistance
from tessera.metrics.image_sets import subset_numbers
from tessera.metrics.protocol import Figure, Protocol
from tessera.perturbation.grid import PerturbationGrid, Setting


class PerturbedFrechet:
    """Sums behind pFID: Frechet distances of the decodings of a whole grid to the images, for one encoding of each.

    `begin`, then `measure` every batch and call what it returns, then `figure`. All images are perturbed (beta = 1),
    the reference are the very images, and features and latents are float32.

    Args:
        extractor: of the features.
        grid: of the settings.
    """

    def __init__(self, extractor: FeatureExtractor, grid: PerturbationGrid):
        self.extractor, self.grid = extractor, grid
        self.real = FrechetDistance(extractor.num_features, sides=("real",))
        self.fakes: dict[Setting, FrechetDistance] = {}
        self.changed = torch.zeros(0)

    def begin(self, tokenizer: Any, device: torch.device | str) -> None:
        """Start anew, for a tokenizer.

        Raises:
            ConfigError: its quantizer doesn't fit the grid.
        """
        self.grid.check(tokenizer.quantizer)
        self.extractor.to(device)
        self.real.to(device).reset()
        self.fakes = {
            setting: FrechetDistance(self.extractor.num_features, sides=("fake",)).to(device)
            for setting in self.grid.settings(tokenizer.quantizer)
        }
        self.changed = torch.zeros(len(self.fakes), 2, dtype=torch.float64)

    @torch.no_grad()
    def measure(
        self, tokenizer: Any, images: Tensor, index: Tensor, z: Tensor | None = None
    ) -> Callable[[Tensor], None]:
        """Encode a batch once, decode it in every setting.

        Args:
            images: (B, 3, H, W) float in [-1, 1].
            index: (B,) int64, their numbers in the data set.
            z: (B, C, h, w) float32 latents of the images, where they are known; None: encode.

        Returns:
            What adds those samples of the batch to the sums that a mask (B,) bool selects.
        """
        with torch.autocast(images.device.type, enabled=False):
            z = (tokenizer.encode(images) if z is None else z).float()
            real = self.extractor(images)
            features, changed = [], []
            for perturbed in self.grid.tokens(tokenizer.quantizer, z, index):
                decoded = tokenizer.decode(tokenizer.quantizer.decode(perturbed.tokens)).clamp(-1, 1)
                features.append(self.extractor(decoded))
                changed.append(perturbed.changed)
        rates = torch.stack(changed).cpu()  # (settings, B)

        def commit(mask: Tensor) -> None:
            self.real.update(real, real=True, mask=mask, index=index)
            for metric, fake in zip(self.fakes.values(), features, strict=True):
                metric.update(fake, real=False, mask=mask, index=index)
            self.changed += torch.stack([rates[:, mask].sum(1), mask.sum().expand(len(rates)).double()], dim=1)

        return commit

    def figure(self, tokenizer: Any, samples: int, crop: str) -> Figure:
        """pFID over all processes, each of which must call.

        Args:
            samples: measured, each once.
            crop: id of the crop that made the images.

        Returns:
            The mean over the grid (and over seeds). Details: `table`, by setting, mean over seeds; `control_rfid`, of
            the unperturbed tokens; `changed_share`, realised, by setting; with several seeds also `per_seed`, the mean
            of each, and `spread`, half their range.
        """
        with self.real.sync_context():
            real = self.real.statistics(real=True)
        values: dict[Setting, float] = {}
        for setting, metric in self.fakes.items():
            metric.reference = real  # one real side for all settings
            values[setting] = metric.summary()[0]
        sums = all_reduce_sum(self.changed.to(real.mu.device)).cpu()
        rates = dict(zip(self.fakes, (sums[:, 0] / sums[:, 1]).tolist(), strict=True))
        control, *settings = self.fakes
        self.fakes = {}  # 15 covariances are worth freeing
        cells = dict.fromkeys((setting.alpha, setting.delta) for setting in settings)
        seeds = self.grid.seeds

        def by_cell(found: dict[Setting, float]) -> dict[str, float]:
            return {f"a={a},d={d}": mean([found[Setting(seed, a, d)] for seed in seeds]) for a, d in cells}

        details: dict[str, Any] = {
            "table": by_cell(values),
            "control_rfid": values[control],
            "changed_share": by_cell(rates),
        }
        if len(seeds) > 1:
            per_seed = {seed: mean([values[Setting(seed, *cell)] for cell in cells]) for seed in seeds}
            details["per_seed"] = per_seed
            details["spread"] = (max(per_seed.values()) - min(per_seed.values())) / 2
        extra, in_label = self.grid.protocol(tokenizer.quantizer)
        protocol = Protocol(
            **self.extractor.protocol_fields,
            crop=crop,
            reference_samples=samples,
            samples=samples,
            extra=extra,
            in_label=in_label,
        )
        warnings = [
            *sample_warnings(samples, self.extractor.num_features),
            *extractor_warnings(self.extractor.name, self.extractor.is_image_quality),
        ]
        return Figure("pFID", mean(list(details["table"].values())), protocol, details, warnings)


def measure_perturbed(
    tokenizer: Any,
    dataset: Any,
    extractor: FeatureExtractor,
    grid: PerturbationGrid | None = None,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    num_samples: int | None = None,
    num_workers: int = 0,
) -> Figure:
    """pFID of a tokenizer on the images of a data set, without a trainer; all processes call it together.

    Args:
        tokenizer: in eval mode; moved to the device.
        dataset: a `tessera.data.ImageDataset`; its images in their fixed crop are measured.
        extractor: of the features.
        grid: of the settings; None: the published one, with deltas scaled to the codebook.
        batch_size: per process.
        device: of tokenizer and extractor.
        num_samples: of the images, see `subset_numbers`; None: all.
        num_workers: processes that read images.

    Returns:
        See `PerturbedFrechet.figure`.

    Raises:
        ConfigError: the tokenizer's quantizer doesn't fit the grid; more samples than images.
    """
    numbers = subset_numbers(len(dataset), num_samples)
    sums = PerturbedFrechet(extractor, grid or PerturbationGrid())
    sums.begin(tokenizer.to(device), device)
    own = share(len(numbers))
    batches = [part.tolist() for part in numbers[own.start : own.stop].split(batch_size) if len(part)]
    loader = DataLoader(
        dataset.without_augmentation(),
        batch_size=None,  # the keys are batches already
        sampler=batches,
        num_workers=num_workers,
        generator=torch.Generator(),  # drawing the workers' seeds must not advance torch's global one
    )
    for batch in loader:
        add = sums.measure(tokenizer, batch["image"].to(device), batch["index"].to(device))
        add(torch.ones(len(batch["index"]), dtype=torch.bool))
    return sums.figure(tokenizer, len(numbers), str(dataset.crop_id))


def mean(values: list[float]) -> float:
    """Arithmetic mean of one or more numbers."""
    return sum(values) / len(values)


def table_text(figure: Figure) -> str:
    """A pFID figure's table as lines of text: a row per alpha, a column per delta, with the share that changed."""
    table, changed = figure.details["table"], figure.details["changed_share"]
    alphas, deltas = figure.protocol.extra["alpha"], figure.protocol.extra["delta"]
    lines = ["alpha" + "".join(f"{f'd={delta}':>10}" for delta in deltas) + "   tokens changed"]
    for alpha in alphas:
        keys = [f"a={alpha},d={delta}" for delta in deltas]
        shares = [f"{100 * changed[key]:.1f}" for key in keys]
        lines.append(f"{alpha:<5g}" + "".join(f"{table[key]:10.4f}" for key in keys) + f"   {' / '.join(shares)} %")
    last = f"mean {figure.value:.4f}"
    if "spread" in figure.details:
        last += f" +- {figure.details['spread']:.4f} over {len(figure.details['per_seed'])} seeds"
    return "\n".join([*lines, f"{last}; unperturbed (rFID) {figure.details['control_rfid']:.4f}"])
