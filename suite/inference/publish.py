"""--mode publish: sends a trained model and its card to the Hugging Face Hub, or says what would be sent.

    python main.py --mode publish OWNER/NAME                    prints files, sizes, visibility and card; sends nothing
    python main.py --mode publish OWNER/NAME --yes              sends them, to a private repository
    python main.py --mode publish OWNER/NAME --model checkpoints/RUN/export --public --license apache-2.0 --yes

The files on a fixed list are sent, in one commit. Nothing else of a run is: no configuration, paths, reviews,
predictions or optimizer state. The login is the library's own (`hf auth login`, or HF_TOKEN).
"""

from __future__ import annotations

from pathlib import Path

from suite.common.cli import Command
from suite.common.devices import Devices
from suite.common.pages import NOT_TESTED
from suite.common.run_folder import read_metrics, read_saved_config, run_of
from suite.common.storage import CARD, THRESHOLD, refuse_damage
from suite.encoders.checkpoints import kind_of
from suite.encoders.loading import WITHOUT_ENCODER
from suite.inference.classifier import chosen_model
from utils import DEMO_WARNING, UserError, brief, say

FILES = ["README.md", "config.json", "model.safetensors", "model.py", THRESHOLD, "sentence_bert_config.json",
         "index.html", "page.json", "onnx/model.onnx", "onnx/model.onnx.data", "onnx/model_quantized.onnx",
         "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
         "vocab.json", "merges.txt", "bpe.codes", "spm.model", "spiece.model", "sentencepiece.bpe.model",
         "sentencepiece.model", "tokenizer.model", "entity_vocab.json", "word_shape.json", "word_pronunciation.json"]


def publish(command: Command, devices: Devices) -> None:
    """Send the folder of `command` to the repository `command.repo` if `command.yes`, else print what would be sent.

    Raises UserError for a model that must not be published, and if the Hub refuses it.
    """
    if not devices.is_main:
        return
    folder = chosen_model(command)
    is_demo = is_demo_model(folder)
    card = fit_card((folder / CARD).read_text(encoding="utf-8"), command.repo, command.license)
    files = {name: card.encode() if name == CARD else folder / name for name in FILES if (folder / name).is_file()}
    show_plan(command, folder, files)
    if is_demo:
        raise UserError(f"{folder} is a DEMO, trained on generated reviews: it is of no use to others. Nothing was "
                        "sent; publish a model that was trained on real ones")
    if command.yes:
        send(command, files)
    else:
        say("Nothing was sent. To send it, give the same command with --yes.")


def is_demo_model(folder: Path) -> bool:
    """Whether the model is a demo's. Raises UserError for a model that must not be published."""
    if (kind := kind_of(folder)) in WITHOUT_ENCODER:
        raise UserError(f"{folder} holds a {kind} model, which no program but this one reads: publish an encoder")
    refuse_damage(folder)
    is_demo = False
    if run := run_of(folder):
        config = read_saved_config(run / "config.yaml")
        if config.pretrains:
            raise UserError(f"{run} is a pretraining run, whose model knows no classes: fine-tune from it first")
        if "test" not in read_metrics(run):
            raise UserError(f"{run} is not finished, or not tested: give its training command again, or --mode test")
        is_demo = config.is_demo
    try:
        card = (folder / CARD).read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        raise UserError(f"{folder / CARD}: there is no model card in UTF-8: test the run, or write one") from None
    if NOT_TESTED in card:
        raise UserError(f"{folder} was exported before its run was tested: test the run, and export it again")
    return is_demo or DEMO_WARNING in card


def fit_card(card: str, repo: str, license_name: str | None) -> str:
    """The model card with the repository's name in its examples, and a licence if one is given."""
    card = card.replace('"FOLDER"', f'"{repo}"').replace(
        "`FOLDER` is the folder of this file.", f"`FOLDER` is a copy: `hf download {repo} --local-dir FOLDER`.")
    if license_name is None:
        return card
    if not card.startswith("---\n"):
        return f"---\nlicense: {license_name}\n---\n\n{card}"
    metadata, end, text = card.removeprefix("---\n").partition("\n---")
    lines = [f"license: {license_name}", *(line for line in metadata.split("\n") if not line.startswith("license:"))]
    return "---\n" + "\n".join(lines) + end + text


def show_plan(command: Command, folder: Path, files: dict[str, Path | bytes]) -> None:
    left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - files.keys()
    say(f"{command.repo}: a {'public' if command.public else 'private'} repository, "
        f"{f'licence {command.license}' if command.license else 'no licence given'}")
    for name, file in files.items():
        size = len(file) if name == CARD else file.stat().st_size
        say(f"  {name}  {size / 1e6:,.3f} MB")
    say(f"not sent: {', '.join(sorted(left))}\nremoved, where an earlier model has left it there: any other model "
        f"file\n\n{CARD}:\n{files[CARD].decode().rstrip()}\n")


def send(command: Command, files: dict[str, Path | bytes]) -> None:
    """One commit with all files, and without those of an earlier model. Raises UserError if it fails."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, private = HfApi(), not command.public
    try:
        api.whoami()
        api.create_repo(command.repo, private=private, exist_ok=True)
        there = api.repo_info(command.repo)
        if there.private != private:
            raise UserError(f"{command.repo} exists already and is {'private' if there.private else 'public'}: "
                            f"{'leave out' if there.private else 'give'} --public, or choose another name")
        # Of two models mixed, transformers would make one with a random head.
        old = {file.rfilename for file in there.siblings} & set(FILES) - files.keys()
        commit = api.create_commit(command.repo, [*(CommitOperationAdd(name, file) for name, file in files.items()),
                                                  *map(CommitOperationDelete, old)],
                                   commit_message="Add a trained classifier and its card")
    except UserError:
        raise
    except Exception as error:  # of any type: the library fails on a server's odd answers in any way
        raise UserError(f"{command.repo} was not sent ({type(error).__name__}: {brief(error)}): correct this, and give "
                        "the same command again; all files arrive together or not at all") from error
    say(f"sent: {commit.commit_url}")
