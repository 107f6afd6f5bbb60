"""Belt control: the last request is repeated until the drive has taken it."""

import threading

from edge_agent.devices.drivers.belt import BeltMessage, RepeatedRequest
from models.errors import UnavailableError


def test_a_request_is_repeated_until_it_is_taken_and_the_last_one_counts() -> None:
    taken: list[BeltMessage] = []
    refusals = [3]
    heard = threading.Event()

    def send(message: BeltMessage) -> None:
        if refusals[0]:
            refusals[0] -= 1
            raise UnavailableError("driver.no_answer", "The drive does not answer.")
        taken.append(message)
        heard.set()

    request = RepeatedRequest(send, every_s=0.01)
    request.start()
    assert not heard.wait(0.05)  # nothing is sent before the first request
    request.stop("camera.frozen")
    assert heard.wait(300.0)
    assert taken[0] == BeltMessage(stop=True, reason="camera.frozen", sequence=1)
    request.run()
    while not any(message.sequence == 2 for message in tuple(taken)):
        heard.clear()
        assert heard.wait(300.0)
    request.close()
    assert taken[-1] == BeltMessage(stop=False, reason="", sequence=2)
    assert request.counters["no_answer"] == 3
