"""What happens besides training: figures, pictures, averaged weights, resuming."""

from tessera.callbacks.codebook_collapse import CodebookCollapse
from tessera.callbacks.codebook_report import CodebookReport
from tessera.callbacks.early_stopping import EarlyStopping
from tessera.callbacks.ema import EMA
from tessera.callbacks.generation_fid import GenerationFID
from tessera.callbacks.image_grid import ImageGrid
from tessera.callbacks.last_checkpoint import LastCheckpoint
from tessera.callbacks.perturbed_fid import PerturbedFID
from tessera.callbacks.progress import PlainProgress, progress_display
from tessera.callbacks.reconstruction_fid import ReconstructionFID
from tessera.callbacks.reconstruction_quality import ReconstructionQuality
from tessera.callbacks.resume_state import ResumeState

__all__ = [
    "EMA",
    "CodebookCollapse",
    "CodebookReport",
    "EarlyStopping",
    "GenerationFID",
    "ImageGrid",
    "LastCheckpoint",
    "PerturbedFID",
    "PlainProgress",
    "ReconstructionFID",
    "ReconstructionQuality",
    "ResumeState",
    "progress_display",
]
