"""What every program does around its work, in processes of their own."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from iwm_fast.programs import run_program

def work():
    import swallows
    raise SystemExit(7)

sys.exit(run_program("program", work, ends_process=True))
"""
# As libraries do with optional imports.
SWALLOWS = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)
except BaseException:
    pass
"""


def ended(program, **settings):
    return subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, check=False, **settings)


def test_ctrl_c_in_an_import_ends_the_program_though_a_library_swallows_it(tmp_path):
    (tmp_path / "swallows.py").write_text(SWALLOWS)
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    done = ended(heard + PROGRAM, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stderr) == (130, "program: interrupted\n")


def test_ctrl_c_that_was_ignored_from_the_beginning_stays_ignored_in_imports(tmp_path):
    (tmp_path / "swallows.py").write_text(SWALLOWS)
    ignored = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    done = ended(ignored + PROGRAM, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stderr) == (7, "")


@pytest.mark.skipif(sys.platform != "linux", reason="another system may not let the folder go")
def test_a_current_folder_that_is_gone_is_named(tmp_path):
    program = f"import os; os.chdir({str(tmp_path)!r}); os.rmdir({str(tmp_path)!r})\n{PROGRAM}"
    done = ended(program)
    assert done.returncode == 2
    assert done.stderr == (
        "program: the current folder is gone or may not be read (No such file or directory): cd to another, then "
        "start again\n"
    )


@pytest.mark.parametrize("cause", ["", "CtrlC() from "])
def test_ctrl_c_says_what_the_work_says_of_it(cause):
    work = f"def work():\n    raise {cause}KeyboardInterrupt('interrupted; resume')\n"
    end = "raise SystemExit(run_program('program', work))"
    done = ended(f"from iwm_fast.programs import CtrlC, run_program\n{work}{end}")
    assert (done.returncode, done.stderr) == (130, "program: interrupted; resume\n")
