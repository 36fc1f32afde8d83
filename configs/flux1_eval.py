"""Base, cold start and result of FLUX.1-dev by the published suite of rewards."""

import families


def get_config():
  return families.evaluation("flux1")
