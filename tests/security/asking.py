"""Requests of every shape by the real client, and the token ids of a text."""

from __future__ import annotations

from typing import Any

from ..server.api.conftest import MODEL, Server

__all__ = ["COMPLETIONS", "PREFILL", "ids_of", "post", "said"]

COMPLETIONS = "/v1/completions"


def post(server: Server, path: str, body: dict[str, Any], *, stream: bool) -> Any:
    return server.http.post(path, json={"model": MODEL, "temperature": 0, **body, "stream": stream})


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


PREFILL = {"add_generation_prompt": False, "continue_final_message": True}


def ids_of(text: str) -> list[int]:
    """Tokens of a text that trips, which the server itself would not tell."""
    from transformers import AutoTokenizer

    from circuit_breakers.models import resolve_model

    tokenizer = AutoTokenizer.from_pretrained(resolve_model(MODEL).path, local_files_only=True)
    ids: list[int] = tokenizer(text).input_ids
    return ids
