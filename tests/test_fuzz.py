"""Fuzzing: whatever is in a configuration or in reviews, a command ends well or refuses it.

Hypothesis draws input that was good until some of its values or bytes were spoiled (fuzz_input.py), and the command
runs on it in this process. The promises: wrong settings and wrong data end in one line with exit code 2, and no row of
a labelled file is lost. A failure is shrunk and printed with all that repeats it.

    python -m pytest tests/test_fuzz.py -n 0 -s                                     some 10 s
    FUZZ_EXAMPLES=2000 FUZZ_SEED=7 python -m pytest tests/test_fuzz.py -n 0 -s      the long version

FUZZ_EXAMPLES is the number for each of the three. The same FUZZ_SEED draws the same ones.
"""

import contextlib
import csv
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import fuzz_input
import hypothesis
import pytest
from conftest import PROJECT, content_of, write_reviews
from hypothesis import HealthCheck, Phase, configuration
from hypothesis import strategies as st

import main
from suite.common import cli
from suite.inference import labelling
from suite.reviews.rows import columns_of
from suite.training import finish

EXAMPLES, SEED = int(os.environ.get("FUZZ_EXAMPLES", "25")), int(os.environ.get("FUZZ_SEED", "12"))
LONGEST = 10  # seconds of an example; more is a hang
configuration.set_hypothesis_home_dir(tempfile.mkdtemp(prefix="hypothesis_"))


def fuzz(strategy: st.SearchStrategy, attempt: Callable[..., str]) -> None:
    """Call `attempt` with examples of the strategy, and print how often it had which outcome."""
    outcomes = Counter()

    @hypothesis.seed(SEED)
    @hypothesis.settings(max_examples=EXAMPLES, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
                         suppress_health_check=list(HealthCheck), report_multiple_bugs=False)
    @hypothesis.given(strategy)
    def try_one(example):
        outcomes[attempt(example)] += 1

    try_one()
    print(f"\n{EXAMPLES:,} examples with FUZZ_SEED={SEED}: {dict(outcomes)}")
    assert set(outcomes) >= {"done", "refused"}, "a fuzzing that reaches only one outcome proves little"


