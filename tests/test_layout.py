"""Where things stand: the top level, the direction of imports, the size of functions, and what the docs say of it."""

import ast
import re
from pathlib import Path

from conftest import PROJECT

# From the bottom up. A module may import from its own floor, within its own folder, and from the floors below.
FLOORS = [
    ["suite.common.checks"],  # utils checks the configuration with it, and it imports nothing of this project
    ["model", "utils"],
    ["suite.common"],
    ["suite.reviews", "suite.encoders"],
    ["data"],
    ["suite.inference"],  # a trained model needs nothing of its training
    ["suite.training"],
    ["suite.comparison"],
    ["main", "main_accumulation", "experiment", "compare", "ensemble"],
]
MOST_LINES = 60  # of a function: a screen


def sources() -> list[Path]:
    return [*PROJECT.glob("*.py"), *PROJECT.glob("suite/**/*.py")]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> tuple[int, str] | None:
    """(floor, folder or file) of a module; None for a library's."""
    rooms = [(floor, room) for floor, rooms in enumerate(FLOORS) for room in rooms
             if module == room or module.startswith(room + ".")]
    return max(rooms, key=lambda room: len(room[1]), default=None)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def test_imports_run_one_way():
    wrong = []
    for path in sources():
        room = room_of(module_of(path))
        for name in imports(path):
            other = room_of(name)
            if room and other and room != other and other[0] >= room[0]:
                wrong.append(f"{path.relative_to(PROJECT)} imports {name}")
    assert wrong == ["main_accumulation.py imports main.main"]  # it is the same loop


def test_the_top_level_holds_what_is_looked_for_by_name():
    assert {path.name for path in PROJECT.glob("*.py")} == {
        "main.py", "main_accumulation.py", "experiment.py", "compare.py", "ensemble.py", "model.py", "data.py",
        "utils.py"}


def test_only_tracking_knows_trackers_only_pages_jinja_and_only_scripts_argparse():
    knowing = {library: {str(path.relative_to(PROJECT)) for path in sources()
                         if any(name.partition(".")[0] == library for name in imports(path))}
               for library in ("wandb", "trackio", "jinja2", "argparse")}
    assert knowing["wandb"] == knowing["trackio"] == {"suite/training/tracking.py"}
    assert knowing["jinja2"] == {"suite/common/pages.py"}
    assert knowing["argparse"] <= {"suite/common/cli.py", "experiment.py", "compare.py", "ensemble.py"}


def test_each_template_is_filled_by_some_code():
    everything = "".join(path.read_text(encoding="utf-8") for path in sources())
    assert all(f'"{path.name}"' in everything for path in PROJECT.glob("suite/templates/*"))


def test_a_function_fits_on_a_screen():
    long = [f"{path.relative_to(PROJECT)}: {node.name}" for path in sources()
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= MOST_LINES]
    assert long == []


def test_the_docs_name_files_and_functions_that_exist():
    everything = "".join(path.read_text(encoding="utf-8") for path in sources())
    for page in [PROJECT / "README.md", *PROJECT.glob("docs/*.md")]:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"`((?:[\w/]+/)?\w+\.py)`", text):
            assert (PROJECT / name).exists(), f"{page.name}: {name}"
        for name in re.findall(r"`(\w+)\(\)`", text):
            assert f"def {name}(" in everything, f"{page.name}: {name}()"
        for target in re.findall(r"\]\(([^)#:]+)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_lines_that_the_docs_show_are_those_of_the_loop():
    def lines_of(code: str) -> list[str]:
        return [line.strip() for line in re.sub("#.*", "", code).splitlines() if line.strip()]

    loop = lines_of((PROJECT / "main.py").read_text(encoding="utf-8"))
    page = (PROJECT / "docs/accumulation.md").read_text(encoding="utf-8")
    [shown] = re.findall(r"```python\n(for number.*?)```", page, re.DOTALL)
    shown = lines_of(shown)
    start = loop.index(shown[0])
    assert loop[start:start + len(shown)] == shown


def test_the_readme_is_a_door():
    assert len((PROJECT / "README.md").read_text(encoding="utf-8")) <= 6000
