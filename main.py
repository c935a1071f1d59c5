"""Fine-tune a Transformer encoder for sentiment classification on one device: CUDA, MPS or CPU.

    python main.py --config demo.yaml                                   the built-in demo: no download, under a minute
    python main.py --config config.yaml --mode train                    BERT on IMDB: train, validate, test
    python main.py model_config.model_name=answerdotai/ModernBERT-base  another encoder
    python main.py train_config.epochs=3 data_config.max_len=256        any setting of config.yaml, see README.md
    python main.py --mode test                                          evaluate the best model of that run again
    python main.py --mode predict --text "A film to remember."          label a review with that model
    python main.py --mode predict --input FILE --output FILE            or all rows of a file
    python main.py --mode explain --text "A film to remember."          the words that the decision rests on
    python main.py --mode export                                        that model as ONNX
    python main_accumulation.py data_config.batch_size=64 train_config.gradient_accumulation_steps=4
                                                                        large batches: gradient accumulation
    accelerate launch --num_processes 2 main_accumulation.py            several devices
    python experiment.py experiments/exp2.yaml                          a grid of settings and seeds, and its report
    python compare.py checkpoints/RUN checkpoints/RUN                   finished runs side by side
"""

from suite.common import cli

if __name__ == "__main__":
    COMMAND = cli.read_command(__doc__, accumulates=False)  # a wrong setting is refused before torch's slow import

import time
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from data import get_dataloader, prepare_data
from model import EncoderForClassification
from suite.common.hub import check_hub, quiet_libraries
from suite.common.run_folder import read_history, read_metrics
from suite.common.stopping import SIGNALS, StopRequested
from suite.common.storage import room_for, write_json
from suite.encoders.cpu_kernels import place_model
from suite.encoders.loading import best_model, load_model
from suite.inference.explain import explain
from suite.inference.export import export
from suite.inference.predict import predict
from suite.training.devices import SingleDevice, make_deterministic
from suite.training.efficiency import environment, peak_flops, peak_memory_mb, training_flops
from suite.training.evaluation import Predictions, compute_metrics, mistakes, write_mistakes, write_predictions
from suite.training.model_card import write_model_card
from suite.training.run import Run
from suite.training.states import (
    find_state,
    finished_metrics,
    open_run,
    refuse_differences,
    refuse_other_data,
    saved_states,
)
from suite.training.tracking import ProgressBar, Wandb, try_plots
from utils import Config, UserError, say

# ---------------------------------------------------------------------------------------------------------------------
# One optimizer step, and one pass over a split


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, window: list[dict[str, torch.Tensor]],
               weight: float, devices: Any, max_grad_norm: float | None, class_weights: torch.Tensor | None = None
               ) -> tuple[torch.Tensor, bool]:
    """One optimizer step on the mean loss over a window, over all its micro-batches and processes.

    `weight`: the window's reviews or, with `class_weights` (num_labels,), the sum of the weights of their classes.
    Returns the window's [summed loss, correct reviews] of this process, a tensor (2,) on the device, and whether the
    weights were updated: never where the gradient is not finite, nor in any later step, see `settle`.
    """
    sums = torch.zeros(2, device=devices.device)
    for number, batch in enumerate(window, start=1):
        _, labels, inputs = to_device(batch, devices.device)
        with devices.accumulate(model, is_last=number == len(window)):
            with devices.autocast():
                output = model(**inputs, labels=labels, reduction="sum", class_weights=class_weights)
            # Each micro-batch's sum over the window's weight: their gradients add up to the mean's. DDP averages over
            # processes, which the factor undoes.
            devices.backward(output.loss * (devices.num_processes / weight))
        sums += torch.stack([output.loss.detach(), (output.logits.argmax(dim=1) == labels).sum()])
    norm = devices.clip_gradients(model, optimizer, max_grad_norm)
    updated = devices.step(optimizer, norm, sums[0])
    optimizer.zero_grad(set_to_none=True)
    return sums, updated


