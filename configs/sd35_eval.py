"""Base, cold start and result of SD3.5-M by the published suite of rewards."""

import families


def get_config():
  return families.evaluation("sd35")
