"""Generated bad input for what a user or a peer hands over, and what becomes of it.

`SURFACES` is used by tests/test_bad_inputs.py, a few examples each, and benchmarks/bad_input.py.
"""

import base64
import http.client
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save

from rtdmd_jax.adapters.peft import CONFIG_NAME, PEFT_NAME, load_peft
from rtdmd_jax.config import flatten, load_config
from rtdmd_jax.datasets.prompts import load_prompts
from rtdmd_jax.errors import UserError
from rtdmd_jax.models import build_transformer
from rtdmd_jax.rewards.remote import protocol
from rtdmd_jax.rewards.serve.server import RewardServer
from rtdmd_jax.rewards.serve.service import Limits, Service, TooMany
from rtdmd_jax.runtime.sharding import make_mesh
from rtdmd_jax.training.resume import FIXED, check_resume, read_stored_config
from rtdmd_jax.training.typed_config import optimizer_config, policy_config
from rtdmd_jax.training.validate import check_limits
from rtdmd_jax.weights.key_table import KeyTable, Stack
from rtdmd_jax.weights.safetensors import load_params, read_config
from rtdmd_jax.weights.state_dict import read_state_dict
from tests.support.damage import (
  JSON,
  NUMBERS,
  STRANGE_JSON,
  TEXT,
  damaged,
  dump,
  json_files,
  mangled,
)
from tests.support.paths import CONFIGS
from tests.support.reward_faults import number, running
from tests.support.torch_bytes import Tensor, pickled, zipped

_LONGEST = 3000  # letters of a sentence


class Refused(Exception):
  """A service's own sentence about a request."""


class Surface(NamedTuple):
  """`read(folder, case)` writes a case where it belongs and reads it as the program does."""

  name: str
  sound: Any  # a case that is accepted
  cases: st.SearchStrategy
  read: Callable[[Path, Any], None]
  names_file: bool = True  # the sentence must


def outcome(surface: Surface, folder: Path, case: Any) -> str:
  """`"refused"` or `"accepted"`; anything but one sentence of refusal passes as it was raised."""
  try:
    surface.read(folder, case)
  except (UserError, protocol.BadMessage, TooMany, Refused) as error:
    sentence = " ".join(str(error).split())
    assert sentence and "Traceback" not in sentence, sentence
    assert len(sentence) <= _LONGEST, f"{len(sentence)} letters: {sentence[:200]}"
    assert not surface.names_file or str(folder) in sentence, f"names no file: {sentence}"
    return "refused"
  return "accepted"


def _write(path: Path, data: bytes) -> Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(data)
  return path


# Prompt files.

_RECORDS = [{"prompt": "a red circle", "tag": "color", "include": [{"class": "circle"}]}, "a cat"]
_JSONL = "\n".join(map(json.dumps, _RECORDS)).encode()
_PROMPTS = st.one_of(
  st.tuples(st.just("p.json"), json_files(_RECORDS)),
  st.tuples(st.just("p.jsonl"), mangled(_JSONL) | STRANGE_JSON),
  st.tuples(st.just("p.jsonl"), damaged(_RECORDS[0]).map(dump)),
  st.tuples(st.just("p.txt"), mangled("ein Kätzchen\nzwei Bälle\n".encode()) | st.binary()),
  st.tuples(st.sampled_from(["p.csv", "p", "p.txt"]), st.sampled_from([b"", b" \n\n", b"\xff"])),
)


def _read_prompts(folder: Path, case: tuple[str, bytes]) -> None:
  name, data = case
  for prompt in load_prompts(_write(folder / name, data)):
    assert prompt.text and prompt.text.encode()


# Configurations: files, and values on the command line.

_SOURCE = b"""from ml_collections import ConfigDict
def get_config():
  c = ConfigDict()
  c.seed = 42
  c.lora = ConfigDict({"rank": 4, "targets": ("to_q",)})
  return c
"""
_LINES = ["import nothing", "raise OSError", "1 / 0", "c = ", "def get_config(: pass", "return 1"]
_LINES += ["def get_config(): return 1", "def get_config(): raise KeyError('x')", "get_config = 3"]
_LINES += ["def get_config(a, b): return a", "x" * 99, "(" * 300, "-" * 5000 + "1", "assert 0"]
_FILES = mangled(_SOURCE) | st.lists(st.sampled_from(_LINES), max_size=3).map(
  lambda lines: "\n".join(lines).encode()
)


def _read_config_file(folder: Path, data: bytes) -> None:
  load_config(str(_write(folder / "run.py", data)))


