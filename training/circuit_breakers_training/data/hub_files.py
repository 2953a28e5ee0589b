"""Files of a data set on the Hugging Face hub: `hf:OWNER/NAME[@REVISION][:FILE]`.

FILE may be a pattern, as large sets come in parts. Files are cached by huggingface_hub; without a
connection a cached file is found by its exact name.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final, NamedTuple

from circuit_breakers.errors import DataError
from circuit_breakers_training.data.records import SUFFIXES, shown

__all__ = ["PREFIX", "HubFiles", "hub_files"]

PREFIX: Final = "hf:"
"""How a location on the hub starts."""

_LOCATION = re.compile(
    r"hf:(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[^:@\s]+))?"
    r"(?::(?P<file>\S.*))?",
    re.ASCII,
)
_PATTERN: Final = frozenset("*?[")
_DATA_FILE = re.compile(rf"(?:{'|'.join(map(re.escape, SUFFIXES))})(?:\.gz|\.xz)?$", re.IGNORECASE)


class HubFiles(NamedTuple):
    """Local copies of files of one commit."""

    paths: tuple[Path, ...]
    revision: str
    """The commit."""


def hub_files(location: str) -> HubFiles:
    """The files at `location`, downloaded unless they are cached.

    Raises:
        DataError: the location is no such name, nothing is there or may be read, or the hub cannot
            be reached.
    """
    match = _LOCATION.fullmatch(location)
    if match is None:
        raise DataError(
            f"got the location {shown(location)}, expected hf:OWNER/NAME[@REVISION][:FILE]; "
            "correct it, or pass a local file"
        )
    repo, revision, wanted = match["repo"], match["revision"], match["file"]
    names: tuple[str, ...]
    if wanted is not None and not _PATTERN & set(wanted):
        names = (wanted,)
    else:
        revision, names = _pick(location, repo, revision, wanted)
    paths = []
    for name in names:
        path = _download(location, repo, revision, name)
        # .../snapshots/COMMIT/name: the next file comes from the same commit.
        revision = path.parts[-len(Path(name).parts) - 1]
        paths.append(path)
    assert revision is not None
    return HubFiles(tuple(paths), revision)


def _download(location: str, repo: str, revision: str | None, name: str) -> Path:
    from huggingface_hub import constants, hf_hub_download

    with _hub_errors(location):
        return Path(
            hf_hub_download(
                repo,
                name,
                repo_type="dataset",
                revision=revision,
                # Some releases ask for a commit even when told to be offline.
                local_files_only=constants.is_offline_mode(),
            )
        )


def _pick(
    location: str, repo: str, revision: str | None, pattern: str | None
) -> tuple[str | None, tuple[str, ...]]:
    """Commit and names of the files that fit the pattern, or of the only data file."""
    from huggingface_hub import HfApi

    with _hub_errors(location):
        info = HfApi().dataset_info(repo, revision=revision)
    files = sorted(sibling.rfilename for sibling in info.siblings or ())
    data = [name for name in files if _DATA_FILE.search(name)]
    if pattern is None:
        found, expected = data, "one data file"
    else:
        found, expected = [name for name in files if fnmatchcase(name, pattern)], "some that fit"
    if not found or (pattern is None and len(found) > 1):
        listed = ", ".join(data[:10]) + (", ..." if len(data) > 10 else "") or "none"
        raise DataError(
            f"{location}: got {len(found)} files, expected {expected}; name one after a colon; "
            f"data files there: {listed}"
        )
    return info.sha, tuple(found)


@contextmanager
def _hub_errors(location: str) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as e:
        raise DataError(
            f"{location}: the data set is gated, expected one that this account may read; "
            "accept its conditions on its page, then set HF_TOKEN"
        ) from e
    except errors.RevisionNotFoundError as e:
        raise DataError(
            f"{location}: got a revision that is not there, expected a branch, tag or commit; "
            "correct what follows the @"
        ) from e
    except errors.RepositoryNotFoundError as e:
        raise DataError(
            f"{location}: got no such data set on the hub, expected OWNER/NAME of one; check the "
            "spelling, or set HF_TOKEN if it is private"
        ) from e
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as e:
        offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "on", "yes", "true")
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        raise DataError(
            f"{location}: not in the hub cache, and {why}; expected a cached file or a "
            "connection; download the file elsewhere and pass its path"
        ) from e
    except errors.EntryNotFoundError as e:
        raise DataError(
            f"{location}: got no such file in the data set, expected one of its files; leave the "
            "file out to see their names"
        ) from e
    except (OSError, ValueError) as e:
        raise DataError(
            f"{location}: the download failed ({e}), expected the file; try again, or download "
            "it elsewhere and pass its path"
        ) from e
