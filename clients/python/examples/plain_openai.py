"""The openai package as it is: guard_of reads the report that the server adds.

OPENAI_BASE_URL=http://127.0.0.1:8000/v1 python plain_openai.py "What is a circuit breaker?"
"""

import os
import sys

import openai

from circuit_breakers_client import guard_of

MODEL = os.environ.get("CIRCUIT_BREAKERS_MODEL", "smollm2-135m-instruct")

client = openai.OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)
for question in sys.argv[1:]:
    try:
        answer = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=32,
        )
    except openai.BadRequestError as error:
        if error.code != "content_filter":
            raise
        print(f"the prompt was stopped: {guard_of(error)}")
        continue
    # A server without a guard would be taken for one that let the answer pass.
    report = guard_of(answer)
    assert report is not None, "this server has no guard"
    print(f"{answer.choices[0].message.content!r}, tripped: {report.tripped}")
