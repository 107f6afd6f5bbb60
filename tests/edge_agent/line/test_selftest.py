"""The self-test judges the model, not the company it keeps."""

import threading
import time

from edge_agent.line.selftest import _own_ms


def test_time_that_other_processes_take_is_not_the_models() -> None:
    # Waiting uses no processor, exactly like a process that others push aside.
    assert _own_ms(lambda: threading.Event().wait(0.05)) < 25.0


def test_time_the_model_takes_counts() -> None:
    def work() -> None:
        until = time.process_time() + 0.05
        while time.process_time() < until:
            pass

    assert _own_ms(work) >= 50.0
