"""Keys at rest are hashes under a pepper, and finding one tells nothing of the others."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from circuit_breakers.errors import ConfigError
from circuit_breakers.policies import api_keys
from circuit_breakers.policies.api_keys import Pepper, load_pepper, new_key

SECRET = "0123456789abcdef"
PEPPER = Pepper(SECRET.encode())


def keys(*texts: str) -> list[Any]:
    return [SimpleNamespace(id=f"k{i}", hash=PEPPER.hash(text)) for i, text in enumerate(texts)]


def test_a_hash_is_hmac_sha256_under_the_pepper() -> None:
    expected = hmac.new(SECRET.encode(), b"cb-x", hashlib.sha256).hexdigest()
    assert PEPPER.hash("cb-x") == f"hmac-sha256:{PEPPER.name}:{expected}"
    assert Pepper(b"another pepper, as long").hash("cb-x") != PEPPER.hash("cb-x")


def test_finds_the_key_that_is_shown_and_no_other() -> None:
    ring = keys("cb-a", "cb-b", "cb-c")
    assert [PEPPER.find(text, ring) for text in ("cb-a", "cb-b", "cb-c")] == ring
    for wrong in ("", "cb-", "cb-aa", "CB-A", ring[0].hash, "cb-\udcff", "ключ"):
        assert PEPPER.find(wrong, ring) is None


def test_every_key_is_compared_in_constant_time_whichever_is_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared: list[tuple[str, str]] = []

    def counted(a: str, b: str) -> bool:
        compared.append((a, b))
        return hmac.compare_digest(a, b)

    monkeypatch.setattr(api_keys, "hmac", SimpleNamespace(new=hmac.new, compare_digest=counted))
    ring = keys("cb-a", "cb-b", "cb-c")
    for shown in ("cb-a", "cb-c", "cb-none"):
        compared.clear()
        PEPPER.find(shown, ring)
        assert [b for _, b in compared] == [key.hash for key in ring], "no early exit"
        assert all(a == PEPPER.hash(shown) for a, _ in compared), "hashes, never keys"


def test_keys_are_random_and_long() -> None:
    made = {new_key() for _ in range(100)}
    assert len(made) == 100
    # 32 bytes in base64 without padding are 43 characters.
    assert {len(key) for key in made} == {len("cb-") + 43}


def test_the_pepper_comes_from_one_place(tmp_path: Path) -> None:
    file = tmp_path / "pepper"
    file.write_text(SECRET + "\n")
    variable = {"CIRCUIT_BREAKERS_PEPPER": SECRET}
    assert load_pepper(variable, None).hash("x") == load_pepper({}, file).hash("x")
    with pytest.raises(ConfigError, match="both CIRCUIT_BREAKERS_PEPPER and --pepper-file"):
        load_pepper(variable, file)
    with pytest.raises(ConfigError, match=r"no pepper.*set CIRCUIT_BREAKERS_PEPPER.*openssl"):
        load_pepper({}, None)
    with pytest.raises(ConfigError, match="cannot read the pepper file"):
        load_pepper({}, tmp_path / "missing")


def test_a_short_pepper_is_refused_without_being_shown() -> None:
    with pytest.raises(ConfigError, match="got a pepper of 7 characters") as caught:
        load_pepper({"CIRCUIT_BREAKERS_PEPPER": "cumin-7"}, None)
    assert "cumin" not in str(caught.value)


def test_hashes_of_another_pepper_are_named() -> None:
    PEPPER.check_made(keys("cb-a"))
    with pytest.raises(ConfigError, match=rf"keys of k0 were hashed.*{PEPPER.name}"):
        PEPPER.check_made([SimpleNamespace(id="k0", hash=Pepper(b"x" * 16).hash("cb-a"))])
