"""`python -m circuit_breakers.cli`."""

from circuit_breakers.cli import main

__all__: list[str] = []

main()
