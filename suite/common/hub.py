"""The Hugging Face Hub and the libraries' cache: which names refer to the Hub, whether it answers, and one clear line
when something cannot be loaded."""

from __future__ import annotations

import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from suite.common.run_folder import is_encoder
from suite.common.storage import chain, room_for
from utils import Config, UserError, brief, file_kind, say

if TYPE_CHECKING:
    from datasets import Dataset

PROBE_SECONDS = 6
WITHOUT_THE_HUB = ("connect to the internet once, or give a local folder or file as model_config.model_name and "
                   "data_config.dataset, or try the built-in demo: python main.py --config demo.yaml")
ANOTHER_DISK = "set HF_HOME to another disk"  # where a cache has no room


def is_hub_name(name: str) -> bool:
    """Whether `name` is a Hub id such as `owner/name` and not a path on this machine."""
    is_path = file_kind(name) or os.path.exists(name)
    return not is_path and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) is not None


def check_hub(config: Config) -> None:
    """Go offline if the configuration names anything on the Hub and the Hub does not answer.

    Offline, the libraries use what the local cache holds and fail at once for the rest. Online, they try each file six
    times, which takes 24 seconds if connections are refused, and 83 if they are never answered. Call this before any
    loading.
    """
    from huggingface_hub import constants

    encoder = [config.model_config.model_name] if is_encoder(config) else []
    names = [name for name in (*encoder, config.data_config.dataset) if is_hub_name(name)]
    if names and not constants.HF_HUB_OFFLINE and not answers(constants.ENDPOINT):
        say(f"The Hugging Face Hub does not answer: {' and '.join(names)} must be in the local cache.")
        constants.HF_HUB_OFFLINE = True


def answers(url: str) -> bool:
    """Whether a server responds within PROBE_SECONDS, whatever it says."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:  # a refusal is an answer, too
        return True
    except OSError:
        return False
    return True


def quiet_libraries() -> None:
    """Turn off the libraries' warnings about what this project does on purpose, and progress bars in a log file.

    suite/reviews/sources.py does so for the datasets library, which labelling does not import.
    """
    import huggingface_hub
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # it counts weights while they are read, for a second or two
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()


# ---------------------------------------------------------------------------------------------------------------------
# The cache of the datasets library


def cached(name: str, build: Callable[[Path], Dataset]) -> Dataset:
    """The table that `build(folder)` takes from `folder`, the part `name` of the cache, or puts there.

    The library writes a table under another name and renames it. So neither a kill nor another process that builds the
    same table at the same time leaves half of one.
    """
    import datasets

    folder = Path(datasets.config.HF_DATASETS_CACHE).expanduser() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # such as a home that may not be written to
        raise UserError(f"{folder.parent} cannot be written ({error.strerror}): set HF_HOME to a folder that can"
                        ) from None
    with room_for(folder, needed=0, fix=ANOTHER_DISK):
        return build(folder)


# ---------------------------------------------------------------------------------------------------------------------
# One line for what cannot be loaded


@contextmanager
def explained(key: str, name: str):
    """Surrounds code of the libraries that loads `name`, the value of `key`: turns its errors, of whatever type, into
    one UserError that says what to do. The libraries fail on bad values of a model's or a dataset's files in any way.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        with room_for(Path(HF_HUB_CACHE), needed=0, fix=ANOTHER_DISK):
            yield
    except Exception as error:
        causes = list(chain(error))
        if user_error := next((cause for cause in causes if isinstance(cause, UserError)), None):
            raise user_error from None
        reason = brief(causes[-1])
        if not isinstance(causes[-1], OSError | ValueError):  # the others may be no sentence: KeyError says `'a'`
            reason = f"{type(causes[-1]).__name__}: {reason}"
        problem = (is_hub_name(name) and _hub_problem(name, causes)
                   or f"{name} cannot be loaded ({reason}): repair it or name another one")
        raise UserError(f"{key}: {problem}") from error


def _hub_problem(name: str, causes: list[BaseException]) -> str | None:
    """Why a name on the Hub could not be loaded; None if the reason is another one than its name and the Hub."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import errors, is_offline_mode

    def has(*kinds: type) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if has(errors.GatedRepoError) or "is a gated dataset" in str(causes[0]):  # datasets hides its cause
        return f"{name} is gated: ask for access on its page on the Hub, and log in with hf auth login"
    if not is_offline_mode() and has(errors.RepositoryNotFoundError, DatasetNotFoundError):
        return (f"{name} is neither a folder here nor a name on the Hugging Face Hub; check the spelling, or log in if "
                "it is private")
    if not is_offline_mode() and has(errors.RemoteEntryNotFoundError):
        return None  # the Hub has answered: it is there, and lacks a file
    if is_offline_mode() or has(ConnectionError, TimeoutError, errors.HTTPError, errors.LocalEntryNotFoundError):
        return (f"the Hugging Face Hub cannot be reached and {name} is not completely in the local cache; "
                f"{WITHOUT_THE_HUB}")
    return None
