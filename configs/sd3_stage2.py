"""RTDMD of SD3-M, with the published values."""

import families


def get_config(which=""):
  return families.stage2("sd3", which)
