"""Fine-tune a Transformer encoder for sentiment classification on one device: CUDA, MPS or CPU.

    python main.py --config demo.yaml                                   the built-in demo: no download, about a minute
    python main.py --config config.yaml --mode train                    BERT on IMDB: train, validate, test
    python main.py model_config.model_name=answerdotai/ModernBERT-base  another encoder
    python main.py train_config.epochs=3 data_config.max_len=256        any key of config.yaml, see docs/settings.md
    python main.py --mode pretrain                                      masked words first, without labels; then:
    python main.py model_config.model_name=checkpoints/pretrain-bert-base-uncased-len128-bs64-seed42/best
    python main.py --mode test                                          evaluate the best model of that run again
    python main.py --mode predict --text "A wonderful film."            label a review with that model
    python main.py --mode predict --input FILE --output FILE            or all rows of a file
    python main.py --mode explain --text "A wonderful film."            the words that the decision rests on
    python main.py --mode export                                        that model as ONNX or for transformers
    python main.py --mode publish OWNER/NAME                            that model on the Hub; --yes sends it
    python main.py --mode baseline                                      a bag of words on the same split, in seconds
    python main_accumulation.py data_config.batch_size=64 train_config.gradient_accumulation_steps=4
                                                                        large batches: gradient accumulation
    accelerate launch --multi_gpu --num_processes 2 main_accumulation.py    several devices; on CPUs: torchrun
    python experiment.py experiments/exp2.yaml                          a grid of settings and seeds, and its report
    python compare.py checkpoints/RUN checkpoints/RUN                   finished runs side by side
    python ensemble.py checkpoints/RUN checkpoints/RUN --output FOLDER  finished runs combined by stacking
"""

from suite.common import cli

if __name__ == "__main__":
    cli.begin()
    COMMAND = cli.read_command(__doc__, accumulates=False)  # a wrong value is refused before torch's slow import

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from data import PreparedData, get_dataloader, load_split, prepare_data
from model import EncoderForClassification
from suite.common.hub import check_hub, quiet_libraries, say_what_was_cached
from suite.common.protocols import Devices
from suite.common.run_folder import is_encoder, read_metrics
from suite.common.stopping import SIGNALS, StopRequested
from suite.common.storage import room_for
from suite.comparison.report import show_baseline
from suite.encoders.loading import best_model, load_model
from suite.encoders.placement import Batch, compute_logits, pass_tokens, place_model, to_device
from suite.inference.explain import explain
from suite.inference.export import export
from suite.inference.opening import open_classifier
from suite.inference.predict import predict
from suite.inference.publish import publish
from suite.pretraining.run import PretrainingRun, masked_sums
from suite.training.baseline import baseline, predictions_of
from suite.training.devices import SingleDevice, make_deterministic
from suite.training.evaluation import Predictions
from suite.training.finish import show_finished, write_results, write_untested
from suite.training.run import Run
from suite.training.states import claim_run_folder, lock_within, refuse_differences, refuse_other_data
from suite.training.tracking import ProgressBar, Tracker
from utils import Config, UserError, say

MAY_DIFFER_IN_A_TEST = ("train_config.device", "train_config.mixed_precision", "train_config.compile", "log_config",
                        "train_config.gradient_accumulation_steps", "data_config.batch_size")

# ---------------------------------------------------------------------------------------------------------------------
# The loop


def train(run: Run) -> None:
    """Train, validate after each epoch, keep the best model. A signal saves the state and leaves."""
    devices, max_grad_norm = run.devices, run.config.train_config.max_grad_norm
    with run.saved_when_stopped():
        for _ in run.epochs():  # those that are left; max_steps and early stopping may end them
            for rows, micro_batches in run.steps():  # the reviews of each optimizer step
                with run.smaller_if_out_of_memory():
                    loss, correct = train_step(run.model, run.optimizer, micro_batches, run.total_weight(rows), devices,
                                               run.scheduler, max_grad_norm, run.class_weights)
                    run.count(rows, loss, correct)  # the sums stay on the device, so nothing waits for them
                    if run.log_due():
                        run.log()
                    stop_if_asked(devices)
                    if run.save_due():
                        run.save()
            validate = evaluate_masked if run.config.pretrains else evaluate
            predictions = validate(run.model, run.valid_loader, devices, "validation")
            run.end_epoch(predictions)  # records their metrics, keeps the model if it is the best yet, saves the state


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: list[Batch], total_weight: float,
               devices: Devices, scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
               max_grad_norm: float | None = None, class_weights: torch.Tensor | None = None
               ) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step on the mean loss over an effective batch, which all micro-batches of all processes form.

    `total_weight`: the reviews of the effective batch or, with `class_weights` (num_labels,), the sum of the weights of
    their classes. Returns this process's summed loss and number of correct reviews, two tensors () on the device.
    """
    loss, correct = torch.zeros(2, device=devices.device)
    for number, batch in enumerate(micro_batches, start=1):
        _, labels, inputs = to_device(batch, devices.device)
        with devices.accumulate(model, is_last=number == len(micro_batches)):  # gradients are exchanged at the last one
            with devices.autocast():
                output = model(**inputs, labels=labels, reduction="sum", class_weights=class_weights)
            # Each micro-batch's sum is divided by the total weight of the effective batch, so that the gradients add up
            # to that of its mean. DDP averages over the processes, which the factor undoes.
            devices.backward(output.loss * (devices.num_processes / total_weight))
        loss += output.loss.detach()
        correct += (output.logits.argmax(dim=1) == labels).sum()
    norm = devices.clip_gradients(model, optimizer, max_grad_norm)
    if devices.step(optimizer, norm, loss) and scheduler is not None:  # fp16's loss scaler may skip the step
        scheduler.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, correct


def stop_if_asked(devices: Devices) -> None:
    """Raises StopRequested if any process has received a signal."""
    if devices.any(SIGNALS.received is not None):
        raise StopRequested


def evaluate(model: nn.Module, loader: DataLoader, devices: Devices, name: str) -> Predictions:
    """The model's logits on every review of a split, each exactly once. Raises StopRequested between batches."""
    model.eval()
    batches = watched(loader, devices, name)
    ids, labels, logits = compute_logits(model, batches, sum(map(len, loader.sampler)), devices)
    model.train()
    counted = ids >= 0  # -1: a review that is there only to keep the processes in step
    return Predictions(*devices.gather(ids[counted], labels[counted], logits[counted]))