class Bench:
    """Runs one example after the other: `in` holds its input and `out`, the current folder, its output. `shared` has an
    encoder, a trained classifier and reviews for all examples."""

    def __init__(self, base: Path, encoder: str):
        self.base, self.shared, self.count = base, base / "shared", 0
        self.shared.mkdir()
        (self.shared / "bert").symlink_to(encoder)
        write_reviews(self.shared / "reviews.csv", rows=30)
        with self.example() as folder:
            assert self.train(folder, fuzz_input.GOOD_CONFIG) == "done"
            (folder / "out/run/best").rename(self.shared / "ours")

    @contextlib.contextmanager
    def example(self):
        self.count += 1
        with tempfile.TemporaryDirectory(dir=self.base, prefix=f"example-{self.count}-") as name:
            for part in ("in", "out"):
                Path(name, part).mkdir()
            yield Path(name)

    def run(self, folder: Path, *arguments: str) -> str:
        """The outcome of `python main.py ARGUMENTS`: done, refused, or diverged, where a learning rate is absurd."""
        before, code = content_of(folder / "in"), 0
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), at_most(LONGEST):
            warnings.simplefilter("ignore")
            patch.chdir(folder / "out")
            patch.setattr(sys, "argv", ["main.py", *arguments])
            patch.setattr(labelling, "CHUNK_ROWS", 8)
            patch.setattr(finish, "try_plots", lambda *arguments: [])  # they take most of a tiny run's time
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    cli.run_with_exit_code(lambda: main.main(cli.read_command("", accumulates=False)))
                except SystemExit as left:
                    code = left.code
                except Exception as error:
                    # As text: Hypothesis compares the causes of errors, and some go thousands deep.
                    code = "".join(traceback.format_exception(error, limit=-8, chain=False))[-3000:]
        self.printed, errors = out.getvalue(), err.getvalue()
        report = f"exit code {code}, standard error {errors!r}"
        assert code in (0, 2) or (code == 1 and "not finite" in errors), report
        if code:
            assert errors.startswith("error: "), report
            assert len(errors.splitlines()) == 1, report
        assert content_of(folder / "in") == before, f"the input has changed; {report}"
        return {0: "done", 1: "diverged", 2: "refused"}[code]

    def try_configuration(self, example: tuple[dict[str, str], list[str]]) -> str:
        with self.example() as folder:
            return self.train(folder, *example)

    def train(self, folder: Path, values: dict[str, str], overrides: list[str] = ()) -> str:
        """The outcome of --mode train with a YAML file of these values, and the overrides."""
        def placed(text: str) -> str:
            return text.replace("@IN@", str(self.shared)).replace("@OUT@", str(folder / "out"))

        content = fuzz_input.as_yaml({key: placed(value) for key, value in values.items()})
        (folder / "in/config.yaml").write_bytes(content)
        outcome = self.run(folder, "--config", str(folder / "in/config.yaml"), *map(placed, overrides))
        assert outcome != "done" or list((folder / "out").rglob("metrics.json"))
        return outcome

    def label(self, folder: Path, source: Path, output: str) -> tuple[str, list[dict], list]:
        """(outcome, the rows that were written, the rows that were rejected) of --mode predict."""
        target = folder / f"out/labels{output}"
        outcome = self.run(folder, "--mode", "predict", "--config", str(PROJECT / "config.yaml"), "--model",
                           str(self.shared / "ours"), "--input", str(source), "--output", str(target),
                           "data_config.text_column=review", "data_config.max_len=32", "train_config.device=cpu",
                           "train_config.mixed_precision=no")
        if outcome != "done":
            return outcome, [], []
        with target.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file)) if output == ".csv" else [json.loads(line) for line in file]
        rejected, broken = Path(f"{target}.rejected.csv"), []
        if rejected.exists():
            with rejected.open(encoding="utf-8", newline="") as file:
                broken = list(csv.reader(file))[1:]
        for row in rows:
            shares = [float(value) for name, value in row.items() if str(name).startswith("probability_")]
            assert math.isclose(sum(shares), 1, abs_tol=1e-3), row
        return outcome, rows, broken

    def try_reviews(self, example: tuple[bytes, str, str], kind: str) -> str:
        content, mode, output = example
        with self.example() as folder:
            source = folder / f"in/reviews{kind}"
            source.write_bytes(content)
            if mode == "train":
                return self.train(folder, fuzz_input.GOOD_CONFIG | {"data_config.dataset": str(source)})
            outcome, rows, broken = self.label(folder, source, output)
            if outcome == "done":
                self.refuse_lost_rows(source, rows, broken)
            return outcome

    def refuse_lost_rows(self, source: Path, rows: list[dict], broken: list) -> None:
        content = source.read_bytes()
        if source.suffix == ".jsonl":
            lines = re.split(b"\r\n|\r|\n", content.removeprefix(b"\xef\xbb\xbf"))
            assert len(rows) + len(broken) == sum(bool(line.strip()) for line in lines)
        assert f" {len(rows)} rows," in self.printed, self.printed
        found = str([rows, broken, columns_of(str(source))])  # an open quote can put rows into the name of a column
        marks = [set(re.findall("mark[0-9]{2}x", text)) for text in (content.decode(errors="replace"), found)]
        assert marks[0] <= marks[1], f"neither written nor rejected: {sorted(marks[0] - marks[1])}"


@contextlib.contextmanager
def at_most(seconds: float):
    """Ends what takes longer, by what is not an Exception: some code would take one for an error of its input."""
    def hang(*_):
        pytest.fail(f"it hangs: still busy after {seconds} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(encoder_folder):
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a busy disk takes most of an example's time
    with tempfile.TemporaryDirectory(prefix="fuzz_", dir=memory) as folder:
        yield Bench(Path(folder), encoder_folder("bert"))


def test_what_is_not_spoiled_works(bench):
    for kind, mode in itertools.product([".csv", ".jsonl"], ["train", "predict"]):
        content = fuzz_input.file_of(fuzz_input.good_rows("bad", "good"), kind)
        assert bench.try_reviews((content, mode, ".csv"), kind) == "done"


def test_configurations(bench):
    fuzz(fuzz_input.configurations(), bench.try_configuration)


@pytest.mark.parametrize("kind", [".csv", ".jsonl"])
def test_reviews(bench, kind):
    modes = st.sampled_from(["train", "predict", "predict"])
    fuzz(st.tuples(fuzz_input.reviews(kind), modes, st.sampled_from([".csv", ".jsonl"])),
         lambda example: bench.try_reviews(example, kind))
