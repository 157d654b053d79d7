"""A batch of a pipeline, taken from the iterators of its first and last ranks before anything is computed.

Called by the pipeline engine. All ranks tell each other how that went, so that a loader that ends early, or a batch that is
not one, is the same error on every rank, and nobody waits for micro-batches that never come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_leaves

from deepspeed.mesh import Mesh
from deepspeed.parallel.pipeline.layers import PipelineError

FINE, ENDED, WRONG = range(3)


class Batch(NamedTuple):
    """What the first stage reads and what the last stage reads, by micro-batch."""

    inputs: list[Any]
    labels: list[Any]


def take(
    mesh: Mesh, data: Iterator[Any] | None, num: int, batch_fn: Callable[[Any], Any] | None, *, is_needed: bool
) -> Batch:
    """The next `num` micro-batches. Collective over the job.

    Raises on every rank StopIteration where a loader has none left, PipelineError where it has fewer, or what is no
    (inputs, labels), or micro-batches of differing size.
    """
    batch, failure = pull(data, num, batch_fn, is_needed=is_needed)
    status, text = FINE, ""
    if failure is not None:
        status, text = ENDED if isinstance(failure, StopIteration) else WRONG, str(failure)
    worst = max(theirs for (theirs,) in mesh.agree("job", status))
    if worst == FINE:
        return batch
    everyone = mesh.gather_objects("job", (status, text))
    rank, words = next((rank, words) for rank, (theirs, words) in enumerate(everyone) if theirs == worst)
    if worst == ENDED:
        raise StopIteration(words)
    raise PipelineError(f"rank {rank} could not read its batch: {words}")


def pull(
    data: Iterator[Any] | None, num: int, batch_fn: Callable[[Any], Any] | None, *, is_needed: bool
) -> tuple[Batch, Exception | None]:
    """This rank's part alone, and StopIteration or a PipelineError instead of one."""
    if not is_needed:
        return Batch([], []), None
    try:
        return _pull(data, num, batch_fn), None
    except StopIteration:
        return Batch([], []), StopIteration("the data loader has no batch left.")
    except PipelineError as error:
        return Batch([], []), error
    except Exception as error:
        return Batch([], []), PipelineError(f"{type(error).__name__}: {error}")


def _pull(data: Iterator[Any] | None, num: int, batch_fn: Callable[[Any], Any] | None) -> Batch:
    if data is None:
        raise PipelineError(
            "the first and the last stage need a data iterator.\n  Pass one to train_batch or eval_batch, or training_data to "
            "deepspeed.initialize."
        )
    if not isinstance(data, Iterator):
        raise PipelineError(
            f"a {type(data).__name__} is no iterator.\n  Pass iter(loader), or give set_dataloader the loader."
        )
    batch = Batch([], [])
    for micro in range(num):
        try:
            item = next(data)
        except StopIteration:
            if micro == 0:
                raise
            raise PipelineError(
                f"the data loader ended after {micro} of the {num} micro-batches of a step.\n  Use drop_last and a length that "
                "gradient_accumulation_steps divides, or deepspeed.utils.RepeatingLoader."
            ) from None
        item = batch_fn(item) if batch_fn is not None else item
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            got = f"{len(item)} values" if isinstance(item, (tuple, list)) else f"a {type(item).__name__}"
            raise PipelineError(
                f"a micro-batch is (inputs, labels), the iterator gives {got}.\n  Convert it with engine.set_batch_fn(function)."
            )
        batch.inputs.append(item[0])
        batch.labels.append(item[1])
    sizes = [_size(inputs) for inputs in batch.inputs]
    if len(set(sizes)) > 1:
        raise PipelineError(
            f"micro-batches of one step have {sizes} samples: their losses would be averaged with wrong weights.\n  Use "
            "drop_last in the data loader."
        )
    return batch


def _size(inputs: Any) -> int | None:
    first = next((leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)), None)
    return first.shape[0] if first is not None and first.dim() else None
