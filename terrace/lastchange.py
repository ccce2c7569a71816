"""Which change a command has asked for last, and what is known of it: what to say when somebody interrupts."""

from __future__ import annotations


class LastChange:
    """The last change that was asked for: what is to be said of it if somebody interrupts at any moment.

    It is kept beside the exceptions, for an interrupt may come between any two of them, and a second one while the
    first is seen to (`timeout -s INT` sends both to the process and to its group).
    """

    def __init__(self) -> None:
        self.path: tuple[str, ...] | None = None
        """Without /v1; None where nothing was asked for, or it was refused."""
        self.is_answered = False
        """The daemon has said that it is done."""

    def begins(self, path: tuple[str, ...]) -> None:
        """It is about to be sent: from now on it may be carried out."""
        self.is_answered = False
        self.path = path

    def succeeded(self) -> None:
        """The daemon has said so."""
        self.is_answered = True

    def failed(self) -> None:
        """The command has an error to tell."""
        self.path = None
