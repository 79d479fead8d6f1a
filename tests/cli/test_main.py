"""The command line itself: discovery, help, exit codes, and one line for every error."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import types

import pytest
import torch

import speedk
from speedk import cli
from speedk.errors import ArtifactError, ConfigError, one_line


def speedk_process(*words, **options):
    return subprocess.run([sys.executable, "-m", "speedk", *words], capture_output=True, text=True, **options)


@pytest.fixture
def command(monkeypatch):
    """Make `speedk probe` do what the test says."""

    def make(action, **attributes):
        module = types.SimpleNamespace(HELP="Probe.", add_arguments=lambda parser: None, run=action, **attributes)
        monkeypatch.setattr(cli, "commands", lambda: {"probe": "probe"})
        monkeypatch.setattr(cli, "_module", lambda name: module)
        return lambda: cli.main(["probe"])

    return make


def raising(error):
    def action(args):
        raise error

    return action


def line(capsys):
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("speedk: ") and err.endswith("\n") and err.count("\n") == 1
    return err.strip()


def test_a_name_that_the_terminal_cannot_show_is_escaped():
    code = """if True:
        import types
        from speedk import cli
        probe = types.SimpleNamespace(HELP="", add_arguments=lambda p: None, run=lambda a: print("caf\\u00e9 \\udcff"))
        cli.commands, cli._module = lambda: {"probe": "probe"}, lambda name: probe
        raise SystemExit(cli.main(["probe"]))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "caf\\xe9 \\udcff\n", "")


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    page = capsys.readouterr().out
    assert {"info", "decode", "show"} <= set(cli.commands())
    for name in cli.commands():
        assert f"\n    {name} " in page


def test_every_command_explains_itself(capsys):
    for name, module in cli.commands().items():
        assert cli.main([name, "--help"]) == 0
        page = capsys.readouterr().out
        assert page.startswith(f"usage: speedk {name}")
        assert cli._module(module).HELP.split()[0] in page


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"speedk {speedk.__version__}\n"


def test_no_command_prints_help(capsys):
    assert cli.main([]) == 2
    assert "usage: speedk" in capsys.readouterr().err


def test_unknown_commands_and_options(capsys):
    assert cli.main(["inof"]) == 2
    assert line(capsys) == "speedk: no command 'inof'; did you mean 'info'?"
    assert cli.main(["zzzzzz"]) == 2
    assert "there are " in line(capsys)
    assert cli.main(["info"]) == 2
    assert line(capsys) == "speedk: the following arguments are required: FILE; see speedk info --help"
    assert cli.main(["info", "x", "--jsn"]) == 2
    assert line(capsys) == "speedk: unrecognized arguments: --jsn; did you mean '--json'?; see speedk info --help"
    assert cli.main(["--frobnicate"]) == 2
    assert line(capsys) == "speedk: unrecognized arguments: --frobnicate; see speedk --help"
    assert cli.main(["distill", "--ipc", "few"]) == 2
    assert line(capsys) == "speedk: argument --ipc: invalid int value: 'few'; see speedk distill --help"


@pytest.mark.parametrize("error, code, words", [
    (ConfigError("k=9 is\n  too   large"), 1, "speedk: k=9 is too large"),
    (ArtifactError("x is damaged"), 2, "speedk: x is damaged"),
    (ArtifactError("name \x1b[31m"), 2, "speedk: name \\x1b[31m"),
    (KeyboardInterrupt(), 130, "speedk: interrupted"),
    (MemoryError(), 1, "speedk: out of memory: lower the batch"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), 1, "speedk: out of memory: lower the batch"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "speedk: out of memory: "),
    (PermissionError(13, "Permission denied", "/x"), 1, "speedk: Permission denied: /x"),
    (KeyError("k"), 70, "speedk: a bug in speedk, please report it with what SPEEDK_DEBUG=1 shows: KeyError: 'k'"),
    (AssertionError(), 70, "shows: AssertionError"),
])
def test_errors_are_one_line(error, code, words, command, capsys, monkeypatch):
    monkeypatch.delenv("SPEEDK_DEBUG", raising=False)
    assert command(raising(error))() == code
    assert words in line(capsys)


def test_a_command_says_what_to_lower(command, capsys):
    assert command(raising(MemoryError()), LOWER="take fewer")() == 1
    assert line(capsys) == "speedk: out of memory: take fewer"


def test_a_real_allocation_that_fails_is_memory(command, capsys):
    assert command(lambda args: torch.empty(1 << 60, dtype=torch.uint8))() == 1
    assert "out of memory" in line(capsys)


def test_traceback_on_request(command, capsys, monkeypatch):
    monkeypatch.setenv("SPEEDK_DEBUG", "1")
    assert command(raising(KeyError("k")))() == 70
    err = capsys.readouterr().err
    assert "Traceback" in err and err.rstrip().splitlines()[-1].startswith("speedk: a bug")


def test_exit_code_of_a_command(command):
    assert command(lambda args: None)() == 0
    assert command(lambda args: 3)() == 3


@pytest.mark.parametrize("buffered", ["", "1"])
def test_the_reader_of_a_pipe_goes_away(buffered):
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-m", "speedk", "--help"]
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": buffered})
    os.close(writer)
    assert done.returncode == cli.BROKEN_PIPE and done.stderr == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize("buffered", ["", "1"])
def test_output_on_a_full_disk(buffered):
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "speedk", "--version"]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True,
                              env=os.environ | {"PYTHONUNBUFFERED": buffered})
    assert done.returncode and done.stderr.startswith("speedk: No space left") and done.stderr.count("\n") == 1


def test_help_is_quick_and_imports_nothing_heavy():
    """Under 0.3 s of processor time, whatever else the machine does."""
    heavy = ("torch", "numpy", "PIL", "pyarrow", "sklearn", "kornia", "tqdm")
    code = ("import sys\nfrom speedk.cli import main\nmain(['--help'])\n"
            f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)")
    taken = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.stderr.strip() == "[]"
    assert min(taken) < 0.3


def test_as_a_process(tmp_path):
    done = speedk_process("info", str(tmp_path / "none"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"speedk: {tmp_path / 'none'} does not exist\n"


def test_one_line():
    assert one_line("a\n b\tc") == "a b c"
    assert one_line("x" * 300) == "x" * 197 + "..."
    assert one_line("\u202e\x07é猫") == "\\u202e\\x07é猫"


def test_help_names_every_plugin_and_data_set(capsys):
    from speedk import data, networks
    from speedk.distillation import coresets, objectives, parameterizations
    from speedk.registry import names

    for command, known in (("distill", data.names() + names(objectives) + names(parameterizations) + names(networks)),
                           ("evaluate", names(networks)), ("coreset", names(coresets))):
        assert cli.main([command, "--help"]) == 0
        words = set(re.findall(r"\w+", capsys.readouterr().out))
        assert not set(known) - words


def test_help_says_what_each_coreset_is(capsys):
    from speedk.distillation import coresets
    from speedk.registry import find, names

    assert cli.main(["coreset", "--help"]) == 0
    said = capsys.readouterr().out
    for name in names(coresets):
        first = sys.modules[find(coresets, name).__module__].__doc__.splitlines()[0]
        assert re.search(rf"^  {name} +{re.escape(first)}$", said, re.MULTILINE), name


def test_a_demo_of_no_runs_is_refused_before_it_begins(capsys, tmp_path):
    assert cli.main(["demo", "--runs", "0", "--out", str(tmp_path / "demo")]) == 1
    assert line(capsys) == "speedk: --runs 0 must be at least 1" and not (tmp_path / "demo").exists()
