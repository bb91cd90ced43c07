"""When an engine counts as hung; every history is told second by second."""

from __future__ import annotations

from llamarunner.runners.watchdog import Signs, SlotsLook, Watch

TIMEOUT_S = 100.0


class History:
    """An engine that owes one streamed answer from the beginning, looked at each second."""

    def __init__(self, *, has_slots: bool = True, timeout_s: float = TIMEOUT_S) -> None:
        self.watch = Watch(timeout_s, has_slots=has_slots)
        self.at = 1000.0
        self.received, self.spoke_at = 0, 0.0
        self.owes, self.all_streamed = True, True
        self.slots = SlotsLook(fingerprint=1)
        self.asked = 0
        self.see()

    def see(self) -> None:
        self.watch.see(Signs(self.at, self.owes, self.all_streamed, self.received, self.spoke_at))

    def go_on(self, seconds: int, *, moving: bool = False) -> float | None:
        for second in range(seconds):
            self.at += 1
            self.see()
            if self.watch.wants_slots:
                self.asked += 1
                if moving:
                    self.slots = SlotsLook(fingerprint=2 + second)
                self.watch.hear(self.slots)
        return self.watch.hung_s


def test_silence_with_frozen_slots_is_a_hang_after_the_timeout() -> None:
    history = History()
    assert history.go_on(99) is None
    assert history.go_on(1) == 100
    assert history.go_on(30) == 130


def test_so_it_is_with_slots_that_are_not_answered() -> None:
    history = History()
    history.slots = SlotsLook()
    assert history.go_on(99) is None
    assert history.go_on(1) == 100


def test_the_slots_are_not_asked_before_half_the_time() -> None:
    history = History()
    history.go_on(49)
    assert history.asked == 0
    history.go_on(1)
    assert history.asked == 1


def test_slots_that_move_are_life() -> None:
    """A prompt that takes minutes, or an answer in one piece."""
    assert History().go_on(1000, moving=True) is None


def test_an_answer_about_the_slots_after_none_is_life() -> None:
    history = History()
    history.slots = SlotsLook()
    history.go_on(90)
    history.slots = SlotsLook(fingerprint=1)
    assert history.go_on(50) is None
    assert history.go_on(60) is not None


def test_one_look_at_the_slots_is_not_enough_to_tell() -> None:
    """The first may come late, when the loop was busy."""
    history = History(timeout_s=4)
    for _ in range(3):
        history.at += 100
        history.see()
    assert history.watch.wants_slots
    history.watch.hear(SlotsLook(fingerprint=1))
    history.at += 100
    for _ in range(20):
        history.see()
        history.at += 1
    assert history.watch.hung_s is None
    history.watch.hear(SlotsLook(fingerprint=1))
    assert history.watch.hung_s is not None


def test_bytes_and_log_lines_are_life() -> None:
    for sign in ("received", "spoke_at"):
        history = History()
        history.go_on(99)
        setattr(history, sign, 7)
        assert history.go_on(99) is None
        assert history.go_on(2) is not None


def test_a_hang_ends_with_a_sign_of_life() -> None:
    history = History()
    assert history.go_on(150) is not None
    history.received += 1
    assert history.go_on(1) is None


def test_an_engine_that_owes_nothing_is_not_hung() -> None:
    history = History()
    history.owes = False
    assert history.go_on(1000) is None
    assert history.asked == 0


def test_clients_that_give_up_and_try_again_do_not_hide_a_hang() -> None:
    history = History()
    for _ in range(4):
        history.owes = True
        history.go_on(30)
        history.owes = False
        history.go_on(5)
    assert history.watch.hung_s is not None
    assert history.go_on(500) == history.watch.hung_s  # nobody waits, and it has not moved since


def test_without_slots_each_request_has_the_whole_time() -> None:
    history = History(has_slots=False)
    for _ in range(4):
        history.owes = True
        assert history.go_on(90) is None
        history.owes = False
        history.go_on(1)
    history.owes = True
    assert history.go_on(102) is not None
    assert history.asked == 0


def test_without_slots_nothing_is_told_of_an_answer_in_one_piece() -> None:
    history = History(has_slots=False)
    history.all_streamed = False
    assert history.go_on(1000) is None


def test_an_engine_that_tells_nothing_of_its_slots_is_as_one_without() -> None:
    history = History()
    history.slots = SlotsLook(has_slots=False, fingerprint=3)
    assert history.go_on(100) == 100
    assert history.asked == 1
    history.all_streamed = False
    assert history.go_on(100) is None


def test_time_in_which_we_did_not_run_does_not_count() -> None:
    history = History()
    history.at += 3600  # suspended, or stopped by a signal
    history.see()
    assert history.watch.hung_s is None
    assert not history.watch.wants_slots


def test_looks_are_rare_where_there_is_time() -> None:
    assert Watch(120, has_slots=True).look_s == 5
    assert Watch(1, has_slots=True).look_s == 0.1
