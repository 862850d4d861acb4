"""The ``--s2o-*`` flags; what they say waits in vLLM's own ``additional_config``.

There it goes wherever vLLM's arguments go: into other processes, which may not have loaded the
plug-in yet, and through copies, pickles and keyword arguments.
"""

import argparse
from collections.abc import Mapping
from typing import Any

from .config import (
    FIELDS,
    FLAGS,
    HELP,
    REMOVED,
    ConfigError,
    check,
    parse_text,
    refusal,
    removed,
)

ADDITIONAL = "additional_config"


class Flag(argparse.Action):
    """Reads one setting and keeps it in ``additional_config``, not under a name of its own."""

    def __init__(self, option_strings: list[str], dest: str, key: str, **kwargs: Any):
        kwargs["default"] = argparse.SUPPRESS
        super().__init__(option_strings, dest, **kwargs)
        self.key = key

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Check and keep what was given.

        Raises:
            argparse.ArgumentError: if it is refused.
        """
        try:
            value = self.read(values)
        except ConfigError as error:
            raise argparse.ArgumentError(self, str(error)) from None
        keep(self, namespace, {self.key: value})

    def read(self, values: Any) -> Any:
        """Return the setting; ``--no-...`` says that it is False, which most settings refuse.

        Raises:
            ConfigError: if it is refused.
        """
        if self.nargs == 0:
            return check(self.key, False)
        value = parse_text(self.key, ",".join(values) if isinstance(values, list) else values)
        return list(value) if isinstance(value, tuple) else value


class Removed(argparse.Action):
    """Refuses a flag of a setting that was removed, whatever stands behind it."""

    def __init__(self, option_strings: list[str], dest: str, key: str, **kwargs: Any):
        super().__init__(option_strings, dest, default=argparse.SUPPRESS, **kwargs)
        self.key = key

    def __call__(self, *_: Any) -> None:
        """Refuse it.

        Raises:
            argparse.ArgumentError: always.
        """
        raise argparse.ArgumentError(self, str(removed(self.key)))


def keep(action: argparse.Action, namespace: argparse.Namespace, flags: Mapping[str, Any]) -> None:
    """Keep flags in a namespace's ``additional_config``, beside all that is there.

    Raises:
        argparse.ArgumentError: if that is no JSON object.
    """
    additional = getattr(namespace, ADDITIONAL, None) or {}
    before = additional.get(FLAGS, {}) if isinstance(additional, Mapping) else {}
    for place, value in ((ADDITIONAL, additional), (f"{ADDITIONAL} {FLAGS!r}", before)):
        if not isinstance(value, Mapping):
            raise argparse.ArgumentError(action, str(refusal(place, value, "a JSON object")))
    kept = dict(before) | dict(flags)
    setattr(namespace, ADDITIONAL, dict(additional) | {FLAGS: kept})


def keep_flags_through(action: argparse.Action) -> None:
    """Let vLLM's ``--additional-config`` keep what flags before it have said."""
    kind: Any = type(action)

    class Keeping(kind):
        def __call__(
            self, parser: Any, namespace: argparse.Namespace, values: Any, option: Any = None
        ) -> None:
            before = getattr(namespace, ADDITIONAL, None)
            super().__call__(parser, namespace, values, option)
            if isinstance(before, Mapping) and FLAGS in before:
                keep(self, namespace, before[FLAGS])

    action.__class__ = Keeping


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every setting to a parser of vLLM's engine arguments. Idempotent.

    YAML files come as flags, too: ``true`` as a flag alone, ``false`` as its ``--no-`` form where
    there is one and else not at all, a list as words after the flag.
    """
    additional = [action for action in parser._actions if action.dest == ADDITIONAL]
    if not additional or any(isinstance(action, Flag) for action in parser._actions):
        return
    for action in additional:
        keep_flags_through(action)
    group = parser.add_argument_group("S2O", "Sparse prefill; needs --attention-backend s2o.")
    for key, text in HELP.items():
        name = "s2o-" + key.replace("_", "-")
        words: dict[str, Any] = {}
        if FIELDS[key] is bool:
            words = {"nargs": "?", "const": "true"}
        elif key == "dense_layers":
            words = {"nargs": "+"}
        dest = name.replace("-", "_")
        group.add_argument(f"--{name}", action=Flag, key=key, dest=dest, help=text, **words)
        group.add_argument(
            f"--no-{name}", action=Flag, key=key, dest=dest, nargs=0, help=argparse.SUPPRESS
        )
    for key in REMOVED:
        name = "s2o-" + key.replace("_", "-")
        words = {"action": Removed, "key": key, "help": argparse.SUPPRESS}
        dest = name.replace("-", "_")
        group.add_argument(f"--{name}", nargs="?", dest=dest, **words)
        group.add_argument(f"--no-{name}", nargs=0, dest=dest, **words)
