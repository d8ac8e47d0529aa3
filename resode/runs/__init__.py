"""Run folders: made, continued and read so that they are whole at every moment."""

from resode.runs.atomic import write_atomic
from resode.runs.environment import environment
from resode.runs.run import Run
from resode.runs.values import digest, jsonable

__all__ = ["Run", "digest", "environment", "jsonable", "write_atomic"]
