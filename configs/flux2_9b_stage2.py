"""RTDMD of FLUX.2-klein 9B, with the published values."""

import families


def get_config(which=""):
  return families.stage2("flux2_9b", which)
