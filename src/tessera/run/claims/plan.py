"""What the claims study trains: tokenizers, generators on them, and decoders after post-training."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SIGMAS = (0.5, 0.7, 0.9, 1.0)  # of the sweep; 1.0 is the control: the tokenizer's own clean tokens
SIGMA = 0.9  # of all else
CODEBOOK_SIZES = (512, 2048, 4096)
FAMILIES = {"rar": "generator", "llama": "generator_llama"}
SIZE_KEY = "quantizer.branch.codebook.codebook_size"


@dataclass(frozen=True)
class Run:
    """One training, named by the folders of what it builds on: tokenizer/generator/post-training.

    Attributes:
        name: below claims/seed<n>/.
        recipe: in conf/experiment/claims.
        overrides: what it changes of the recipe.
        tokenizer, generator: names of the runs whose last checkpoints it starts from.
    """

    name: str
    recipe: str
    overrides: tuple[str, ...] = ()
    tokenizer: str | None = None
    generator: str | None = None

    @property
    def script(self) -> str:
        """Which script trains it."""
        return "post_train" if self.generator else "train"

    def folder(self, seed: int) -> str:
        """The run's `name` key, which is its folder below `paths.outputs`."""
        return f"claims/seed{seed}/{self.name}"

    def arguments(self, seed: int, outputs: str | Path) -> list[str]:
        """Command-line arguments of the script."""

        def last(name: str) -> str:
            return f"{outputs}/claims/seed{seed}/{name}/checkpoints/last.ckpt"

        given = [f"experiment=claims/{self.recipe}", f"name={self.folder(seed)}", f"seed={seed}", *self.overrides]
        given += [f"tokenizer.path={last(self.tokenizer)}"] if self.tokenizer else []
        given += [f"generator.path={last(self.generator)}"] if self.generator else []
        return given


def tokenizer(name: str, recipe: str, *overrides: str) -> Run:
    """A tokenizer's main-training."""
    return Run(name, f"tokenizer_{recipe}" if recipe else "tokenizer", overrides)


def generator(of: str, name: str, recipe: str) -> Run:
    """A generator on a tokenizer's tokens."""
    return Run(f"{of}/{name}", recipe, tokenizer=of)


def post_training(of: str, family: str, sigma: float) -> Run:
    """A tokenizer's decoder, trained on a generator's tokens."""
    name = f"{of}/{family}/sigma{sigma:g}"
    return Run(name, "post_train", (f"pairs.sigma={sigma:g}",), tokenizer=of, generator=f"{of}/{family}")


def _ablation(name: str, recipe: str, *overrides: str) -> list[Run]:
    """A tokenizer with a RAR on it."""
    return [tokenizer(name, recipe, *overrides), generator(name, "rar", FAMILIES["rar"])]


def _whole(name: str, recipe: str) -> list[Run]:
    """A tokenizer with a generator of each family, post-training on each, and the sweep of sigma with the RAR."""
    runs = _ablation(name, recipe)
    runs.append(generator(name, "llama", FAMILIES["llama"]))
    runs += [post_training(name, family, SIGMA) for family in FAMILIES]
    return runs + [post_training(name, "rar", sigma) for sigma in SIGMAS if sigma != SIGMA]


def chains() -> list[list[Run]]:
    """All runs of one seed, in chains whose runs build on each other; chains are independent."""
    size = f"{SIZE_KEY}="
    return [
        [*_whole("plain", ""), generator("plain", "rar_raster", "generator_raster")],
        _whole("half", "half"),
        _ablation("constant", "constant"),
        _ablation("zero", "zero"),
        _ablation("revival", "revival"),
        _ablation("product", "product"),
        _ablation("residual", "residual"),
        _ablation("multiscale", "multiscale"),
        _ablation("vq2048", "", f"{size}2048"),
        _ablation("ibq2048", "ibq", f"{size}2048"),
        # for their usage alone
        [tokenizer("ibq512", "ibq", "callbacks.pfid=null")],
        [tokenizer("vq4096", "", f"{size}4096", "callbacks.pfid=null")],
        [tokenizer("ibq4096", "ibq", f"{size}4096", "callbacks.pfid=null")],
    ]


def sized(kind: str, size: int) -> str:
    """Name of the tokenizer with a codebook of a kind (vq or ibq) and size."""
    return "plain" if (kind, size) == ("vq", CODEBOOK_SIZES[0]) else f"{kind}{size}"


def all_runs() -> list[Run]:
    """The runs of one seed, flat."""
    return [run for chain in chains() for run in chain]


def ranked_tokenizers() -> Sequence[str]:
    """The tokenizers that have a RAR, which are ranked by gFID."""
    return [run.tokenizer for run in all_runs() if run.recipe == FAMILIES["rar"]]
