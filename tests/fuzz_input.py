"""What test_fuzz.py draws: input that was good until some of its values or bytes were spoiled."""

import csv
import io
import json

from hypothesis import strategies as st

from utils import choices, config_fields

WORKERS = ["-1", "0", "1", "2", "1.5", "5000", "null", "word", "[]", "${nope}"]  # 200 would take long

# ---------------------------------------------------------------------------------------------------------------------
# Bytes


def damages(tokens: list[bytes]) -> st.SearchStrategy:
    """Lists of (what is done, where in thousandths of the file, to how many bytes, with which token)."""
    kinds = st.sampled_from(["insert", "replace", "remove", "double", "cut"])
    return st.lists(st.tuples(kinds, st.integers(0, 999), st.integers(1, 60), st.sampled_from(tokens)), max_size=3)


def spoiled(content: bytes, damages: list[tuple[str, int, int, bytes]]) -> bytes:
    for kind, place, length, token in damages:
        start = len(content) * place // 1000
        before, there, after = content[:start], content[start:start + length], content[start + length:]
        content = {"insert": before + token + there + after, "replace": before + token + after,
                   "remove": before + after, "double": before + there * 2 + after, "cut": before}[kind]
    return content


# ---------------------------------------------------------------------------------------------------------------------
# A configuration: a YAML file and the overrides of a command line. @IN@ and @OUT@ stand for folders of the test.

GOOD_CONFIG = {
    "run_name": "run", "output_dir": "@OUT@", "model_config.model_name": "@IN@/bert", "model_config.pooling": "mean",
    "data_config.dataset": "@IN@/reviews.csv", "data_config.text_column": "review",
    "data_config.label_column": "verdict", "data_config.max_len": "32", "data_config.batch_size": "16",
    "train_config.max_steps": "1", "train_config.device": "cpu", "train_config.mixed_precision": "no",
    "log_config.wandb_mode": "disabled"}
VALUES = [
    "", "null", "~", "true", "no", "0", "-1", "1", "2", "0.5", "1e-3", "-0.0", "1e400", ".inf", ".nan", "9" * 400,
    "2147483648", "1e30", "5e-324", "0x1F", "010", "1:30", "1_000", "'1'", "'null'", "word", "'a b'", "x" * 300,
    "[]", "[1, 2]", "[[1]]", "{}", "{a: 1}", "{epochs: 2}", "&a 1", "*a", "!!str 5", "!!int x", "2026-01-01",
    '"\\x1b[31m"', '"a\\nb"', "\u00e9", "''", "' '", "???", "${nope}", "${run_name}", "${train_config.seed}",
    "${oc.env:NOPE}", "${", "\\${a}", "${data_config.max_len}", "|\n    x", "@", "#", "- 1", "a: b", "..", "../x",
    ".", "a/b", ".zz.lock", "-x", "a\\b"]
SPLITS = ["[0.8, 0.1, 0.1]", "[0.4, 0.3, 0.3]", "[1, 0, 0]", "[0.98, 0.01, 0.01]", "official", "[.inf, 0, 0]",
          "[0.8, 0.2]", "[true, 0.5, 0.5]", "[1e-9, 0.5, 0.5]", "[0.8, 0.1, null]", "[0.8, [0.1], 0.1]",
          "[${train_config.seed}, 0.1, 0.1]"]
UNFIT = ["''", "null", "x" * 300, "[]", "${nope}", "@IN@/reviews.csv"]
ONLY = {  # keys whose other values would reach beyond the test's folders, or take minutes
    "output_dir": ["@OUT@", "@OUT@/a/b", "@IN@/reviews.csv/x", *UNFIT],
    "model_config.model_name": ["@IN@/bert", "@IN@", "nobody/nothing", "@IN@/none", *UNFIT],
    "data_config.dataset": ["@IN@/reviews.csv", "nobody/nothing", "@IN@/bert", "@IN@/none.csv", *UNFIT],
    "data_config.num_workers": WORKERS,
    "train_config.compile": ["false", "no", "maybe", "null", "[]"],
    "train_config.max_steps": ["1", "2", "0", "-1", "null", "1.5", ".nan", "word", "9" * 400, "${train_config.seed}"],
    "log_config.wandb_mode": ["disabled", "auto", "disable", "null", "[]", "'${nope}'"]}
