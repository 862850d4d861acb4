"""A second stream: launches that wait for nothing run beside one that fills few multiprocessors."""

import torch


class Beside:
    """Launches inside ``with`` run beside what the current stream is given behind it.

    They see what was launched before; :meth:`join` makes the current stream wait for them, which
    the operator does before it returns: so no tensor that they use is freed or written meanwhile.
    Without CUDA (the interpreter, a compilation) all runs in turn.

    The stream goes first: its launches are small, and would wait for the last block of a large one.
    """

    def __init__(self, device: torch.device):
        cuda = device.type == "cuda"
        self.running = False
        self.stream = torch.cuda.Stream(device, priority=-1) if cuda else None
        # One does: a wait is for the record before it, whatever is recorded later.
        self.event = torch.cuda.Event() if cuda else None

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
