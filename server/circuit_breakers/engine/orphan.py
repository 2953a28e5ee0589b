"""An engine core whose API process is gone ends itself.

vLLM's workers end with their engine core; the core itself outlives an API process that was killed,
idle for ever, and holds the memory that the next start needs. It watches from before the model is
loaded.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from functools import wraps
from multiprocessing.connection import wait
from typing import Any

from circuit_breakers.engine.config import EngineGuardConfig

__all__ = ["end_with_parent", "install"]

logger = logging.getLogger(__name__)

_NAME = "EngineCore"
"""How vLLM begins the names of the processes that it starts for engine cores."""


def install() -> None:
    """Wraps vLLM's executor, the first thing that an engine core makes."""
    from vllm.v1.executor.abstract import Executor

    original = Executor.__init__

    @wraps(original)
    def watching_init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        is_core = multiprocessing.current_process().name.startswith(_NAME)
        if is_core and EngineGuardConfig.from_vllm_config(vllm_config) is not None:
            end_with_parent()
        original(self, vllm_config, *args, **kwargs)

    Executor.__init__ = watching_init


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
    # Standard error may be a pipe that nobody reads any more.
    threading.Timer(1.0, os._exit, (1,)).start()
    logger.error("the API process is gone, so this engine ends")
    os._exit(1)