_BASE = load_config(str(CONFIGS / "tiny_stage2.py"))
_KEYS = [key for key, _ in flatten(_BASE.to_dict())]
_VALUES = st.one_of(
  NUMBERS.map(lambda n: str(n) if isinstance(n, float) else hex(n) if n > 2**69 else str(n)),
  TEXT,
  st.sampled_from(["-1", "0", "nan", "inf", "-inf", "1e9", "2.5", "true", "None", "()", "(0,)"]),
  st.sampled_from(["1,2", "1000,1000", "[[1]]", "{[]: 1}", "9" * 5000, "(" * 300, "{1: 2}"]),
)
_OVERRIDES = st.lists(
  st.tuples(st.sampled_from(_KEYS) | st.sampled_from(_KEYS).map(lambda k: k[:-1]), _VALUES)
  | st.tuples(TEXT, _VALUES),
  min_size=1,
  max_size=2,
)


def _read_overrides(folder: Path, case: list[tuple[str, str]]) -> None:
  del folder
  overrides = [f"{key}={value}" for key, value in case]
  config = load_config(str(CONFIGS / "tiny_stage2.py"), overrides)
  check_limits(config)
  make_mesh(**config.mesh)
  policy_config(config)
  optimizer_config(config.generator)


_STORED = json.loads(_BASE.to_json_best_effort())


def _read_stored_config(folder: Path, data: bytes) -> None:
  stored = read_stored_config(_write(folder / "config.json", data))
  check_resume(str(folder / "checkpoints/3"), stored, _STORED, FIXED)


_MODELS = [
  json.loads((Path(_BASE.model.pretrained) / "transformer/config.json").read_text()),
  {"_class_name": "FluxTransformer2DModel", "num_layers": 1, "num_single_layers": 1},
  {"_class_name": "Flux2Transformer2DModel", "num_layers": 1, "num_single_layers": 1},
]


_MODEL_FILES = st.sampled_from(_MODELS).flatmap(json_files)


def _read_model_config(folder: Path, data: bytes) -> None:
  _write(folder / "config.json", data)
  build_transformer(read_config(folder))


# Weights.

_TABLE = KeyTable(stacks=[Stack("blocks", "layers")])
_ABSTRACT = {
  "blocks": {"to_q": {"kernel": jax.ShapeDtypeStruct((2, 6, 8), jnp.float32)}},
  "proj_out": {"kernel": jax.ShapeDtypeStruct((6, 4), jnp.float32)},
}
_WEIGHTS = {
  "layers.0.to_q.weight": np.ones((8, 6), np.float32),
  "layers.1.to_q.weight": np.ones((8, 6), np.float32),
  "proj_out.weight": np.ones((4, 6), np.float32),
}
_ADAPTERS = {
  f"base_model.model.layers.{i}.to_q.lora_{part}.weight": np.ones(shape, np.float32)
  for i in range(2)
  for part, shape in (("A", (2, 6)), ("B", (8, 2)))
}
_ADAPTER_CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4.0, "bias": "none"}


def safetensors_files(tensors: dict[str, np.ndarray], notes: Any = None) -> st.SearchStrategy:
  """Contents of a file that should have held `tensors`."""
  data = save(tensors, notes)
  length = int.from_bytes(data[:8], "little")
  header, body = json.loads(data[8 : 8 + length]), data[8 + length :]

  def pack(value: Any) -> bytes:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return len(text).to_bytes(8, "little") + text + body

  headers = damaged(header)
  return st.one_of(headers.map(pack), headers.map(pack), STRANGE_JSON.map(pack), mangled(data))


def _read_safetensors(folder: Path, data: bytes) -> None:
  file = _write(folder / "model.safetensors", data)
  read_state_dict(file)
  load_params(file, _ABSTRACT, _TABLE)


_INDEX = {"metadata": {"total_size": 480}, "weight_map": dict.fromkeys(_WEIGHTS, "a.safetensors")}


def _read_index(folder: Path, data: bytes) -> None:
  _write(folder / "a.safetensors", save(_WEIGHTS))
  _write(folder / "model.safetensors.index.json", data)
  load_params(folder, _ABSTRACT, _TABLE)


_FIELDS = {"transformer.lora_alpha": 4.0, "transformer.r": 2}
_NOTES = [{"lora_adapter_metadata": json.dumps(_FIELDS)}]
_NOTES += [{"lora_adapter_metadata": text} for text in ("[]", '{"lora_alpha": "x"}', "{", "1e999")]
_PEFT = st.one_of(
  st.tuples(json_files(_ADAPTER_CONFIG), st.just(save(_ADAPTERS))),
  st.tuples(st.just(dump(_ADAPTER_CONFIG)), safetensors_files(_ADAPTERS)),
  st.tuples(st.none(), st.sampled_from(_NOTES).flatmap(lambda n: safetensors_files(_ADAPTERS, n))),
)


def _read_peft(folder: Path, case: tuple[bytes | None, bytes]) -> None:
  config, weights = case
  if config is None:
    path = _write(folder / "lora.safetensors", weights)
  else:
    path = folder
    _write(folder / CONFIG_NAME, config)
    _write(folder / PEFT_NAME, weights)
  _, alpha = load_peft(path, _ABSTRACT, _TABLE)
  assert np.isfinite(alpha)


