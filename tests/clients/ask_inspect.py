"""What inspect-ai shows: python ask_inspect.py BASE_URL MODEL TEXT..."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import openai
from inspect_ai.model import GenerateConfig, get_model


async def ask(base_url: str, model: str, text: str, stream: bool) -> dict[str, Any]:
    asked = get_model(
        f"openai-api/guarded/{model}",
        base_url=base_url,
        api_key="none",
        memoize=False,
        stream=stream,
        config=GenerateConfig(temperature=0, max_tokens=32, max_retries=0),
    )
    try:
        answer = await asked.generate(text)
        return {"text": answer.completion, "finish_reason": answer.stop_reason}
    except openai.OpenAIError as e:
        return {"error": type(e).__name__, "status": getattr(e, "status_code", None)}


async def main(base_url: str, model: str, *texts: str) -> None:
    print(json.dumps([await ask(base_url, model, t, s) for t in texts for s in (False, True)]))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
