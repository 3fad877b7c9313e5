"""`millrace fsck`: whether what the farm promises of its records, objects and hosts holds, on a farm that may be at work.

`check` only reads. What it finds is checked against grace times, so that a busy farm is not blamed for what is on its way.
"""

from scheduler.fsck.invariants import INVARIANTS, REPAIRS, check, mend, page
from scheduler.fsck.terms import Fault, Finding, Host, Scope, Standing, Thing

__all__ = ["INVARIANTS", "REPAIRS", "Fault", "Finding", "Host", "Scope", "Standing", "Thing", "check", "mend", "page"]
