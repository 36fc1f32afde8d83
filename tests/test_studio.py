"""The page's systems, and the page itself in a browser."""

import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import jax
import numpy as np
import pytest

from rtdmd_jax import cli, sample, studio
from rtdmd_jax.adapters.load import load_adapters
from rtdmd_jax.config import load_config
from rtdmd_jax.errors import UserError
from rtdmd_jax.pipeline import Pipeline
from rtdmd_jax.runtime import sharding
from tests.support.paths import ROOT

CONFIG = str(ROOT / "configs/tiny_eval.py")


def _config():
  config = load_config(CONFIG)
  with config.unlocked():
    config.systems.teacher.steps = 2
    del config.systems["base"]
  return config


def test_a_lora_is_a_further_system():
  path = ROOT / "rtdmd_jax/assets/tiny/stage1/generator"
  found = studio.systems(_config(), [f"result={path}:0.5"])
  assert list(found) == ["cold_start", "teacher", "result"]
  assert found["result"].few_step and found["result"].loras[0].scale == 0.5
  with pytest.raises(UserError, match="NAME=PATH"):
    studio.systems(_config(), ["result"])
  config = _config()
  with config.unlocked():
    del config.systems["cold_start"]
  with pytest.raises(UserError, match="few-step"):
    studio.systems(config, [f"result={path}"])


@pytest.mark.slow
def test_images_are_those_of_the_sampling_tool():
  """The page draws the same bits as `rtdmd_jax.sample`."""
  settings = studio.systems(_config(), [])
  built = studio.Studio(settings)
  images = built.draw(" a photo of a red ring ", 7)
  assert list(images) == ["cold_start", "teacher"]
  assert built.label("teacher") == "teacher: 2 steps, guidance 3"
  assert built.label("cold_start") == "cold start: 4 steps"
  with jax.set_mesh(sharding.make_mesh()):
    how = settings["cold_start"]
    pipeline = Pipeline.from_pretrained(how.pipeline, dtype=np.float32)
    adapters = load_adapters(how.loras, pipeline.transformer)
    shot = sample.Shot(0, "a photo of a red ring", 7)
    ((_, wanted),) = sample.draw(pipeline, how, adapters, [shot])
  # Batches of other sizes round otherwise in the last bit.
  assert np.abs(images["cold_start"].astype(int) - wanted).max() <= 1
  assert not np.array_equal(images["teacher"], images["cold_start"])
  for prompt, seed in ((" ", 0), ("a", -1), ("a", 0.5), ("a", 2**32)):
    with pytest.raises(UserError):
      built.draw(prompt, seed)


def test_without_gradio_one_sentence(monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "gradio", None)
  monkeypatch.setattr(studio, "Studio", lambda settings: pytest.fail("too late"))
  argv = ["studio", f"--config={CONFIG}"]
  code = cli.run(studio.main, argv, define_flags=studio.define_flags, requires=("config",))
  assert code == 2 and "pip install" in capsys.readouterr().err


def _free_port():
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


@pytest.fixture
def address(tmp_path):
  port = _free_port()
  config = tmp_path / "quick.py"
  config.write_text(
    f"import sys\nsys.path.insert(0, {str(ROOT / 'configs')!r})\nimport tiny_eval\n\n\n"
    "def get_config():\n  c = tiny_eval.get_config()\n"
    "  c.systems.teacher['steps'] = 2\n  return c\n"
  )
  command = [sys.executable, "-m", "rtdmd_jax.studio", f"--config={config}", f"--port={port}"]
  command += [f"--lora=result={ROOT / 'rtdmd_jax/assets/tiny/stage1/generator'}:0.5"]
  process = subprocess.Popen(command, cwd=ROOT)
  try:
    for _ in range(240):
      assert process.poll() is None
      try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5).close()
        break
      except OSError:
        time.sleep(0.5)
    yield f"http://127.0.0.1:{port}"
  finally:
    process.terminate()
    process.wait(30)


@pytest.mark.slow
def test_the_page_in_a_browser(address):
  pytest.importorskip("gradio")
  playwright = pytest.importorskip("playwright.sync_api")
  chromium = shutil.which("chromium") or shutil.which("google-chrome")
  if chromium is None:
    pytest.skip("no chromium on this machine")
  with playwright.sync_playwright() as tool:
    browser = tool.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
    page = browser.new_page()
    page.set_default_timeout(120_000)
    page.goto(address)
    for label in ("teacher: 2 steps", "base: 4 steps", "cold start: 4 steps", "result: 4 steps"):
      page.get_by_text(label).first.wait_for()
    page.locator("#prompt textarea").fill("a photo of a red ring")
    page.locator("#draw").click()
    # All four are loaded, at the size they were drawn in.
    page.wait_for_function(
      """[...document.querySelectorAll('img[src*="/file="]')]
      .filter(image => image.naturalWidth === 64 && image.naturalHeight === 64).length === 4"""
    )
    page.locator("#prompt textarea").fill(" ")
    page.locator("#draw").click()
    page.get_by_text("the prompt is empty").first.wait_for()
    browser.close()
