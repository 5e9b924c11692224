"""One thread for work that somebody waits for beside other programs.

OpenMP's threads spin while they wait for a core that another program has: small tensor operations
took forty times as long on two threads as on one (issue 21). The verbs tell OpenMP not to
(`OMP_WAIT_POLICY`); a server that we are loaded into does as it was started.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes on one thread, and on as many as before after it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
