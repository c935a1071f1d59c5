"""Where a training step's time goes: torch's profile, summed over what a model is made of.

    python -m benchmarks.profile                                  MiniLM's shape at 128 and 512 tokens, on two CPU cores
    python -m benchmarks.profile --shape modernbert-small --tokens 128

An operation counts for the innermost part of the model that called it; a backward operation for the part whose forward
operation it differentiates. `Python` is the time in which neither an operation nor a part ran. The last row is no part
of the sum: the share of processor time that the operating system's kernel took. On a CPU only.
"""

import argparse
import functools
import resource
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

from torch.autograd.profiler import record_function
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from benchmarks.noise import quietly, refuse_busy_machine
from benchmarks.workload import SHAPES, WARM_UP_STEPS, config_for, describe_machine, workload
from main import train_step
from suite.common.devices import Devices
from suite.encoders import cpu_kernels
from suite.training.run import Run

PARTS = {"Linear": "matrix products", "Embedding": "embeddings", "LayerNorm": "layer norm", "Dropout": "dropout",
         "CPUDropout": "dropout", "GELUActivation": "GELU"}  # by the class of a module
OPERATIONS = {"aten::_to_copy": "casts", "aten::to": "casts", "Optimizer.step#Adam.step": "optimizer",
              "aten::linalg_vector_norm": "gradient's norm", "aten::_foreach_norm": "gradient's norm"}  # by their names
KERNELS = {"softmax_dropout": "attention", "softmax_dropout_backward": "attention", "gelu_backward": "GELU",
           "dropout_add_norm": "layer norm", "dropout_add_norm_backward": "layer norm"}  # numba's, by their names
FUNCTIONS = ("BlockAttention", "Attention", "DropoutAddNorm", "GELU")  # which have a backward pass of their own
ORDER = ["matrix products", "attention", "dropout", "GELU", "layer norm", "embeddings", "casts", "optimizer",
         "gradient's norm", "the rest", "Python"]


def named(function: Any, part: str) -> Any:
    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        with record_function(part):
            return function(*arguments, **options)

    return call


def part_of(event: FunctionEvent, forward: dict[int, FunctionEvent]) -> str:
    """The part that an operation belongs to. `forward`: the forward operation of each number."""
    at: FunctionEvent | None = event
    while at is not None:
        if at.name in OPERATIONS or at.name in ORDER:
            return OPERATIONS.get(at.name, at.name)
        if at.name.startswith("autograd::engine::evaluate_function") and at.sequence_nr in forward:
            return part_of(forward[at.sequence_nr], {})
        at = at.cpu_parent
    return "the rest"


def shares(events: list[FunctionEvent], seconds: float) -> dict[str, float]:
    """The share of each part of the time, 0 to 1."""
    # Operations that nothing is differentiated by carry the number of the next one that is, so the last one counts.
    forward = {event.sequence_nr: event for event in sorted(events, key=lambda event: event.time_range.start)
               if event.name.startswith(("aten::", *FUNCTIONS)) and event.sequence_nr >= 0 and not is_backward(event)}
    times: dict[str, float] = defaultdict(float)
    for event in events:
        # A part's own time is that of no operation: in dropout, of NumPy's generator.
        if (event.name.startswith(("aten::", "autograd::", "torch::autograd::")) or event.name.endswith("Backward0")
                or event.name in ORDER):
            times[part_of(event, forward)] += event.self_cpu_time_total / 1e6 / seconds
    return {**times, "Python": max(0.0, 1 - sum(times.values()))}


def is_backward(event: FunctionEvent) -> bool:
    while event is not None:
        if event.name.startswith("autograd::engine"):
            return True
        event = event.cpu_parent
    return False


def measure(work: Path, tokens: int, batch: int) -> dict[str, float]:
    """The shares of an epoch's steps, and that of the operating system's kernel."""
    config = config_for(work, tokens, batch)
    with ExitStack() as stack:
        for name, part in (("drop", "dropout"), ("draw", "dropout"), ("cpu_attention", "attention")):
            stack.enter_context(mock.patch.object(cpu_kernels, name, named(getattr(cpu_kernels, name), part)))
        attention, devices = {"sdpa_cpu": cpu_kernels.cpu_attention}, Devices(config)
        if devices.has_numba_kernels:
            from suite.encoders import numba_layers

            own, attention["sdpa_numba"] = numba_layers.call, named(numba_layers.numba_attention, "attention")
            stack.enter_context(mock.patch.object(numba_layers, "call", lambda kernel, *rest: named(
                own, KERNELS[kernel.__name__])(kernel, *rest)))
        stack.enter_context(mock.patch.dict(cpu_kernels.AttentionInterface()._global_mapping, attention))
        run = Run.open(config, devices)
        for module in run.model.modules():
            if (part := PARTS.get(type(module).__name__)) is not None:
                module.forward = named(module.forward, part)
        steps = list(run.train_loader(0))

        def take(some: list) -> None:
            for step in some:
                train_step(run, step)

        take(steps[:WARM_UP_STEPS])
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
            take(steps)
            seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    user, kernel = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    return {**shares(profiled.events(), seconds), "kernel": kernel / (user + kernel)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="minilm")
    parser.add_argument("--tokens", nargs="+", type=int, default=[128, 512])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--reviews", type=int, default=128)
    arguments = parser.parse_args()
    print(f"{arguments.shape}, batch {arguments.batch}, {arguments.reviews} reviews, {describe_machine()}", flush=True)
    refuse_busy_machine()
    columns = {}
    with workload(arguments.shape, arguments.reviews) as work:
        for tokens in arguments.tokens:
            columns[tokens] = quietly(lambda t=tokens: measure(work, t, arguments.batch), f"{tokens} tokens")
    print("| share of the time | " + " | ".join(f"{tokens} tokens" for tokens in columns) + " |\n"
          "| --- |" + " --- |" * len(columns))
    for part in [*ORDER, "kernel"]:
        print(f"| {part} | " + " | ".join(f"{found.get(part, 0.0):.1%}" for found in columns.values()) + " |")


if __name__ == "__main__":
    main()
