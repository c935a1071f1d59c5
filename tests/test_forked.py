"""A script that the tests fork behaves as one that is started afresh: or no test that forks one proves anything."""

import pytest
from conftest import expect, run_script

SCRIPT = """
import atexit, json, multiprocessing, os, signal, sys, threading, time
atexit.register(print, "at its end")
print(json.dumps([__name__, sys.argv, sys.path[0], os.getcwd(), dict(os.environ), "model" in sys.modules,
                  multiprocessing.get_start_method(), threading.active_count(), str(signal.getsignal(2))]))
print("an error's line", file=sys.stderr)
threading.Thread(target=lambda: (time.sleep(0.1), print("of a thread"))).start()
"""
ENDS = {"": 0, "sys.exit()": 0, "sys.exit(143)": 143, "sys.exit('a message')": 1, "raise ValueError(1)": 1,
        "os._exit(7)": 7, "os.kill(os.getpid(), signal.SIGKILL)": -9, "os.kill(os.getpid(), signal.SIGTERM)": -15}


@pytest.mark.parametrize(("end", "code"), ENDS.items())
def test_a_forked_script_is_like_a_fresh_one(tmp_path, monkeypatch, end, code):
    """Its arguments, environment, output, threads and exit code."""
    (tmp_path / "script.py").write_text(SCRIPT + end)
    monkeypatch.setenv("CPU_OF_TESTS", "bf16")
    forked, fresh = (expect(code, run_script(str(tmp_path / "script.py"), "word", "a=b c", fresh=fresh))
                     for fresh in (False, True))
    assert forked.stdout == fresh.stdout
    errors, expected = ([line for line in result.stderr.splitlines() if not line.startswith(" ")]  # less the frames
                        for result in (forked, fresh))
    assert errors == expected
