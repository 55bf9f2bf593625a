"""Composing a config: precedence, messages word for word, round trips, and nothing escapes but UserError."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raytune_ds.aliases import ALIASES, suggestions
from raytune_ds.compose import compose, differences, dump, load
from raytune_ds.config import Config, SourceConfig
from raytune_ds.confighelp import help_text
from raytune_ds.errors import UserError
from raytune_ds.keys import KEYS


def problems(*overrides: str, files: list[Path] | None = None) -> list[str]:
    with pytest.raises(UserError) as caught:
        compose(files or [], overrides)
    return str(caught.value).split("\n")


def problem(*overrides: str) -> str:
    (line,) = problems(*overrides)
    return line


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str, name: str = "a.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def file_problems(path: Path) -> list[str]:
    return [line.replace(str(path), path.name) for line in problems(files=[path])]


# precedence and values


def test_nothing_given_is_the_defaults() -> None:
    assert compose([], []) == Config()


def test_right_wins_and_mappings_merge(write) -> None:
    a = write("adapter: {r: 4, alpha: 8}\ndata: {sources: [x, y]}\n", "a.yaml")
    b = write("adapter: {r: 5}\ndata: {sources: [z]}\n", "b.yaml")
    config = compose([a, str(b)], [])
    assert (config.adapter.r, config.adapter.alpha) == (5, 8)
    assert config.data.sources == (SourceConfig(path="z"),)
    assert compose([b, a], []).adapter.r == 4
    assert compose([a, b], ["adapter.r=6", "adapter.r=7"]).adapter.r == 7
    assert compose([a], ["adapter={r: 9}"]).adapter.alpha == 8


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "---\n", "null\n", "{}", "adapter:\ntrain: {}\n", "\ufeff"]
)
def test_files_that_set_nothing(write, text: str) -> None:
    assert compose([write(text)], []) == Config()


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.learning_rate=3e-4", "train.learning_rate", 3e-4),
        ("train.max_steps=1e3", "train.max_steps", 1000),
        ("train.max_steps=1_000", "train.max_steps", 1000),
        ("train.max_steps=010", "train.max_steps", 10),
        ("train.max_steps=", "train.max_steps", None),
        ("run.name=007", "run.name", "007"),
        ("run.name=no", "run.name", "no"),
        ("run.name='1'", "run.name", "1"),
        ("run.name=null", "run.name", None),
        (" run.name = x ", "run.name", "x"),
        ("run.storage=s3://b/x?a=b", "run.storage", "s3://b/x?a=b"),
        ("scaling.use_gpu=yes", "scaling.use_gpu", True),
        ("adapter.targets=[a, b]", "adapter.targets", ["a", "b"]),
        ("adapter.targets=.*proj", "adapter.targets", ".*proj"),
        ("tracking.to=[]", "tracking.to", []),
        ("tracking.to.0=mlflow", "tracking.to", ["mlflow"]),
        ("data.sources=*.jsonl", "data.sources", [SourceConfig(path="*.jsonl").model_dump()]),
        ("data.sources.0.path=x", "data.sources", [SourceConfig(path="x").model_dump()]),
        (
            "data.sources={path: x, format: text}",
            "data.sources",
            [SourceConfig(path="x", format="text").model_dump()],
        ),
    ],
)
def test_override_values(override: str, key: str, value: object) -> None:
    found: object = json.loads(dump(compose([], [override])))
    for part in key.split("."):
        assert isinstance(found, dict)
        found = found[part]
    assert found == value
    assert type(found) is type(value)


def test_list_indices(write) -> None:
    path = write("data:\n  sources: a.jsonl\n")
    config = compose(
        [path], ["data.sources.0.format=alpaca", "data.sources.1=b", "data.sources.1.format=text"]
    )
    assert config.data.sources == (
        SourceConfig(path="a.jsonl", format="alpaca"),
        SourceConfig(path="b", format="text"),
    )
    assert (
        problem("data.sources.2=x")
        == "data.sources.2 (command line): the list is shorter; its next free index is 0"
    )


def test_files_are_yaml_1_2(write) -> None:
    path = write(
        "run: {name: 2024-01-01}\ntrain: {learning_rate: 2e-4, max_steps: 010}\n"
        "data: {sources: [&a {path: x}, *a], chat_template: ~}\nscaling: {use_gpu: 'true'}\n"
    )
    config = compose([path], [])
    assert (config.run.name, config.train.learning_rate, config.train.max_steps) == ("2024-01-01", 2e-4, 10)
    assert config.data.sources == (SourceConfig(path="x"), SourceConfig(path="x"))
    assert (config.data.chat_template, config.scaling.use_gpu) == (None, True)
    assert file_problems(write("run: {name: 007}\nadapter:\n  <<: {r: 2}\n")) == [
        "adapter.<<.r (a.yaml, line 3): unknown key; did you mean adapter.r?",
        "run.name = 7 (a.yaml, line 1): must be text or null; put the value in quotes",
    ]


# messages


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rate=-1", "train.learning_rate = -1 (command line): must be greater than 0"),
        (
            "train.learning_rate=1e400",
            "train.learning_rate = Infinity (command line): must be a finite number",
        ),
        ("train.learning_rate=fast", "train.learning_rate = fast (command line): must be a number"),
        ("train.max_steps=0", "train.max_steps = 0 (command line): must be at least 1 or null"),
        ("train.max_steps=1.5", "train.max_steps = 1.5 (command line): must be a whole number or null"),
        ("train.micro_batch=0", "train.micro_batch = 0 (command line): must be at least 1 or auto"),
        (
            "train.global_batch=true",
            "train.global_batch = true (command line): takes a number, not true or false",
        ),
        ("data.eval.fraction=0.9", "data.eval.fraction = 0.9 (command line): must be at most 0.5"),
        ("adapter.dropout=1", "adapter.dropout = 1 (command line): must be less than 1"),
        ("scaling.use_gpu=2", "scaling.use_gpu = 2 (command line): must be true, false or auto"),
        (
            "run.resume=mst",
            "run.resume = mst (command line): must be auto, never or must; did you mean must?",
        ),
        ("tracking.to=[x]", "tracking.to.0 = x (command line): must be tensorboard, mlflow or wandb"),
        ("tracking.to=x", "tracking.to = x (command line): must be tensorboard, mlflow or wandb"),
        ("model.name=''", 'model.name = "" (command line): must be some text, not empty'),
        ("model.name=null", "model.name = null (command line): must be text"),
        ("adapter.r.x=1", "adapter.r = a mapping (command line): must be a whole number or null"),
        (
            "engine=ddp",
            "engine = ddp (command line): must be a section with keys (kind, stage, offload, config); "
            "did you mean engine.kind?",
        ),
        (
            "data.eval=0.1",
            "data.eval = 0.1 (command line): must be a section with keys (fraction, sources)",
        ),
        (
            "run.name=a b",
            "run.name = \"a b\" (command line): use letters, digits, '.', '_' and '-' only, and no "
            "dot at the beginning",
        ),
        (
            "scaling.num_workers=17",
            "scaling.num_workers = 17 (command line): each worker needs at least one pack of the "
            "global batch, which has 16; lower it or raise train.global_batch",
        ),
        (
            "data.eval={sources: x, fraction: 0.1}",
            "data.eval.fraction = 0.1 (command line): data.eval.sources are given too; set one of "
            "them only, or this to 0",
        ),
        ("data.sources=[{format: text}]", "data.sources.0.path (command line): is missing"),
        (
            "data.sources=[{path: x, share: 2}]",
            "data.sources.0.share (command line): unknown key; --help lists all keys",
        ),
        (
            "data.sources=[{path: x, weight: 2}, y]",
            "data.sources = a list (command line): some have a weight and y has none; give each one or none of them (a "
            "weight is relative to the others)",
        ),
        (
            "data.eval.sources=[{path: x, epochs: 2}]",
            "data.eval.sources.0.epochs (command line): mixes training data; held-out rows are measured once each "
            "(max_rows limits them)",
        ),
        ("foo", "foo (command line): write key=value, such as adapter.r=16"),
        ("", '"" (command line): write key=value, such as adapter.r=16'),
        ("adapter..r=5", "adapter..r (command line): is no key; write section.key=value"),
        (
            ".".join("abcdefghi") + "=1",
            "a.b.c.d.e.f.g.h.i (command line): is no key; write section.key=value",
        ),
        (
            "adapter.targets=[",
            "adapter.targets (command line), line 1, column 2: not valid YAML: expected the node "
            "content, but found '<stream end>'; quote the value if it is text",
        ),
        ("adapter=&a [*a]", "adapter (command line): is nested too deeply, or refers to itself"),
        (
            "adapter={r: 1, r: 2}",
            "adapter (command line), line 1, column 8: r is set twice, first in line 1; keep one",
        ),
        ("run.name=\udc80", "run.name = \\udc80 (command line): has characters that are not valid Unicode"),
        ("foo\nbar=1", "foo\\nbar (command line): unknown key; --help lists all keys"),
    ],
)
def test_messages(override: str, message: str) -> None:
    assert problem(override) == message


def test_messages_name_file_and_line(write) -> None:
    path = write(
        "adapter:\n  rank: 3\n  r: 0\nrun: {name: 123}\noptimizer:\n  lr: 1\n  foo: {}\n"
        "data:\n  sources:\n    - path: x\n      format: csv\nengine: zero\nadapter.alpha: 3\n"
    )
    assert file_problems(path) == [
        "adapter.rank (a.yaml, line 2): unknown key; did you mean adapter.r?",
        "optimizer.lr (a.yaml, line 6): unknown key; did you mean train.learning_rate?",
        "optimizer.foo (a.yaml, line 7): unknown key; --help lists all keys",
        "adapter.alpha (a.yaml, line 13): unknown key; dots are for the command line, in a file "
        "write sections: adapter: {alpha: ...}",
        "run.name = 123 (a.yaml, line 4): must be text or null; put the value in quotes",
        "adapter.r = 0 (a.yaml, line 3): must be at least 1 or null",
        "data.sources.0.format = csv (a.yaml, line 11): must be auto, messages, sharegpt, alpaca, "
        "prompt-completion, text, preference or kto",
        "engine = zero (a.yaml, line 12): must be a section with keys (kind, stage, offload, config); "
        "did you mean engine.kind?",
    ]


def test_the_last_place_is_named(write) -> None:
    path = write("adapter: {r: 0}\n")
    assert problems("adapter.r=-1", files=[path]) == [
        "adapter.r = -1 (command line): must be at least 1 or null"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\n", "a.yaml, line 2, column 1: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        (
            "adapter:\n\tr: 1\n",
            "a.yaml, line 2, column 1: not valid YAML: found character '\\t' that cannot start any",
        ),
        ("x\n", "a.yaml: must be a mapping of sections, such as 'adapter: {r: 16}'"),
        ("adapter:\n  r: 1\n  r: 2\n", "a.yaml, line 3, column 3: r is set twice, first in line 2; keep one"),
        ("? [a]\n: 1\n", "a.yaml, line 1, column 3: a key must be plain text, not a list or mapping"),
        ("a: &a {b: *a}\n", "a.yaml: is nested too deeply, or refers to itself"),
        ("a: 1\n---\nb: 1\n", "a.yaml, line 2, column 1: not valid YAML: but found another document"),
        ("a: \x01\n", "a.yaml: not valid YAML: special characters are not allowed"),
    ],
)
def test_bad_files(write, text: str, message: str) -> None:
    (line,) = file_problems(write(text))
    assert line.startswith(message)


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff\n")
    files = [tmp_path / "none.yaml", tmp_path, tmp_path / "latin.yaml"]
    assert problems(files=files) == [
        f"{tmp_path}/none.yaml: there is no such config file",
        f"{tmp_path}: cannot be read: Is a directory",
        f"{tmp_path}/latin.yaml: is not UTF-8 text (byte 3)",
    ]


def test_everything_at_once(write) -> None:
    path = write("train: {learning_rate: -1, micro_batch: 99}\nmodle: {name: x}\n")
    lines = problems("adapter.r=0", "foo", "lr=1", "scaling.num_workers=99", files=[path, Path("none.yaml")])
    keys = [line.split(" ")[0] for line in lines]
    assert sorted(keys) == sorted(
        [
            "none.yaml:",
            "foo",
            "modle.name",
            "lr",
            "adapter.r",
            "train.micro_batch",
            "train.learning_rate",
        ]
    )


def test_no_jargon() -> None:
    text = "\n".join(problems(*[f"{key}={{a: [1]}}" for key in KEYS]))
    for jargon in ["Input should", "pydantic", "http", "valid dictionary", "Extra inputs", "instance of"]:
        assert jargon not in text


# did you mean


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("adapter.rank", ["adapter.r"]),
        ("learning_rat", ["train.learning_rate"]),
        ("lr", ["train.learning_rate"]),
        ("adapter.lr", ["train.learning_rate"]),
        ("batch_size", ["train.global_batch", "train.micro_batch"]),
        ("--learning-rate", ["train.learning_rate"]),
        ("--adapter.r", ["adapter.r"]),
        ("Train.Seed", ["run.seed"]),
        ("seq_len", ["data.seq_len"]),
        ("adaptor.r", ["adapter.r"]),
        ("modle.name", ["model.name"]),
        ("train.eval_stps", ["train.eval_steps"]),
        ("kind", ["adapter.kind", "objective.kind", "engine.kind"]),
        ("completely_different", []),
        ("x" * 10_000, []),
    ],
)
def test_suggestions(key: str, expected: list[str]) -> None:
    assert suggestions(key) == expected


def test_aliases_point_to_keys_and_shadow_none() -> None:
    for alias, targets in ALIASES.items():
        assert targets
        assert set(targets) <= set(KEYS), alias
        assert suggestions(alias) == list(targets)
        assert alias == alias.lower().replace("-", "_")
        # `epochs` of a source is a key, and what people write for that of a run
        assert alias not in {key.rpartition(".")[2] for key in KEYS if ".0." not in key}


# secrets


@pytest.mark.parametrize(
    "overrides",
    [
        ["hf_token=hunter2"],
        ["model.api_key=hunter2"],
        ["tracking={wandb_api_key: hunter2}"],
        ["tracking={to: [{password: hunter2}]}"],
        ["api_key=*hunter2"],
        ["api_key=[hunter2"],
        ["--api_key", "hunter2"],
        ["--api_key hunter2"],
        ["run.storage=s3://key:hunter2@bucket"],
        ["data.sources=[s3://key:hunter2@bucket]"],
        ["model=[{token: hunter2}]"],
    ],
)
def test_secrets_are_not_echoed(overrides: list[str]) -> None:
    assert "hunter2" not in "\n".join(problems(*overrides))


def test_secrets_get_advice() -> None:
    assert problem("hf_token=x") == (
        "hf_token (command line): unknown key; secrets do not belong in a config, set them in the "
        "environment of the nodes"
    )


# dump, load, differences


ROUND_TRIPS = [
    [],
    ["data.sources=[a, {path: b, format: text}]", "data.eval.sources=c", "run.name=u"],
    ["adapter.targets=[a, b]", "train.max_steps=5", "train.learning_rate=3.3e-5", "tracking.to=[]"],
    ["run.storage=/größe/文"],
    ["scaling.use_gpu=true", "scaling.num_workers=2", "train.micro_batch=2"],
]


@pytest.mark.parametrize("overrides", ROUND_TRIPS)
def test_round_trip(overrides: list[str]) -> None:
    config = compose([], overrides)
    text = dump(config)
    assert load(text) == config
    assert dump(load(text)) == text
    assert text.endswith("}\n")
    assert differences(load(text), config) == {}


def test_dump_is_in_the_trees_order_and_a_config_file(write) -> None:
    config = compose([], ["tracking.to=wandb", "run.name=x", "data.eval.sources=y"])
    text = dump(config)
    assert [line.split('"')[1] for line in text.splitlines() if line.startswith('  "')] == list(
        Config.model_fields
    )
    assert compose([write(text)], []) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the resolved config is not valid JSON"),
        ("[" * 100_000, "the resolved config is not valid JSON"),
        ("[]", "the resolved config must be a JSON object of sections"),
        ('{"adapter": {"r": 0}}', "adapter.r = 0 (resolved config): must be at least 1 or null"),
        ('{"x": 1}', "x (resolved config): unknown key"),
    ],
)
def test_load_refuses(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(text)
    assert str(caught.value).startswith(message)


def test_differences_are_dotted() -> None:
    a, b = compose([], ["adapter.r=4"]), compose([], ["data.eval.fraction=0.1", "tracking.to=[]"])
    assert differences(a, b) == {
        "adapter.r": (4, 8),
        "data.eval.fraction": (0.02, 0.1),
        "tracking.to": (["tensorboard"], []),
    }


# help


@pytest.mark.parametrize("columns", [50, 80, 200])
def test_help_names_every_key_and_fits(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = help_text()
    assert max(map(len, text.splitlines())) <= columns
    for key in KEYS:
        if not key.startswith("data.eval.sources.0"):
            assert f"\n  {key.replace('.0.', '.N.')}:" in text
    sections = [
        line.partition(":")[0] for line in text.splitlines() if line and line[0] != " " and ":" in line
    ]
    assert [name for name in sections if name in Config.model_fields] == list(Config.model_fields)


def test_help_tells_type_choices_and_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    text = help_text()
    for line in [
        "  adapter.r: whole number >= 1 | null; default 8",
        "  adapter.dropout: number >= 0 < 1; default 0.0",
        '  run.resume: auto | never | must; default "auto"',
        '  train.micro_batch: whole number >= 1 | auto; default "auto"',
        "  train.warmup_steps: whole number >= 0 | null; default null",
        '  scaling.use_gpu: true | false | auto; default "auto"',
        '  tracking.to: list of (tensorboard | mlflow | wandb); default ["tensorboard"]',
        "  data.sources.N.path: text; required",
    ]:
        assert f"{line}\n" in text


# nothing but UserError, and nothing slow


keys = st.one_of(
    st.sampled_from(KEYS), st.sampled_from(["adapter", "data.eval", "data.sources.0", "x", "0"]), st.text()
)
values = st.one_of(
    st.text(),
    st.text(alphabet="[]{},:&*!|>'\"%@ \n\t0a#-.~<"),
    st.sampled_from(
        ["1e400", "9" * 5000, ".nan", "{a: {b: [1]}}", "&a [*a]", "!!int x", "!!binary x", "{<<: 1}"]
    ),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.builds("{}={}".format, keys, values), st.text()), max_size=4))
@example(["data.sources=!!set {a, b}"])
@example(["data.sources.9999=x", "data.sources.²=x"])
@example(["train={? {a: 1}: 2}", "adapter=" + "[" * 3000])
@example(["0=1", "data.0.1=2", "adapter.0=3"])
def test_any_overrides_give_a_config_or_a_user_error(overrides: list[str]) -> None:
    try:
        config = compose([], overrides)
    except UserError as error:
        told = str(error)
    else:
        told = "no problem"
        assert load(dump(config)) == config
    assert all(line and line.isprintable() for line in told.split("\n"))


@settings(max_examples=100, deadline=None)
@given(text=st.one_of(values, st.builds("{}: {}".format, st.sampled_from(list(Config.model_fields)), values)))
def test_any_file_gives_a_config_or_a_user_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        config = compose([path], [])
    except UserError:
        return
    assert load(dump(config)) == config


def test_imports_nothing_slow() -> None:
    code = (
        "import sys, raytune_ds.compose, raytune_ds.confighelp\n"
        "slow = {'torch', 'ray', 'transformers', 'numpy', 'pyarrow', 'pandas', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported {slow}' if slow else 0)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
