"""Errors for people: each says what was wrong, what was expected and what to do.

Every error that ildlab raises on purpose is an `IldlabError`, so that a notebook or the stepper can
show its text as it is and let everything else surface as the bug that it is.
"""


def first_line(error: BaseException) -> str:
    """First line of an error's message, or its type's name where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or in main memory."""
    words = ("out of memory", "can't allocate memory", "not enough memory")  # torch's, of either
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )


class IldlabError(Exception):
    """Base of every error that ildlab raises on purpose."""


class ParameterError(IldlabError):
    """A parameter of a notebook, or of a command, is of another type, or there is none such."""


class ModelError(IldlabError):
    """A model or tokenizer could not be found, read or matched."""


class UnsupportedModelError(ModelError):
    """The decoder layers of a model could not be found, or replaying them differs from the model."""


class TextError(IldlabError):
    """A text source is missing, empty, too short or unreadable."""


class MeasureError(IldlabError):
    """Scores could not be computed, or came out NaN."""


class DistillError(IldlabError):
    """Distillation was asked for something impossible, or failed."""


class NotFiniteError(DistillError):
    """The loss of a distillation, or its gradient, stopped being finite."""


class SuiteError(IldlabError):
    """A suite, a task or one of its rows is malformed or out of reach."""


class SessionError(IldlabError):
    """A pruning step is not possible in the session's present state."""


class FileError(IldlabError):
    """A file or folder cannot be written: the disk is full, or it is not ours to write."""


class JournalError(IldlabError):
    """A run folder holds no run, another one, or a damaged one, or is locked."""


class GridError(IldlabError):
    """A grid is none of its notebook, its folder is another's, or a worker lacks something."""


class PlotError(IldlabError, ValueError):
    """A figure was asked for of what it cannot be drawn from."""


class ExportError(IldlabError):
    """A checkpoint could not be written, or did not prove equal to the student when reloaded."""
