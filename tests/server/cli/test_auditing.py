"""`audit` and `replay` on a real log: exit codes and what is said."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest
from typer.testing import CliRunner

from circuit_breakers.artifact import builtin_breaker_path, load_breaker
from circuit_breakers.audit.store import AuditStore
from circuit_breakers.cli import app

from ..audit.entries import KEY, trace, trip, url, write_log

runner = CliRunner()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "audit.db"
    write_log(path, 4)
    return path


def change(log: Path, statement: str) -> None:
    with sqlite3.connect(log) as db:
        db.execute(statement)
    db.close()


def test_an_untouched_log_passes_and_gives_its_head(log: Path) -> None:
    result = runner.invoke(app, ["audit", "verify", "--db", str(log)])
    assert result.exit_code == 0, result.output
    assert "ok: 5 rows, each as it was written" in result.stdout
    assert "head: 5:" in result.stdout
    assert "0 of 5 rows are signed" in result.stdout


def test_a_changed_row_is_named_and_exits_with_1(log: Path) -> None:
    change(log, "UPDATE audit_log SET key_id = 'someone-else' WHERE seq = 3")
    result = runner.invoke(app, ["audit", "verify", "--url", url(log)])
    assert result.exit_code == 1
    assert result.stderr.splitlines() == ["error: row 3: was changed"]
    assert "ok:" not in result.stdout


def test_a_cut_end_shows_against_the_head_of_an_earlier_check(log: Path) -> None:
    before = runner.invoke(app, ["audit", "verify", "--db", str(log)]).stdout
    (head,) = (x.removeprefix("head: ") for x in before.splitlines() if x.startswith("head: "))
    change(log, "DELETE FROM audit_log WHERE seq = 5")
    assert runner.invoke(app, ["audit", "verify", "--db", str(log)]).exit_code == 0
    result = runner.invoke(app, ["audit", "verify", "--db", str(log), "--expect-head", head])
    assert result.exit_code == 1
    assert "row 5: is missing" in result.stderr


def test_an_export_can_be_verified_by_itself(log: Path, tmp_path: Path) -> None:
    exported = runner.invoke(app, ["audit", "export", "--db", str(log)])
    assert exported.exit_code == 0
    file = tmp_path / "audit.jsonl"
    file.write_text(exported.stdout)
    lines = exported.stdout.splitlines()
    assert len(lines) == 5
    assert json.loads(lines[1])["request_id"] == "r0"
    assert runner.invoke(app, ["audit", "verify", "--file", str(file)]).exit_code == 0
    file.write_text("\n".join(lines[:2] + lines[3:]))
    result = runner.invoke(app, ["audit", "verify", "--file", str(file)])
    assert result.exit_code == 1
    assert "row 3: is missing" in result.stderr
    file.write_text("{}\n")
    result = runner.invoke(app, ["audit", "verify", "--file", str(file)])
    assert result.exit_code == 1
    assert f"{file}:1 is no row" in result.stderr
    # The last of two would count here, and the first may be what a person reads.
    for line, said in (
        (lines[1].replace('"kind": "trip"', '"kind": "x", "kind": "trip"'), "duplicate key 'kind'"),
        ("[" * 5000, "nested too deeply"),
    ):
        file.write_text("\n".join([lines[0], line, *lines[2:]]))
        result = runner.invoke(app, ["audit", "verify", "--file", str(file)])
        assert result.exit_code == 1
        assert said in result.stderr


def test_a_signed_log_is_checked_with_its_key(tmp_path: Path) -> None:
    log, key, other = (tmp_path / name for name in ("audit.db", "key", "other"))
    write_log(log, 2, key=KEY)
    key.write_bytes(KEY)
    other.write_bytes(b"o" * 32)

    def verify(*arguments: str) -> tuple[int, str]:
        result = runner.invoke(app, ["audit", "verify", "--db", str(log), *arguments])
        return result.exit_code, result.output

    assert "not checked: no key" in verify()[1]
    code, said = verify("--key-file", str(key))
    assert (code, "3 of 3 rows are signed, checked" in said) == (0, True)
    assert verify("--key-file", str(other))[0] == 1
    assert verify("--key-file", str(other), "--key-file", str(key))[0] == 0
    # Pruning signs too, so it needs the key.
    prune = ["audit", "prune", "--db", str(log), "--older-than-days", "0"]
    assert runner.invoke(app, prune).exit_code == 1
    assert runner.invoke(app, [*prune, "--key-file", str(key)]).exit_code == 0
    assert verify("--key-file", str(key))[0] == 0


def test_pruning_keeps_the_log_verifiable(tmp_path: Path) -> None:
    log = tmp_path / "audit.db"
    store = AuditStore(url(log))
    store.append([trip(), trip()])
    store.close()
    prune = ["audit", "prune", "--db", str(log), "--older-than-days"]
    kept = runner.invoke(app, [*prune, "1"])
    assert "ok: 0 rows and 0 score traces" in kept.stdout
    gone = runner.invoke(app, [*prune, "0"])
    assert "ok: 3 rows and 0 score traces" in gone.stdout
    result = runner.invoke(app, ["audit", "verify", "--db", str(log)])
    assert result.exit_code == 0
    assert "pruned: rows up to 3 were taken out, as the log says" in result.stdout


def test_pruning_does_not_do_away_with_the_signs_of_a_change(log: Path) -> None:
    change(log, "UPDATE audit_log SET score = 0 WHERE seq = 3")
    prune = ["audit", "prune", "--db", str(log), "--older-than-days", "0"]
    refused = runner.invoke(app, prune)
    assert refused.exit_code == 1
    assert "row 3: was changed), nothing was taken out" in refused.stderr
    assert runner.invoke(app, ["audit", "verify", "--db", str(log)]).exit_code == 1
    assert runner.invoke(app, [*prune, "--force"]).exit_code == 0


def test_replay_counts_what_another_threshold_would_do(log: Path) -> None:
    store = AuditStore(url(log))
    store.add_traces([trace(peaks={"completion": {"p": peak}}) for peak in (0.0, 1.0, 2.0, 3.0)])
    store.close()
    result = runner.invoke(app, ["replay", "--db", str(log), "--threshold", "2"])
    assert result.exit_code == 0, result.output
    assert "completion: 2 of 4 requests would trip" in result.stdout
    assert "note: " in result.stdout
    result = runner.invoke(app, ["replay", "--db", str(log), "--threshold", "p=2.5", "--json"])
    shown = json.loads(result.stdout)
    assert [group["num_would_trip"] for group in shown["data"]] == [0, 1, 1]


def test_replay_takes_thresholds_from_a_breaker(log: Path) -> None:
    path = builtin_breaker_path("smollm2-135m-instruct")
    assert path is not None
    breaker = load_breaker(path)
    probe = breaker.manifest.probes[0]
    over, under = probe.threshold_logit + 1, probe.threshold_logit - 1
    store = AuditStore(url(log))
    store.add_traces(
        [trace(breaker=breaker.digest, peaks={"prompt": {probe.name: p}}) for p in (over, under)]
        + [trace(peaks={"prompt": {probe.name: over}})]
    )
    store.close()
    promise = str(probe.calibration.fpr_upper_bound)
    arguments = ["replay", "--db", str(log), "--target-fpr", promise, "--breaker", str(path)]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "prompt: 1 of 2 requests would trip" in result.stdout


def test_replay_without_traces_says_how_to_get_some(log: Path) -> None:
    result = runner.invoke(app, ["replay", "--db", str(log), "--threshold", "1"])
    assert result.exit_code == 0
    assert "--score-traces" in result.stdout


def test_what_is_typed_goes_before_the_variables_of_the_server(log: Path, tmp_path: Path) -> None:
    live = {"CIRCUIT_BREAKERS_AUDIT_URL": "postgresql://nobody@127.0.0.1:1/none"}
    exported = runner.invoke(app, ["audit", "export", "--db", str(log)], env=live)
    assert exported.exit_code == 0, exported.output
    file = tmp_path / "audit.jsonl"
    file.write_text(exported.stdout)
    for place in ("--db", str(log)), ("--url", url(log)), ("--file", str(file)):
        for env in live, {"CIRCUIT_BREAKERS_AUDIT_DB": "none.db"}:
            verified = runner.invoke(app, ["audit", "verify", *place], env=env)
            assert verified.exit_code == 0, verified.output
    here = {"CIRCUIT_BREAKERS_AUDIT_DB": str(log)}
    assert runner.invoke(app, ["audit", "verify"], env=here).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["audit", "verify"], 2, "exactly one of --db and --url"),
        (["audit", "verify", "--url", "mysql://u:hidden@h/d"], 2, "postgresql"),
        (["audit", "verify", "--db", "none.db"], 1, "no audit log in"),
        (["audit", "verify", "--db", "none/none.db"], 2, "no folder"),
        (["audit", "verify", "--file", "f", "--db", "d"], 2, "--file and a database"),
        (["audit", "verify", "--file", "none.jsonl"], 1, "none.jsonl"),
        (["audit", "verify", "--db", "none.db", "--expect-head", "7"], 2, "SEQ:HASH"),
        (["audit", "verify", "--db", "none.db", "--key-file", "none"], 2, "none"),
        (["audit", "export", "--db", "none.db"], 1, "no audit log in"),
        (["audit", "prune", "--db", "none.db", "--older-than-days", "1"], 1, "no audit log in"),
        (["audit", "prune", "--db", "d", "--older-than-days", "inf"], 2, "--older-than-days"),
        (["replay", "--db", "d", "--threshold", "1", "--days", "999999999"], 2, "--days"),
        (["replay", "--db", "none.db"], 2, "--threshold and --target-fpr"),
        (["replay", "--db", "none.db", "--threshold", "x"], 2, "LOGIT"),
        (["replay", "--db", "none.db", "--threshold", "nan"], 2, "LOGIT"),
        (["replay", "--db", "none.db", "--threshold", "1", "--threshold", "2"], 2, "PROBE=LOGIT"),
        (["replay", "--db", "none.db", "--threshold", "1"], 1, "no audit log in"),
    ],
)
def test_wrong_usage_and_missing_logs_are_explained(
    arguments: list[str], code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, arguments)
    assert result.exit_code == code, result.output
    assert said in result.stderr
    assert "hidden" not in result.output and "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []
