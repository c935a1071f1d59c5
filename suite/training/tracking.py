"""What watches a run: the progress bar, and an experiment tracker (wandb, trackio or TensorBoard) where it works.

A run never waits at a tracker's prompt and never dies of one. At its first failure the run goes on without it, and the
files of the run folder are complete all the same.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sized
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from suite.common.devices import Devices
from suite.common.hub import answers
from suite.common.pages import escaped
from suite.common.stopping import stop_if_asked
from suite.training.evaluation import MISTAKE_COLUMNS as COLUMNS
from suite.training.evaluation import Predictions
from utils import Config, brief, process_rank, say

TIMEOUT_SECONDS = 15  # how long an unreachable server may delay the start, and the end; wandb's own is 90
TABLE_ROWS = 1000  # misclassified reviews that a tracker gets; misclassified.csv has them all


class ProgressBar:
    """A bar with the running loss, accuracy and speed; plain lines where the output is no terminal."""

    def __init__(self, name: str, total: int, done: int = 0, unit: str = "step"):
        self.name, self.total, self.done, self.printed = name, total, done, done
        is_terminal = process_rank() == 0 and sys.stderr.isatty()
        self.bar = tqdm(desc=name, total=total, initial=done, unit=unit, leave=False, dynamic_ncols=True,
                        disable=not is_terminal)

    def update(self) -> None:
        self.done += 1
        self.bar.update()

    def show(self, loss: float, accuracy: float, speed: str) -> None:
        text = f"loss {loss:.4f}, accuracy {accuracy:.4f}, {speed}"
        self.bar.set_postfix_str(text)
        if self.bar.disable and (self.done - self.printed) * 10 >= self.total:  # about ten lines an epoch
            say(f"{self.name}, step {self.done}/{self.total}: {text}")
            self.printed = self.done

    def close(self) -> None:
        self.bar.close()


def watched(batches: Sized, devices: Devices, name: str) -> Iterator[Any]:
    """The batches, with a progress bar. Raises StopRequested between two of them."""
    bar = ProgressBar(name, len(batches), unit="batch")
    for batch in batches:
        stop_if_asked(devices)
        yield batch
        bar.update()
    bar.close()


class Tracker:
    """The tracker that the configuration asks for, if it is on. The first call that fails ends it with a line, and the
    run goes on without it."""

    def __init__(self, config: Config, run_id: str | None = None, job_type: str = "train", step: int = 0):
        """`run_id`: of the tracker's run that an interrupted run goes on with, after so many optimizer steps (`step`);
        `job_type`: train or test."""
        self.run, self.name = None, config.log_config.tracker
        is_off = self.name == "wandb" and _wandb_mode(config) == "disabled"
        if process_rank() == 0 and not is_off:
            self.run = self._try(lambda: TRACKERS[self.name](config, run_id, job_type, step))

    @property
    def run_id(self) -> str | None:
        return self.run.id if self.run is not None else None

    def log(self, record: dict[str, Any]) -> None:
        """`record`: a line of history.jsonl, and more."""
        if self.run is not None:
            self._try(lambda: self.run.log(record))

    def report(self, summary: dict[str, Any], rows: list[dict], predictions: Predictions, label_names: list[str],
               plots: list[Path]) -> None:
        """The results of the test: summary, misclassified reviews, predictions, plots."""
        if self.run is not None:
            self._try(lambda: self.run.report(summary, rows[:TABLE_ROWS], predictions, label_names, plots))

    def finish(self) -> None:
        if self.run is not None:
            self._try(lambda: self.run.finish())

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            self.run = None
            say(f"{self.name}: left out of this run ({type(error).__name__}: {brief(error)}); the run folder has "
                "everything")
            return None


class WandbRun:
    """A run in wandb, which has no use for `step`. No method waits long for a server; each may raise any error."""

    def __init__(self, config: Config, run_id: str | None, job_type: str, step: int):
        os.environ.setdefault("WANDB_SILENT", "true")  # this project says what there is to say
        import wandb

        mode = _wandb_mode(config)
        if mode != "offline" and not wandb.login(prompt=False, verify=False):
            if mode == "online":
                say("wandb: no login found (run `wandb login` once); recording offline")
            mode = "offline"
        # Where a server takes the connection and stays silent, wandb.init was seen to wait for 313 s.
        if mode != "offline" and not answers(url := wandb.setup().settings.base_url):
            say(f"wandb: the server cannot be reached ({url} does not answer); recording offline")
            mode = "offline"
        start = functools.partial(
            wandb.init, project=config.log_config.wandb_project, name=config.run_name, dir=config.output_dir,
            id=run_id, resume="allow" if run_id else None, job_type=job_type, config=asdict(config),
            tags=["DEMO"] if config.is_demo else None,
            settings=wandb.Settings(init_timeout=TIMEOUT_SECONDS, x_graphql_retry_max=3, console="off",
                                    finish_timeout=TIMEOUT_SECONDS, finish_timeout_raises=False))
        try:
            self.run = start(mode="online" if mode == "auto" else mode)
        except Exception as error:
            if mode == "offline":
                raise
            say(f"wandb: {type(error).__name__}: {brief(error)}; recording offline")
            self.run = start(mode="offline")
        self.id = self.run.id
        for name in ("step", "epoch"):
            self.run.define_metric(name, hidden=True)
        for names, axis in (("train/*", "step"), ("valid/*", "epoch"), ("test/*", "epoch")):
            self.run.define_metric(names, step_metric=axis)

    def log(self, record: dict[str, Any]) -> None:
        self.run.log(record)

    def report(self, summary: dict[str, Any], rows: list[dict], predictions: Predictions, label_names: list[str],
               plots: list[Path]) -> None:
        import wandb

        self.run.summary.update(summary)
        self.run.log({
            "test/misclassified": wandb.Table(columns=COLUMNS, data=_cells(rows)),
            "test/confusion_matrix": wandb.plot.confusion_matrix(
                y_true=predictions.labels.tolist(), preds=predictions.predicted.tolist(), class_names=label_names),
            **{f"plots/{path.stem}": wandb.Image(str(path)) for path in plots}})

    def finish(self) -> None:
        """Close the run; an offline one prints the command that uploads it later."""
        offline, folder = self.run.settings.mode == "offline", Path(self.run.dir).parent
        self.run.finish()
        if offline:
            say(f"wandb: recorded offline; upload it with: wandb sync {folder}")


def _wandb_mode(config: Config) -> str:
    mode = config.log_config.wandb_mode
    return os.environ.get("WANDB_MODE") or mode if mode == "auto" else mode  # wandb's own variable


class TrackioRun:
    """A run in trackio, in files: OUTPUT_DIR/trackio, unless trackio's own variable TRACKIO_DIR names a folder.

    trackio writes twice a second, so a kill may cost it the last records. It has no summary: that of the test is one
    more record, whose names begin with summary/.
    """

    def __init__(self, config: Config, run_id: str | None, job_type: str, step: int):
        os.environ.setdefault("TRACKIO_DIR", str(Path(config.output_dir, "trackio").absolute()))  # its import reads it
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        self.project, self.step = config.log_config.wandb_project, step
        with contextlib.redirect_stdout(io.StringIO()):  # this project says what there is to say
            self.run = trackio.init(self.project, name=_run_name(config, job_type), config=asdict(config),
                                    group="DEMO" if config.is_demo else None, resume="allow" if run_id else "never")
        self.id = self.run.id
        # What was recorded after the saved state comes again; trackio would show it twice.
        self.recorded = {(row["step"], *sorted(row.keys() - {"step", "timestamp"}))
                         for row in SQLiteStorage.get_logs(self.project, run_id=self.id)}

    def log(self, record: dict[str, Any]) -> None:
        self.step = record["step"]
        self._write({name: value for name, value in record.items() if name != "step"})

    def _write(self, values: dict[str, Any]) -> None:
        if (self.step, *sorted(values)) not in self.recorded:
            self.run.log(values, step=self.step)

    def report(self, summary: dict[str, Any], rows: list[dict], predictions: Predictions, label_names: list[str],
               plots: list[Path]) -> None:
        import trackio

        self._write(_numbers(summary) | {"test/misclassified": trackio.Table(columns=COLUMNS, data=_cells(rows))}
                    | {f"plots/{path.stem}": trackio.Image(str(path)) for path in plots})

    def finish(self) -> None:
        import trackio

        with contextlib.redirect_stdout(io.StringIO()):
            trackio.finish()
        say(f"trackio: see it with: TRACKIO_DIR={trackio.TRACKIO_DIR} trackio show --project {self.project}")


class TensorBoardRun:
    """A run in TensorBoard: OUTPUT_DIR/tensorboard/RUN_NAME. Its scalars are 32-bit floats, over optimizer steps."""

    def __init__(self, config: Config, run_id: str | None, job_type: str, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.id, self.step = _run_name(config, job_type), step
        self.folder = Path(config.output_dir, "tensorboard", self.id)
        # What was recorded after the saved state comes again. A run that starts afresh hides an earlier one.
        self.writer = SummaryWriter(str(self.folder), purge_step=step + 1 if run_id else 0)
        if run_id is None:
            values = json.dumps(asdict(config), indent=2)
            self.writer.add_text("config", f"{config.demo_mark}\n```\n{values}\n```", 0)

    def log(self, record: dict[str, Any]) -> None:
        self.step = record["step"]
        self._write({name: value for name, value in record.items() if name not in ("step", "epoch")})

    def _write(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, self.step)
        self.writer.flush()  # else a kill costs up to two minutes of records

    def report(self, summary: dict[str, Any], rows: list[dict], predictions: Predictions, label_names: list[str],
               plots: list[Path]) -> None:
        from PIL import Image  # matplotlib brings it

        lines = [COLUMNS, ["---"] * len(COLUMNS), *([escaped(str(cell)) for cell in cells] for cells in _cells(rows))]
        self.writer.add_text("test/misclassified", "\n".join(f"| {' | '.join(line)} |" for line in lines), self.step)
        for path in plots:
            self.writer.add_image(f"plots/{path.stem}", np.asarray(Image.open(path)), self.step, dataformats="HWC")
        self._write(_numbers(summary))

    def finish(self) -> None:
        self.writer.close()
        say(f"tensorboard: see it with: tensorboard --logdir {self.folder.parent}")


def _run_name(config: Config, job_type: str) -> str:
    """That of the run in trackio and TensorBoard, which know it by its name: --mode test has its own."""
    return config.run_name if job_type == "train" else f"{config.run_name}-{job_type}"


def _cells(rows: list[dict]) -> list[list]:
    return [[row[name] for name in COLUMNS] for row in rows]


def _numbers(summary: dict[str, Any]) -> dict[str, float]:
    """Those of the summary, under names of their own: valid/loss is the best epoch's here, and each epoch's in the
    records."""
    return {f"summary/{name}": value for name, value in summary.items() if isinstance(value, int | float)}


TRACKERS = {"wandb": WandbRun, "trackio": TrackioRun, "tensorboard": TensorBoardRun}  # the values of log_config.tracker
