"""The audit log: every trip and every act of an operator, hash-chained, without content.

    AuditEntry -> AuditWriter -> Spool (a local file) -> AuditStore (SQLite or PostgreSQL)
                                                             |
        audit verify, export, prune   GET /v1/breaker/trips -+
    ScoreTrace -> AuditWriter ----------> score_traces ------+-> replay, GET /v1/breaker/what-if

`entry`, `chain`, `verification` and `whatif` are pure; the others need SQLAlchemy, which comes with
the extra `serve`.
"""

__all__: list[str] = []
