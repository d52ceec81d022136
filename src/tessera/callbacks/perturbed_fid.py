"""pFID: how much reconstructions suffer when tokens are replaced by near neighbours."""

import lightning
import torch
from torch import Tensor

from tessera.callbacks.figure import FigureCallback, frechet_protocol, warn_if_internal
from tessera.callbacks.unique import Commit
from tessera.distributed import all_reduce_sum
from tessera.errors import ConfigError
from tessera.metrics.features import FeatureExtractor
from tessera.metrics.fid import FrechetDistance
from tessera.metrics.protocol import Figure
from tessera.perturbation.nearest import perturb_tokens, ranks
from tessera.rng import IndexedRng

ALPHAS = (0.9, 0.8, 0.7, 0.6, 0.5)
BASE_DELTAS, BASE_CODEBOOK_SIZE = (200, 280, 360), 16384
# Of codebooks beyond 2^18 codes, whose neighbours would fill the memory
LARGEST_DELTA = 8192
# the published rows; K = 1024 is rounded down from 12.5, 17.5, 22.5
PUBLISHED_DELTAS = {16384: (200, 280, 360), 8192: (100, 140, 180), 4096: (50, 70, 90), 1024: (10, 15, 20)}


def scaled_deltas(codebook_size: int) -> tuple[int, ...]:
    """Neighbour counts for a codebook: proportional to its size, at least 2, at most K and 8192; published rows as
    printed.

    Source: arXiv:2503.08354, table of pFID settings.
    """
    if codebook_size in PUBLISHED_DELTAS:
        return PUBLISHED_DELTAS[codebook_size]
    scaled = (round(base * codebook_size / BASE_CODEBOOK_SIZE) for base in BASE_DELTAS)
    return tuple(min(max(delta, 2), codebook_size, LARGEST_DELTA) for delta in scaled)


