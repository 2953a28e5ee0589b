"""Circuit Breakers: a guard for language models that lives inside the model.

Importing this package is light: no torch, no vllm, no fastapi. Each layer imports what it needs.
"""

from circuit_breakers.errors import CircuitBreakersError

__all__ = ["CircuitBreakersError", "__version__"]

__version__ = "0.1.0"
