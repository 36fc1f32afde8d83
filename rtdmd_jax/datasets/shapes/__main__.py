"""`python -m rtdmd_jax.datasets.shapes --out DIR`: writes the prompt files."""

import argparse

from rtdmd_jax.datasets.shapes.records import write_prompt_files


def main(argv: list[str] | None = None) -> None:
  """Parses the command line and writes the two prompt files."""
  parser = argparse.ArgumentParser(prog="python -m rtdmd_jax.datasets.shapes", description=__doc__)
  parser.add_argument("--out", required=True, help="directory of the files; created if missing")
  for path, count in write_prompt_files(parser.parse_args(argv).out).items():
    print(f"{path}: {count} records")


if __name__ == "__main__":
  main()