_STATE = {key: Tensor(value.shape) for key, value in _ADAPTERS.items()}
_STATES = JSON.map(lambda value: {"x": value} if isinstance(value, str) else value) | st.tuples(
  st.sampled_from(["offset", "size", "stride"]), JSON
).map(lambda change: _STATE | {"x.lora_A.weight": Tensor((2, 6), **{change[0]: change[1]})})
_TORCH = st.one_of(
  mangled(pickled(_STATE)).map(zipped),
  _STATES.filter(lambda value: "torch" not in repr(value)).map(pickled).map(zipped),
  mangled(zipped(pickled(_STATE))),
  st.binary(max_size=60).map(zipped),
  st.binary(max_size=60).map(lambda program: zipped(program, zipfile.ZIP_DEFLATED)),
)


def _read_torch(folder: Path, data: bytes) -> None:
  file = _write(folder / "generator.pt", data)
  load_peft(file, _ABSTRACT, _TABLE)


# The reward service.


def _image(form: str) -> bytes:
  stream = io.BytesIO()
  Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(stream, form)
  return stream.getvalue()


def _encode(data: bytes) -> str:
  return base64.b64encode(data).decode()


_IMAGES = [_image(form) for form in ("PNG", "JPEG", "WEBP", "BMP")]
_BODY = {"requests": [protocol.request("a cat", _encode(_IMAGES[0]), "ocr", {"prompt": "a cat"})]}
_BAD_IMAGES = (
  st.sampled_from(_IMAGES).flatmap(mangled).map(lambda data: base64.b64encode(data).decode())
  | st.text()
)


def _read_image(folder: Path, text: str) -> None:
  del folder
  image = protocol.decode_image(text, 4096)
  assert image.dtype == np.uint8 and image.shape[2:] == (3,)


class _Server(RewardServer):
  """Turns what a handler did not expect into a failure of the next question."""

  defects: list[str]

  def handle_error(self, request: object, client_address: object) -> None:
    import traceback

    self.defects.append(traceback.format_exc())


_LIMITS = Limits(body=2**20, images=4, pixels=4096, requests=4, idle=5.0)
_running: list[_Server] = []


@contextmanager
def service() -> Iterator[None]:
  """The reward service that `SURFACES` with a body to score talk to."""
  server = _Server(("127.0.0.1", 0), Service({"ocr": number}, _LIMITS))
  server.defects = []
  with running(server):
    _running.append(server)
    try:
      yield
    finally:
      _running.pop()


def _ask(folder: Path, body: bytes) -> None:
  """A refusal of the whole request, or of each image, is a refusal."""
  del folder
  server = _running[-1]
  connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
  try:
    connection.request("POST", "/score", body=body)
    response = connection.getresponse()
    answer = json.loads(response.read())
  finally:
    connection.close()
    assert not server.defects, server.defects.pop()
  if response.status != 200:
    assert 400 <= response.status < 500, answer
    raise Refused(answer["error"])
  failures = [text for errors in answer["errors"] for text in errors.values()]
  if failures and not any(answer["results"]):
    assert "Error: " not in failures[0], failures[0]
    raise Refused(failures[0])


_ANSWER = {"results": [{"ocr": {"ocr": 0.5, "words": 2}}, {}], "errors": [{}, {"ocr": "no text"}]}


def _read_answer(folder: Path, answer: Any) -> None:
  del folder
  metrics, _ = protocol.read_results(answer, "ocr", 2)
  assert len(metrics) == 2


SURFACES = (
  Surface("prompt files", ("p.json", dump(_RECORDS)), _PROMPTS, _read_prompts),
  Surface("configuration files", _SOURCE, _FILES, _read_config_file),
  Surface("overrides", [("lora.rank", "8")], _OVERRIDES, _read_overrides, names_file=False),
  Surface("stored configurations", dump(_STORED), json_files(_STORED), _read_stored_config),
  Surface("model configurations", dump(_MODELS[1]), _MODEL_FILES, _read_model_config, False),
  Surface("safetensors files", save(_WEIGHTS), safetensors_files(_WEIGHTS), _read_safetensors),
  Surface("safetensors indices", dump(_INDEX), json_files(_INDEX), _read_index),
  Surface("PEFT adapters", (dump(_ADAPTER_CONFIG), save(_ADAPTERS)), _PEFT, _read_peft),
  Surface("PyTorch files", zipped(pickled(_STATE)), _TORCH, _read_torch),
  Surface("bodies of requests", dump(_BODY), json_files(_BODY), _ask, names_file=False),
  Surface("images of requests", _encode(_IMAGES[0]), _BAD_IMAGES, _read_image, names_file=False),
  Surface("answers of services", _ANSWER, damaged(_ANSWER), _read_answer, names_file=False),
)
