"""`raytune-ds render`: the project's own files are what it writes, another config shows, and it answers well."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from raytune_ds import cli
from raytune_ds.compose import compose
from raytune_ds.config import Config
from raytune_ds.deploy.render import TARGETS, describe, render
from tests.cluster_files import PROJECT, SHIPPED

every_target = pytest.mark.parametrize("target", SHIPPED)
RUN = [
    "run.name=tickets-7",
    "run.storage=s3://our-bucket/runs",
    "scaling.num_workers=7",
    "scaling.cpus_per_worker=2",
    "cluster.image=registry.example/raytune:1.2",
    "cluster.aws.instance_profile=trainer",
    "cluster.onprem.workers=[n1,n2,n3,n4,n5,n6,n7]",
]


def test_there_are_templates() -> None:
    """An empty folder would pass all tests below."""
    assert {"aws", "gcp", "onprem", "slurm"} <= SHIPPED.keys()


@every_target
def test_the_file_is_the_output_for_the_default_config(target: str) -> None:
    """So `raytune-ds render` is the one source."""
    path = SHIPPED[target]
    expected = render(Config(), target)[0]
    written = path.read_text(encoding="utf-8") if path.is_file() else ""
    stale = f"{path.relative_to(PROJECT)} is not what its template makes; `make cluster-files` writes it anew"
    assert written == expected, stale


@every_target
def test_it_begins_with_what_it_is_for(target: str) -> None:
    """A comment; and it ends with a single newline."""
    text = render(Config(), target)[0]
    lines = [line for line in text.splitlines() if not line.startswith("#!")]
    assert lines[0].startswith("# ")
    assert sum(line.startswith("#") for line in lines[:8]) >= 4
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    assert not [line for line in text.splitlines() if line != line.rstrip()]


@every_target
def test_a_config_of_ones_own_shows(target: str) -> None:
    """Seven workers of two CPUs, a bucket, a name, an image."""
    text, layout = render(compose([], RUN), target)
    assert layout.num_workers == 7
    assert layout.cpus_per_worker == 2
    assert layout.storage == "s3://our-bucket/runs"
    if target not in ("slurm", "kuberay-service"):  # no image of ours
        assert "registry.example/raytune:1.2" in text
    if target in ("aws", "gcp", "onprem", "slurm"):
        assert "tickets-7" in text
        assert "s3://our-bucket/runs" in text
        assert f"{ {'slurm': '--nodes=', 'onprem': 'min_workers: '}.get(target, 'max_workers: ') }7" in text


@every_target
def test_no_value_of_the_environment_is_written(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names only."""
    for name in ("HF_TOKEN", "WANDB_API_KEY", "RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, f"value-of-{name}")
    assert "value-of-" not in render(Config(), target)[0]


@every_target
def test_it_parses(target: str) -> None:
    """YAML with no key left empty by a template, or shell."""
    text = render(compose([], RUN), target)[0]
    if SHIPPED[target].suffix == ".sh":
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
        assert os.access(SHIPPED[target], os.X_OK)
    else:
        assert all(isinstance(part, dict) for part in yaml.safe_load_all(text) if part is not None)


def test_slurm_is_told_the_settings() -> None:
    """All that is not a default, as the run reads it."""
    text = render(compose([], [*RUN, "adapter.r=32", "cluster.slurm.partition=a100"]), "slurm")[0]
    settings = yaml.safe_load(text.partition("<<'SETTINGS'\n")[2].partition("SETTINGS\n")[0])
    assert settings == {
        "run": {"name": "tickets-7", "storage": "s3://our-bucket/runs"},
        "scaling": {"num_workers": 7, "cpus_per_worker": 2},
        "adapter": {"r": 32},
    }
    assert "#SBATCH --partition=a100" in text


# -------------------------------------------------------------------------------------------- the command line


def test_prints_the_file_and_says_the_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    """The file alone on stdout, so that it can be piped."""
    assert cli.main(["render", "--target", "aws", "cluster.max_nodes=3"]) == 0
    printed = capsys.readouterr()
    assert yaml.safe_load(printed.out)["max_workers"] == 3
    assert printed.err.splitlines() == [
        "nodes: 0 to 3, each with 1 x L40S, 8 CPUs, 64 GiB",
        "workers: as many as fit, each with a GPU and 1 CPU; 1 on a node",
        "run.storage: /shared/raytune_ds",
        "price: about 6.93 US dollars an hour with all nodes up, by the on-demand list prices of late 2025; spot nodes "
        "cost about a third of theirs",
    ]


def test_no_price_where_none_is_known() -> None:
    """Nor a range where there is none."""
    layout = render(compose([], ["cluster.min_nodes=2", "cluster.gpus_per_node=0"]), "slurm")[1]
    assert describe(layout).splitlines() == [
        "nodes: 2, each with 8 CPUs, 64 GiB",
        "workers: as many as fit, each with 1 CPU; 8 on a node",
        "run.storage: /shared/raytune_ds",
    ]


def test_writes_a_file_but_not_over_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a person has changed by hand is not lost."""
    path = tmp_path / "mine.yaml"
    assert cli.main(["render", "--target", "onprem", "--output", str(path)]) == 0
    assert path.read_text() == render(Config(), "onprem")[0]
    assert cli.main(["render", "--target", "aws", "--output", str(path)]) == 2
    assert "mine.yaml: is there already" in capsys.readouterr().err
    assert path.read_text() == render(Config(), "onprem")[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "awss"], "--target awss: did you mean aws? There are aws, gcp"),
        (["--target", "elsewhere"], "--target elsewhere: There are aws, gcp"),
        (
            ["--target", "aws", "--output", "no/such/place.yaml"],
            "can't be written: No such file or directory",
        ),
        (["--target", "aws", "scaling.cpus_per_worker=9"], "so no worker ever fits"),
        (["--target", "aws", "cluster.pass_env=[HF_TOKEN=hf_abc]"], "takes names of environment variables"),
    ],
)
def test_says_what_is_wrong(
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a line, without a file; no value that may be a secret is repeated."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["render", *arguments]) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.out == ""
    assert "hf_abc" not in printed.err


def test_every_target_has_a_file_of_its_own() -> None:
    """Below cluster/ or docker/."""
    files = [target.file for target in TARGETS.values()]
    assert len(set(files)) == len(files)
    assert all(file.startswith(("cluster/", "docker/")) for file in files)
