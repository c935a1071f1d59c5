#!/usr/bin/env bash
# omegaconf 2.4.0, hydra-core 1.3.0, draccus 0.11.6, jsonargparse 4.53.0, tyro 1.0.17, simple-parsing 0.1.9,
# pydantic-settings 2.16.3 (Python 3.11): a command-line value for a dataclass field `name: str`.
#
# Guess, written before the run: whoever declares the field as `str` gets the text that was typed, in each of them; only
# OmegaConf without a structured schema would turn it into a number.
# What happens: OmegaConf, Hydra and draccus read the value before they look at the field's type, and turn the result
# into a text again. A run called 2026_11_29 is written as 20261129, and 1_2 and 12 are one run; OmegaConf and draccus
# read 007 as 7 and a column called `on` as True, and 1:30 becomes 90. Hydra keeps more, but neither 1_2 nor, like
# OmegaConf, 1e3. draccus makes None of null in a field that cannot be None. jsonargparse, tyro, simple-parsing and
# pydantic-settings keep what was typed.
#
# Output (2026-11-29; = stands for the text as typed):
#                        1_2      1e3        007    on      1:30   null
#     omegaconf          12       1000.0     7      True    90     refused
#     hydra              12       1000.0     =      =       =      refused
#     draccus            12       =          7      True    90     None
#     jsonargparse       =        =          =      =       =      =
#     tyro               =        =          =      =       =      =
#     simple-parsing     =        =          =      =       =      =
#     pydantic-settings  =        =          =      =       =      refused
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check omegaconf==2.4.0 hydra-core==1.3.0 draccus==0.11.6 \
    jsonargparse==4.53.0 tyro==1.0.17 simple-parsing==0.1.9 pydantic-settings==2.16.3 2>/dev/null
cd "$folder"
cat > typed.py <<'PYTHON'
import contextlib
import io
from dataclasses import dataclass

TYPED = ["1_2", "1e3", "007", "on", "1:30", "null"]
EXPECTED = {
    "omegaconf": "12 1000.0 7 True 90 refused", "hydra": "12 1000.0 = = = refused", "draccus": "12 = 7 True 90 None",
    "jsonargparse": "= = = = = =", "tyro": "= = = = = =", "simple-parsing": "= = = = = =",
    "pydantic-settings": "= = = = = refused"}


@dataclass
class Settings:
    name: str = "unnamed"


def omegaconf(text):
    from omegaconf import OmegaConf

    return OmegaConf.merge(OmegaConf.structured(Settings), OmegaConf.from_dotlist([f"name={text}"])).name


def hydra(text):
    from hydra import compose, initialize
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="settings", node=Settings)
    with initialize(version_base=None):
        return compose("settings", overrides=[f"name={text}"]).name


def draccus(text):
    import draccus

    return draccus.parse(Settings, args=[f"--name={text}"]).name


def jsonargparse(text):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Settings, "settings")
    return parser.parse_args([f"--settings.name={text}"]).settings.name


def tyro(text):
    import tyro

    return tyro.cli(Settings, args=[f"--name={text}"]).name


def simple_parsing(text):
    import simple_parsing

    return simple_parsing.parse(Settings, args=["--name", text]).name


def pydantic_settings(text):
    from pydantic_settings import BaseSettings, CliApp

    class Model(BaseSettings):
        name: str = "unnamed"

    return CliApp.run(Model, cli_args=[f"--name={text}"]).name


def read(reader, text):
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            found = reader(text)
        except (Exception, SystemExit):
            return "refused"
    return "=" if found == text else str(found)


columns = "{:18} {:8} {:10} {:6} {:7} {:6} {}".format
print(columns("", *TYPED))
for reader in (omegaconf, hydra, draccus, jsonargparse, tyro, simple_parsing, pydantic_settings):
    title = reader.__name__.replace("_", "-")
    found = [read(reader, text) for text in TYPED]
    print(columns(title, *found))
    assert " ".join(found) == EXPECTED[title], title
PYTHON
"$folder/venv/bin/python" typed.py
