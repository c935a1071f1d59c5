"""Fine-tune a Transformer encoder for sentiment classification on one device: CUDA, MPS or CPU.

    python main.py --config demo.yaml                                   the built-in demo: no download, about a minute
    python main.py --config config.yaml --mode train                    BERT on IMDB: train, validate, test
    python main.py model_config.model_name=answerdotai/ModernBERT-base  another encoder
    python main.py train_config.epochs=3 data_config.max_len=256        any key of config.yaml, see docs/settings.md
    python main.py --mode pretrain                                      learn masked words first, without labels; then:
    python main.py model_config.model_name=checkpoints/pretrain-bert-base-uncased-len128-bs64-seed42/best
    python main.py --mode test                                          evaluate the best model of that run again
    python main.py --mode predict --text "A wonderful film."            label a review with that model
    python main.py --mode predict --input FILE --output FILE            or all rows of a file
    python main.py --mode decide --threshold "precision>=0.95"          the threshold between two classes
    python main.py --mode explain --text "A wonderful film."            the words that the decision rests on
    python main.py --mode export                                        that model as ONNX or for transformers
    python main.py --mode export --format web                           and a page in which a browser runs it
    python main.py --mode publish OWNER/NAME                            that model on the Hub; --yes sends it
    python main.py --mode audit --output suspects.csv                   labels that are probably wrong, of all reviews
    python main.py --mode baseline                                      a bag of words on the same split, in seconds
    python main_accumulation.py data_config.batch_size=64 train_config.gradient_accumulation_steps=4
                                                                        large batches: gradient accumulation
    accelerate launch --multi_gpu --num_processes 2 main_accumulation.py    several devices; on CPUs: torchrun
    python experiment.py experiments/exp2.yaml                          a grid of settings and seeds, and its report
    python compare.py checkpoints/RUN checkpoints/RUN                   finished runs side by side
    python ensemble.py checkpoints/RUN checkpoints/RUN --output FOLDER  finished runs combined by stacking
    python main.py --mode distill --teacher checkpoints/RUN             one model that learns from a run, or a stack
"""

from suite.common import cli

if __name__ == "__main__":
    cli.begin()
    COMMAND = cli.read_command(__doc__, accumulates=False)  # a wrong value is refused before torch's slow import
    cli.run_other_mode(COMMAND)

import torch
from torch import nn
from torch.utils.data import DataLoader

from data import Step, classes_of
from suite.common.devices import Devices
from suite.comparison.report import show_baseline
from suite.encoders.placement import compute_logits, to_device
from suite.training.evaluation import Predictions
from suite.training.finish import TrainedRun, lacks_only_its_test, show_finished, test_loader, write_results
from suite.training.run import Run
from suite.training.tracking import watched
from utils import Config

# ---------------------------------------------------------------------------------------------------------------------
# The loop


def train(run: Run) -> None:
    """Train, validate after each epoch, keep the best model. A signal saves the state and leaves."""
    validate = run.evaluate or evaluate  # a pretraining run has no reviews to classify
    with run.saved_when_stopped():
        for epoch in run.epochs_left():  # max_steps and early stopping may end them
            for step in run.steps_left(epoch):  # the reviews of an optimizer step, their micro-batches and total weight
                with run.may_run_out_of_memory():
                    loss, correct = train_step(run, step)
                    run.after_step(step, loss, correct)  # counts it; records, stops and saves where that is due
            with run.average.in_model():  # the averaged weights, if train_config.ema_decay is set
                predictions = validate(run.model, run.valid_loader, run.devices, "validation")
            run.after_epoch(predictions)  # records the metrics, keeps the model if it is the best yet, saves the state


def train_step(run: Run, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step on the mean loss over an effective batch, which all micro-batches of all processes form.

    Returns this process's summed loss and number of correct predictions, two tensors () on the device.
    """
    model, devices = run.model, run.devices
    loss, correct = torch.zeros(2, device=devices.device)
    for number, batch in enumerate(step.micro_batches, start=1):
        _, labels, inputs = to_device(batch, devices.device)
        is_last = number == len(step.micro_batches)
        with devices.accumulate(model, is_last):  # gradients are exchanged at the last one
            with devices.autocast():
                output = model(**inputs, labels=labels, reduction="sum", class_weights=run.class_weights)
            # Each micro-batch's sum is divided by the total weight of the effective batch, so that the gradients add up
            # to that of its mean. DDP averages over the processes, which the factor undoes.
            devices.backward(output.loss * (devices.num_processes / step.total_weight))
        loss += output.loss.detach()
        correct += (output.logits.argmax(dim=1) == classes_of(labels)).sum()
    norm = devices.clip_gradients(model, run.optimizer, run.config.train_config.max_grad_norm)
    if devices.step(run.optimizer, norm, loss):  # fp16's loss scaler may skip the step
        run.scheduler.step()
        run.average.update()  # of the weights, if train_config.ema_decay is set
    run.optimizer.zero_grad(set_to_none=True)
    return loss, correct


def evaluate(model: nn.Module, loader: DataLoader, devices: Devices, name: str) -> Predictions:
    """The model's logits on every review of a split, each exactly once. Raises StopRequested between batches."""
    model.eval()
    reviews = sum(map(len, loader.dataset))
    ids, labels, logits = compute_logits(model, watched(loader, devices, name), reviews, devices)
    model.train()
    counted = ids >= 0  # -1: a review that is there only to keep the processes in step
    return Predictions(*devices.gather(ids[counted], labels[counted], logits[counted]))


# ---------------------------------------------------------------------------------------------------------------------
# The modes train, pretrain, distill and test


def train_and_test(config: Config, devices: Devices, kind: type[Run] = Run) -> None:
    """--mode train: a new run, or the rest of one that was interrupted."""
    if show_finished(config):
        pass  # there is nothing left to do
    elif lacks_only_its_test(config):
        test_again(config, devices)
    else:
        run = kind.open(config, devices)  # data, model, optimizer and schedule; as they were saved, if a state is there
        train(run)
        if config.train_config.test:
            test(run, run.best_model())
        else:
            write_results(run)
    show_baseline(config)  # what a bag of words does on the same test reviews, if somebody has made one


def pretrain(config: Config, devices: Devices) -> None:
    """--mode pretrain: the same loop on masked words, without a test."""
    from suite.training.pretraining import PretrainingRun

    if not show_finished(config):
        run = PretrainingRun.open(config, devices)
        train(run)
        write_results(run)


def distill(config: Config, devices: Devices) -> None:
    """--mode distill: the same on a teacher's labels of the unlabelled reviews, too."""
    from suite.training.distillation import DistillationRun

    train_and_test(config, devices, DistillationRun)


def test(run: Run | TrainedRun, model: nn.Module) -> None:
    """Measure `model` on the test reviews and write metrics, predictions, mistakes, plots and model card."""
    write_results(run, evaluate(model, test_loader(run, model), run.devices, "test"))


def test_again(config: Config, devices: Devices) -> None:
    """--mode test: the best model of a finished or interrupted run on the test split."""
    run = TrainedRun(config, devices)
    if run.model is not None:
        test(run, run.model)
    else:  # a bag of words, or runs that were combined
        write_results(run, run.predictions())


# suite/common/cli.py knows the others
MODES = {"train": train_and_test, "pretrain": pretrain, "distill": distill, "test": test_again}


def main(command: cli.Command, devices_class: type[Devices] = Devices) -> None:
    cli.run_mode(command, devices_class, MODES)


if __name__ == "__main__":
    cli.run_with_exit_code(lambda: main(COMMAND))
