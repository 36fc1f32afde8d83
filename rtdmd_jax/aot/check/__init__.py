"""A check of a run ahead of its start: nothing is trained, written or fetched."""

from rtdmd_jax.aot.check.report import Report, show
from rtdmd_jax.aot.check.run import check

__all__ = ["Report", "check", "show"]
