"""The claims, as statements about the runs of the plan."""

from dataclasses import dataclass

from tessera.run.claims.findings import Comparison, Value, at_most, higher, lower
from tessera.run.claims.plan import CODEBOOK_SIZES, FAMILIES, SIGMA, sized

# what the paper's perturbation costs: rFID 1.02 against 0.91
RFID_COST = 1.12
USAGE = "usage_branch0"
STRUCTURES = {"product": "product", "residual": "residual", "multiscale": "multi-scale"}


@dataclass(frozen=True)
class Claim:
    """A claim of a paper.

    Attributes:
        key: letter.
        text, source: what is claimed, and where.
        comparisons: the statements that it is tested by.
    """

    key: str
    text: str
    source: str
    comparisons: tuple[Comparison, ...] = ()


def _post_training(of: str, family: str) -> Comparison:
    run = f"{of}/{family}/sigma{SIGMA:g}"
    text = f"gFID after < before: {of} tokenizer, {family.upper() if family == 'rar' else family.title()} tokens"
    return lower(text, Value(run, "gFID", "after_ema"), Value(run, "gFID", "before"))


def _beyond_control(of: str) -> Comparison:
    run, control = f"{of}/rar/sigma{SIGMA:g}", f"{of}/rar/sigma1"
    text = f"gFID after < after the control (sigma 1: its own tokens): {of} tokenizer, RAR tokens"
    return lower(text, Value(run, "gFID", "after_ema"), Value(control, "gFID", "after_ema"))


CLAIMS = (
    Claim(
        "a",
        "Latent perturbation lowers pFID and gFID at little cost in rFID.",
        "RobusTok (arXiv:2509.12474)",
        (
            lower("pFID: perturbed (half) < plain", Value("half", "pFID"), Value("plain", "pFID")),
            lower("gFID of the RAR: perturbed (half) < plain", Value("half/rar", "gFID"), Value("plain/rar", "gFID")),
            at_most(
                f"rFID: perturbed (half) at most {RFID_COST} times the plain one's, as in the paper",
                Value("half", "rFID"),
                Value("plain", "rFID"),
                RFID_COST,
            ),
        ),
    ),
    Claim(
        "b",
        "Annealing the perturbation to half its strength beats not annealing it, and beats annealing it to nothing.",
        "RobusTok, ablation",
        (
            lower("gFID: half < constant", Value("half/rar", "gFID"), Value("constant/rar", "gFID")),
            lower("gFID: half < zero", Value("half/rar", "gFID"), Value("zero/rar", "gFID")),
            lower("pFID: half < constant", Value("half", "pFID"), Value("constant", "pFID")),
            lower("pFID: half < zero", Value("half", "pFID"), Value("zero", "pFID")),
        ),
    ),
    Claim(
        "c",
        "Post-training the decoder on a generator's tokens lowers gFID, of perturbed and unperturbed tokenizers, "
        "whatever the generator. Our control: more than as many further steps on the tokenizer's own tokens do.",
        "RobusTok, sections on post-training",
        (
            *(_post_training(of, family) for of in ("plain", "half") for family in FAMILIES),
            *(_beyond_control(of) for of in ("plain", "half")),
        ),
    ),
    Claim(
        "d",
        "Unperturbed tokenizers need a preservation ratio sigma of 0.8 and more in post-training, perturbed ones are "
        "insensitive between 0.7 and 0.9.",
        "RobusTok, ablation of sigma",
        (
            lower(
                "gFID after: sigma 0.9 < sigma 0.5, plain tokenizer",
                Value("plain/rar/sigma0.9", "gFID", "after_ema"),
                Value("plain/rar/sigma0.5", "gFID", "after_ema"),
            ),
            higher(
                "gFID at sigma 0.7: after > before, plain tokenizer",
                Value("plain/rar/sigma0.7", "gFID", "after_ema"),
                Value("plain/rar/sigma0.7", "gFID", "before"),
            ),
            at_most(
                "gFID after: sigma 0.7 at most 1.03 times that of sigma 0.9, perturbed tokenizer",
                Value("half/rar/sigma0.7", "gFID", "after_ema"),
                Value("half/rar/sigma0.9", "gFID", "after_ema"),
                1.03,
            ),
        ),
    ),
    Claim("e", "pFID ranks tokenizers by gFID better than rFID does.", "RobusTok; arXiv:2503.08354"),
    Claim(
        "f",
        "Training a generator on randomised orders that are annealed to raster order beats raster order throughout.",
        "RAR (arXiv:2411.00776)",
        (lower("gFID: randomised < raster", Value("plain/rar", "gFID"), Value("plain/rar_raster", "gFID")),),
    ),
    Claim(
        "g",
        "Index back-propagation keeps a growing codebook in use, where VQ's use collapses.",
        "IBQ (arXiv:2412.02692)",
        tuple(
            higher(
                f"usage of {size} codes: IBQ > VQ", Value(sized("ibq", size), USAGE), Value(sized("vq", size), USAGE)
            )
            for size in CODEBOOK_SIZES
        ),
    ),
    Claim(
        "h",
        "Product and multi-scale quantization beat plain VQ at an equal number of tokens.",
        "ImageFolder (arXiv:2410.01756), VAR (arXiv:2404.02905)",
        tuple(
            lower(f"{metric}: {label} < plain", Value(f"{name}{path}", metric), Value(f"plain{path}", metric))
            for name, label in STRUCTURES.items()
            for metric, path in (("rFID", ""), ("gFID", "/rar"))
        ),
    ),
)
