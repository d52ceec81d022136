"""Errors a user can act on: each message names the culprit and the remedy.

The command line prints these as one line without a traceback; anything else is a bug and keeps its traceback.
"""


class TesseraError(Exception):
    """Base class of every error that is caused by input, configuration or files rather than by a bug."""


class ConfigError(TesseraError, ValueError):
    """A configuration value is out of range, unknown, or contradicts another one."""


class DataError(TesseraError, ValueError):
    """A data set, image, label or token file has unusable content."""


class CheckpointError(TesseraError, ValueError):
    """A checkpoint does not fit what it is loaded into."""


class MissingFileError(TesseraError, FileNotFoundError):
    """A file or folder that is needed does not exist."""
