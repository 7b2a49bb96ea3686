"""What can go wrong, as exceptions; every message names the value at fault and the remedy.

::

    HpschedError                 exit code 1
    ├── UsageError               exit code 2: a value, range, option or path that cannot be right
    │   ├── StudyNotFoundError       no study of that name in this storage
    │   ├── StudyExistsError         the name is taken
    │   └── ObjectiveError           ``module:function`` that cannot be imported
    ├── StorageError             the database cannot be reached, or is not ours
    │   └── DatabaseAwayError        exit code 75 (try again): it stayed away for ten minutes
    ├── TrialLostError           the trial in hand was given to another worker meanwhile
    ├── RanksLostError           exit code 75: processes that train together have lost each other
    ├── RecordError              a record in the study that cannot be read
    └── TrainingError            ``train`` broke the contract of one training run
"""

from __future__ import annotations

import os


class HpschedError(Exception):
    """Any failure hpsched reports in words instead of a traceback; the words say what to do."""

    exit_code = 1


class UsageError(HpschedError, ValueError):
    """A value the caller passed cannot be right: change the call."""

    exit_code = 2


class StudyNotFoundError(UsageError):
    """No study of that name in this storage: see ``hpsched study list``."""


class StudyExistsError(UsageError):
    """A study of that name exists: choose another, or pass ``--skip-if-exists``."""


class ObjectiveError(UsageError):
    """``module:function`` that cannot be imported: run from its folder, or fix the import."""


class StorageError(HpschedError):
    """The database cannot be reached or has a schema Optuna does not know: ``hpsched doctor``."""


class DatabaseAwayError(StorageError):
    """The database was there, and then stayed away for too long: attach again when it is back."""

    exit_code = os.EX_TEMPFAIL


class TrialLostError(HpschedError):
    """The trial in hand was given to another worker: nothing is to be done, both go on."""


class RanksLostError(HpschedError):
    """A process of those that train together is gone: start all of them again."""

    exit_code = os.EX_TEMPFAIL


class RecordError(HpschedError):
    """A record that hpsched stored in a study no longer reads; it is left out, never guessed."""


class TrainingError(HpschedError):
    """``train(cycle)`` broke the contract of one training run; the message says which part."""
