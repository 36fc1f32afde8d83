"""What is wrong with a run, found out before it starts: nothing is trained, written or fetched."""

from rtdmd_jax.aot.check.report import Report, show
from rtdmd_jax.aot.check.run import check

__all__ = ["Report", "check", "show"]
