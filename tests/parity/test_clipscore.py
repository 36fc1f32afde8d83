import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdmd_jax.errors import UserError
from rtdmd_jax.rewards.device.clipscore import ClipScore

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity
PROMPTS = ["a red cube", "two blue cubes left of a red one and more words than fit", "cube"]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _write_tokenizer(directory):
  letters = "abcdefghijklmnopqrstuvwxyz"
  pieces = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
  vocabulary = {piece: i for i, piece in enumerate(pieces)}
  tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[])
  tokenizer.save_pretrained(directory)
  return tokenizer, len(vocabulary)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
  directory = tmp_path_factory.mktemp("clip")
  tokenizer, size = _write_tokenizer(directory)
  shared = dict(intermediate_size=64, projection_dim=16, num_hidden_layers=2, num_attention_heads=2)
  text = dict(hidden_size=32, vocab_size=size, max_position_embeddings=16, **shared)
  text |= dict(bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1)
  vision = dict(hidden_size=48, image_size=24, patch_size=8, **shared)
  torch.manual_seed(0)
  config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
  model = transformers.CLIPModel(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
    model.logit_scale.fill_(np.log(100.0))
  model.save_pretrained(directory)
  settings = dict(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
  settings |= dict(image_mean=MEAN, image_std=STD, resample=3)
  (directory / "preprocessor_config.json").write_text(json.dumps(settings))
  return directory, model, tokenizer


def _reference(model, tokenizer, images):
  """The published steps, and the cosine as logits over the temperature of 100."""
  tokens = tokenizer(PROMPTS, padding="max_length", max_length=16, truncation=True)["input_ids"]
  height, width = images.shape[2:]
  scale = 24 / min(height, width)
  size = (int(height * scale), int(width * scale))
  x = torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True)
  top, left = (round((side - 24) / 2) for side in size)
  x = x[:, :, top : top + 24, left : left + 24]
  x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
  logits = model(input_ids=torch.tensor(tokens), pixel_values=x).logits_per_image
  return logits.diagonal() / 100


@pytest.mark.parametrize("shape", [(32, 32), (24, 40), (16, 16)])
def test_score_and_image_gradient_equal_transformers(pretrained, shape):
  directory, model, tokenizer = pretrained
  images = np.random.default_rng(0).uniform(size=(3, *shape, 3)).astype(np.float32)
  leaf = torch.tensor(images.transpose(0, 3, 1, 2), requires_grad=True)
  want = _reference(model, tokenizer, leaf)
  want.sum().backward()
  reward = ClipScore.from_pretrained(directory)
  ids = reward.tokenize(PROMPTS)
  assert ids.shape == (3, 16)

  def total(params, x):
    score = reward.score(params, x, reward.text_features(params, ids))
    return score.sum(), score

  run = jax.jit(jax.value_and_grad(total, argnums=1, has_aux=True))
  (_, got), gradient = run(reward.params, images)
  assert got.shape == (3,) and np.ptp(want.detach().numpy()) > 1e-2
  np.testing.assert_allclose(got, want.detach().numpy(), atol=1e-5)
  np.testing.assert_allclose(gradient, leaf.grad.numpy().transpose(0, 2, 3, 1), atol=1e-5)


def test_tokens_equal_transformers(pretrained):
  directory, _, tokenizer = pretrained
  ids = ClipScore.from_pretrained(directory).tokenize(PROMPTS)
  for row, prompt in zip(ids, PROMPTS, strict=True):
    plain = tokenizer(prompt)["input_ids"]
    end = tokenizer.eos_token_id
    want = plain[:15] + [end] if len(plain) > 16 else plain + [end] * (16 - len(plain))
    np.testing.assert_array_equal(row, want)


def test_bfloat16_stays_close(pretrained):
  directory, _, _ = pretrained
  images = np.random.default_rng(0).uniform(size=(3, 32, 32, 3)).astype(np.float32)
  scores = []
  for dtype in (jnp.float32, jnp.bfloat16):
    reward = ClipScore.from_pretrained(directory, dtype)
    ids = reward.tokenize(PROMPTS)
    run = jax.jit(lambda p, r=reward, i=ids: r.score(p, images, r.text_features(p, i)))
    scores.append(run(reward.params))
  assert scores[1].dtype == jnp.float32
  np.testing.assert_allclose(scores[1], scores[0], atol=0.03)
  assert (scores[0] != scores[1]).any()


def test_mismatched_files_are_refused(pretrained, tmp_path):
  directory, _, _ = pretrained
  for name in ("config.json", "model.safetensors"):
    (tmp_path / name).symlink_to(directory / name)
  settings = json.loads((directory / "preprocessor_config.json").read_text())
  path = tmp_path / "preprocessor_config.json"
  with pytest.raises(UserError, match="preprocessor_config.json"):
    ClipScore.from_pretrained(tmp_path)
  path.write_text(json.dumps(settings | dict(size=32, crop_size=32)))
  with pytest.raises(UserError, match="crop_size .* is 32, but image_size .* is 24"):
    ClipScore.from_pretrained(tmp_path)
  path.write_text(json.dumps(settings))
  with pytest.raises(UserError, match="no tokenizer_config.json"):
    ClipScore.from_pretrained(tmp_path)


def test_scores_each_image_with_its_own_text_only(pretrained):
  reward = ClipScore.from_pretrained(pretrained[0])
  with pytest.raises(ValueError, match="text features"):
    reward.score(reward.params, jnp.zeros((2, 24, 24, 3)), jnp.zeros((3, 16)))


@pytest.mark.slow
def test_works_without_torch(pretrained):
  code = (
    "import sys; sys.modules.update(torch=None, tensorflow=None)\n"
    "from rtdmd_jax.rewards.device.clipscore import ClipScore\n"
    f"reward = ClipScore.from_pretrained({str(pretrained[0])!r})\n"
    "print(reward.tokenize(['a red cube']).tolist())"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  want = ClipScore.from_pretrained(pretrained[0]).tokenize(["a red cube"]).tolist()
  assert json.loads(done.stdout.splitlines()[-1]) == want
