"""MAMA pruning (Movement and Magnitude Analysis, arXiv 2505.14052) inside Hugging Face trainers."""

from transformers import AutoConfig

from .calibration import calibration_windows
from .callback import MamaPruningCallback
from .config import MamaPruningConfig
from .criteria import CRITERIA
from .distillation import DistillationMixin, MamaSFTTrainer, MamaTrainer
from .grpo import MamaGRPOTrainer
from .masks import GRANULARITIES
from .modeling_mama import MamaConfig, MamaForCausalLM
from .oneshot import prune_model
from .packed import AUTO_CLASSES, MamaPackedConfig, loader_of, save_packed
from .report import sparsity_report
from .shrink import shrink
from .sparse_inference import sparse_inference
from .version import __version__


AutoConfig.register("mama", MamaConfig)  # the models register with each architecture's config

__all__ = [
    "CRITERIA",
    "GRANULARITIES",
    "DistillationMixin",
    "MamaConfig",
    "MamaForCausalLM",
    "MamaGRPOTrainer",
    "MamaPruningCallback",
    "MamaPruningConfig",
    "MamaSFTTrainer",
    "MamaTrainer",
    "__version__",
    "calibration_windows",
    "prune_model",
    "save_packed",
    "shrink",
    "sparse_inference",
    "sparsity_report",
]

AutoConfig.register(MamaPackedConfig.model_type, MamaPackedConfig, exist_ok=True)
for _auto_class in AUTO_CLASSES:
    _auto_class.register(MamaPackedConfig, loader_of(_auto_class), exist_ok=True)
