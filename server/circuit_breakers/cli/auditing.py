"""`audit` and `replay`: check, export and shorten the audit log; try other thresholds on it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from circuit_breakers.cli.apps import app, audit_app, import_extra, reported_errors
from circuit_breakers.errors import ConfigError

if TYPE_CHECKING:
    from circuit_breakers.audit.store import AuditStore
    from circuit_breakers.audit.verification import Verification
    from circuit_breakers.audit.whatif import Thresholds, WhatIf

__all__ = ["audit_export", "audit_prune", "audit_verify", "replay"]

_MAX_SHOWN = 20
_MAX_DAYS = 36_500
"""A century; far more would not fit into the databases' 64 bits."""

Db = Annotated[
    Path | None,
    typer.Option(help="SQLite file of the log.", envvar="CIRCUIT_BREAKERS_AUDIT_DB"),
]
Url = Annotated[
    str | None,
    typer.Option(
        help="Database of the log instead, e.g. postgresql://USER@HOST/DB.",
        envvar="CIRCUIT_BREAKERS_AUDIT_URL",
        show_envvar=True,
    ),
]
KeyFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--key-file",
        help="Key that signs its rows; more than one after a change of keys, the newest first.",
        envvar="CIRCUIT_BREAKERS_AUDIT_KEY_FILE",
    ),
]


@audit_app.command(name="verify", epilog="Example: `circuit-breakers audit verify --db audit.db`")
def audit_verify(
    ctx: typer.Context,
    db: Db = None,
    url: Url = None,
    file: Annotated[
        Path | None, typer.Option(help="Export of the log to check instead of a database.")
    ] = None,
    key_file: KeyFiles = None,
    expect_head: Annotated[
        str | None,
        typer.Option(help="SEQ:HASH of an earlier check; finds newest rows that were cut off."),
    ] = None,
) -> None:
    """Find every row that was changed, taken out, put in or put elsewhere.

    Without a key, somebody who can rewrite the whole log can hide that they did. Rows cut off at
    the end show only against a head from before, kept elsewhere.
    """
    db, url = _typed(ctx, db, url)
    with reported_errors(exit_code=2):
        chain = import_extra("circuit_breakers.audit.chain", extra="serve")
        signer = chain.Signer.from_files(key_file or [])
        expected = chain.Head.parse(expect_head) if expect_head else None
        if file is not None and (db is not None or url is not None):
            raise ConfigError("got --file and a database, expected one of them")
    verify_rows = import_extra("circuit_breakers.audit.verification", extra="serve").verify_rows
    if file is not None:
        with reported_errors():
            found = verify_rows(_exported_rows(file), signer, expected)
    else:
        with _store(db, url) as store:
            found = verify_rows(store.rows(), signer, expected)
    _print_verification(found, has_key=signer is not None)
    if found.findings:
        raise typer.Exit(1)


@audit_app.command(
    name="export", epilog="Example: `circuit-breakers audit export --db audit.db > audit.jsonl`"
)
def audit_export(ctx: typer.Context, db: Db = None, url: Url = None) -> None:
    """Print the log as JSON lines, oldest first; `audit verify --file` can check them."""
    with _store(*_typed(ctx, db, url)) as store:
        for row in store.rows():
            typer.echo(json.dumps(row))


@audit_app.command(
    name="prune",
    epilog="Example: `circuit-breakers audit prune --db audit.db --older-than-days 90`",
)
def audit_prune(
    ctx: typer.Context,
    older_than_days: Annotated[
        float,
        typer.Option("--older-than-days", "--older-than", min=0, max=_MAX_DAYS, help="In days."),
    ],
    db: Db = None,
    url: Url = None,
    key_file: KeyFiles = None,
    force: Annotated[
        bool, typer.Option("--force", help="Although the log does not verify.")
    ] = False,
) -> None:
    """Take old rows and score traces out; what stays is still one chain, and says that they went.

    A signed log needs its key: the row that tells of the pruning is signed too. A log that does not
    verify is left as it is, as what was done to it would be gone.
    """
    verify_rows = import_extra("circuit_breakers.audit.verification", extra="serve").verify_rows
    chain = import_extra("circuit_breakers.audit.chain", extra="serve")
    with _store(*_typed(ctx, db, url), key_file) as store:
        store.set_up()
        found = verify_rows(store.rows(), chain.Signer.from_files(key_file or []))
        if found.findings and not force:
            raise ConfigError(
                f"the log does not verify ({found.findings[0]}), nothing was taken out; see "
                "`audit verify`, export it, then give --force"
            )
        days_ago_us = import_extra("circuit_breakers.audit.entry", extra="serve").days_ago_us
        gone = store.prune(days_ago_us(older_than_days))
    typer.echo(f"ok: {gone.num_entries} rows and {gone.num_traces} score traces taken out")


