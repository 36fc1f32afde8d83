"""The cost of a run on a TPU topology, measured by compiling it on a machine without one."""