def site_draws(seed: int, index: Tensor, branches: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Draws of every token site: whether it is hit, and which neighbour it becomes.

    Args:
        seed: of the protocol.
        index: (B,) int64 data set indices.
        branches, tokens: P, L.

    Returns:
        Two (B, P, L) float in [0, 1), a function of (seed, index, site) alone.
    """
    rng = IndexedRng(seed, index)
    return rng.uniform("pfid/site", branches, tokens), rng.uniform("pfid/rank", branches, tokens)


class PerturbedFID(FigureCallback):
    """Mean rFID over a grid of perturbation strengths, all images perturbed.

    A share alpha of the tokens becomes a uniformly random one of the delta nearest codes, among them the
    nearest itself, so that alpha (1 - 1/delta) really change. The draws are a function of (seed, data set
    index, site) and the same in all settings: hit sets are nested in alpha, and the figure depends neither on
    batch size nor on the number of processes. Neighbours are those of the encoder's output.

    Args:
        extractor: of the features.
        alphas: shares of tokens hit.
        deltas: neighbour counts; None: by codebook size, `scaled_deltas`.
        seed: of the draws.
        scales: numbers from 0 of the scales whose tokens are hit; None: all. Named in the figure's label.
        every_n_validations, prefix: see `FigureCallback`.

    Raises:
        ConfigError: alpha outside [0, 1], delta below 1 or above the codebook size, a scale that doesn't exist.

    Source: arXiv:2503.08354, section 3; common random numbers are ours.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        alphas: tuple[float, ...] | list[float] = ALPHAS,
        deltas: tuple[int, ...] | list[int] | None = None,
        seed: int = 0,
        every_n_validations: int = 1,
        prefix: str = "val",
        scales: tuple[int, ...] | list[int] | None = None,
    ):
        super().__init__(every_n_validations, prefix)
        if not alphas or not all(0 <= alpha <= 1 for alpha in alphas):
            raise ConfigError(f"callbacks.pfid.alphas={list(alphas)} must be one or more numbers in [0, 1]")
        if deltas is not None and (not deltas or not all(int(delta) == delta >= 1 for delta in deltas)):
            raise ConfigError(f"callbacks.pfid.deltas={list(deltas)} must be one or more whole numbers from 1 up")
        self.extractor, self.seed = extractor, seed
        self.alphas, self.given_deltas = tuple(alphas), None if deltas is None else tuple(deltas)
        self.deltas: tuple[int, ...] = ()
        self.scales = None if scales is None else tuple(scales)
        self.real = FrechetDistance(extractor.num_features, sides=("real",))
        self.fakes: dict[tuple[float, int], FrechetDistance] = {}
        self.changed = torch.zeros(0)
        warn_if_internal(extractor, "pFID")

    def begin(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        codebook_size = pl_module.tokenizer.quantizer.codebook_size
        # of small codebooks, several published deltas are the same
        self.deltas = tuple(dict.fromkeys(self.given_deltas or scaled_deltas(codebook_size)))
        if max(self.deltas) > codebook_size:
            raise ConfigError(f"callbacks.pfid.deltas={list(self.deltas)} exceed the codebook size {codebook_size}")
        existing = range(len(pl_module.tokenizer.quantizer.grids))
        if self.scales is not None and not (self.scales and set(self.scales) <= set(existing)):
            raise ConfigError(
                f"callbacks.pfid.scales={list(self.scales)} must be one or more of the quantizer's scales, 0 to "
                f"{existing[-1]}"
            )
        self.extractor.to(pl_module.device)
        self.real.to(pl_module.device).reset()
        # (1, 1) is the control: every token becomes its nearest code, which gives rFID
        settings = [(1.0, 1)] + [(alpha, delta) for alpha in self.alphas for delta in self.deltas]
        self.fakes = {
            setting: FrechetDistance(self.extractor.num_features, sides=("fake",)).to(pl_module.device)
            for setting in settings
        }
        self.changed = torch.zeros(len(self.fakes), 2, dtype=torch.float64)

    @torch.no_grad()
    def measure(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: dict[str, Tensor],
        batch: dict[str, Tensor],
    ) -> Commit:
        images, tokenizer = self.needed(batch, "image", "the data"), pl_module.tokenizer
        with torch.autocast(images.device.type, enabled=False):
            # under mixed precision the validation step's latents are rounded; the protocol is float32
            usable = trainer.precision in ("32-true", "64-true") and "z" in outputs
            z = (outputs["z"] if usable else tokenizer.encode(images)).float()
            neighbors = tokenizer.quantizer.neighbors(z, max(self.deltas))  # (B, P, L, k)
            nearest = neighbors[..., 0]
            site, rank = site_draws(self.seed, batch["index"].to(images.device), *nearest.shape[1:])
            if self.scales is not None:  # no draw lies below any alpha elsewhere
                site = site.masked_fill(~self._hit_sites(tokenizer.quantizer.grids, site.device), 1.0)
            real = self.extractor(images)
            features, changed = [], []
            for alpha, delta in self.fakes:
                tokens = perturb_tokens(nearest, neighbors, site, ranks(rank, delta), alpha)
                decoded = tokenizer.decode(tokenizer.quantizer.decode(tokens)).clamp(-1, 1)
                features.append(self.extractor(decoded))
                changed.append((tokens != nearest).flatten(1).double().mean(1))
        rates = torch.stack(changed).cpu()  # (settings, B)

        def commit(mask: Tensor) -> None:
            self.real.update(real, real=True, mask=mask, index=batch["index"])
            for metric, fake in zip(self.fakes.values(), features, strict=True):
                metric.update(fake, real=False, mask=mask, index=batch["index"])
            self.changed += torch.stack([rates[:, mask].sum(1), mask.sum().expand(len(rates)).double()], dim=1)

        return commit

    def _hit_sites(self, grids: list[tuple[int, int]], device: torch.device) -> Tensor:
        """(L,) bool: the tokens of the chosen scales."""
        parts = [torch.full((h * w,), k in self.scales, device=device) for k, (h, w) in enumerate(grids)]
        return torch.cat(parts)

    def finish(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> list[Figure]:
        with self.real.sync_context():
            real = self.real.statistics(real=True)
        values = {}
        for setting, metric in self.fakes.items():
            metric.reference = real  # one real side for all settings
            values[setting] = metric.summary()[0]
        sums = all_reduce_sum(self.changed.to(pl_module.device)).cpu()
        rates = dict(zip(self.fakes, (sums[:, 0] / sums[:, 1]).tolist(), strict=True))
        self.fakes = {}  # 15 covariances are worth freeing
        codebook_size = pl_module.tokenizer.quantizer.codebook_size
        protocol = frechet_protocol(
            self.extractor,
            trainer,
            self.samples,
            extra={
                "K": codebook_size,
                "delta": list(self.deltas),
                "alpha": list(self.alphas),
                "seed": self.seed,
                "neighbors_of": "latent",
                **({} if self.scales is None else {"scales": list(self.scales)}),
            },
            in_label=(
                "K",
                *(() if self.alphas == ALPHAS else ("alpha",)),
                "delta",
                *(() if self.scales is None else ("scales",)),
            ),
        )
        table = {f"a={a},d={d}": values[a, d] for a in self.alphas for d in self.deltas}
        details = {
            "table": table,
            "control_rfid": values[1.0, 1],
            "changed_share": {f"a={a},d={d}": rates[a, d] for a in self.alphas for d in self.deltas},
        }
        return [Figure("pFID", sum(table.values()) / len(table), protocol, details)]
