"""Tiers: where bytes rest when the device is too small, and the asynchronous file I/O below that.

Used by `deepspeed.zero` (the nvme tier), by `deepspeed.ops.aio` (the handle people use themselves) and by two commands.

| file | one noun |
|---|---|
| `tier.py` | the three tiers |
| `rest.py` | flat bytes at rest, in memory or on disk, with one way to move them |
| `int8_rest.py` | flat bytes that rest as int8 |
| `pieces.py` | how a transfer is cut for direct I/O: pure arithmetic |
| `block_file.py` | an open file: direct where the file system allows it, buffered beside |
| `request.py` | a transfer's request, its outcome, and what a queue is |
| `io_queue.py` | which queue works here |
| `native_queue.py`, `python_queue.py` | the two queues: `csrc/aio.cpp`, and threads in Python |
| `buffers.py` | page-aligned memory |
| `swap_folder.py` | where a rank's swap files lie, who owns them, and cleaning after the dead |
| `nvme.py` | the store: put, get, wait, with checksums |
| `aio.py` | the `aio_handle` API |
| `io_trial.py` | measuring a disk: what the next two share |
| `ds_io.py`, `ds_nvme_tune.py` | the two commands |
"""

from deepspeed.tiers.rest import CopyStream, InMemory, OnDisk, OnHost, Rest, Transfer
from deepspeed.tiers.tier import Tier

__all__ = ["CopyStream", "InMemory", "OnDisk", "OnHost", "Rest", "Tier", "Transfer"]
