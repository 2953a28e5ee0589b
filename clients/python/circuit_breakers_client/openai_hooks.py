"""Everything that this package uses of openai and that openai does not promise, in one place.

`_process_response_data` of a client: every body that is parsed goes through it, from
`with_raw_response` and inside of `.parse()` too, before openai raises its own
ContentFilterFinishReasonError, which has no report. Only `request` would be public, and it does not
see those.

`_raw_stream` of the helpers that `chat.completions.stream` and `responses.stream` give: they keep
no field of a chunk that they do not know, and have no public way to the stream below.
"""

from __future__ import annotations

from typing import Any

import openai

from circuit_breakers_client.answers import Rules, is_guarded

__all__ = ["ParsingHook", "leave_to_stream", "raw_stream"]

_HOOK = "_process_response_data"
_IS_WATCHED = "circuit_breakers_stream"
if not all(hasattr(client, _HOOK) for client in (openai.OpenAI, openai.AsyncOpenAI)):
    # Without it, answers would go unchecked in silence.
    raise ImportError(
        f"got openai {openai.__version__}, whose clients have no {_HOOK}, expected openai>=2,<4; "
        "install one of those, or a newer circuit-breakers-client"
    )


class ParsingHook:
    """Checks each whole answer before anybody gets it; for both of openai's clients."""

    _rules: Rules

    def _process_response_data(self, *, data: object, cast_to: type[Any], response: Any) -> Any:
        # The server has a say in neither: a stream is what one of this package's streams reads, and
        # a redirect may change method and path.
        asked = (response.history or [response])[0].request
        if _IS_WATCHED not in response.extensions and is_guarded(asked.method, asked.url.path):
            self._rules.check_whole(data)
        return super()._process_response_data(  # type: ignore[misc]
            data=data, cast_to=cast_to, response=response
        )


def leave_to_stream(response: Any) -> None:
    """What is parsed of it are chunks, each of which the stream that reads it checks."""
    response.extensions[_IS_WATCHED] = True


def raw_stream(helper: object) -> object:
    """The stream below one of openai's stream helpers; None where there is none."""
    return getattr(helper, "_raw_stream", None)
