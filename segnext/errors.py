"""What the command line tells in one line: errors that the input or the machine is to blame for."""

from __future__ import annotations


class SegnextError(Exception):
    """The base of this package's own errors; the message is a whole sentence."""


class DeviceError(SegnextError, RuntimeError):
    """A GPU that is not there, or memory that does not suffice."""
