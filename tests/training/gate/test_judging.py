"""The base model at the gate, on the template that the server uses."""

from __future__ import annotations

from pathlib import Path

from circuit_breakers_training.data.jsonl import Message
from circuit_breakers_training.evaluation.prompts import EvalPrompt
from circuit_breakers_training.evaluation.suites import Attempt
from circuit_breakers_training.gate.judging import Judge
from circuit_breakers_training.render import PLAIN_TEMPLATE


def test_a_base_model_reads_requests_by_the_template_of_the_breaker(
    base_gpt2: Path, tmp_path: Path
) -> None:
    template = tmp_path / "chat_template.jinja"
    template.write_text(PLAIN_TEMPLATE)
    judge = Judge(
        model_id=str(base_gpt2),
        chat_template=template,
        prompts=(),
        max_new_tokens=4,
        degenerate_share=0.05,
        console=None,
    )
    messages = (Message("user", "please b1 b2"),)
    prompt = EvalPrompt(messages=messages, label="benign", source="s")
    attempt = Attempt(suite="direct", technique="as-is", prompt=prompt, messages=messages)
    # "User:" and "Assistant:" besides the words.
    assert judge.num_prompt_tokens(attempt) == 5
    (text,) = judge.base_texts([attempt])
    assert len(text.split()) <= 4
