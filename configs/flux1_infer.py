"""Four-step images of FLUX.1-dev after both stages."""

import families


def get_config():
  return families.infer("flux1")
