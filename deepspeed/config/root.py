"""The whole configuration: `Config`, with one attribute per top-level JSON key, and `load_config`, which reads it.

Called once by `deepspeed.initialize` (and by `zero.Init`, `init_inference` and the launcher's tools); everything below
gets the section it needs, never a dict. Joins the sections of this folder and holds what concerns several of them.

Invariant: a `Config` that exists is consistent with itself. What depends on the machine (world size, which features
this version has) is checked by `Config.batch_sizes` and `refused_or_ignored.check_available`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, PrivateAttr

from deepspeed.config.base import (
    AUTO,
    FloatDtype,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Problem,
    Section,
    Size,
    also,
    any_case,
)
from deepspeed.config.batch import KEYS, BatchSizes, Given, resolve_batch
from deepspeed.config.compression import (
    CompressionConfig,
    EigenvalueConfig,
    QuantizeTrainingConfig,
    SparseAttentionConfig,
)
from deepspeed.config.data import CurriculumLearningConfig, DataEfficiencyConfig, ProgressiveLayerDropConfig
from deepspeed.config.elastic import elastic_batch
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
from deepspeed.config.parse import Source, origin_of, read_config
from deepspeed.config.precision import (
    AmpConfig,
    Bf16Config,
    DataTypesConfig,
    Fp16Config,
    MsAmpConfig,
    TorchAutocastConfig,
)
from deepspeed.config.refused_or_ignored import exclusions
from deepspeed.config.storage import (
    ActivationCheckpointingConfig,
    AioConfig,
    CheckpointConfig,
    DataStatesConfig,
    NebulaConfig,
)
from deepspeed.config.tuning import AutotuningConfig, ElasticityConfig
from deepspeed.config.zero import ZeroConfig
from deepspeed.utils.logging import LEVELS, warn_once

LogLevel = Annotated[Literal["debug", "info", "warning", "error", "critical"], any_case(*LEVELS)]


def _never_is_none(value: Any) -> Any:
    """None for the spellings of "never print": 0 and infinity."""
    if isinstance(value, str) and value.lower() in ("inf", "infinity"):
        return None
    return None if isinstance(value, (int, float)) and (value == 0 or math.isinf(value)) else value


def _datastates_section(value: Any) -> Any:
    """The section is on unless it is false; true means no settings of its own."""
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


class Config(Section):
    """The root of the configuration."""

    strict_sections: ClassVar[frozenset[str] | None] = frozenset(
        "zero_optimization fp16 bf16 bfloat16 torch_autocast compile hybrid_engine tensor_parallel expert_parallel "
        "weight_quantization tensorboard wandb csv_monitor comet comms_logger timers monitor".split()
    )
    """Those that the original reads as a whole, and refuses with a key too many; the others it reads key by key."""

    train_batch_size: PositiveInt | None = None
    """Samples per step over all data-parallel ranks; computed from the next two when not given (see `batch.py`)."""
    train_micro_batch_size_per_gpu: PositiveInt | None = None
    """Samples per rank in one forward and backward."""
    gradient_accumulation_steps: PositiveInt | None = None
    """Micro-batches per step; 1 when not given and not computed."""
    managed_gradient_accumulation: bool = True
    """Let the engine count micro-batches; when false every `engine.step()` updates."""
    optimizer: OptimizerConfig | None = None
    """The optimizer to build where the script brings none."""
    scheduler: SchedulerConfig | None = None
    """The learning-rate schedule to build where the script brings none."""
    zero_allow_untested_optimizer: bool = False
    """Let ZeRO use an optimizer class it does not know."""
    zero_force_ds_cpu_optimizer: bool = True
    """With an offloaded optimizer, insist on this package's CPU optimizers."""

    fp16: Fp16Config = Field(default_factory=Fp16Config)
    """Train in fp16."""
    bf16: Annotated[Bf16Config, also("bf16", "bfloat16")] = Field(default_factory=Bf16Config)
    """Train in bf16."""
    torch_autocast: TorchAutocastConfig = Field(default_factory=TorchAutocastConfig)
    """Run forward under torch.autocast."""
    amp: AmpConfig = Field(default_factory=AmpConfig)
    """NVIDIA Apex."""
    msamp: MsAmpConfig = Field(default_factory=MsAmpConfig)
    """Microsoft's fp8 library."""
    data_types: DataTypesConfig = Field(default_factory=DataTypesConfig)
    """Dtypes that differ from the mode's own."""

    gradient_clipping: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    prescale_gradients: bool = False
    """Divide gradients before the reduction instead of after."""
    gradient_predivide_factor: PositiveFloat = 1.0
    """With `prescale_gradients`: divide by this before, by the rest after."""
    gradient_allreduce_op: Annotated[Literal["mean", "sum"], any_case("mean", "sum")] = "mean"
    """Average gradients over ranks, or leave the sum. The sum needs ZeRO stage 0 to 2."""
    communication_data_type: FloatDtype | None = None
    """Dtype in which gradients travel; the model's when not given."""
    seq_parallel_communication_data_type: FloatDtype | None = torch.float32
    """The same under sequence parallelism, where sums are longer."""
    sparse_gradients: bool = False
    """Send only the touched rows of embedding gradients."""
    disable_allgather: bool = False
    """Of an old version; no effect."""
    sequence_parallel_size: PositiveInt | None = None
    """Ranks that share one sequence."""
    data_parallel_size: PositiveInt | None = None
    """With `sequence_parallel_size`: the other dim of the mesh."""
    sequence_parallel_loss: Annotated[
        Literal["auto", "gathered", "summed", "local"], any_case("auto", "gathered", "summed", "local")
    ] = "auto"
    """What a rank's loss is where ranks share a sequence: gathered by a differentiable collective, all-reduced in place, or
    the mean of its own tokens. Found out at the first backward."""
    use_data_before_expert_parallelism: bool = False
    """Number ranks over data first, then experts."""
    allgather_size: Size = 500_000_000
    """`zero_optimization.allgather_bucket_size` where `zero_optimization` is just true."""

    zero_optimization: ZeroConfig = Field(default_factory=ZeroConfig)
    """What is sharded and offloaded."""
    aio: AioConfig = Field(default_factory=AioConfig)
    """Files of the nvme tier."""
    activation_checkpointing: ActivationCheckpointingConfig = Field(default_factory=ActivationCheckpointingConfig)
    """Read by `deepspeed.checkpointing.configure`."""

    steps_per_print: Annotated[PositiveInt | None, BeforeValidator(_never_is_none)] = None
    """Steps between progress lines; none when not given, 0 or infinite."""
    wall_clock_breakdown: bool = False
    """Time forward, backward and step."""
    memory_breakdown: bool = False
    """Report memory as well."""
    dump_state: bool = False
    """Print the configuration at the start."""
    log_level: LogLevel | None = None
    """Level of this package's logger."""
    disable_python_gc: bool = False
    """Switch Python's cyclic garbage collector off after the start; `engine.collect_python_gc()` runs it."""
    vocabulary_size: PositiveInt | None = None
    """Vocabulary; a warning where it is not a multiple of 8."""
    dataloader_drop_last: bool = False
    """Drop the last, smaller batch."""
    timers: TimersConfig = Field(default_factory=TimersConfig)
    """The engine's timers."""
    graph_harvesting: bool = False
    """Replay the update of a step as a graph of the device, where it has those."""
    flops_profiler: FlopsProfilerConfig = Field(default_factory=FlopsProfilerConfig)
    """Operations and time per module."""
    comms_logger: CommsLoggerConfig = Field(default_factory=CommsLoggerConfig)
    """Count and time collectives."""
    monitor: MonitorConfig = Field(default_factory=MonitorConfig)
    """The run's own record, and traces."""
    tensorboard: TensorBoardConfig = Field(default_factory=TensorBoardConfig)
    """Events for TensorBoard."""
    wandb: WandbConfig = Field(default_factory=WandbConfig)
    """Events for Weights & Biases."""
    csv_monitor: CsvMonitorConfig = Field(default_factory=CsvMonitorConfig)
    """Events as CSV."""
    comet: CometConfig = Field(default_factory=CometConfig)
    """Events for Comet."""

    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """Saving and loading."""
    datastates_ckpt: Annotated[DataStatesConfig | None, BeforeValidator(_datastates_section)] = None
    """Asynchronous checkpoints through DataStates; on when given and not false."""
    nebula: NebulaConfig = Field(default_factory=NebulaConfig)
    """Asynchronous checkpoints through Nebula."""

    pipeline: PipelineConfig = Field(default_factory=PipelineConfig)
    """The pipeline engine."""
    tensor_parallel: TensorParallelConfig = Field(default_factory=TensorParallelConfig)
    """Cut layers over ranks."""
    expert_parallel: ExpertParallelConfig = Field(default_factory=ExpertParallelConfig)
    """Spread experts over ranks."""
    compile: CompileConfig = Field(default_factory=CompileConfig)
    """DeepCompile."""
    hybrid_engine: HybridEngineConfig = Field(default_factory=HybridEngineConfig)
    """Train and generate by turns."""
    weight_quantization: WeightQuantConfig = Field(default_factory=WeightQuantConfig)
    """Quantized weights for inference."""

    autotuning: AutotuningConfig = Field(default_factory=AutotuningConfig)
    """Try configurations."""
    elasticity: ElasticityConfig = Field(default_factory=ElasticityConfig)
    """Batch sizes for many numbers of GPUs."""
    data_efficiency: DataEfficiencyConfig = Field(default_factory=DataEfficiencyConfig)
    """Which samples and tokens are trained on."""
    curriculum_learning: CurriculumLearningConfig = Field(default_factory=CurriculumLearningConfig)
    """Shorter sequences first."""
    progressive_layer_drop: ProgressiveLayerDropConfig = Field(default_factory=ProgressiveLayerDropConfig)
    """Skip layers at random."""
    compression_training: CompressionConfig = Field(default_factory=CompressionConfig)
    """Quantize, prune or shorten a model."""
    quantize_training: QuantizeTrainingConfig = Field(default_factory=QuantizeTrainingConfig)
    """The first form of MoQ."""
    eigenvalue: EigenvalueConfig = Field(default_factory=EigenvalueConfig)
    """Curvature of layers."""
    sparse_attention: SparseAttentionConfig | None = None
    """Attention over blocks of a pattern; on when given."""

    _auto_keys: frozenset[str] = PrivateAttr(frozenset())

    @property
    def auto_keys(self) -> frozenset[str]:
        """Top-level keys whose value was "auto", so that their default holds."""
        return self._auto_keys

    @property
    def precision_dtype(self) -> torch.dtype:
        """Dtype of the model copy that computes."""
        if self.fp16.enabled:
            return torch.float16
        return torch.bfloat16 if self.bf16.enabled else torch.float32

    def batch_sizes(self, *, data_parallel_size: int, size_source: str, num_sharers: int = 1) -> BatchSizes:
        """The three batch sizes for this many data-parallel ranks; `size_source` says in errors who counted them. Each is a group
        of `num_sharers` that share layers."""
        if self.elasticity.enabled:
            return self._elastic_sizes(data_parallel_size)
        given: list[Given] = [AUTO if key in self.auto_keys else getattr(self, key) for key in KEYS]
        return resolve_batch(
            *given, data_parallel_size=data_parallel_size, size_source=size_source, num_sharers=num_sharers
        )

    def _elastic_sizes(self, data_parallel_size: int) -> BatchSizes:
        found = elastic_batch(self.elasticity, data_parallel_size * self.elasticity.model_parallel_size)
        accumulation = found.batch // (found.micro * data_parallel_size)
        origins = dict.fromkeys(KEYS, "elasticity")
        return BatchSizes(train=found.batch, micro=found.micro, accumulation=accumulation, origins=origins)

    @classmethod
    def adapt(cls, data: dict[str, Any]) -> dict[str, Any]:
        """A boolean `zero_optimization` becomes a section; a dotted key moves into its section, unless that has it."""
        zero = data.get("zero_optimization")
        if isinstance(zero, bool):
            warn_once('zero_optimization as true or false is old; write a section, {"stage": 0 to 3}.')
            on = {"stage": 1, "allgather_bucket_size": data.get("allgather_size", 500_000_000)}
            data["zero_optimization"] = on if zero else {"stage": 0}
        for dotted in [key for key in data if "." in key]:
            _move_into_section(data, dotted)
        return data

    def rules(self) -> Iterator[Problem]:
        """What sections get wrong together."""
        yield from exclusions(self)
        yield from self._elasticity_rules()

    def _elasticity_rules(self) -> Iterator[Problem]:
        elasticity = self.elasticity
        if elasticity.enabled and not elasticity.ignore_non_elastic_batch_info:
            for key in KEYS:
                if getattr(self, key) is not None:
                    yield Problem(
                        ("elasticity.enabled", key),
                        "elasticity computes the batch sizes",
                        f"Remove {key}, or set elasticity.ignore_non_elastic_batch_info to true.",
                    )

    def notes(self) -> Iterator[str]:
        """What is allowed and probably not meant."""
        if self.vocabulary_size is not None and self.vocabulary_size % 8:
            yield (
                f"vocabulary_size {self.vocabulary_size} is not a multiple of 8; "
                "the product with the vocabulary may miss the fast matrix units."
            )
        if self.optimizer is not None and self.optimizer.params.get("max_grad_norm"):
            yield "optimizer.params.max_grad_norm does not clip; use the top-level key gradient_clipping."


def _move_into_section(data: dict[str, Any], dotted: str) -> None:
    """Replace the key "a.b.c" by a value at c in section b of a. What the section says itself goes first."""
    *sections, last = dotted.split(".")
    value = data.pop(dotted)
    place = data
    for name in sections:
        inner = place.get(name, {})
        if not isinstance(inner, Mapping):
            return
        place[name] = dict(inner)
        place = place[name]
    place.setdefault(last, value)


def load_config(source: Source) -> Config:
    """Read and check a configuration: a dict (not modified), a path, or base64.

    Raises DeepSpeedConfigError, listing everything that is wrong.
    """
    data = read_config(source)
    config = read_section(Config, data, origin_of(source))
    config._auto_keys = frozenset(key for key, value in data.items() if value == AUTO)
    return config
