"""MAMA pruning (Movement and Magnitude Analysis, arXiv 2505.14052) inside Hugging Face trainers."""

from .calibration import calibration_windows
from .callback import MamaPruningCallback
from .config import MamaPruningConfig
from .criteria import CRITERIA
from .distillation import DistillationMixin, MamaSFTTrainer, MamaTrainer
from .grpo import MamaGRPOTrainer
from .masks import GRANULARITIES
from .oneshot import prune_model
from .report import sparsity_report
from .version import __version__


__all__ = [
    "CRITERIA",
    "GRANULARITIES",
    "DistillationMixin",
    "MamaGRPOTrainer",
    "MamaPruningCallback",
    "MamaPruningConfig",
    "MamaSFTTrainer",
    "MamaTrainer",
    "__version__",
    "calibration_windows",
    "prune_model",
    "sparsity_report",
]
