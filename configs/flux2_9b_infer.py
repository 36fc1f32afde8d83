"""Four-step images of FLUX.2-klein 9B after both stages."""

import families


def get_config():
  return families.infer("flux2_9b")