@torch.inference_mode()
def evaluate(model: nn.Module, loader: DataLoader, devices: Any, name: str) -> Predictions:
    """The model's logits on every review of a split, each exactly once. Raises StopRequested between batches."""
    model.eval()
    # Results stay on the device: reading them would wait for each batch. And they have their place beforehand: kept one
    # by one between a batch's large tensors, they would tear a CPU's heap into holes that grow with the reviews.
    count = sum(map(len, loader.batch_sampler))
    ids, labels = torch.empty(2, count, dtype=torch.int64, device=devices.device)
    logits = torch.empty(count, devices.unwrap(model).head.out_features, device=devices.device)
    start = 0
    bar = ProgressBar(name, len(loader), unit="batch")
    for batch in loader:
        if devices.any(SIGNALS.received is not None):
            raise StopRequested
        batch_ids, batch_labels, inputs = to_device(batch, devices.device)
        with devices.autocast():
            batch_logits = model(**inputs).logits
        place = slice(start, start := start + len(batch_ids))
        ids[place], labels[place], logits[place] = batch_ids, batch_labels, batch_logits
        bar.update()
    bar.close()
    model.train()
    ids, labels, logits = (tensor.cpu().numpy() for tensor in (ids, labels, logits))
    real = ids >= 0  # the others only kept processes in step
    return Predictions(*devices.gather(ids[real], labels[real], logits[real]))


