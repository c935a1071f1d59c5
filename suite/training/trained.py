"""A run whose best model is tested again."""

from __future__ import annotations

from data import load_split, prepare_data
from suite.common.devices import Devices
from suite.common.hub import say_what_was_cached
from suite.common.run_folder import best_model, is_encoder, read_metrics
from suite.inference.classifier import open_classifier
from suite.training.baseline import predictions_of
from suite.training.evaluation import Predictions
from suite.training.states import RunFolder
from suite.training.tracking import Tracker
from utils import Config, UserError

MAY_DIFFER = ("train_config.device", "train_config.mixed_precision", "train_config.compile", "log_config",
              "train_config.gradient_accumulation_steps", "data_config.batch_size")


class TrainedRun:
    """What a test needs to know of a run: the same attributes as a `Run` has, and `classifier`, its best model."""

    def __init__(self, config: Config, devices: Devices):
        """Raises UserError if there is no trained model, or if it was trained on other data, classes or settings: on
        another split, it would be tested on reviews that it was trained on."""
        self.config, self.devices, folder = config, devices, RunFolder(config)
        folder.lock()
        devices.barrier()
        best = best_model(folder.path)
        folder.refuse_differences(ignored=MAY_DIFFER)
        self.classifier = open_classifier(best, config, devices)
        self.model = getattr(self.classifier, "model", None)  # None: a bag of words, or a stack
        with devices.main_process_first():
            self.data = prepare_data(config, trained_model=str(best)) if is_encoder(config) else load_split(config)
        say_what_was_cached()
        folder.refuse_other_data(self.classifier.data_fingerprint, self.data.fingerprint)
        if self.data.label_names != self.classifier.label_names:
            raise UserError(f"{config.data_config.dataset} has the classes {self.data.label_names}, {best} was trained "
                            f"on {self.classifier.label_names}: test it on the data of its training")
        self.figures, self.tracker = read_metrics(folder.path), Tracker(config, job_type="test")

    def predictions(self) -> Predictions:
        """Those of a bag of words or a stack for the test reviews."""
        return predictions_of(self.classifier.logits, self.data, "test")
