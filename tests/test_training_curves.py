"""The curves of two training runs, from their logs to the committed file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.training_curves import STEPS_PER_POINT, curves, main


def write_log(path: Path, losses: list[float], accuracy: float) -> Path:
    entries = [{"step": i + 1, "loss": loss} for i, loss in enumerate(losses)]
    entries.append({"step": "end", "dtype": "torch.float32", "accuracy": accuracy})
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


@pytest.fixture
def logs(tmp_path: Path) -> list[Path]:
    steps = range(2 * STEPS_PER_POINT + 5)
    return [
        write_log(tmp_path / "reference-7.jsonl", [4.0 for _ in steps], 0.9),
        write_log(tmp_path / "kernels-7.jsonl", [4.0 + (i >= STEPS_PER_POINT) for i in steps], 0.8),
    ]


def test_points_are_means_and_the_gap_is_told(logs: list[Path]) -> None:
    result = curves(logs)["seeds"]["7"]
    assert result["runs"]["reference"]["loss"] == [4.0, 4.0, 4.0]
    assert result["runs"]["kernels"]["loss"] == [4.0, 5.0, 5.0]
    assert result["runs"]["kernels"]["accuracy"] == {"torch.float32": 0.8}
    assert result["largest_gap"] == 0.2
    with pytest.raises(ValueError):
        write_log(logs[0], [4.0], 0.9)
        curves(logs)


def test_each_seed_is_compared_with_itself(logs: list[Path], tmp_path: Path) -> None:
    other = write_log(tmp_path / "kernels-8.jsonl", [1.0], 0.7)
    seeds = curves([*logs, other])["seeds"]
    assert list(seeds) == ["7", "8"] and seeds["7"]["largest_gap"] == 0.2
    assert seeds["8"]["largest_gap"] == 0.0 and list(seeds["8"]["runs"]) == ["kernels"]
    with pytest.raises(ValueError, match=r"log\.jsonl: expected a name like kernels-0\.jsonl"):
        curves([write_log(tmp_path / "log.jsonl", [1.0], 0.7)])


def test_file_and_figure(logs: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    output = tmp_path / "result.json"
    assert main([*map(str, logs), "--output", str(output)]) == 0
    assert json.loads(output.read_text()) == curves(logs)
    assert "<svg" in output.with_suffix(".svg").read_text()


def test_a_name_without_a_seed_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = write_log(tmp_path / "log.jsonl", [1.0], 0.7)
    with pytest.raises(SystemExit):
        main([str(log), "--output", str(tmp_path / "result.json")])
    assert "log.jsonl: expected a name like kernels-0.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "result.json").exists()
