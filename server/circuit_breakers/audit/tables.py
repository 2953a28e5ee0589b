"""The two tables: the log, whose rows are chained, and the score traces."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Double, Integer, MetaData, Table, Text

__all__ = ["AUDIT_LOG", "METADATA", "SCORE_TRACES"]

METADATA = MetaData()

AUDIT_LOG = Table(
    "audit_log",
    METADATA,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("version", Integer, nullable=False),
    Column("prev_hash", Text, nullable=False, unique=True),  # a second row after one would fork it
    Column("entry_id", Text, nullable=False, unique=True),
    Column("kind", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("time_us", BigInteger, nullable=False, index=True),
    Column("key_id", Text, nullable=False),
    Column("request_id", Text),
    Column("model", Text),
    Column("policy", Text),
    Column("breaker", Text),
    Column("phase", Text),
    Column("probe", Text),
    Column("score", Double),
    Column("threshold", Double),
    Column("token_index", BigInteger),
    Column("choice", Integer),
    Column("detail", Text),
    Column("hash", Text, nullable=False),
    Column("mac", Text),
)

SCORE_TRACES = Table(
    "score_traces",
    METADATA,
    Column("request_id", Text, primary_key=True),
    Column("time_us", BigInteger, nullable=False, index=True),
    Column("key_id", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("policy", Text, nullable=False),
    Column("breaker", Text, nullable=False),
    Column("mode", Text, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("num_tokens", BigInteger, nullable=False),
    Column("num_unscored", BigInteger, nullable=False),
    Column("tripped", Text),
    Column("stopped", Boolean, nullable=False),
    Column("peaks", Text, nullable=False),
    Column("thresholds", Text, nullable=False),
)
