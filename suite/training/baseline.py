"""--mode baseline: a bag of words on the split of an encoder's run, in a run folder like any other.

Seconds of work that tell whether the encoder is worth its price. There is nothing to go on from: a run that was killed
starts again.
"""

from __future__ import annotations

import time

from suite.common.devices import Devices
from suite.encoders.bag_of_words import fit
from suite.reviews.splitting import load_split
from suite.training.calibration import at_temperature, fit_temperature
from suite.training.finish import FittedRun, predictions_of, show_finished, write_results
from suite.training.meter import peak_memory_mb
from suite.training.states import RunFolder
from utils import BAG_OF_WORDS, Config, say


def baseline(config: Config, devices: Devices) -> None:
    """Fit, validate and test a bag of words. An earlier run's files are removed only when the fit has succeeded."""
    if show_finished(config):
        return
    folder = RunFolder(config)
    folder.lock()
    folder.state_to_continue()  # refuses a folder with another run; a bag of words has no saved states
    split = load_split(config)
    names, (texts, labels) = split.label_names, split.texts_and_labels("train")
    say(f"{config.run_name}: {len(texts):,} reviews to train on, {len(split.ids_of['valid']):,} to validate")
    started = time.perf_counter()
    words, iterations = fit(texts, labels, names, config.data_config.line_breaks, split.fingerprint)
    seconds = time.perf_counter() - started
    say(f"{BAG_OF_WORDS}: {len(words.ngrams):,} words, pairs and triples of words")
    train = {"samples_per_second": len(texts) / seconds, "seconds": seconds,
             "peak_memory_mb": peak_memory_mb(devices.device), "optimizer_steps": iterations}
    valid = predictions_of(words.logits, split, "valid")
    if config.train_config.calibrate:
        words.config["temperature"] = fit_temperature(valid)
        valid = at_temperature(valid, words.temperature)
    run = FittedRun(folder, devices, split, train, iterations, valid)
    if config.train_config.calibrate:
        run.figures["valid"]["temperature"] = words.temperature
    folder.save_best(words.save)
    write_results(run, predictions_of(words.logits, split, "test") if config.train_config.test else None)
