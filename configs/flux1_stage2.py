"""RTDMD of FLUX.1-dev, with the published values."""

import families


def get_config():
  return families.stage2("flux1")
