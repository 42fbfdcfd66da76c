"""Several processes that build one ability together, one per GPU, as `accelerate launch` and `torchrun` start them.

All go through the same stages in the same order. The first one makes them, the others wait for each and read it; only
rows are trained by all, through transformers' Trainer.
"""

import os


def count() -> int:
    """How many they are; 1 where there is only this one."""
    # Set by torch.distributed.run (docs.pytorch.org/docs/stable/elastic/run.html, "Environment Variables").
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_first() -> bool:
    """Whether this process makes what is made once; so does one that has no others beside it."""
    # The number of a process alone may be left over from whatever else starts processes.
    return count() < 2 or int(os.environ.get("RANK") or 0) == 0
