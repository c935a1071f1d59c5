"""The Hugging Face Hub: what lies on it, whether it answers, and one clear line when it does not."""

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

from suite.common.storage import chain
from utils import Config, UserError, brief

PROBE_SECONDS = 8  # the libraries' own retries can take minutes before they give up
WAYS_ON = ("connect to the internet once, or give a local folder or file as model_config.model_name and "
           "data_config.dataset, or try the built-in demo: python main.py --config demo.yaml")
LIBRARIES = {"datasets", "fsspec", "httpcore", "httpx", "huggingface_hub", "pyarrow", "safetensors", "tokenizers",
             "transformers", "yaml"}


def is_hub_name(name: str) -> bool:
    """Whether `name` is a Hub id such as `owner/name`, rather than a path of this machine."""
    is_file = name.endswith((".csv", ".jsonl", ".parquet", ".json", ".txt"))
    return not is_file and not Path(name).exists() and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) is not None


def check_hub(config: Config) -> None:
    """Ask the Hub for a sign of life if the configuration names anything on it.

    Without an answer, this process goes offline: what the cache holds is used, and what it does not hold is an error
    at once. Call it before anything is loaded.
    """
    names = [name for name in (config.model_config.model_name, config.data_config.dataset) if is_hub_name(name)]
    if not names or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON") or answers(
            os.environ.get("HF_ENDPOINT", "https://huggingface.co")):
        return
    print(f"The Hugging Face Hub does not answer: looking for {' and '.join(names)} in the local cache.",
          file=sys.stderr)
    os.environ["HF_HUB_OFFLINE"] = "1"
    if "huggingface_hub" in sys.modules:  # it has read the variable already
        import huggingface_hub.constants

        huggingface_hub.constants.HF_HUB_OFFLINE = True


def usable_cache() -> None:
    """Where the libraries' cache cannot be written, as in a read-only home: keep this run's part of it in a temporary
    folder, and read models and files from the cache that there is. Call it before these libraries are imported.
    """
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
    """No bars in a log file, and none of the libraries' remarks on what this project does on purpose."""
    import datasets
    import huggingface_hub
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of reading the weights, a second or two
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()


def answers(url: str) -> bool:
    """Whether a server says anything at all within PROBE_SECONDS."""
    answered = threading.Event()

    def ask():
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS).close()
            answered.set()
        except urllib.error.HTTPError:
            answered.set()  # it answers, if only with a refusal
        except OSError:
            pass
        finally:
            done.set()

    # In a thread, because the look-up of a name knows no timeout.
    done = threading.Event()
    threading.Thread(target=ask, daemon=True).start()
    done.wait(PROBE_SECONDS)
    return answered.is_set()


@contextmanager
def explained(key: str, name: str):
    """Turn what a failed load of `name`, given as `key`, raises about it into one UserError.

    A TypeError and its like come from a program, not from what it reads: they keep their traceback.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        causes = list(chain(error))
        if user_error := next((cause for cause in causes if isinstance(cause, UserError)), None):
            raise user_error from None
        # datasets wraps whatever its generator raises
        culprit = error.__cause__ or error if type(error).__name__ == "DatasetGenerationError" else error
        if not _is_about_input(culprit):
            raise
        kinds = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
        if is_hub_name(name):
            if "RepositoryNotFoundError" in kinds or "DatasetNotFoundError" in kinds and not _offline():
                raise UserError(f"{key}: {name} is neither a folder here nor a name on the Hugging Face Hub; "
                                "check the spelling, or log in if it is private") from error
            if _offline() or kinds & {"ConnectionError", "TransportError", "HfHubHTTPError", "TimeoutError",
                                      "LocalEntryNotFoundError", "OfflineModeIsEnabled"}:
                raise UserError(f"{key}: the Hugging Face Hub cannot be reached and {name} is not completely in the "
                                f"local cache; {WAYS_ON}") from error
        raise UserError(f"{key}: {name} cannot be loaded ({brief(causes[-1])}): mend it or name "
                        "another one") from error


def _is_about_input(error: BaseException) -> bool:
    return (isinstance(error, OSError | ValueError | ImportError)  # ImportError: "... requires the ... library"
            or type(error) is Exception  # all that tokenizers knows
            or type(error).__module__.partition(".")[0] in LIBRARIES)


def _offline() -> bool:
    from huggingface_hub import is_offline_mode

    return is_offline_mode()
