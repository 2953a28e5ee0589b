"""Database: SQLite in WAL mode, or PostgreSQL; how it is opened, locked and read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, Table, create_engine, event, func, inspect, select
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from circuit_breakers.errors import AuditError, ConfigError

__all__ = ["Database", "parse_url", "sqlite_url"]

_LOCK = 0x63625F6175646974
"""PostgreSQL's advisory lock of the log: "cb_audit"."""
_ROWS_AT_ONCE = 1000
_BUSY_S = 3
_STATEMENT_S = 15
_WRITES = "circuit_breakers_writes"
"""Execution option of a connection whose transactions write."""


class Database:
    """One database. Every method may be called from any thread.

    Raises:
        AuditError: from every method, when the database does not answer or refuses.
    """

    def __init__(self, url: str | URL, *, patient: bool) -> None:
        """Nothing is connected yet.

        Args:
            patient: statements may take as long as they need, as those of a person at a terminal
                may; otherwise a database that does not answer in seconds counts as away.
        Raises:
            ConfigError: the URL cannot be used.
        """
        self._url = parse_url(url)
        self._is_sqlite = self._url.get_backend_name() == "sqlite"
        self._engine = _connect(self._url, patient=patient)
        self._file: tuple[int, int] | None = None
        """Device and inode of a SQLite file, as it was made or found."""
        self._writing_engine = self._engine.execution_options(**{_WRITES: True})

    def __str__(self) -> str:
        return _shown(self._url)

    @property
    def path(self) -> Path | None:
        """The file of a SQLite database; None for a server."""
        return Path(str(self._url.database)) if self._is_sqlite else None

    def close(self) -> None:
        self._engine.dispose()

    def has(self, table: Table) -> bool:
        # SQLite would make the file.
        if self.path is not None and not self.path.is_file():
            return False
        with self._errors():
            return inspect(self._engine).has_table(table.name)

    def make_file(self) -> None:
        """Makes the file of a SQLite database, for its owner only; nothing else otherwise."""
        if self.path is None:
            return
        # SQLite would make it readable to all; its other files take the mode from this one. A file
        # that is there is not opened: closing it would let go of SQLite's locks on it.
        try:
            with suppress(FileExistsError):
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except OSError as e:
            raise AuditError(f"audit database {self}: {e.strerror}") from e
        self._file = _identity(self.path)

    @contextmanager
    def writing(self, *, locked: bool) -> Iterator[Connection]:
        """One transaction; with `locked` it excludes all others that are locked."""
        self._check_file()
        with self._errors(), self._writing_engine.begin() as connection:
            # SQLite's BEGIN IMMEDIATE has the lock already.
            if locked and not self._is_sqlite:
                connection.execute(select(func.pg_advisory_xact_lock(_LOCK)))
            yield connection
        self._check_file()

    def read(self, query: Any) -> Iterator[dict[str, Any]]:
        """Rows of one query, as of its start, however many there are."""
        with self._errors(), self._engine.connect() as connection:
            result = connection.execution_options(yield_per=_ROWS_AT_ONCE).execute(query)
            for row in result.mappings():
                yield dict(row)

    def _check_file(self) -> None:
        """Raises when SQLite's file is another than it was; the next connection takes that one."""
        # SQLite would go on writing to a file that nobody can open any more.
        if self.path is not None and self._file not in (None, _identity(self.path)):
            self._file = None
            self._engine.dispose()
            raise AuditError(f"audit database {self}: the file was moved, removed or replaced")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as e:
            # The message of SQLAlchemy's own holds the statement with its values.
            reason = getattr(e, "orig", None) or type(e).__name__
            raise AuditError(f"audit database {self}: {str(reason).strip()}") from e


def sqlite_url(path: Path) -> URL:
    """The URL of a SQLite file, whatever characters its path has."""
    return URL.create("sqlite", database=str(path))


def parse_url(text: str | URL) -> URL:
    """The URL of a database that can hold the log.

    Raises:
        ConfigError: another kind of database, or none; never says the password.
    """
    expected = "expected sqlite:///PATH or postgresql://USER@HOST/DATABASE"
    try:
        url = make_url(text)
    except (ArgumentError, ValueError) as e:
        raise ConfigError(f"the audit URL is not one, {expected}") from e
    shown = _shown(url)
    if url.get_backend_name() not in ("sqlite", "postgresql"):
        raise ConfigError(f"got audit URL {shown!r}, {expected}")
    if url.get_backend_name() == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    if url.database in (None, "", ":memory:"):
        raise ConfigError(f"got audit URL {shown!r}, expected a file: sqlite:///PATH")
    return url


def _shown(url: URL) -> str:
    # What follows the '?' can hold a password too.
    return url.set(query={}).render_as_string(hide_password=True)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _connect(url: URL, *, patient: bool) -> Engine:
    sqlite = url.get_backend_name() == "sqlite"
    if sqlite and not (folder := Path(str(url.database)).parent).is_dir():
        raise ConfigError(f"audit database: no folder {str(folder)!r}; make it first")
    arguments = _sqlite_arguments(patient) if sqlite else _postgresql_arguments(patient)
    try:
        engine = create_engine(url, connect_args=arguments, pool_pre_ping=not sqlite)
    except (ImportError, NoSuchModuleError) as e:
        raise ConfigError(
            "PostgreSQL needs psycopg, which is not installed; "
            "pip install 'circuit-breakers[postgres]'"
        ) from e
    if sqlite:
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def _sqlite_arguments(patient: bool) -> dict[str, Any]:
    return {"timeout": 60 if patient else _BUSY_S}


def _postgresql_arguments(patient: bool) -> dict[str, Any]:
    # A peer that is gone without a word must not hold the writer for ever.
    arguments: dict[str, Any] = {
        "connect_timeout": 5,
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 15_000,
        "application_name": "circuit-breakers",
    }
    if not patient:
        arguments["options"] = f"-c statement_timeout={_STATEMENT_S}s"
    return arguments


def _set_up_sqlite(connection: Any, record: Any) -> None:
    # The driver would begin transactions by itself, and too late.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    # What leaves the spool must have reached the disk.
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()


def _begin_sqlite(connection: Any) -> None:
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
