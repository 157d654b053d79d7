"""Sections about files and memory: `aio`, `checkpoint`, `datastates_ckpt`, `nebula` and `activation_checkpointing`.

Read by `deepspeed.tiers`, `deepspeed.checkpoint` and `deepspeed.activation`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from deepspeed.config.base import (
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    PositiveSize,
    Problem,
    Section,
    also,
    any_case,
)


class AioConfig(Section):
    """`aio`: how files of the nvme tier are read and written."""

    block_size: PositiveSize = 1_048_576
    """Bytes per request; large enough that the disk, not the request, is the cost."""
    queue_depth: PositiveInt = 8
    """Requests in flight."""
    intra_op_parallelism: Annotated[PositiveInt, also("intra_op_parallelism", "thread_count")] = 1
    """Threads that share one request."""
    single_submit: bool = False
    """Submit requests one by one."""
    overlap_events: bool = True
    """Submit the next requests before the last are complete."""
    use_gds: bool = False
    """Move bytes between disk and GPU without a stop in main memory (GPUDirect Storage), through `torch.cuda.gds` of torch 2.7 or
    later. Without it: one line, and main memory. These bytes have no checksums."""


class ParallelWriteConfig(Section):
    """`checkpoint.parallel_write`: which ranks write at the same time."""

    pipeline_stage: bool = False
    """Every pipeline stage writes its own layers."""


class CheckpointWriterConfig(Section):
    """`checkpoint.writer`: write checkpoints through large buffers, and in the background."""

    type: Annotated[Literal["mock", "python", "fast"], any_case("mock", "python", "fast")] = "fast"
    """fast: direct I/O; python: plain file writes; mock: nothing is written, for measurements."""
    io_buffer_size: PositiveSize = 64 * 1024 * 1024
    """Bytes of a buffer."""
    io_buffer_double: bool = True
    """Two buffers: one fills while the other is written."""
    io_multiplier: PositiveInt = 1
    """Writers per rank."""
    show_statistics: bool = False
    """Report bytes and speed after each checkpoint."""
    data_parallel: (
        Annotated[Literal["replica", "socket", "machine"], any_case("replica", "socket", "machine")] | None
    ) = None
    """Over which data-parallel ranks the writing of replicated tensors is spread; one rank writes when not given."""
    decoupled: bool = False
    """Return to training while files are written."""


class CheckpointConfig(Section):
    """`checkpoint`: how `save_checkpoint` and `load_checkpoint` behave."""

    tag_validation: Annotated[Literal["Ignore", "Warn", "Fail"], any_case("Ignore", "Warn", "Fail")] = "Warn"
    """What happens when ranks name different tags; any case."""
    load_universal: bool = False
    """Load a universal checkpoint. Every checkpoint here can be resharded; needed only for those of other versions."""
    use_node_local_storage: bool = False
    """The path is on each node's own disk, so the first rank of every node writes the shared files."""
    parallel_write: ParallelWriteConfig = Field(default_factory=ParallelWriteConfig)
    """Which ranks write at the same time."""
    checkpoint_serialization: bool = True
    """Let the fast writer use torch's zip format. Files are safetensors here; no effect."""
    writer: CheckpointWriterConfig | None = None
    """Writing in the background, if `decoupled`. Its other keys have no effect: files are always written by direct I/O."""
    async_save: bool = False
    """Return to training once the state is copied to main memory, and write files in the background."""
    staging_bytes: PositiveSize | None = None
    """Bytes of main memory per rank for an asynchronous save; a save that needs more blocks until its rest has found
    room. When not given: as much as the rank's share, at most half of what is free."""
    keep_last_n: PositiveInt | None = None
    """Checkpoints kept in a folder: a save deletes older ones once it is durable. All when not given."""


class NebulaConfig(Section):
    """`nebula`: asynchronous checkpoints through Azure's Nebula service."""

    enabled: bool = False
    """Use Nebula."""
    enable_nebula_load: bool = True
    """Load through Nebula as well."""
    load_path: Path | None = None
    """Where to load from."""
    persistent_storage_path: Path | None = None
    """Where the service keeps checkpoints."""
    persistent_time_interval: PositiveFloat = 100.0
    """Seconds between persistent checkpoints."""
    num_of_version_in_retention: PositiveInt = 2
    """Checkpoints kept."""


class DataStatesConfig(Section, extra="allow"):
    """`datastates_ckpt`: asynchronous checkpoints through the DataStates library, which gets every key as it is."""

    host_cache_size: NonNegativeFloat | None = None
    """GB of CPU memory for checkpoints on their way to disk."""


class ActivationCheckpointingConfig(Section):
    """`activation_checkpointing`: what `deepspeed.checkpointing.configure` uses where its arguments do not say.

    The engine applies it by itself only where `recompute` or `memory_budget_gb` asks it to checkpoint the model's blocks.
    """

    partition_activations: bool = False
    """Each tensor-parallel rank keeps its share of a saved input."""
    cpu_checkpointing: bool = False
    """Keep saved inputs in CPU memory."""
    contiguous_memory_optimization: bool = False
    """Copy saved inputs into one buffer. Needs `partition_activations` and `number_checkpoints`."""
    number_checkpoints: PositiveInt | None = None
    """Checkpoints in one forward, which is the number of pieces of that buffer."""
    synchronize_checkpoint_boundary: bool = False
    """Wait for the device at each boundary; for debugging."""
    profile: bool = False
    """Time the forward and the recomputation of each checkpoint."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Have the engine checkpoint the model's repeated blocks: keep only their inputs ("full"), or the results of
    matrix products and attention, too ("selective")."""
    memory_budget_gb: PositiveFloat | None = None
    """Recompute in as few blocks, and as little, as is predicted to keep a rank's device memory below this many GiB."""

    def rules(self) -> Iterator[Problem]:
        """A budget chooses by itself."""
        if self.memory_budget_gb is not None and self.recompute != "none":
            yield Problem(
                ("recompute", "memory_budget_gb"),
                "the budget chooses what is recomputed",
                "Leave one of them out.",
            )
