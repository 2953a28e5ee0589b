"""What litellm shows: python ask_litellm.py BASE_URL MODEL TEXT..."""

from __future__ import annotations

import json
import sys
from typing import Any

import litellm
import openai

litellm.suppress_debug_info = True


def ask(base_url: str, model: str, text: str, stream: bool) -> dict[str, Any]:
    try:
        answer: Any = litellm.completion(
            model=f"openai/{model}",
            api_base=base_url,
            api_key="none",
            messages=[{"role": "user", "content": text}],
            temperature=0,
            max_tokens=32,
            stream=stream,
            num_retries=0,
        )
        if stream:
            answer = litellm.stream_chunk_builder(list(answer))
        choice = answer.choices[0]
        return {"text": choice.message.content, "finish_reason": choice.finish_reason}
    except openai.OpenAIError as e:
        return {"error": type(e).__name__, "status": getattr(e, "status_code", None)}


if __name__ == "__main__":
    base_url, model, *texts = sys.argv[1:]
    print(json.dumps([ask(base_url, model, text, s) for text in texts for s in (False, True)]))
