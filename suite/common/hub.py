"""The Hugging Face Hub: which names refer to it, whether it answers, and one clear line when it does not."""

import atexit
import os
import re
import shutil
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from suite.common.run_folder import is_encoder
from suite.common.storage import chain, room_for
from utils import Config, UserError, brief, file_kind, say

PROBE_SECONDS = 6  # the libraries themselves would retry for minutes before they give up
WITHOUT_THE_HUB = ("connect to the internet once, or give a local folder or file as model_config.model_name and "
           "data_config.dataset, or try the built-in demo: python main.py --config demo.yaml")
ANOTHER_DISK = "set HF_HOME to another disk"  # where a cache has no room
UNREACHABLE = {"ConnectionError", "TransportError", "HfHubHTTPError", "TimeoutError", "LocalEntryNotFoundError"}
NOT_FOUND = {"RepositoryNotFoundError", "DatasetNotFoundError"}
LIBRARIES = {"datasets", "fsspec", "httpcore", "httpcore2", "httpx", "httpx2", "huggingface_hub", "pyarrow",
             "safetensors", "tokenizers", "transformers", "yaml"}
UNANSWERED: list[str] = []  # what this process asked the Hub for in vain


def is_hub_name(name: str) -> bool:
    """Whether `name` is a Hub id such as `owner/name` and not a path on this machine."""
    is_path = file_kind(name) or os.path.exists(name)
    return not is_path and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) is not None


def check_hub(config: Config) -> None:
    """Go offline if the configuration names anything on the Hub and the Hub does not answer.

    Offline, the libraries use what the local cache holds and fail at once for the rest. Call this before any loading,
    and `say_what_was_cached` after it.
    """
    encoder = [config.model_config.model_name] if is_encoder(config) else []
    names = [name for name in (*encoder, config.data_config.dataset) if is_hub_name(name)]
    if not names or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON") or answers(
            os.environ.get("HF_ENDPOINT", "https://huggingface.co")):
        return
    UNANSWERED.extend(names)
    os.environ["HF_HUB_OFFLINE"] = "1"
    if "huggingface_hub" in sys.modules:  # it read the variable when it was imported
        import huggingface_hub.constants

        huggingface_hub.constants.HF_HUB_OFFLINE = True


def say_what_was_cached() -> None:
    if UNANSWERED:
        say(f"The Hugging Face Hub does not answer: {' and '.join(UNANSWERED)} came from the local cache.")
        UNANSWERED.clear()


def usable_cache() -> None:
    """If the cache of datasets cannot be written, as in a read-only home, use a temporary folder for it.

    Models are still read from the existing cache. Call it before the Hugging Face libraries are imported.
    """
    for name in ("HF_HOME", "HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_ENDPOINT"):
        if os.environ.get(name) == "":
            del os.environ[name]  # the libraries would take the current folder, or no address
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    cache = Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets").expanduser()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            return
    except OSError as error:
        reason = error.strerror
    temporary = tempfile.mkdtemp(prefix="datasets-")
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    os.environ["HF_DATASETS_CACHE"] = temporary
    print(f"{cache} cannot be written ({reason}): the reviews are tokenized into a temporary folder, for this run "
          "only; set HF_HOME to keep them", file=sys.stderr)


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


def answers(url: str) -> bool:
    """Whether a server responds within PROBE_SECONDS, whatever it says."""
    answered = threading.Event()

    def ask():
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # a refusal is an answer, too
        except (OSError, ValueError):  # ValueError: no address at all
            return
        answered.set()

    thread = threading.Thread(target=ask, daemon=True)  # because looking up a host name has no timeout
    thread.start()
    thread.join(PROBE_SECONDS)
    return answered.is_set()


@contextmanager
def explained(key: str, name: str, any_error: bool = False):
    """Surrounds code that loads `name`, the value of `key`: turns its errors into one UserError that says what to do.

    Errors that come from a bug rather than from what is loaded, such as a TypeError, keep their traceback. With
    `any_error` there are none: the libraries fail on bad values of a model's or a dataset's files in any way.
    """
    try:
        with room_for(_model_cache(), needed=0, fix=ANOTHER_DISK):
            yield
    except Exception as error:
        causes = list(chain(error))
        if user_error := next((cause for cause in causes if isinstance(cause, UserError)), None):
            raise user_error from None
        # datasets wraps every error of the code that reads the rows, bugs included, in a DatasetGenerationError
        culprit = error.__cause__ or error if type(error).__name__ == "DatasetGenerationError" else error
        reason = brief(causes[-1])
        if not _is_about_input(culprit):
            if not any_error:
                raise
            reason = f"{type(error).__name__}: {reason}"
        problem = (is_hub_name(name) and _hub_problem(name, causes)
                   or f"{name} cannot be loaded ({reason}): repair it or name another one")
        raise UserError(f"{key}: {problem}") from error


def _model_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _hub_problem(name: str, causes: list[BaseException]) -> str | None:
    """Why a name on the Hub could not be loaded: it is not found, or the Hub is not reachable; None if neither."""
    from huggingface_hub import is_offline_mode

    kinds = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
    if kinds & NOT_FOUND and not is_offline_mode():
        return (f"{name} is neither a folder here nor a name on the Hugging Face Hub; check the spelling, or log in if "
                "it is private")
    if kinds & UNREACHABLE or is_offline_mode():
        return (f"the Hugging Face Hub cannot be reached and {name} is not completely in the local cache; "
                f"{WITHOUT_THE_HUB}")
    return None


def _is_about_input(error: BaseException) -> bool:
    return (isinstance(error, OSError | ValueError | ImportError)  # ImportError: "... requires the ... library"
            or type(error) is Exception  # tokenizers raises nothing more specific
            or type(error).__module__.partition(".")[0] in LIBRARIES)
