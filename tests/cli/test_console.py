"""The entry point, errors as one line, progress, and the small files beside a run."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from rich.console import Console

from metafast.cli import console, main, metrics
from metafast.cli.console import ProgressLine, bad_input, say, say_error
from metafast.cli.interrupt import Interrupt


@pytest.mark.parametrize("missing", ["typer", "rich", "matplotlib"])
def test_missing_packages_are_named(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    assert main(["train", "maml", "--data", "sinusoid"]) == 2
    assert capsys.readouterr().err == f"metafast: the command line needs {missing}: pip install 'metafast[cli]'\n"


def test_the_entry_point_needs_none_of_them_to_be_imported() -> None:
    code = "import sys, metafast.cli; sys.exit(any(n in sys.modules for n in ('typer', 'rich', 'matplotlib')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


def test_all_commands_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for command in ("train", "eval", "info", "check", "bench"):
        assert f" {command} " in out
        assert main([command, "--help"]) == 0


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("metafast: ") and "trian" in error and error.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError, TypeError, FileNotFoundError, PermissionError, ImportError])
def test_bad_input_is_one_line(error: type[Exception], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught, bad_input():
        raise error("ways: expected\n  [red]more[/red]")
    assert caught.value.exit_code == 2
    assert capsys.readouterr().err == "metafast: ways: expected [red]more[/red]\n"


def test_defects_are_not_bad_input() -> None:
    with pytest.raises(ZeroDivisionError), bad_input():
        raise ZeroDivisionError


def test_an_error_is_red_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    say_error("bad")
    assert "\x1b[1;31mmetafast: bad" in capsys.readouterr().err


def test_what_is_said_is_not_markup_nor_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    text = "[bold]" + "word " * 60
    say(text)
    assert capsys.readouterr().out == text + "\n"


def test_progress_in_plain_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr(console.time, "perf_counter", lambda: now[0])
    with ProgressLine("training", total=10, done=2) as progress:
        for i in range(8):
            now[0] += 2.0
            progress.advance(1, lambda i=i: f"loss {i}")
    # Every five seconds, and at the end; the rate counts what was done here.
    assert capsys.readouterr().out.splitlines() == [
        "training 5/10  loss 2  0.5 steps/s",
        "training 8/10  loss 5  0.5 steps/s",
        "training 10/10  loss 7  0.5 steps/s",
    ]


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, "Console", lambda: Console(force_terminal=True, width=100))
    with ProgressLine("training", total=3) as progress:
        progress.advance(3, lambda: "loss 0.25")
    assert "training" in (out := capsys.readouterr().out) and "3/3" in out and "loss 0.25" in out


def test_a_second_signal_is_immediate() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_metrics_are_read_as_written_and_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert metrics.read(path) == []
    lines = [{"iteration": i, "loss": 0.1 * i} for i in (1, 2, 3)]
    for line in lines:
        metrics.append(path, line)
    assert metrics.read(path) == lines
    assert metrics.read(path, until=2) == lines[:2]
    metrics.write(path, lines[:1])
    assert path.read_text() == '{"iteration": 1, "loss": 0.1}\n'
    path.write_text('{"iteration": 1}\n{"loss": 3}\n')
    with pytest.raises(ValueError, match=f"^{str(path)!r}, line 2: "):
        metrics.read(path)
