"""RTDMD of SD3.5-M, with the published values."""

import families


def get_config():
  return families.stage2("sd35")
