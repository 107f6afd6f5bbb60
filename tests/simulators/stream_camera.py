"""A network camera: an HTTP server that streams JPEG pictures in real time, can pause, and can change its size.

It speaks `multipart/x-mixed-replace` as IP cameras do, so that the product's own OpenCV reads it.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import cv2
import numpy as np

_BOUNDARY = b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: "


class StreamCamera:
    """Streams the pictures over and over.

    Args:
        images: uint8 (H, W, 3) BGR.
        frames_per_s: Their rate.
    """

    def __init__(self, images: list[np.ndarray], frames_per_s: float = 30.0) -> None:
        self.pictures = [self._jpeg(image) for image in images]
        self.period_s = 1.0 / frames_per_s
        self.began_s = time.monotonic()
        self.sent = 0
        self.connections = 0
        self.pause_after = 0
        """Number of pictures after which it pauses; 0 = never."""
        self.pause_s = 0.0
        self.silent = threading.Event()
        """Once set, no picture is sent any more, but connections stay."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @staticmethod
    def _jpeg(image: np.ndarray) -> bytes:
        return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/stream.mjpg"

    def _handler(camera) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                camera.connections += 1
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
                self.end_headers()
                with contextlib.suppress(OSError):
                    camera._stream(self)

            def log_message(self, *_args: object) -> None:
                return

        return Handler

    def _stream(self, handler: BaseHTTPRequestHandler) -> None:
        while True:
            if self.pause_after and self.sent >= self.pause_after:
                self.pause_after = 0
                threading.Event().wait(self.pause_s)
                return  # the camera restarts: its connections are gone
            if self.silent.is_set():
                threading.Event().wait(60.0)
                return
            # The belt runs on in real time: the picture is that of this moment.
            number = int((time.monotonic() - self.began_s) / self.period_s)
            data = self.pictures[number % len(self.pictures)]
            handler.wfile.write(_BOUNDARY + str(len(data)).encode() + b"\r\n\r\n" + data + b"\r\n")
            self.sent += 1
            due_s = self.began_s + (number + 1) * self.period_s
            threading.Event().wait(max(0.0, due_s - time.monotonic()))

    @contextlib.contextmanager
    def running(self) -> Iterator["StreamCamera"]:
        self._thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
