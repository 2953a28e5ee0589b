"""Entry point of vLLM's `vllm.general_plugins`: runs in every process of the engine.

The wraps are installed everywhere and do nothing until a VllmConfig names a breaker, or, where the
configuration is made, a variable or a key of additional_config does (dropin.py). vLLM logs and
swallows a plugin that cannot be imported, so a launch asks every worker for its probes' digest
before it trusts the engine.
"""

from __future__ import annotations

__all__ = ["register"]

_installed = False


def register() -> None:
    """Installs the guard's wraps once.

    Raises:
        UnsupportedEngineError: vLLM is outside the tested range.
    """
    global _installed
    if _installed:
        return
    from circuit_breakers.engine import (
        compat,
        delivery,
        dropin,
        orphan,
        requests,
        scheduler,
        worker,
    )

    compat.check_vllm_version()
    worker.install()
    scheduler.install()
    delivery.install()
    requests.install()
    dropin.install()
    orphan.install()
    _installed = True
