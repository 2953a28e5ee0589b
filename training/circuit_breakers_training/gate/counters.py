"""The server's own counters, summed over their labels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

from circuit_breakers.errors import RemoteServerError
from circuit_breakers.remote_server import RemoteServer

__all__ = ["Counters", "read_counters"]

Counters = Mapping[str, float]

_PREFIX: Final = "circuit_breakers_"


def read_counters(server: RemoteServer) -> Counters:
    """This package's series at /metrics, by name.

    Raises:
        RemoteServerError: there are none.
    """
    answer = server.ask("GET", "/metrics")
    found: dict[str, float] = defaultdict(float)
    try:
        for family in text_string_to_metric_families(answer.body.decode()):
            for sample in family.samples:
                if sample.name.startswith(_PREFIX):
                    found[sample.name] += sample.value
    except ValueError:
        found.clear()
    if answer.status != 200 or not found:
        raise RemoteServerError(
            f"got HTTP {answer.status} and no {_PREFIX}* series at /metrics of {server.place}, "
            "expected the counters of a guarded server; check --url, and that the key may read them"
        )
    return dict(found)
