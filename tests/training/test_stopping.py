from __future__ import annotations

import os
import pickle
import signal
import threading

import pytest

from qcrd_ray.errors import Stopped
from qcrd_ray.training.stopping import Stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_interrupts_where_nothing_looks_for_it(number: int) -> None:
    stop = Stop()
    before = signal.getsignal(number)
    with stop.on_signals(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before
    assert stop.asked and stop.signal == number


def test_the_first_signal_only_asks_where_somebody_looks_and_the_second_interrupts() -> None:
    stop = Stop()
    with stop.on_signals(), stop.orderly():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_another_thread_asks_and_takes_no_signals() -> None:
    stop = Stop()
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work() -> None:
        with stop.on_signals():
            seen.append(signal.getsignal(signal.SIGTERM))
            stop.ask()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
    with pytest.raises(KeyboardInterrupt):
        stop.check()
    assert stop.signal is None


def test_waiting_ends_where_the_run_is_asked_to(ray_session: object) -> None:
    import ray

    @ray.remote
    def sleep(seconds: float) -> float:
        import time

        time.sleep(seconds)
        return seconds

    stop = Stop()
    assert stop.get(sleep.remote(0.1)) == 0.1
    slow = sleep.remote(60.0)
    assert stop.wait([slow], 0.5) == [slow]
    threading.Timer(0.5, stop.ask).start()
    with pytest.raises(KeyboardInterrupt):
        stop.get(slow)
    ray.cancel(slow, force=True)


def test_what_was_stopped_survives_a_pickle() -> None:
    stopped = pickle.loads(pickle.dumps(Stopped(7, 20, signal.SIGTERM)))
    assert (stopped.step, stopped.steps, stopped.signal) == (7, 20, signal.SIGTERM)
    assert str(stopped) == "stopped at step 7 of 20; the same command goes on from there"
    stopped = pickle.loads(pickle.dumps(Stopped(0, 4, signal.SIGINT, "trial")))
    assert (stopped.step, stopped.steps, stopped.signal, stopped.unit) == (0, 4, signal.SIGINT, "trial")
    assert str(stopped) == "stopped at trial 0 of 4; the same command goes on from there"
