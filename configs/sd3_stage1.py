"""AC-DMD of SD3-M, with the published values."""

import families


def get_config(which=""):
  return families.stage1("sd3", which)
