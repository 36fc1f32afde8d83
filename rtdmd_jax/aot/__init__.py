"""What a run costs on a TPU topology, found by compiling it on a machine without one."""
