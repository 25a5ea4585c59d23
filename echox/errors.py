"""Defines the errors a user can cause or must act on; the command line turns each into a sentence and an exit code."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""A text from outside as a terminal may show it: characters that steer one, or turn words around, are named.

    Line ends and tabs stay; other control characters become `\x1b` and the like.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(each if each.isprintable() or each in "\n\t" else ascii(each)[1:-1] for each in text)


class EchoXError(Exception):
    """A failure with a cause and a remedy the user can act on.

    Attributes:
        what: what went wrong, with the value at fault.
        where: file, key or process it happened in; may be empty.
        fix: what to do next; may be empty.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.fix = fix

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle through keyword arguments, so that the error survives the trip from a Ray worker."""
        return (_rebuild, (type(self), self.what, self.where, self.fix))

    def __str__(self) -> str:
        where = f" [{self.where}]" if self.where else ""
        fix = f" Fix: {self.fix}" if self.fix else ""
        return f"{self.what}{where}.{fix}" if not self.what.endswith((".", "?", "!")) else f"{self.what}{where}{fix}"


def _rebuild(kind: type[EchoXError], what: str, where: str, fix: str) -> EchoXError:
    return kind(what, where=where, fix=fix)


class RecipeError(EchoXError):
    """A recipe or DeepSpeed JSON that cannot be run; `what` lists every mistake, one a line."""

    exit_code = 2


class MissingModelError(EchoXError):
    """A model folder that is absent or incomplete."""

    exit_code = 3


class AlteredModelError(EchoXError):
    """A model file whose hash is not the expected one."""

    exit_code = 3


class DataError(EchoXError):
    """A shard, sample or audio file that breaks the data contract."""

    exit_code = 4


class CorruptSampleError(DataError):
    """One sample that is damaged for good: reading it again gives the same.

    Attributes:
        kind: class of the damage, a word to count by, such as "checksum" or "decode".
    """

    def __init__(self, what: str, *, kind: str, where: str = "", fix: str = "") -> None:
        super().__init__(what, where=where, fix=fix)
        self.kind = kind

    def __reduce__(self) -> tuple[object, ...]:
        """As the base class does, with the kind."""
        return (_rebuild_corrupt, (self.what, self.kind, self.where, self.fix))


def _rebuild_corrupt(what: str, kind: str, where: str, fix: str) -> CorruptSampleError:
    return CorruptSampleError(what, kind=kind, where=where, fix=fix)


class CheckpointError(EchoXError):
    """A checkpoint that is damaged or does not fit the run."""

    exit_code = 5


class NetworkError(EchoXError):
    """A download or service that could not be reached."""

    exit_code = 6


class TransientReadError(EchoXError):
    """Data that could not be read although it was tried again and again; the same read may succeed later."""

    exit_code = 6


class LaunchError(EchoXError):
    """A cluster or job that could not be started, reached or followed."""

    exit_code = 7


class TrainingError(EchoXError):
    """A loss or gradient that is not finite, or spikes, beyond what the recipe's `health` section allows."""

    exit_code = 8