def to_device(batch: dict[str, torch.Tensor], device: torch.device
              ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """(ids, labels, the model's inputs) of a batch, copied without waiting."""
    moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    return moved.pop("id"), moved.pop("labels"), moved


# ---------------------------------------------------------------------------------------------------------------------
# Train, validate, test


def train(config: Config, devices: Any) -> None:
    """Train, validate each epoch, keep the best model, test it; go on where the same run stopped before."""
    if metrics := finished_metrics(config):
        say(f"{config.run_folder} holds this run, finished: nothing was done again. For another one set run_name=NAME; "
            "to replace it, train_config.resume=never train_config.overwrite=true")
        print_results(config, metrics)
        return
    open_run(config.run_folder)
    state = find_state(config)
    run = Run(config, devices)
    run.start(state)
    say(f"{config.run_name}: {len(run.train_loader.dataset):,} reviews to train on, {len(run.valid_loader.dataset):,} "
        f"to validate; {run.total_steps:,} optimizer steps of {run.sampler.window_size} reviews on {devices}")
    with SIGNALS.deferred():
        try:
            while not run.is_over():
                train_epoch(run)
                validate_epoch(run)
        except StopRequested:
            run.save()
            say(f"{SIGNALS.name}: saved at optimizer step {run.progress.step}; the same command goes on from there")
            raise SystemExit(SIGNALS.exit_code) from None
    finish(run)


def train_epoch(run: Run) -> None:
    """The windows that are left of the epoch, with smaller micro-batches where the device's memory asks for them."""
    progress, train_config = run.progress, run.config.train_config
    bar = ProgressBar(f"epoch {progress.epoch + 1}/{train_config.epochs}", run.steps_per_epoch, progress.windows)
    while True:
        try:
            train_windows(run, bar)
            break
        except torch.OutOfMemoryError:
            if not train_config.auto_micro_batch or run.sampler.micro_batch == 1:
                raise
        # Outside of `except`, whose traceback would keep the window's tensors alive
        run.model.zero_grad(set_to_none=True)
        settle(run)
        run.sampler.micro_batch = progress.micro_batch = -(-run.sampler.micro_batch // 2)
        if run.devices.device.type == "cuda":
            torch.cuda.empty_cache()
        say(f"out of memory at optimizer step {progress.step + 1}: going on with micro-batches of "
            f"{run.sampler.micro_batch} reviews, at the same {run.sampler.window_size} reviews an optimizer step")
    bar.close()


def train_windows(run: Run, bar: ProgressBar) -> None:
    """One optimizer step on each window that is left of the epoch."""
    progress, devices, train_config = run.progress, run.devices, run.config.train_config
    run.sampler.epoch, run.sampler.first_window = progress.epoch, progress.windows
    lengths = run.train_loader.dataset.lengths
    batches = iter(run.train_loader)
    run.clock = time.perf_counter()
    for rows in run.sampler.windows()[progress.windows:]:
        if progress.step == run.total_steps:
            break
        window = [next(batches) for _ in run.sampler.cut(rows)]
        weight = float(run.weights[rows].sum())
        sums, updated = train_step(run.model, run.optimizer, window, weight, devices, train_config.max_grad_norm,
                                   run.class_weights)
        if updated:
            run.scheduler.step()
        run.sums += sums
        progress.step, progress.windows = progress.step + 1, progress.windows + 1
        progress.reviews += len(rows)
        progress.unrecorded_weight += weight
        progress.tokens += int(lengths[rows].sum())
        progress.flops += training_flops(run.work, lengths[rows])
        progress.executed_flops += training_flops(run.executed_work, lengths[rows])
        bar.update()
        at_end = progress.windows == run.steps_per_epoch or progress.step == run.total_steps
        if at_end or progress.step % run.config.log_config.log_every_steps == 0:
            log_training(run, bar)
        if devices.any(SIGNALS.received is not None):
            settle(run)
            raise StopRequested
        if progress.step % train_config.save_every_steps == 0:
            settle(run)
            run.save()
            run.clock = time.perf_counter()
    settle(run)


def log_training(run: Run, bar: ProgressBar) -> None:
    """Record the mean over the reviews since the last record: the only place where a step waits for the device."""
    progress = run.progress
    settle(run)
    loss, correct = run.devices.total(run.sums).tolist()
    count = progress.reviews - progress.recorded_reviews
    speed = progress.reviews / progress.seconds
    loss /= progress.unrecorded_weight
    run.record({"train/loss": loss, "train/accuracy": correct / count,
                "train/learning_rate": run.scheduler.get_last_lr()[0]}, {"train/samples_per_second": speed})
    bar.show(loss=loss, accuracy=correct / count, reviews_per_second=speed)
    progress.recorded_reviews, progress.unrecorded_weight = progress.reviews, 0.0
    run.sums.zero_()


def settle(run: Run) -> None:
    """Wait for the device: add the time since the last call, and stop if a step since then had no finite gradient.

    Raises FloatingPointError naming step and reviews. The weights are those before that step, on which nothing later
    was built either: each step looks at the one before it on the device, where looking costs no waiting.
    """
    run.devices.synchronize()
    now = time.perf_counter()
    run.progress.seconds += now - run.clock
    run.clock = now
    if run.devices.any(bool(run.devices.failed > 0)):
        step = run.start_step + int(run.devices.good_steps) + 1
        rows = run.sampler.windows()[run.progress.windows - 1 - (run.progress.step - step)]
        ids = run.train_loader.dataset.ids[np.sort(rows)].tolist()
        kept = next((str(state) for state in saved_states(run.folder / "last")), "none yet")
        raise FloatingPointError(
            f"optimizer step {step}: loss or gradient is not finite, so the weights were left as they were; reviews "
            f"{', '.join(map(str, ids))}. Lower train_config.learning_rate, set train_config.max_grad_norm, or look "
            f"at these reviews (last saved state: {kept})")


def validate_epoch(run: Run) -> None:
    """Measure on the validation reviews, keep the model if it is the best so far, save the state."""
    progress, metric = run.progress, run.config.train_config.best_metric
    metrics = compute_metrics(evaluate(run.model, run.valid_loader, run.devices, "validation"))
    run.record({f"valid/{name}": value for name, value in metrics.items() if isinstance(value, float)})
    progress.epoch, progress.windows = progress.epoch + 1, 0
    is_better = progress.best_epoch is None or rank(metrics, metric) > rank(progress.best_metrics, metric)
    say(f"epoch {progress.epoch}: validation loss {metrics['loss']:.4f}, accuracy {metrics['accuracy']:.4f}"
        + (", the best so far" if is_better else ""))
    if is_better:
        progress.best_metrics, progress.best_epoch, progress.epochs_without_improvement = metrics, progress.epoch, 0
        run.save_best()
    else:
        progress.epochs_without_improvement += 1
    run.save()


def rank(metrics: dict[str, Any], best_metric: str) -> tuple[float, ...]:
    """The larger, the better. Equal accuracies, which small validation sets often have, are told apart by the loss."""
    return (metrics["accuracy"], -metrics["loss"]) if best_metric == "accuracy" else (-metrics["loss"],)


def finish(run: Run) -> None:
    """Test the best model and write what the run was worth."""
    progress, device = run.progress, run.devices.device
    peak = (peak_flops(device) or 0) * run.devices.num_processes
    figures = {
        "train": {
            "samples_per_second": progress.reviews / progress.seconds,
            "tokens_per_second": progress.tokens / progress.seconds,
            "seconds": progress.seconds,
            "peak_memory_mb": peak_memory_mb(device),
            "model_tflops_per_second": progress.flops / progress.seconds / 1e12,
            "executed_tflops_per_second": progress.executed_flops / progress.seconds / 1e12,
            "model_flops_utilization": progress.flops / progress.seconds / peak if peak else None,
            "executed_flops_utilization": progress.executed_flops / progress.seconds / peak if peak else None,
            "optimizer_steps": progress.step,
        },
        "valid": progress.best_metrics | {"epoch": progress.best_epoch},
    }
    model = load_model(run.folder / "best")
    test(run.config, run.devices, model, get_dataloader(run.config, "test"), figures, run.wandb)


def test_again(config: Config, devices: Any) -> None:
    """--mode test: the best model of a finished or interrupted run on the test split."""
    folder = config.run_folder
    open_run(folder)
    devices.barrier()
    model = load_model(best_model(folder))
    # With another split, the model would be tested on reviews that it was trained on.
    refuse_differences(config, ignored=("train_config", "log_config", "data_config.batch_size"))
    loader = get_dataloader(config, "test", tokenizer_name=str(folder / "best"))
    refuse_other_data(config, model.config.data_fingerprint, prepare_data(config, str(folder / "best")).fingerprint)
    if (names := prepare_data(config, str(folder / "best")).label_names) != list(model.config.id2label.values()):
        raise UserError(f"{config.data_config.dataset} has the classes {names}, {folder / 'best'} was trained on "
                        f"{list(model.config.id2label.values())}: test it on the data of its training")
    test(config, devices, model, loader, read_metrics(folder), Wandb(config, job_type="test"))


def test(config: Config, devices: Any, model: EncoderForClassification, loader: DataLoader, figures: dict, wandb: Wandb
         ) -> None:
    """Measure `model` on the test reviews and write metrics, predictions, mistakes, plots and model card."""
    place_model(model, config, devices)
    predictions = evaluate(model, loader, devices, "test")
    if not devices.is_main:
        return
    folder, names = config.run_folder, list(model.config.id2label.values())
    metrics = figures | {"test": compute_metrics(predictions), "environment": environment(devices)}
    rows = mistakes(predictions, loader.dataset.text, names)
    write_predictions(folder / "test_predictions.csv", predictions, names)
    write_mistakes(folder / "misclassified.csv", rows)
    history = read_history(folder / "history.jsonl")
    plots = try_plots("suite.training.plots", folder / "plots", config, history, predictions, names)
    write_model_card(folder / "best", config, metrics, names)
    write_json(folder / "metrics.json", metrics)  # last: it says that the run is finished
    wandb.report({f"{split}/{name}": value for split in ("valid", "test")
                  for name, value in metrics.get(split, {}).items()}, rows, predictions, names, plots)
    print_results(config, metrics)
    wandb.finish()


def print_results(config: Config, metrics: dict[str, Any]) -> None:
    test = metrics["test"]
    low, high = test["accuracy_ci95"]
    demo = config.demo_mark
    say(f"{demo}test accuracy {test['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f}), loss {test['loss']:.4f}, "
        f"F1 {test['f1']:.4f}, {test['n']:,} reviews")
    if train := metrics.get("train"):
        say(f"{demo}{train['optimizer_steps']:,} optimizer steps in {train['seconds']:.1f} s, "
            f"{train['samples_per_second']:.1f} reviews a second")
    say(f"{demo}everything about this run: {config.run_folder}")


def main(command: cli.Command, devices_class: type = SingleDevice) -> None:
    if command.mode in ("train", "test"):  # the others need no more than a model's folder
        check_hub(command.config)
    quiet_libraries()
    make_deterministic()
    devices = devices_class(command.config)
    if command.mode == "predict":
        predict(command, devices)
        devices.close()
        return
    with room_for(command.config.run_folder):
        if command.mode == "train":
            train(command.config, devices)
        elif command.mode == "test":
            test_again(command.config, devices)
        elif command.mode == "export":
            export(command, devices)
        elif command.mode == "explain":
            explain(command, devices)
    devices.close()


if __name__ == "__main__":
    cli.run(lambda: main(COMMAND))
