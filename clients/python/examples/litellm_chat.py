"""LiteLLM on this package's client: LiteLLM turns what a client raises into errors of its own, and
keeps the trip in their chain.

    OPENAI_BASE_URL=http://127.0.0.1:8000/v1 python litellm_chat.py "What is a circuit breaker?"
"""

import os
import sys

import litellm

from circuit_breakers_client import CircuitBreakers, TrippedError

MODEL = os.environ.get("CIRCUIT_BREAKERS_MODEL", "smollm2-135m-instruct")

client = CircuitBreakers(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
    on_trip="raise",
)


def trip_of(error: BaseException | None) -> TrippedError | None:
    """The trip that an error was made of."""
    while error is not None and not isinstance(error, TrippedError):
        error = error.__cause__ or error.__context__
    return error


for question in sys.argv[1:]:
    try:
        answer = litellm.completion(
            model=f"openai/{MODEL}",
            client=client,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=32,
            num_retries=0,
        )
    except Exception as error:
        if (trip := trip_of(error)) is None:
            raise
        print(f"{trip.partial_text!r}, tripped: True")
        print(trip)
    else:
        print(f"{answer.choices[0].message.content!r}, tripped: False")
