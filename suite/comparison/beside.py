"""The figure of a bag of words beside an encoder's, at the end of a training run: is the encoder worth its price?"""

from __future__ import annotations

from pathlib import Path

from suite.common.storage import read_json
from suite.comparison.results import Result, read_result, refuse_different_tests
from suite.comparison.significance import compare, sentence
from utils import BAG_OF_WORDS, Config, UserError, process_rank, say


def show_baseline(config: Config) -> None:
    """Print what a finished bag of words of the same split gets right, and how the finished run compares with it.

    It is looked for among the run folders beside this one; what is damaged there is passed by.
    """
    if process_rank() > 0:
        return
    try:
        run = read_result(config.run_folder)
        words = next((found for folder in sorted(Path(config.output_dir).iterdir())
                      if (found := _bag_of_words(folder, run))), None)
    except (UserError, OSError):  # another process has replaced the run, or removed it
        return
    if words is None:
        return
    accuracy = words.metrics["test"]["accuracy"]
    low, high = words.metrics["test"]["accuracy_ci95"]
    [pair] = compare([BAG_OF_WORDS, config.run_name], [words.correct[None], run.correct[None]])
    say(f"{config.demo_mark}beside it, {words.folder}: test accuracy {accuracy:.4f} (95 % interval {low:.4f} to "
        f"{high:.4f}), {words.metrics['train']['seconds']:.1f} s of training\n{config.demo_mark}{sentence(pair)}")


def _bag_of_words(folder: Path, run: Result) -> Result | None:
    """The finished bag of words in this folder, if it was tested on the same reviews as `run`."""
    try:
        values = read_json(folder / "best" / "config.json")
        if (values["model_type"], values["data_fingerprint"]) != (BAG_OF_WORDS, run.data_fingerprint):
            return None
        found = read_result(folder)
        refuse_different_tests([run, found])
    except (UserError, OSError, ValueError, TypeError, KeyError):
        return None
    return found
