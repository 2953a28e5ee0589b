"""Plain HTTP: the report is the field `guard` of the answer, or of its error.

OPENAI_BASE_URL=http://127.0.0.1:8000/v1 python plain_requests.py "What is a circuit breaker?"
"""

import os
import sys

import requests

from circuit_breakers_client import guard_of

BASE_URL = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
KEY = os.environ.get("OPENAI_API_KEY", "none")
MODEL = os.environ.get("CIRCUIT_BREAKERS_MODEL", "smollm2-135m-instruct")

for question in sys.argv[1:]:
    answer = requests.post(
        f"{BASE_URL}/chat/completions",
        headers={"Authorization": f"Bearer {KEY}"},
        json={
            "model": MODEL,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": 32,
        },
        timeout=600,
    )
    body = answer.json()
    report = guard_of(body)
    if report is None:
        answer.raise_for_status()
        sys.exit("this server has no guard")
    if not answer.ok:
        print(f"the {report.phase} was stopped: {report}")
    else:
        text = body["choices"][0]["message"]["content"]
        print(f"{text!r}, tripped: {report.tripped}")
