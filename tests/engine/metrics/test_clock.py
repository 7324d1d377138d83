import subprocess
import sys
import time


def test_the_process_s_age_includes_what_came_before_our_first_line():
    code = (
        "import time; time.sleep(0.2); from iwm_fast.engine.metrics.clock import seconds_since_start as s; print(s())"
    )
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.2 < float(done.stdout) < time.monotonic() - begin + 0.05
