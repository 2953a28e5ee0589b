"""Models of the Hugging Face hub: a snapshot of their safe files, cached or downloaded."""

from __future__ import annotations

import os
from pathlib import Path

from circuit_breakers.errors import ModelError

__all__ = ["hub_snapshot"]

# Safetensors weights and what config, tokenizer and chat template need: no pickle, no code.
_HUB_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
]


def hub_snapshot(name: str, revision: str | None) -> Path:
    """Directory of the hub snapshot, downloaded unless it is cached; its name is the commit.

    Raises:
        ModelError: it is not there, may not be read, or the hub cannot be reached.
    """
    try:
        from huggingface_hub import constants, errors, snapshot_download
    except ImportError as e:
        raise ModelError(
            f"model {name!r} is a hub id, and huggingface_hub is not installed; "
            "pip install 'circuit-breakers[serve]'"
        ) from e
    at = f" at revision {revision!r}" if revision else ""
    try:
        snapshot = snapshot_download(
            name,
            revision=revision,
            allow_patterns=_HUB_FILES,
            # Some releases ask the hub for a commit's list of files even when told to be offline.
            local_files_only=constants.is_offline_mode(),
        )
        return Path(snapshot)
    except errors.GatedRepoError as e:
        raise ModelError(
            f"model {name!r} is gated on the hub, expected one that this account may read; "
            "ask for access on its page, then set HF_TOKEN"
        ) from e
    except errors.RevisionNotFoundError as e:
        raise ModelError(
            f"got revision {revision!r}, which model {name!r} does not have on the hub, expected "
            "a branch, tag or commit; check --revision"
        ) from e
    except errors.RepositoryNotFoundError as e:
        raise ModelError(
            f"model {name!r} is neither a local directory nor on the hub; check the spelling, or "
            "set HF_TOKEN if it is private"
        ) from e
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as e:
        offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "on", "yes", "true")
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        raise ModelError(
            f"model {name!r}{at} is neither a local directory nor in the hub cache, and {why}; "
            f"download it where there is a connection, or pass a built-in name or a local directory"
        ) from e
    except (OSError, ValueError) as e:
        raise ModelError(
            f"downloading model {name!r}{at} failed: {e}; try again, or pass a local directory"
        ) from e
