"""The classic studies start to end, as users call them, on tiny files in the real formats."""

from __future__ import annotations

import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from study_files import cifar_binary, cifar_pickle, fashion_mnist

import hpsched
from studies import (
    char_transformer,
    cifar10_resnet56,
    fashion_mnist_schedules,
    super_convergence,
    weight_decay_range_tests,
)

ROOT = Path(hpsched.__file__).parents[1]
STUDIES = ("super_convergence", "fashion_mnist_schedules", "cifar10_resnet56",
           "weight_decay_range_tests", "char_transformer")  # fmt: skip


@pytest.mark.parametrize("name", STUDIES)
def test_help_says_what_it_is(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "studies" / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 0
    header = (ROOT / "studies" / f"{name}.py").read_text().splitlines()[0].strip('"')
    assert header in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", STUDIES)
def test_the_header_states_its_evidence(name: str) -> None:
    text = (ROOT / "studies" / f"{name}.py").read_text()
    header = text.split('"""')[1]
    assert all(f"\n{word}" in header for word in ("What", "Data", "Cost"))
    assert "\nEvidence" in header or "\nExpected" in header
    assert f"studies.{name}" in header, "how to run it"
    assert "{" not in header


# -- Fashion-MNIST ---------------------------------------------------------------------------------


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_fashion_mnist_under_every_schedule(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run, summarised and drawn; what is there does not run again."""
    fashion_mnist(tmp_path, train=24, test=40)
    results = tmp_path / "results.jsonl"
    call = ["--results", str(results)]
    go = [*call, "run", "--data", str(tmp_path), "--epochs", "2", "--device", "cpu"]
    fashion_mnist_schedules.main(go)
    said = capsys.readouterr().out
    assert "range tests propose max_lr" in said
    assert "published: 0.876" in said
    found = lines(results)
    assert [row["schedule"] for row in found] == fashion_mnist_schedules.NAMES
    for row in found:
        assert len(row["rows"]) == 2
        for epoch in row["rows"]:
            assert math.isfinite(epoch["train_loss"])
            assert 0 <= epoch["train_accuracy"] <= 1
            assert epoch["test_accuracy"] * 40 == pytest.approx(round(epoch["test_accuracy"] * 40))
    assert found[-1]["max_lr"] > 0

    fashion_mnist_schedules.main(go)
    assert lines(results) == found
    figure = tmp_path / "figure.html"
    fashion_mnist_schedules.main([*call, "plot", "--output", str(figure)])
    text = figure.read_text()
    assert all(name in text for name in fashion_mnist_schedules.NAMES)
    capsys.readouterr()


def test_fashion_mnist_learns(tmp_path: Path) -> None:
    """Images whose brightness is their class: the training loss falls."""
    fashion_mnist(tmp_path, train=100, test=40)
    data = fashion_mnist_schedules.load(tmp_path)
    rows = fashion_mnist_schedules.run_schedule("one-cycle", data, 60, seed=0, max_lr=0.03)
    assert rows[-1]["train_loss"] < 0.8 * rows[0]["train_loss"]
    assert rows[-1]["test_accuracy"] > 0.25


# -- CIFAR-10 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_cifar10_by_every_recipe(
    tmp_path: Path, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (cifar_pickle if precision == "float32" else cifar_binary)(tmp_path)
    results = tmp_path / "results.jsonl"
    go = ["--results", str(results), "run", "--data", str(tmp_path), "--depth", "8",
          "--device", "cpu", "--precision", precision, "--scale", "0.0001"]  # fmt: skip
    go += ["--recipes", *(cifar10_resnet56.RECIPES if precision == "float32" else ["one-cycle"])]
    cifar10_resnet56.main(go)
    said = capsys.readouterr().out
    found = lines(results)
    for row in found:
        expected = max(3, round(cifar10_resnet56.RECIPES[row["recipe"]].steps * 0.0001))
        assert row["steps"] == expected
        assert row["diverged"] or row["looks"][-1][0] == expected
        assert row["recipe"] in said
    if precision == "float32":
        assert {row["recipe"] for row in found} == set(cifar10_resnet56.RECIPES)
        assert "one-cycle reaches step's" in said
        cifar10_resnet56.main(go)
        assert lines(results) == found, "what is there does not run again"


def test_cifar10_goes_on_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was cut off and resumed has the same accuracies as one that was not."""
    cifar_pickle(tmp_path, count=40)
    data = cifar10_resnet56.load(tmp_path)

    def run(name: str, cut_after: int | None = None) -> list[tuple[int, float]]:
        recipe = cifar10_resnet56.Recipe(
            batch_size=50, steps=12, curves=cifar10_resnet56.one_cycle, accuracy=0.0
        )
        one = cifar10_resnet56.Run(recipe=recipe, data=data, depth=8, precision="float32", looks=[])
        if cut_after:
            accuracy = one.accuracy

            def cut(net: Any) -> float:
                if len(one.looks) == cut_after:
                    raise KeyboardInterrupt
                return accuracy(net)

            object.__setattr__(one, "accuracy", cut)
        cifar10_resnet56.run_recipe(one, name, 12, seed=3)
        return one.looks

    whole = run("whole")
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setenv("HPSCHED_CHECKPOINTS", str(tmp_path / "checkpoints"))
    monkeypatch.setenv("HPSCHED_CHECKPOINT_SECONDS", "0")
    with pytest.raises(KeyboardInterrupt):
        run("cut", cut_after=6)
    assert list((tmp_path / "checkpoints").rglob("*")), "nothing was kept"
    rest = run("cut")
    assert len(rest) < len(whole)
    assert rest == whole[-len(rest) :]


def test_the_comparison_with_what_was_published() -> None:
    row = {"seed": 0, "depth": 56, "scale": 1, "images": 50_000, "seconds": 9.0, "diverged": None}
    done = [
        {**row, "recipe": "one-cycle", "steps": 10_000, "looks": [(5_000, 88.0), (10_000, 92.0)]},
        {**row, "recipe": "step", "steps": 80_000, "looks": [(80_000, 91.0)]},
        {**row, "recipe": "clr-95", "steps": 9_215, "looks": [], "diverged": "the loss is nan"},
    ]
    said = cifar10_resnet56.summary(done)
    assert "92.00      92.40" in said
    assert "diverged      93.53" in said
    assert "one-cycle reaches step's 91.00 (in 80000 steps) after 10000 steps" in said
    small = cifar10_resnet56.summary([{**done[0], "scale": 0.1}])
    assert "92.40" not in small, "only whole runs compare with what was published"


@pytest.mark.parametrize("study", [fashion_mnist_schedules, cifar10_resnet56])
def test_missing_data_is_one_clear_message(
    study: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        study.main(["run", "--data", str(tmp_path / "nowhere"), "--device", "cpu"])
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert "--data" in said.err and "https://" in said.err


# -- MNIST-1D and text -----------------------------------------------------------------------------


def test_super_convergence_runs_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(super_convergence.TOTAL_STEPS, "mlp", 24)
    monkeypatch.setattr(super_convergence, "TRIALS", 2)
    path = tmp_path / "results.jsonl"
    super_convergence.run(path, ["mlp"], searches=1, seeds=2)
    rows = lines(path)
    assert len(rows) == 10 + 2 * 10
    for row in rows:
        if "recipe" in row:
            low, high = super_convergence.RATES
            assert low <= row["recipe"]["max_lr"] <= high
        else:
            assert 0 <= row["error"] <= 1
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:-3]) + '{"model": "ml')
    super_convergence.run(path, ["mlp"], searches=1, seeds=2)
    again = super_convergence.read(path)
    assert again == rows, "cut short and run again, to the last digit"
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["x", "--results", str(path), "summarise"])
    super_convergence.main()
    figure = tmp_path / "figure.html"
    super_convergence.plot(rows, "mlp", figure)
    assert all(name in figure.read_text() for name in super_convergence.SCHEDULES)
    said = capsys.readouterr().out
    assert "**mlp**, 2 runs each" in said
    assert "| mlp | constant |" in said


def test_weight_decay_range_tests_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(weight_decay_range_tests, "REPLICATES", 1)
    figure = tmp_path / "sweeps.html"
    weight_decay_range_tests.main(
        ["--model", "mlp", "--num-iter", "40", "--steps", "20", "--output", str(figure)]
    )
    said = capsys.readouterr().out
    assert said.count("validation error") == len(weight_decay_range_tests.WEIGHT_DECAYS)
    assert "chosen weight decay:" in said
    assert "accuracy" in figure.read_text()


@pytest.mark.slow
def test_the_character_transformer_learns(capsys: pytest.CaptureFixture[str]) -> None:
    char_transformer.main(["--trials", "1", "--steps", "100"])
    said = capsys.readouterr().out
    first = said.splitlines()[0]
    validation, test = (float(part.split()[-1]) for part in first.split(":")[1].split(","))
    assert validation < 4.5 and test < 4.9, "of seven bits, which is no knowledge"
    assert "max_lr" in said and "def " in said
