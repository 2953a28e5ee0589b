"""A served model as any client sees it: text, whether it tripped, and the guard's score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from circuit_breakers.errors import BreakerMismatchError, ConfigError, EvaluationError
from circuit_breakers_training.data.jsonl import Message

__all__ = ["Reply", "ServedModel"]

_TIMEOUT_S = 600.0
_RETRIES = 5
"""Of answers that say busy, with the wait that they ask for."""


class Reply(NamedTuple):
    """What one query gives its client."""

    text: str
    """As far as it was delivered."""
    tripped: bool
    score: float | None
    """guard.score: at the trip, else the highest so far; None where nothing was scored."""
    threshold: float | None


class ServedModel:
    """The server that is attacked, through the openai client."""

    def __init__(self, url: str, api_key: str | None) -> None:
        """
        Raises:
            ConfigError: the client library is not installed.
        """
        try:
            import openai
        except ImportError as e:
            raise ConfigError(
                "this attack needs the package openai, expected it installed; pip install openai"
            ) from e
        self._errors = openai
        root = url.rstrip("/").removesuffix("/v1")
        self._client = openai.OpenAI(
            base_url=f"{root}/v1",
            # A server without keys asks for none, but the client refuses to start without.
            api_key=api_key or "none",
            timeout=_TIMEOUT_S,
            max_retries=_RETRIES,
        )
        self._root = root
        self.model = ""
        """Name of the served model."""
        self.max_model_len = 0

    def check(self, digest: str) -> None:
        """Pass if the server enforces the breaker of that digest; learn its model's name.

        Raises:
            BreakerMismatchError: it serves another breaker.
            EvaluationError: it does not answer, has no guard, or only observes.
        """
        breaker = self._get("/breaker")
        if breaker.get("digest") != digest:
            raise BreakerMismatchError(
                f"{self._root} serves breaker {str(breaker.get('digest'))[:12]}, expected "
                f"{digest[:12]}, that of --artifact; give the one that is served"
            )
        if breaker.get("mode") != "enforce":
            raise EvaluationError(
                f"{self._root} is in mode {breaker.get('mode')!r}, expected 'enforce', as nothing "
                "can be broken where nothing is stopped; serve with --mode enforce"
            )
        models = self._get("/models")["data"]
        self.model, self.max_model_len = models[0]["id"], int(models[0]["max_model_len"])

    def ask(self, messages: Sequence[Message], *, temperature: float, max_tokens: int) -> Reply:
        """One query; a conversation that ends with the assistant's turn is continued.

        No seed is sent: a server on a CPU refuses one with a temperature above 0.

        Raises:
            EvaluationError: no answer, or one without a guard's report.
        """
        continued = messages[-1].role == "assistant"
        prefill = {"add_generation_prompt": False, "continue_final_message": True}
        try:
            answer = self._client.chat.completions.create(
                model=self.model,
                messages=[{"role": m.role, "content": m.content} for m in messages],  # type: ignore[misc]
                temperature=temperature,
                max_tokens=max_tokens,
                extra_body=prefill if continued else None,
            )
        except self._errors.APIStatusError as error:
            body = error.body if isinstance(error.body, dict) else {}
            if body.get("code") != "content_filter":
                raise self._failure(f"status {error.status_code}") from None
            return _reply("", body.get("guard"))
        except self._errors.OpenAIError as error:
            # Its text may quote what was asked.
            raise self._failure(type(error).__name__) from None
        choice = answer.choices[0]
        return _reply(choice.message.content or "", (choice.model_extra or {}).get("guard"))

    def _get(self, path: Literal["/breaker", "/models"]) -> dict[str, Any]:
        try:
            # Not there at the start is no server that is busy.
            found = self._client.with_options(max_retries=0).get(path, cast_to=object)
        except self._errors.OpenAIError as error:
            raise self._failure(f"{type(error).__name__} from GET /v1{path}") from None
        if not isinstance(found, dict):
            raise self._failure(f"no object from GET /v1{path}")
        return found

    def _failure(self, got: str) -> EvaluationError:
        return EvaluationError(
            f"{self._root}: got {got}, expected an answer of `circuit-breakers serve`; check that "
            "it runs and is ready, and --api-key"
        )


def _reply(text: str, guard: Any) -> Reply:
    if not isinstance(guard, dict) or not isinstance(guard.get("tripped"), bool):
        raise EvaluationError(
            "got an answer without a guard's report, expected one on each; check that --url is a "
            "server of `circuit-breakers serve`"
        )
    return Reply(text, guard["tripped"], guard.get("score"), guard.get("threshold"))
