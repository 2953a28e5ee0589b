"""A policy file is taken whole or refused, with table, field and cure."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from circuit_breakers.errors import ConfigError
from circuit_breakers.policies.api_keys import new_key
from circuit_breakers.policies.limits import KeyLimits
from circuit_breakers.policies.policy_file import load_policy_file

HASHES = ["hmac-sha256:00000000:" + digit * 64 for digit in "abc"]
POLICIES = """
default = "standard"
[policies.standard]
[policies.strict]
mode = "enforce"
threshold = { layer16 = 2.5, layer3 = -1 }
phases = ["completion"]
probes = ["layer16", "layer3"]
action = "refuse"
refusal = "No."
"""
KEYS = f"""
[[keys]]
id = "team-a"
hash = "{HASHES[0]}"
policy = "strict"
models = ["m"]
expires = 2027-01-01T00:00:00Z
[keys.limits]
requests_per_minute = 60
burst = 5
[[keys]]
id = "ops"
hash = "{HASHES[1]}"
scope = ["admin"]
"""


def write(directory: Path, text: str) -> Path:
    file = directory / "policies.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_whole_file_is_read(tmp_path: Path) -> None:
    file = load_policy_file(write(tmp_path, POLICIES + KEYS)).content
    assert (file.default, file.metrics) == ("standard", "open")
    standard, strict = file.policies["standard"], file.policies["strict"]
    assert (standard.mode, standard.target_fpr, standard.probes) == (None, None, None)
    assert standard.phases == {"prompt", "completion"}
    assert strict.threshold == {"layer16": 2.5, "layer3": -1.0}
    assert (strict.action, strict.refusal, strict.phases) == ("refuse", "No.", {"completion"})
    team, ops = file.keys
    assert (team.policy, team.models, team.scope) == ("strict", {"m"}, {"inference"})
    assert team.limits == KeyLimits(requests_per_minute=60, burst=5)
    assert (ops.scope, ops.limits) == ({"admin"}, None)


def test_a_key_expires_at_its_time(tmp_path: Path) -> None:
    team, ops = load_policy_file(write(tmp_path, POLICIES + KEYS)).content.keys
    assert not team.has_expired(datetime(2026, 12, 31, 23, 59, tzinfo=UTC))
    assert team.has_expired(datetime(2027, 1, 1, tzinfo=UTC))
    assert not ops.has_expired(datetime(2100, 1, 1, tzinfo=UTC))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'mode = "enforce"',
            "mode = 1",
            r"\[policies\.strict\] mode: got 1, expected 'observe' or",
        ),
        ("[policies.strict]", "[policies.Strict]", r"\[policies\.Strict\].*lower-case.*rename it"),
        (
            "[policies.strict]",
            "[policies.strict]\ntarget_fpr = 0.1",
            "got target_fpr and threshold",
        ),
        ("layer16 = 2.5", "layer16 = inf", r"\[policies\.strict\] threshold\.layer16: got inf"),
        ("layer16 = 2.5", "layer16 = true", r"threshold\.layer16: got True, expected a valid num"),
        ("layer16 = 2.5", "layer9 = 2.5", r"threshold: got probe 'layer9', expected one that `pr"),
        ('"completion"', '"reasoning"', r"phases\.0: got 'reasoning', expected 'prompt' or"),
        ('phases = ["completion"]', "phases = []", r"phases: got \[\], expected at least one"),
        ('action = "refuse"', 'action = "stop"', "got a text with action 'stop'"),
        ('action = "refuse"', 'axtion = "refuse"', r"\[policies\.strict\] axtion: got an unknown"),
        ('default = "standard"', "", "default: got nothing, expected a value; add it"),
        ('default = "standard"', 'default = "x"', "default: got 'x', expected one of the policies"),
        ('id = "ops"', 'id = "anonymous"', r"number 2 \(id 'anonymous'\).*without a key; rename"),
        ('id = "ops"', 'id = "server"', r"\(id 'server'\).*the server does by itself; rename"),
        (HASHES[1], HASHES[0], r"number 2 \(id 'ops'\) hash: got that of id 'team-a' again"),
        ('id = "ops"', 'id = "team-a"', r"\(id 'team-a'\) policy: differs from an earlier key"),
        ('policy = "strict"', 'policy = "lax"', r"policy: got 'lax', expected one of.*add a table"),
        ("00:00:00Z", "00:00:00", r"number 1 \(id 'team-a'\) expires: .*a time with its zone"),
        ("requests_per_minute = 60", "", "limits: got burst 5 without requests_per_minute"),
        ("burst = 5", "burst = 0", r"limits\.burst: got 0, expected greater than or equal to 1"),
        ('scope = ["admin"]', 'scope = ["root"]', r"scope\.0: got 'root', expected 'inference' or"),
        ("burst = 5", "burst = ", r"not TOML: .*line \d+"),
        ("burst = 5", "burst = " + "[" * 2000, "not TOML: maximum recursion"),
        ("burst = 5", "burst = " + "9" * 5000, "not TOML: Exceeds the limit"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = POLICIES + KEYS
    assert text.count(old) == 1 or old in (HASHES[1], "[policies.strict]")
    with pytest.raises(ConfigError, match=message) as caught:
        load_policy_file(write(tmp_path, text.replace(old, new)))
    assert str(tmp_path / "policies.toml") in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (f'hash = "{HASHES[0]}"', 'hash = "cb-Secret"'),
        (f'hash = "{HASHES[0]}"', 'hash = ["cb-Secret"]'),
        ('id = "team-a"', 'id = "cb-Secret"'),
        ("burst = 5", 'burst = 5\nkey = "cb-Secret"'),
        ("[policies.standard]", 'pepper = "cb-Secret"\n[policies.standard]'),
    ],
)
def test_a_message_never_shows_what_may_be_a_secret(tmp_path: Path, old: str, new: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_policy_file(write(tmp_path, (POLICIES + KEYS).replace(old, new)))
    assert "Secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('default = "standard"', 'default = "KEY"'),
        ('default = "standard"', 'default = "standard"\nkeys = ["KEY"]'),
        ('policy = "strict"', 'policy = "KEY"'),
        ('models = ["m"]', 'models = "KEY"'),
        ('scope = ["admin"]', 'scope = ["KEY"]'),
        ("burst = 5", 'burst = "KEY"'),
        ("burst = 5", '"KEY" = 5'),
    ],
)
def test_a_key_that_stands_in_another_place_is_not_shown(
    tmp_path: Path, old: str, new: str
) -> None:
    key = new_key()
    text = POLICIES + ("" if "keys = [" in new else KEYS)
    assert old in text
    with pytest.raises(ConfigError) as caught:
        load_policy_file(write(tmp_path, text.replace(old, new.replace("KEY", key), 1)))
    assert key not in str(caught.value) and "<an API key>" in str(caught.value)


def test_keys_of_one_id_differ_in_hash_and_expiry_only(tmp_path: Path) -> None:
    rotated = f'\n[[keys]]\nid = "ops"\nhash = "{HASHES[2]}"\nscope = ["admin"]\n'
    later = "expires = 2027-06-01T00:00:00Z\n"
    keys = load_policy_file(write(tmp_path, POLICIES + KEYS + rotated + later)).content.keys
    assert [key.id for key in keys] == ["team-a", "ops", "ops"]
    with pytest.raises(ConfigError, match="differs from an earlier key of that id"):
        load_policy_file(write(tmp_path, POLICIES + KEYS + rotated + 'models = ["m"]\n'))


def test_an_empty_file_is_no_policy_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="policies: got nothing"):
        load_policy_file(write(tmp_path, ""))
    with pytest.raises(ConfigError, match=r"cannot read the policy file .*; pass --policies"):
        load_policy_file(tmp_path / "missing.toml")
    (tmp_path / "latin.toml").write_bytes(b"default = '\xe9'")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 11"):
        load_policy_file(tmp_path / "latin.toml")


def test_the_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    import hashlib

    file = write(tmp_path, POLICIES)
    assert load_policy_file(file).digest == hashlib.sha256(file.read_bytes()).hexdigest()
