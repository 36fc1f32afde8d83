"""Base, cold start and result of FLUX.2-klein 4B by the published suite of rewards."""

import families


def get_config():
  return families.evaluation("flux2")
