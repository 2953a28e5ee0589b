"""An engine core whose API process is gone ends itself.

vLLM's workers end with their engine core; the core itself outlives an API process that was killed,
idle for ever, and holds the memory that the next start needs.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from multiprocessing.connection import wait

__all__ = ["end_with_parent"]

logger = logging.getLogger(__name__)


def end_with_parent() -> None:
    """Ends this process, as a crash would, when the one that started it has ended.

    Does nothing in a process that multiprocessing has not started.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    threading.Thread(target=_wait, args=(parent.sentinel,), name="orphan", daemon=True).start()


def _wait(sentinel: int) -> None:
    wait([sentinel])
    logger.error("the API process is gone, so this engine ends")
    os._exit(1)