STRANGE = ["=", "x", "--nope", "-1", "=1", "a.b.c=1", "train_config=1", "train_config={epochs: 2}", "train_config=null",
           "train_config.epochs", ".=.", "..=1", "model_config.=1", "train_config.epochs.x=1", "train_config[epochs]=2",
           "run_name[0]=a", "run_name=a=b", "\u00e9=1", "data_config={dataset: [}", "trainconfig.epochs=2", "epochs=2",
           "--config", "--mode=words", "--text=a"]


def values_of(key: str, field) -> st.SearchStrategy:
    """YAML for a key: its bounds and choices and the values next to them, or what may suit another key."""
    if key in ONLY:
        return st.sampled_from(ONLY[key])
    bounds = [getattr(bound, name) for bound in field.metadata for name in ("ge", "gt", "le", "lt")
              if hasattr(bound, name)]
    near = [str(bound + step) for bound in bounds for step in (-1, 0, 1)] + SPLITS * (key == "data_config.split")
    near += [text for choice in choices(field) for text in (choice, choice[:-1], choice.upper())]
    any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).map(
        lambda text: json.dumps(text, ensure_ascii=False))
    numbers = st.one_of(st.integers(-5, 2000).map(str), st.floats().map(repr))
    return st.one_of(*[st.sampled_from(near)] * bool(near), st.sampled_from(VALUES), numbers, any_text)


@st.composite
def configurations(draw) -> tuple[dict[str, str], list[str]]:
    """(the values of the YAML file, the overrides)"""
    fields = config_fields()
    keys = st.sampled_from([*fields, "seed", "nope", "train_config", "train_config.epochs.x", "1"])
    changes = draw(st.lists(keys.flatmap(lambda key: st.tuples(
        st.just(key), values_of(key, fields.get(key, fields["run_name"])), st.booleans())), min_size=1, max_size=3))
    file = GOOD_CONFIG | {key: value for key, value, in_file in changes if in_file}
    overrides = [f"{key}={value}" for key, value, in_file in changes if not in_file]
    overrides += draw(st.lists(st.sampled_from(STRANGE), max_size=1)) * (draw(st.integers(0, 9)) == 0)
    # Whatever is drawn, a run has at most an epoch, and stays in the test's folders.
    changed = {key for key, *_ in changes}
    overrides += ["train_config.epochs=1"] if "train_config.max_steps" in changed else ["train_config.max_steps=1"]
    overrides += [f"{key}={GOOD_CONFIG[key]}" for key in ONLY if key in GOOD_CONFIG and key not in changed]
    return file, [item.replace("\0", "") for item in overrides]


def as_yaml(values: dict[str, str]) -> bytes:
    sections: dict[str, list[str]] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        sections.setdefault(section, []).append(f"{'  ' * bool(section)}{name}: {value}")
    lines = [line for section, content in sections.items() for line in ([f"{section}:"] * bool(section) + content)]
    return "\n".join([*lines, ""]).encode(errors="surrogatepass")


# ---------------------------------------------------------------------------------------------------------------------
# Reviews: rows of id, review and verdict. The id is a mark by which a row can be found again.

ROWS = 30
CLASSES = [("bad", "good"), ("0", "1"), ("1", "2"), ("a", "A"), ("\x1b[31m", "x"), ("é", "e\u0301"), ("x" * 300, "y"),
           ("=1", "@x"), ("../x", "a/b"), ("nan", "inf"), ("true", "false"), ("<b>", "&"), ("a,b", 'c"d'),
           ("$a$", "{b}"), ("a\nb", "c"), ("\u202e", "\u200b"), ("-1", "1"), ("0.0", "1.0"), ("", "x"),
           ("label", "predicted")]
