"""MAMA pruning (Movement and Magnitude Analysis, arXiv 2505.14052) inside Hugging Face trainers."""

from transformers import AutoConfig

from .calibration import calibration_windows
from .callback import MamaPruningCallback
from .config import MamaPruningConfig
from .criteria import CRITERIA
from .grpo import MamaGRPOTrainer
from .masks import GRANULARITIES
from .modeling_mama import MamaConfig, MamaForCausalLM
from .oneshot import prune_model
from .report import sparsity_report
from .shrink import shrink
from .version import __version__


AutoConfig.register("mama", MamaConfig)  # the models register with each architecture's config

__all__ = [
    "CRITERIA",
    "GRANULARITIES",
    "MamaConfig",
    "MamaForCausalLM",
    "MamaGRPOTrainer",
    "MamaPruningCallback",
    "MamaPruningConfig",
    "__version__",
    "calibration_windows",
    "prune_model",
    "shrink",
    "sparsity_report",
]
