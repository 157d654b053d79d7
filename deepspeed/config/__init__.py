"""The JSON configuration, as one typed, strict, frozen tree.

    config = load_config("ds_config.json")     # or a dict, or base64
    config.zero_optimization.stage             # attributes are named as the JSON keys

`parse.py` reads the source; `root.py` is the tree's root; the sections are in files by theme: `zero.py`, `precision.py`,
`optimizer.py`, `storage.py` (files and memory), `monitors.py`, `parallelism.py`, `execution.py`, `data.py`,
`compression.py`, `tuning.py`. `dotted.py` reads and sets dotted keys of a plain dict. `explain.py` words what is wrong, `unknown.py` what becomes of keys that no field names, `schema.py` what a section looks like; `batch.py`
computes batch sizes, `elastic.py` those for many numbers of ranks; `refused_or_ignored.py` has three tables: not yet, not
together, no effect (`tables.py` prints them); `base.py` is what sections have in common; `legacy_config.py` is the flat
object that scripts know as `DeepSpeedConfig`.
"""

from deepspeed.config.base import Section
from deepspeed.config.batch import BatchSizes, resolve_batch
from deepspeed.config.compression import CompressionConfig, EigenvalueConfig, SparseAttentionConfig
from deepspeed.config.data import CurriculumLearningConfig, DataEfficiencyConfig, ProgressiveLayerDropConfig
from deepspeed.config.execution import CompileConfig, HybridEngineConfig, WeightQuantConfig
from deepspeed.config.explain import read_section
from deepspeed.config.monitors import (
    CometConfig,
    CommsLoggerConfig,
    CsvMonitorConfig,
    FlopsProfilerConfig,
    MonitorConfig,
    TensorBoardConfig,
    TimersConfig,
    WandbConfig,
)
from deepspeed.config.optimizer import OptimizerConfig, SchedulerConfig
from deepspeed.config.parallelism import ExpertParallelConfig, PipelineConfig, TensorParallelConfig
from deepspeed.config.parse import read_config
from deepspeed.config.precision import AmpConfig, Bf16Config, DataTypesConfig, Fp16Config, TorchAutocastConfig
from deepspeed.config.refused_or_ignored import check_available
from deepspeed.config.root import Config, load_config
from deepspeed.config.storage import ActivationCheckpointingConfig, AioConfig, CheckpointConfig, NebulaConfig
from deepspeed.config.tuning import AutotuningConfig, ElasticityConfig
from deepspeed.config.zero import (
    LeafModuleConfig,
    OffloadOptimizerConfig,
    OffloadParamConfig,
    ZenFlowConfig,
    ZeroConfig,
)
from deepspeed.utils.errors import DeepSpeedConfigError

__all__ = [
    "ActivationCheckpointingConfig",
    "AioConfig",
    "AmpConfig",
    "AutotuningConfig",
    "BatchSizes",
    "Bf16Config",
    "CheckpointConfig",
    "CometConfig",
    "CommsLoggerConfig",
    "CompileConfig",
    "CompressionConfig",
    "Config",
    "CsvMonitorConfig",
    "CurriculumLearningConfig",
    "DataEfficiencyConfig",
    "DataTypesConfig",
    "DeepSpeedConfigError",
    "EigenvalueConfig",
    "ElasticityConfig",
    "ExpertParallelConfig",
    "FlopsProfilerConfig",
    "Fp16Config",
    "HybridEngineConfig",
    "LeafModuleConfig",
    "MonitorConfig",
    "NebulaConfig",
    "OffloadOptimizerConfig",
    "OffloadParamConfig",
    "OptimizerConfig",
    "PipelineConfig",
    "ProgressiveLayerDropConfig",
    "SchedulerConfig",
    "Section",
    "SparseAttentionConfig",
    "TensorBoardConfig",
    "TensorParallelConfig",
    "TimersConfig",
    "TorchAutocastConfig",
    "WandbConfig",
    "WeightQuantConfig",
    "ZenFlowConfig",
    "ZeroConfig",
    "check_available",
    "load_config",
    "read_config",
    "read_section",
    "resolve_batch",
]
