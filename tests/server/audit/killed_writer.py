"""A process that writes entries until it is killed: python killed_writer.py DB SPOOL.

Prints the id of each entry once the entry is on the disk, and no sooner.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

from circuit_breakers.audit.entry import AuditEntry, new_entry_id, now_us
from circuit_breakers.audit.store import AuditStore
from circuit_breakers.audit.writer import AuditWriter


class Loud:
    def record_audit_dropped(self, num: int) -> None:
        print("dropped", flush=True)

    def record_traces_dropped(self, num: int) -> None:
        print("dropped", flush=True)


def main(database: str, spool: str) -> None:
    writer = AuditWriter(AuditStore(f"sqlite:///{database}"), Path(spool), Loud())
    writer.start()
    for number in itertools.count():
        entry_id = new_entry_id()
        writer.record(
            AuditEntry(
                entry_id=entry_id,
                kind="trip",
                action="stopped",
                time_us=now_us(),
                key_id="anonymous",
                token_index=number,
            )
        )
        assert writer.sync(30)
        print(entry_id, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
