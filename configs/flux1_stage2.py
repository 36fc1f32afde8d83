"""RTDMD of FLUX.1-dev, with the published values."""

import families


def get_config(which=""):
  return families.stage2("flux1", which)
