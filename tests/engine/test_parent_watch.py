from __future__ import annotations

import multiprocessing
import subprocess
import sys

import psutil

_PARENT = "from tests.engine.test_parent_watch import start_child; start_child()"


def _child() -> None:
    from act_serve.engine.parent_watch import end_with_parent

    end_with_parent()
    print("watching", flush=True)
    multiprocessing.Event().wait()


def start_child() -> None:
    """Waits for a child that waits for ever."""
    child = multiprocessing.get_context("spawn").Process(target=_child)
    child.start()
    child.join()


def test_a_process_ends_with_its_parent_however_that_ends() -> None:
    parent = subprocess.Popen([sys.executable, "-c", _PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "watching\n"
    processes = psutil.Process(parent.pid).children(recursive=True)
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert alive == []


def test_a_process_that_was_not_spawned_is_left_alone() -> None:
    code = "from act_serve.engine.parent_watch import end_with_parent as f; f(); import threading; "
    code += "print(threading.active_count())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "1\n"
