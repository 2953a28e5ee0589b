"""What langchain-openai shows: python ask_langchain.py BASE_URL MODEL TEXT..."""

from __future__ import annotations

import json
import sys
from typing import Any

import openai
from langchain_openai import ChatOpenAI


def ask(base_url: str, model: str, text: str, stream: bool) -> dict[str, Any]:
    chat: Any = ChatOpenAI(
        model=model,
        base_url=base_url,
        api_key="none",
        temperature=0,
        max_tokens=32,
        max_retries=0,
    )
    try:
        if stream:
            chunks = iter(chat.stream(text))
            answer = next(chunks)
            for chunk in chunks:
                answer += chunk
        else:
            answer = chat.invoke(text)
        reason = answer.response_metadata["finish_reason"]
        return {"text": answer.content, "finish_reason": reason}
    except openai.OpenAIError as e:
        status, code = getattr(e, "status_code", None), getattr(e, "code", None)
        return {"error": type(e).__name__, "status": status, "code": code}


if __name__ == "__main__":
    base_url, model, *texts = sys.argv[1:]
    print(json.dumps([ask(base_url, model, text, s) for text in texts for s in (False, True)]))
