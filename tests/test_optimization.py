"""Every optimizer and every schedule that the configuration offers: the weights and learning rates of its formula."""

import math
import typing

import pytest
import torch
from conftest import history_of, train_here

from suite.training.optimization import build_optimizer, build_scheduler
from utils import TrainConfig

STEPS, RATE = 40, 0.5
FORMULAS = {"constant": lambda done: 1, "linear": lambda done: 1 - done,
            "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2}  # by the share of the steps after the warm-up


def choices(field: str) -> set[str]:
    return set(typing.get_args(typing.get_type_hints(TrainConfig)[field]))


def rates(train_config: TrainConfig) -> list[float]:
    optimizer = build_optimizer(torch.nn.Linear(2, 2), train_config)
    scheduler, found = build_scheduler(optimizer, train_config, STEPS), []
    for _ in range(STEPS):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("warm_up", [0, 10, STEPS])
@pytest.mark.parametrize("name", FORMULAS)
def test_a_schedule_gives_the_learning_rates_of_its_formula(name, warm_up):
    expected = [RATE * (step / warm_up if step < warm_up else FORMULAS[name]((step - warm_up) / (STEPS - warm_up)))
                for step in range(STEPS)]
    found = rates(TrainConfig(scheduler=name, warmup_ratio=warm_up / STEPS, learning_rate=RATE))
    assert found == pytest.approx(expected)


def test_all_choices_are_tested():
    assert choices("scheduler") == FORMULAS.keys()
    assert choices("optimizer") == {"adam", "adamw", "sgd"}


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_an_optimizer_is_the_one_of_its_paper(name):
    """Two steps with weight decay on the matrix, and none on the bias."""
    torch.manual_seed(0)
    layer, gradients = torch.nn.Linear(3, 2).double(), torch.randn(2, 2, 4, dtype=torch.float64)
    expected = torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach().clone()
    optimizer = build_optimizer(layer, TrainConfig(optimizer=name, learning_rate=0.1, weight_decay=0.2))
    decay, first, second = torch.tensor([0.2, 0.2, 0.2, 0.0], dtype=torch.float64), 0, 0
    for step, gradient in enumerate(gradients, start=1):
        layer.weight.grad, layer.bias.grad = gradient[:, :3].clone(), gradient[:, 3].clone()
        optimizer.step()
        if name == "adamw":  # Loshchilov and Hutter, 2019: the decay does not pass through the moments
            expected *= 1 - 0.1 * decay
        else:
            gradient = gradient + decay * expected
        if name == "sgd":
            expected -= 0.1 * gradient
            continue
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient ** 2  # Kingma and Ba, 2015
        expected -= 0.1 * (first / (1 - 0.9 ** step)) / ((second / (1 - 0.999 ** step)).sqrt() + 1e-8)
    torch.testing.assert_close(torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach(), expected)


@pytest.mark.parametrize(("optimizer", "scheduler"), [("adam", "cosine"), ("adamw", "linear"), ("sgd", "constant")])
def test_a_run_follows_its_schedule(overrides, tmp_path, optimizer, scheduler):
    """20 steps, of which the first 5 warm up; the record after step 3 holds the rate of the step that comes next."""
    train_here(*overrides, f"train_config.optimizer={optimizer}", f"train_config.scheduler={scheduler}",
               "train_config.warmup_ratio=0.25", "train_config.test=false")
    for row in history_of(tmp_path / "runs" / "run"):
        if "train/learning_rate" in row:
            step = row["step"]
            factor = step / 5 if step < 5 else FORMULAS[scheduler]((step - 5) / 15)
            assert row["train/learning_rate"] == pytest.approx(0.01 * factor)