HEADERS = [["id", "review", "verdict"]] * 20 + [
    ["id", "review", "review"], ["id", "review"], ["review", "verdict"], ["id", "review", "verdict", ""], [],
    ["id", "review", "verdict", "predicted"], ["id", "review", "verdict", "probability_bad"],
    ["Id", "Review", "Verdict"], ["id", " review", "verdict "], ["id", "review", "verdict", "n\x1b\u2028"]]
CELLS = ["", " ", "\u3000", "NA", "nan", "None", "0", "-1", "1.0", "9" * 400, "1e999", "x" * 20_000, "a " * 5_000, "\0",
         "\ufeff", "\ud800", "a\rb", "a\nb", "\x1a", "\x85", '"', "'", "=cmd()", "<br />", "\U0001f600",
         "e\u0301" * 500, "[UNK]", "[SEP] [CLS]", "\u202e", "##a", "good", "\\", "{}"]
JSON_CELLS = [None, True, 0, 1, 2, -1, 1.5, 1e308, float("nan"), float("inf"), 10**400, 2**63, [], {}, ["a"], {"a": 1},
              [[[]]]]
CSV_BYTES = [b'"', b'""', b"\0", b"\xff", b"\xef\xbb\xbf", b"\r", b"\n", b"\r\n", b"\n\n", b",", b";", b"\t",
             b"\xed\xa0\x80", "\u2028".encode(), b"\xc2\x85", b"\x1a", b"\0" * 99, b"y" * 200_000, b"NaN", b"9" * 400,
             b"1e999", b"'", b"\x1b[2J", b" ", b',"', b'",', b'\n"', b"\xf0\x9f\x98", b"\\"]
JSON_BYTES = CSV_BYTES + [b"{", b"}", b"[", b"]", b"[" * 200, b"[" * 9000, b"\\ud800", b"\\u0000", b"NaN", b"-Infinity",
                          b"1e400", b"9" * 5000, b"null", b'"review": null, ', b'"review": "b", ', b"{}\n", b"[]\n",
                          b'"a"\n', b"\\x", b':', b'"":', b'"predicted": 1, ', b'"1": ' + b"[" * 99 + b"]" * 99 + b", ",
                          b"//"]


def good_rows(*names: str) -> list[dict]:
    return [{"id": f"mark{row:02d}x", "review": f"a film that is {('dull', 'moving')[row % 2]} number {row}",
             "verdict": names[row % 2]} for row in range(ROWS)]


def file_of(rows: list[dict], kind: str, header: list[str] = HEADERS[0], end: str = "\n", encoding: str = "utf-8",
            ensure_ascii: bool = True) -> bytes:
    """The content of a .csv or .jsonl file with these rows."""
    if kind == ".csv":
        file = io.StringIO(newline="")
        csv.writer(file, lineterminator=end).writerows([header, *(row.values() for row in rows)])
        text = file.getvalue()
    else:
        text = "".join(json.dumps(row, ensure_ascii=ensure_ascii) + end for row in rows)
    return text.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace")


@st.composite
def reviews(draw, kind: str) -> bytes:
    """The content of a .csv or .jsonl file, spoiled in some of its header, cells and bytes."""
    rows = good_rows(*draw(st.sampled_from(CLASSES)))
    cell = st.tuples(st.integers(0, ROWS - 1), st.sampled_from(["review", "verdict"]),
                     st.sampled_from(CELLS if kind == ".csv" else CELLS + JSON_CELLS))
    for row, column, value in draw(st.lists(cell, max_size=3)):
        rows[row][column] = value
    encodings = ["utf-8"] * 12 + ["utf-8-sig"] * 3 + ["utf-16", "utf-32-le", "latin-1"]
    content = file_of(rows, kind, draw(st.sampled_from(HEADERS)), draw(st.sampled_from(["\n", "\r\n", "\r"])),
                      draw(st.sampled_from(encodings)), draw(st.booleans()))
    return spoiled(content, draw(damages(CSV_BYTES if kind == ".csv" else JSON_BYTES)))
