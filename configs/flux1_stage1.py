"""AC-DMD of FLUX.1-dev, with the published values."""

import families


def get_config(which=""):
  return families.stage1("flux1", which)