@app.command(epilog="Example: `circuit-breakers replay --db audit.db --target-fpr 0.001 --days 30`")
def replay(
    ctx: typer.Context,
    db: Db = None,
    url: Url = None,
    threshold: Annotated[
        list[str] | None,
        typer.Option(
            help="LOGIT for every probe, or PROBE=LOGIT; the latter may be repeated, other probes "
            "keep theirs."
        ),
    ] = None,
    target_fpr: Annotated[
        float | None,
        typer.Option(help="As in `serve`: the thresholds that the breaker proves it for."),
    ] = None,
    breaker: Annotated[
        Path | None,
        typer.Option(help="Breaker of --target-fpr. [the one that ships for --model]"),
    ] = None,
    model: Annotated[
        str, typer.Option(help="Built-in model of that breaker.")
    ] = "smollm2-135m-instruct",
    days: Annotated[int, typer.Option(min=1, max=_MAX_DAYS, help="How far back.")] = 7,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """How many requests of the last days would have tripped under other thresholds.

    Needs the traces of a server that runs with --score-traces.
    """
    with reported_errors(exit_code=2):
        if bool(threshold) == (target_fpr is not None):
            raise ConfigError("give exactly one of --threshold and --target-fpr")
        thresholds: Thresholds = _parse_thresholds(threshold) if threshold else {}
    whatif = import_extra("circuit_breakers.audit.whatif", extra="serve")
    days_ago_us = import_extra("circuit_breakers.audit.entry", extra="serve").days_ago_us
    digest = None
    if target_fpr is not None:
        with reported_errors():
            thresholds, digest = _proven_thresholds(target_fpr, breaker, model)
    with _store(*_typed(ctx, db, url)) as store:
        traces = store.traces(days_ago_us(days), breaker=digest)
        groups = whatif.what_if(traces, thresholds)
    if as_json:
        shown = {"days": days, "thresholds": thresholds, "data": [g.to_json() for g in groups]}
        typer.echo(json.dumps(shown | {"notes": list(whatif.CAVEATS)}, indent=2))
        return
    _print_what_if(groups, days, thresholds)
    for caveat in whatif.CAVEATS:
        typer.echo(f"note: {caveat}")


def _typed(ctx: typer.Context, db: Path | None, url: str | None) -> tuple[Path | None, str | None]:
    """What was typed, if anything was; else what the server's variables say."""
    sources = {name: ctx.get_parameter_source(name) for name in ("db", "url", "file")}
    typed = {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}
    if not typed:
        return db, url
    return (db if "db" in typed else None), (url if "url" in typed else None)


@contextmanager
def _store(
    db: Path | None, url: str | None, key_files: list[Path] | None = None
) -> Iterator[AuditStore]:
    with reported_errors(exit_code=2):
        if (db is None) == (url is None):
            raise ConfigError("give exactly one of --db and --url")
        signer = import_extra("circuit_breakers.audit.chain", extra="serve").Signer
        database = import_extra("circuit_breakers.audit.database", extra="serve")
        store_type = import_extra("circuit_breakers.audit.store", extra="serve").AuditStore
        place = url if db is None else database.sqlite_url(db.expanduser())
        store: AuditStore = store_type(place, signer.from_files(key_files or []), patient=True)
    try:
        with reported_errors():
            store.check_exists()
            yield store
    finally:
        store.close()


def _exported_rows(file: Path) -> Iterator[dict[str, Any]]:
    from circuit_breakers.artifact.strict_json import load_json

    chain = import_extra("circuit_breakers.audit.chain", extra="serve")
    expected = {*chain.HASHED_FIELDS, "hash", "mac"}
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                row = load_json(line)
                if not isinstance(row, dict) or set(row) != expected:
                    raise ConfigError(f"{file}:{number} is no row of an exported audit log")
                yield row
    except (OSError, ValueError) as e:
        if isinstance(e, ConfigError):
            raise
        raise ConfigError(f"{file} cannot be read as an exported audit log: {e}") from e


def _print_verification(found: Verification, *, has_key: bool) -> None:
    for finding in found.findings[:_MAX_SHOWN]:
        typer.secho(f"error: {finding}", err=True, fg=typer.colors.RED)
    if (more := len(found.findings) - _MAX_SHOWN) > 0:
        typer.echo(f"error: and {more} more", err=True)
    if found.head is not None:
        typer.echo(f"head: {found.head}")
    if found.pruned_through:
        typer.echo(f"pruned: rows up to {found.pruned_through} were taken out, as the log says")
    signed = f"{found.num_signed} of {found.num_rows} rows are signed"
    checked = "" if not found.num_signed else (", checked" if has_key else ", not checked: no key")
    typer.echo(f"signatures: {signed}{checked}")
    if not found.findings:
        typer.echo(f"ok: {found.num_rows} rows, each as it was written")


def _parse_thresholds(given: list[str]) -> Thresholds:
    by_probe: dict[str, float] = {}
    for text in given:
        probe, has_name, value = text.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if not abs(number) < 1e30:
            raise ConfigError(f"got --threshold {text!r}, expected LOGIT or PROBE=LOGIT")
        if not has_name:
            if len(given) > 1:
                raise ConfigError(f"got --threshold {text!r} and others, expected PROBE=LOGIT each")
            return number
        by_probe[probe] = number
    return by_probe


def _proven_thresholds(
    target_fpr: float, breaker: Path | None, model: str
) -> tuple[dict[str, float], str]:
    from circuit_breakers.artifact import builtin_breaker_path, load_breaker
    from circuit_breakers.guard.operating_point import probes_at

    path = breaker or builtin_breaker_path(model)
    if path is None:
        raise ConfigError(f"no breaker ships for model {model!r}; give --breaker DIR")
    loaded = load_breaker(path)
    probes = probes_at(loaded.manifest, target_fpr)
    return {probe.name: probe.threshold_logit for probe in probes}, loaded.digest


def _print_what_if(groups: list[WhatIf], days: int, thresholds: Thresholds) -> None:
    typer.echo(f"thresholds: {thresholds if isinstance(thresholds, float) else dict(thresholds)}")
    if not groups:
        typer.echo(f"no score traces of the last {days} days; serve with --score-traces")
    for group in groups:
        low, high = group.interval
        typer.echo(
            f"breaker {group.breaker[:12]} policy {group.policy} {group.phase}: "
            f"{group.num_would_trip} of {group.num_requests} requests would trip "
            f"({low:.3%} to {high:.3%}), {group.num_unknown} unknown; "
            f"{group.num_tripped} did"
        )
