"""LangChain: ChatOpenAI on this package's clients, so that a trip is raised through every chain.

OPENAI_BASE_URL=http://127.0.0.1:8000/v1 python langchain_chat.py "What is a circuit breaker?"
"""

import os
import sys

from langchain_openai import ChatOpenAI

from circuit_breakers_client import AsyncCircuitBreakers, CircuitBreakers, TrippedError

server = {
    "base_url": os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    "api_key": os.environ.get("OPENAI_API_KEY", "none"),
}
client = CircuitBreakers(**server, on_trip="raise")
async_client = AsyncCircuitBreakers(**server, on_trip="raise")
model = ChatOpenAI(
    model=os.environ.get("CIRCUIT_BREAKERS_MODEL", "smollm2-135m-instruct"),
    temperature=0,
    max_tokens=32,
    # LangChain would make openai's own clients; these are asked instead.
    client=client.chat.completions,
    async_client=async_client.chat.completions,
    root_client=client,
    root_async_client=async_client,
    **server,
)
for question in sys.argv[1:]:
    try:
        print(f"{model.invoke(question).content!r}, tripped: False")
        print("streamed:", "".join(str(part.content) for part in model.stream(question)))
    except TrippedError as trip:
        print(f"{trip.partial_text!r}, tripped: True")
        print(trip)
