"""Signals that stop a run: noted once, raised where it is safe, and given back."""

from __future__ import annotations

import os
import signal
import time

import pytest

from powerflow_lit import interrupt
from powerflow_lit.interrupt import Stopped, StopSignals


def send(number: int = signal.SIGUSR1) -> None:
    os.kill(os.getpid(), number)


def test_a_signal_is_noted_while_it_is_deferred_and_raised_by_the_next_check() -> None:
    with StopSignals(["SIGUSR1"]) as signals:
        with signals.deferred():
            send()
        with pytest.raises(Stopped) as stop:
            signals.check()
    assert (stop.value.code, stop.value.at_once) == (128 + signal.SIGUSR1, False)


def test_a_signal_raises_at_once_where_nothing_can_be_saved() -> None:
    with StopSignals(["SIGUSR1"]), pytest.raises(Stopped):
        send()


def test_a_launcher_that_passes_a_signal_on_does_not_make_it_a_second_one() -> None:
    with StopSignals(["SIGUSR1"]) as signals, signals.deferred():
        send()
        send()


def test_a_second_signal_raises_even_while_it_is_deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "ONE_CAUSE_S", 0.01)
    monkeypatch.setattr(interrupt, "LAST_RESORT_S", 10_000)  # not the end of these tests
    with StopSignals(["SIGUSR1"]) as signals, signals.deferred():
        send()
        time.sleep(0.02)
        with pytest.raises(Stopped) as stop:
            send()
    assert stop.value.at_once


def test_a_hangup_that_nohup_ignores_stays_so_and_handlers_are_given_back() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    old = signal.getsignal(signal.SIGUSR1)
    try:
        with StopSignals(["SIGHUP", "SIGUSR1"]) as signals:
            send(signal.SIGHUP)
            signals.check()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGUSR1) is old
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_is_heeded_by_a_job_that_a_shell_has_put_into_the_background() -> None:
    """A script's `command &` begins with SIGINT ignored, but `kill -INT` is meant."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals([]), pytest.raises(Stopped):
            send(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
