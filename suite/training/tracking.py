"""What follows a run from outside: wandb, and plots.

A run never waits at wandb's prompt and never dies of wandb. At its first failure the run goes on without it, and the
files of the run folder are complete all the same.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from suite.common.hub import answers
from suite.training.evaluation import Predictions
from utils import Config, brief, process_rank, say

FINISH_TIMEOUT_SECONDS = 15  # how long an unreachable server may delay the end; the record stays on disk
INIT_TIMEOUT_SECONDS = 15  # wandb's own default for an unreachable server is 90
TABLE_ROWS = 1000  # misclassified reviews that go to wandb; misclassified.csv has them all


class Tracker:
    """A wandb run that cannot do harm: the first call that fails ends it with one line."""

    def __init__(self, config: Config, run_id: str | None = None, job_type: str = "train"):
        self.run = None
        mode = config.log_config.wandb_mode
        if mode == "auto":
            # wandb's own variable; anything but online needs no server, "dryrun" is an old name of offline
            mode = {"online": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}.get(
                os.environ.get("WANDB_MODE", ""), "auto")
        if mode == "disabled" or process_rank() > 0:
            return
        try:
            self._start(config, mode, run_id, job_type)
        except Exception as error:
            self._leave_out(error)

    def _start(self, config: Config, mode: str, run_id: str | None, job_type: str) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")  # this project says what there is to say
        import wandb

        if mode in ("auto", "online") and not self._has_login(wandb):
            if mode == "online":
                say("wandb: no login found (run `wandb login` once); recording offline")
            mode = "offline"
        # Where a server takes the connection and stays silent, wandb.init was seen to wait for 313 s.
        if mode != "offline" and not answers(url := wandb.setup().settings.base_url):
            say(f"wandb: the server cannot be reached ({url} does not answer); recording offline")
            mode = "offline"
        arguments = {
            "project": config.log_config.wandb_project, "name": config.run_name, "dir": config.output_dir,
            "id": run_id, "resume": "allow" if run_id else None,
            "config": asdict(config),
            "job_type": job_type, "tags": ["DEMO"] if config.is_demo else None,
            "settings": wandb.Settings(init_timeout=INIT_TIMEOUT_SECONDS, x_graphql_retry_max=3, console="off",
                                       finish_timeout=FINISH_TIMEOUT_SECONDS, finish_timeout_raises=False),
        }
        try:
            self.run = wandb.init(mode="offline" if mode == "offline" else "online", **arguments)
        except Exception as error:
            if mode == "offline":
                raise
            say(f"wandb: the server cannot be reached ({type(error).__name__}: {brief(error)}); recording offline")
            self.run = wandb.init(mode="offline", **arguments)
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("epoch", hidden=True)
        self.run.define_metric("train/*", step_metric="step")
        self.run.define_metric("valid/*", step_metric="epoch")
        self.run.define_metric("test/*", step_metric="epoch")

    @staticmethod
    def _has_login(wandb) -> bool:
        try:
            return bool(wandb.login(prompt=False, verify=False))
        except Exception:
            return False

    @property
    def run_id(self) -> str | None:
        return self.run.id if self.run is not None else None

    def log(self, record: dict[str, Any]) -> None:
        self._attempt(lambda: self.run.log(record))

    def report(self, summary: dict[str, Any], rows: list[dict], predictions: Predictions, label_names: list[str],
               plots: list[Path]) -> None:
        """The results of the test: summary, misclassified reviews, confusion matrix, plots."""

        def send():
            import wandb

            self.run.summary.update(summary)
            table = wandb.Table(columns=["id", "text", "label", "predicted", "confidence"],
                                data=[list(row.values()) for row in rows[:TABLE_ROWS]])
            confusion = wandb.plot.confusion_matrix(y_true=predictions.labels.tolist(), class_names=label_names,
                                                    preds=predictions.predicted.tolist())
            self.run.log({"test/misclassified": table, "test/confusion_matrix": confusion,
                          **{f"plots/{path.stem}": wandb.Image(str(path)) for path in plots}})

        self._attempt(send)

    def finish(self, exit_code: int = 0) -> None:
        """Close the run; an offline one prints the command that uploads it later."""

        def close():
            offline, folder = self.run.settings.mode == "offline", Path(self.run.dir).parent
            self.run.finish(exit_code=exit_code)
            if offline:
                say(f"wandb: recorded offline; upload it with: wandb sync {folder}")

        self._attempt(close)
        self.run = None

    def _attempt(self, call: Callable[[], None]) -> None:
        if self.run is None:
            return
        try:
            call()
        except Exception as error:
            self._leave_out(error)

    def _leave_out(self, error: Exception) -> None:
        self.run = None
        say(f"wandb: left out of this run ({type(error).__name__}: {brief(error)}); the run folder has everything")


def try_plots(module: str, *arguments: Any) -> list[Path]:
    """The paths that the module's `save_plots` returns; none, and one line, where matplotlib is broken.

    The module is imported here because it imports matplotlib, and no result may depend on a picture.
    """
    try:
        return importlib.import_module(module).save_plots(*arguments)
    except Exception as error:
        say(f"plots: left out ({type(error).__name__}: {brief(error)}); everything else is in the folder")
        return []
