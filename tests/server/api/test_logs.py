"""Records become one line each; that a whole server logs so, test_observability.py shows."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from typing import Any

from circuit_breakers.api.logs import ENGINE_CONFIG, JsonFormatter, TextFormatter, log_request
from circuit_breakers.api.request_summary import RequestSummary
from circuit_breakers.errors import ConfigError

SUMMARY = RequestSummary(
    request_id="req-1",
    key_id="team-a",
    model="m",
    endpoint="chat",
    outcome="rejected",
    error="invalid_value",
    started_ns=0,
    duration_s=0.5,
    ttft_s=None,
)


def record(message: str, *args: object, **more: Any) -> logging.LogRecord:
    made = logging.LogRecord("circuit_breakers.x", logging.WARNING, "f", 1, message, args, None)
    made.__dict__ |= more
    return made


def test_a_record_is_one_line_of_json_whatever_it_says() -> None:
    try:
        raise ValueError("line one\nline two")
    except ValueError:
        made = record('a "quoted"\n%s', "é", exc_info=sys.exc_info())
    line = JsonFormatter().format(made)
    assert "\n" not in line
    entry = json.loads(line)
    assert entry["message"] == 'a "quoted"\né'
    assert (entry["level"], entry["logger"]) == ("warning", "circuit_breakers.x")
    assert entry["time"].endswith("+00:00")
    assert entry["exception"].endswith("ValueError")


def test_a_traceback_has_frames_and_our_words_and_nobody_elses() -> None:
    try:
        try:
            compile("terces"[::-1] + "(", "<answer>", "eval")  # its message quotes the line
        except SyntaxError as e:
            raise ConfigError("got 1, expected 2") from e
    except ConfigError:
        made = record("broke", exc_info=sys.exc_info())
    for said in (JsonFormatter().format(made), TextFormatter().format(made)):
        assert "secret" not in said
        assert "ConfigError: got 1, expected 2" in said
        assert "SyntaxError" in said and "test_logs.py" in said


def test_fields_stand_beside_the_message_in_json_and_behind_it_in_text() -> None:
    made = record("request ended", fields={"request_id": "req-1", "score": 1.5})
    entry = json.loads(JsonFormatter().format(made))
    assert (entry["message"], entry["request_id"], entry["score"]) == (
        "request ended",
        "req-1",
        1.5,
    )
    text = TextFormatter().format(made)
    assert text == "WARNING circuit_breakers.x: request ended request_id=req-1 score=1.5"


def test_a_request_that_ended_is_a_record_with_its_fields(caplog: Any) -> None:
    with caplog.at_level(logging.INFO, "circuit_breakers.access"):
        log_request(SUMMARY)
    (made,) = caplog.records
    assert made.fields == SUMMARY.to_json()
    assert made.fields["error"] == "invalid_value"


def test_the_engines_file_sets_its_logger_up_with_one_json_line_a_record() -> None:
    code = """
import json, logging.config, pathlib, sys
logging.config.dictConfig(json.loads(pathlib.Path(sys.argv[1]).read_text()))
logging.getLogger("vllm.engine").info("hello")
logging.getLogger("vllm.engine").debug("below the level")
logging.getLogger("other").warning("there")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(ENGINE_CONFIG)],
        env={**os.environ, "VLLM_LOGGING_LEVEL": "INFO"},
        capture_output=True,
        text=True,
        check=True,
    )
    entries = [json.loads(line) for line in done.stderr.splitlines()]
    assert [(e["logger"], e["message"]) for e in entries] == [
        ("vllm.engine", "hello"),
        ("other", "there"),
    ]
