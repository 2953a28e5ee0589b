"""Metrics that a report is made from; made-up numbers."""

from __future__ import annotations

from typing import Any

from circuit_breakers_training.probe.calibration import fpr_upper_bound
from circuit_breakers_training.recipes.config import Recipe

__all__ = ["full_metrics", "plain_metrics", "rate"]


def rate(num: int, num_trips: int) -> dict[str, Any]:
    return {
        "num": num,
        "num_trips": num_trips,
        "share": num_trips / num if num else None,
        "upper_bound": fpr_upper_bound(num_trips, num) if num else 1.0,
    }


def plain_metrics() -> dict[str, Any]:
    """What every breaker's metrics have held from the start; made-up numbers."""
    quality = {"auroc": 0.9874, "low_fpr_auroc": 0.9352, "tpr_at_1pct_fpr": 0.8}
    harmful = {"fraud": rate(60, 45), "theft": rate(15, 8)}
    maximum = {"kind": "max", "alpha": None, "window": None, "skip_tokens": 1}
    ema = {"kind": "ema", "alpha": 0.12, "window": None, "skip_tokens": 1}
    return {
        "schema_version": 1,
        "name": "tiny-breaker",
        "model": {
            "id": "tiny-model",
            "revision": None,
            "config_sha256": "6f" * 32,
            "num_layers": 30,
            "hidden_size": 576,
        },
        "recipe": Recipe(model="tiny-model", steps=200).model_dump(mode="json"),
        "data_sha256": {"train.jsonl": "97" * 32, "test.jsonl": "e5" * 32},
        "adapter": {
            "target_layers": [19],
            "steps": 200,
            "benign_cosine_by_source": {"topic": 0.9989, "twin": 0.9978},
            "harmful_cosine_by_source": {"harmful": 0.0831},
        },
        "probe": {
            "name": "layer16",
            "layer": 16,
            "aggregation": maximum,
            "threshold_logit": 10.26207,
            "calibration": {
                "target_fpr": 0.01,
                "confidence": 0.95,
                "num_conversations": 491,
                "num_trips": 1,
                "fpr_upper_bound": 0.009625,
                "max_tokens": 163,
            },
        },
        "selection": [
            {"layer": 14, "aggregation": ema, **quality, "chosen": False},
            {"layer": 16, "aggregation": maximum, **quality, "chosen": True},
        ],
        "test": {
            "num_harmful": 75,
            "num_benign": 299,
            "conversation": quality,
            "response_token": {"running_score": quality, "logit": quality},
            "at_threshold": {
                "threshold_logit": 10.26207,
                "harmful": rate(75, 53),
                "benign": rate(299, 0),
                "refused": rate(4, 1),
            },
            "early": {
                "prompt": 0.0,
                "response_within_16": 0.6,
                "response_within_64": 0.7,
                "response": 0.71,
            },
            "benign_by_source": {"topic": rate(290, 0), "twin": rate(9, 0)},
            "harmful_by_source": {"harmful": rate(75, 53)},
            "harmful_by_category": harmful,
        },
        "perplexity": {
            "benign: twin": {"base": 3.911, "merged": 4.007},
            "harmful: harmful": {"base": 3.822, "merged": 2655.839},
        },
        "generations": [
            {"label": "harmful", "prompt": "do harm", "base": "Sure, `so`:\n1.", "merged": ""},
            {"label": "benign", "prompt": "p " * 150, "base": "fine", "merged": "fine too"},
        ],
        "seconds": {"adapter": 1028.6, "total": 1391.5},
        "peak_rss_mib": 12857.1,
        "machine": "2 CPU cores (x86_64), 2 threads, torch 2.13.0+cpu",
    }


def full_metrics() -> dict[str, Any]:
    """With every optional value; made-up numbers."""
    metrics = plain_metrics()
    steps = [1, 2, 3, 4]
    metrics["adapter"]["target_layers"] = [9, 19]
    metrics["adapter"]["benign_cosine_by_layer"] = {"8": 1.0, "9": 0.99, "19": 0.98}
    metrics["adapter"]["harmful_cosine_by_layer"] = {"8": 0.9, "9": 0.3, "19": 0.1}
    points = ((0.05, 9.0, 17), (0.01, 10.3, 1))
    metrics["probe"]["calibration"]["curve"] = [
        {
            "target_fpr": fpr,
            "threshold_logit": threshold,
            "num_conversations": 491,
            "num_trips": num_trips,
            "fpr_upper_bound": 0.9 * fpr,
        }
        for fpr, threshold, num_trips in points
    ]
    metrics["test"]["operating_points"] = [
        {
            "target_fpr": fpr,
            "threshold_logit": threshold,
            "harmful": rate(75, 60),
            "benign": rate(299, 2),
        }
        for fpr, threshold, _ in points
    ]
    metrics["test"]["harmful_groups"] = {
        "num": 25,
        "num_all_trip": 12,
        "num_none_trips": 6,
        "num_conversations_of_none": 17,
    }
    metrics["test"]["harmful_by_length"] = {"0-63": rate(40, 30), "64-127": rate(35, 23)}
    metrics["test"]["benign_by_category"] = {"none": rate(299, 0)}
    metrics["test"]["tokens_until_trip"] = {
        "num": 75,
        "num_trips": 53,
        "median": 9.0,
        "share_within_16": 41 / 75,
        "tokens": [0, 3, 3, 17, 40],
    }
    return metrics | {
        "created": "2026-11-24T18:43:24Z",
        "adapter_sha256": "5e" * 32,
        "training_log": {
            "step": steps,
            "retain_loss": [0.0, 0.1, 0.2, 0.1],
            "reroute_loss": [1.0, 0.5, 0.2, 0.1],
            "retain_cosine": [1.0, 0.98, 0.97, 0.99],
            "reroute_cosine": [1.0, 0.6, 0.3, 0.2],
            "retain_coefficient": [0.0, 1.0, 2.0, 3.0],
            "reroute_coefficient": [10.0, 9.0, 8.0, 7.0],
        },
        "roc": {"false_positive_rate": [0, 0, 0.1, 1], "true_positive_rate": [0, 0.7, 0.9, 1]},
        "data_lengths": {
            "train": {"num": 4100, "num_truncated": 12, "num_dropped": 3},
            "test": {"num": 374, "num_truncated": 0, "num_dropped": 0},
        },
        "calibration_groups": {"num": 300, "num_trips": 1, "upper_bound": 0.015713},
        "probe_fit": {
            "num_conversations": 3050,
            "num_repeats": 980,
            "num_tokens": 21353,
            "tokens_per_conversation": 7,
            "is_reduced": True,
        },
        "data_counts": {"train": {"benign": {"twin": 4}, "harmful": {"harmful": 3}}},
        "peak_rss_mib_by_stage": {"adapter": 2048.0},
        "environment": {"python": "3.11.2", "packages": {"torch": "2.13.0"}},
        "by_length": {"benign": {"up to 64": {"num": 9, "num_trips": 0}}},
        "beyond_calibrated_length": {
            "num_trips": 0,
            "num_tokens": 30211,
            "rate_at_tokens": {"4096": {"rate": 0.0, "upper_bound": 0.334}},
        },
        "long_context": {
            "num_benign_tokens": {"min": 3900, "max": 4000},
            "benign_run": rate(20, 1),
            "harmful_turn": rate(0, 0),
        },
        "suites": [{"name": "look-alikes", "base": {"num": 4, "num_trips": 2}}],
    }
