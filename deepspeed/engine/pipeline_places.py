"""Where a rank is in its pipeline, by the names that scripts ask for: a mixin of the pipeline engine."""

from __future__ import annotations

from typing import Any


class Places:
    """Mixin of the pipeline engine."""

    module: Any
    grid: Any
    num_stages: int
    stage_id: int

    def is_first_stage(self) -> bool:
        """Whether this rank has the first stage."""
        return 0 in self.module.own_stages

    def is_last_stage(self) -> bool:
        """Whether this rank has the last stage, which makes the loss."""
        return len(self.module.rank_of) - 1 in self.module.own_stages

    def get_pipeline_parallel_rank(self) -> int:
        """This rank's place in the pipeline."""
        return self.stage_id

    @property
    def prev_stage(self) -> int:
        """The place before; -1 on the first rank."""
        return self.stage_id - 1

    @property
    def next_stage(self) -> int:
        """The place after; `num_stages` on the last rank."""
        return self.stage_id + 1

    @property
    def is_pipe_parallel(self) -> bool:
        """Whether there is more than one stage."""
        return self.num_stages > 1

    @property
    def is_data_parallel(self) -> bool:
        """Whether there is more than one pipeline."""
        return bool(self.grid.data_parallel_size > 1)

    @property
    def is_model_parallel(self) -> bool:
        """Whether a stage's layers are cut over ranks, by a topology with a "model" axis."""
        return bool(self.grid.model_parallel_size > 1)
