"""Four-step images of SD3-M after both stages."""

import families


def get_config():
  return families.infer("sd3")
