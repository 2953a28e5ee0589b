"""Digests, signatures and heads."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

import pytest

from circuit_breakers.audit.chain import GENESIS, HASHED_FIELDS, Head, Signer, digest, linked
from circuit_breakers.errors import ConfigError

from .entries import KEY, trip


def test_a_digest_is_sha256_of_the_canonical_row() -> None:
    entry = trip(entry_id="0" * 32, time_us=1, breaker="b", detail="é")
    (row,) = linked([entry], None, None)
    # Written out by hand: sorted names, no spaces, ASCII.
    text = (
        '{"action":"stopped","breaker":"b","choice":0,"detail":"\\u00e9",'
        f'"entry_id":"{"0" * 32}","key_id":"anonymous","kind":"trip","model":"m",'
        f'"phase":"completion","policy":"default","prev_hash":"{GENESIS}","probe":"p",'
        '"request_id":"chatcmpl-1","score":1.25,"seq":1,"threshold":1.0,"time_us":1,'
        '"token_index":7,"version":1}'
    )
    assert row["hash"] == hashlib.sha256(text.encode()).hexdigest()


def test_rows_are_linked_to_the_one_before() -> None:
    first, second = linked([trip(), trip()], Head(4, "a" * 64), None)
    assert (first["seq"], first["prev_hash"]) == (5, "a" * 64)
    assert (second["seq"], second["prev_hash"]) == (6, first["hash"])
    assert {*HASHED_FIELDS, "hash", "mac"} == set(first)


def test_a_signature_is_hmac_sha256_of_the_digest() -> None:
    (row,) = linked([trip()], None, Signer([KEY]))
    fingerprint, _, value = row["mac"].partition(":")
    assert value == hmac.new(KEY, row["hash"].encode(), hashlib.sha256).hexdigest()
    assert len(fingerprint) == 8
    assert Signer([KEY]).accepts(row["hash"], row["mac"])


@pytest.mark.parametrize("mac", ["", ":", "zz", "é", "0" * 73])
def test_a_broken_signature_is_not_accepted(mac: str) -> None:
    assert not Signer([KEY]).accepts("0" * 64, mac)


def test_after_a_change_of_keys_both_are_accepted_and_the_newest_signs() -> None:
    (old,) = linked([trip()], None, Signer([KEY]))
    both = Signer([b"n" * 32, KEY])
    (new,) = linked([trip()], Head(1, old["hash"]), both)
    assert both.accepts(old["hash"], old["mac"])
    assert both.accepts(new["hash"], new["mac"])
    assert not Signer([KEY]).accepts(new["hash"], new["mac"])


def test_a_head_reads_what_it_writes() -> None:
    head = Head(7, digest(linked([trip()], None, None)[0]))
    assert Head.parse(f" {head}\n") == head
    zeros = "0" * 64
    wrong = ("", "7", f"x:{zeros}", f"7:{zeros[1:]}", "7:" + "g" * 64, f"{'7' * 5000}:{zeros}")
    for text in (*wrong, f"\N{ARABIC-INDIC DIGIT SEVEN}:{zeros}"):
        with pytest.raises(ConfigError, match="expected SEQ:HASH"):
            Head.parse(text)


def test_a_key_that_is_no_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with pytest.raises(ConfigError, match="No such file"):
        Signer.from_files([path])
    path.write_text("short\n")
    with pytest.raises(ConfigError, match="holds 5 bytes, expected 32 or more"):
        Signer.from_files([path])
    path.write_bytes(KEY + b"\n")
    assert Signer.from_files([path]) is not None
    assert Signer.from_files([]) is None
