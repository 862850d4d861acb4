"""A second stream: launches that wait for nothing run beside one that fills few multiprocessors."""

import torch


class Beside:
    """Launches inside ``with`` run beside what the current stream is given behind it.

    They see what was launched before; :meth:`join` makes the current stream wait for them, which
    the operator does before it returns: so no tensor that they use is freed or written meanwhile.
    Without CUDA (the interpreter, a compilation) all runs in turn.
    """

    def __init__(self, device: torch.device):
        self.running = False
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # One does: a wait is for the record before it, whatever is recorded later.
        self.event = torch.cuda.Event() if device.type == "cuda" else None

    def __enter__(self) -> None:
        """Begin what runs beside."""
        if self.stream is None or self.event is None:
            return
        self.before = torch.cuda.current_stream(self.stream.device)
        self.event.record(self.before)
        self.stream.wait_event(self.event)
        torch.cuda.set_stream(self.stream)

    def __exit__(self, *_: object) -> None:
        """Go back to the stream that was current."""
        if self.stream is not None:
            torch.cuda.set_stream(self.before)
            self.running = True

    def join(self) -> None:
        """Let what is launched from here on wait for all that runs beside."""
        if self.running and self.stream is not None and self.event is not None:
            self.event.record(self.stream)
            torch.cuda.current_stream(self.stream.device).wait_event(self.event)
            self.running = False


IN_TURN = Beside(torch.device("cpu"))
