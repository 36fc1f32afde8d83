"""AC-DMD of SD3-M, with the published values."""

import families


def get_config():
  return families.stage1("sd3")