def evaluate_masked(model: nn.Module, loader: DataLoader, devices: Devices, name: str) -> np.ndarray:
    """The same for a pretraining run: [summed loss, hits, number] of the masked words."""
    model.eval()
    sums = masked_sums(model, watched(loader, devices, name), devices)
    model.train()
    return sums


def watched(loader: DataLoader, devices: Devices, name: str) -> Iterator[Batch]:
    """The batches, with a progress bar. Raises StopRequested between two of them."""
    bar = ProgressBar(name, len(loader), unit="batch")
    for batch in loader:
        stop_if_asked(devices)
        yield batch
        bar.update()
    bar.close()


# ---------------------------------------------------------------------------------------------------------------------
# The modes train, pretrain and test


def train_and_test(config: Config, devices: Devices) -> None:
    """--mode train, and --mode pretrain, which tests nothing: a new run, or the rest of one that was interrupted."""
    if show_finished(config):
        show_baseline(config)
        return
    # Data, model, optimizer and schedule; as they were saved, if a state is there
    run = (PretrainingRun if config.pretrains else Run).open(config, devices)
    say(f"{config.run_name}: {len(run.data.splits['train']):,} {run.unit} to train on, "
        f"{len(run.data.splits['valid']):,} to validate; {run.total_steps:,} optimizer steps of "
        f"{run.sampler.effective_batch} {run.unit} on {devices}")
    train(run)
    if not config.train_config.test:
        write_untested(config, devices, run.figures(), run.tracker)
        return
    test(config, devices, load_model(best_model(run.folder)), run.data, run.figures(), run.tracker)
    show_baseline(config)  # what a bag of words does on the same reviews, if somebody has made one


def test(config: Config, devices: Devices, model: EncoderForClassification, data: PreparedData, figures: dict[str, Any],
         tracker: Tracker) -> None:
    """Measure `model` on the test reviews and write metrics, predictions, mistakes, plots and model card."""
    place_model(model, devices.device, compiled=config.train_config.compile)
    loader = get_dataloader(data, "test", config, devices.device, pass_tokens(model, devices.device))
    predictions = evaluate(model, loader, devices, "test")
    if devices.is_main:
        write_results(config, devices, predictions, list(model.config.id2label.values()), data.splits["test"].text,
                      figures, tracker)


def test_again(config: Config, devices: Devices) -> None:
    """--mode test: the best model of a finished or interrupted run on the test split."""
    folder = config.run_folder
    if folder.is_dir():  # else there is nothing to claim, and `best_model` says so
        claim_run_folder(folder)
    devices.barrier()
    best = best_model(folder)
    # With another split, the model would be tested on reviews that it was trained on.
    refuse_differences(config, ignored=MAY_DIFFER_IN_A_TEST)
    trained = open_classifier(best, config, devices)
    with devices.main_process_first():
        data = prepare_data(config, trained_model=str(best)) if is_encoder(config) else load_split(config)
    say_what_was_cached()
    refuse_other_data(config, trained.data_fingerprint, data.fingerprint)
    if data.label_names != trained.label_names:
        raise UserError(f"{config.data_config.dataset} has the classes {data.label_names}, {best} was trained on "
                        f"{trained.label_names}: test it on the data of its training")
    lock_within(folder)
    figures, tracker = read_metrics(folder), Tracker(config, job_type="test")
    if is_encoder(config):
        test(config, devices, trained.model, data, figures, tracker)
    elif devices.is_main:
        write_results(config, devices, predictions_of(trained.logits, data, "test"), data.label_names, data.text,
                      figures, tracker)


# ---------------------------------------------------------------------------------------------------------------------


def main(command: cli.Command, devices_class: type[Devices] = SingleDevice) -> None:
    config = command.config
    if command.mode in cli.RUN_MODES or command.int8:
        check_hub(config)
    quiet_libraries()
    make_deterministic()
    devices = devices_class(config)
    if command.mode in cli.RUN_MODES:
        with room_for(config.run_folder):
            modes = {"train": train_and_test, "pretrain": train_and_test, "test": test_again, "baseline": baseline}
            modes[command.mode](config, devices)
    else:
        modes = {"predict": predict, "export": export, "explain": explain, "publish": publish}
        modes[command.mode](command, devices)
    devices.close()


if __name__ == "__main__":
    cli.run(lambda: main(COMMAND))
