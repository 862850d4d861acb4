"""A side stream: launches that wait for nothing overlap with one that fills few multiprocessors."""

import torch


class SideStream:
    """Launches inside ``with`` overlap with what the current stream is given after it.

    They see what was launched before. :meth:`join` makes the current stream wait for them; the
    operator joins before it returns, so that no tensor that they use is freed or overwritten.
    Without CUDA (the interpreter, a compilation) all launches run in turn.

    The stream has priority: its launches are small, and would wait for the last block of a large
    one.
    """

    def __init__(self, device: torch.device):
        cuda = device.type == "cuda"
        self.running = False
        self.stream = torch.cuda.Stream(device, priority=-1) if cuda else None
        # One event is enough: a wait is for the record before it, whatever is recorded later.
        self.event = torch.cuda.Event() if cuda else None

    def __enter__(self) -> None:
        """Send launches to the side stream."""
        if self.stream is None or self.event is None:
            return
        self.before = torch.cuda.current_stream(self.stream.device)
        self.event.record(self.before)
        self.stream.wait_event(self.event)
        torch.cuda.set_stream(self.stream)

    def __exit__(self, *_: object) -> None:
        """Return to the stream that was current."""
        if self.stream is not None:
            torch.cuda.set_stream(self.before)
            self.running = True

    def join(self) -> None:
        """Let later launches wait for all that run on the side stream."""
        if self.running and self.stream is not None and self.event is not None:
            self.event.record(self.stream)
            torch.cuda.current_stream(self.stream.device).wait_event(self.event)
            self.running = False


IN_TURN = SideStream(torch.device("cpu"))  # overlaps nothing
