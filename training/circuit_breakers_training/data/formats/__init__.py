"""Published data formats: how a row of each becomes a conversation. registry.py has the names."""

__all__: list[str] = []
