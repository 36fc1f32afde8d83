"""The generator's gradient in the cold start against PyTorch's, tensor by tensor, in float32."""

import copy
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rtdmd_jax.adapters.lora import fold_scale, module_names, target_entries
from rtdmd_jax.adapters.peft import adapter_layers, load_peft
from rtdmd_jax.algo.subgrpo import sample_noise
from rtdmd_jax.algo.timesteps import random_stop
from rtdmd_jax.pipeline.conditioning import Conditioning
from rtdmd_jax.training.objectives import AmbientDMD
from rtdmd_jax.training.optim import Optimizers
from rtdmd_jax.training.settings import DMDConfig
from rtdmd_jax.training.stage1 import Stage1
from rtdmd_jax.training.state import Batch, Frozen, Roles, TrainState
from tests.parity import backbones
from tests.parity.backbones import BACKBONES

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.parity, pytest.mark.slow]

SIGMAS = (1.0, 0.9, 0.75, 0.5, 0.0)
ETA = 0.9
RANK, ALPHA = 3, 6.0
PROMPT_INDEX, SAMPLE_INDEX = [1, 0], [7, 3]
KEY = jax.random.key(4)  # its stop is 2
# An optimizer that moves nothing and has the gradient as its state.
KEEP = optax.GradientTransformation(
  lambda params: jax.tree.map(jnp.zeros_like, params),
  lambda grads, state, params: (jax.tree.map(jnp.zeros_like, grads), grads),
)


class Draws(NamedTuple):
  """What a generator step draws, as torch tensors (the stop is a number)."""

  start: "torch.Tensor"
  steps: list
  stop: int
  level: "torch.Tensor"
  renoise: "torch.Tensor"
  transition: "torch.Tensor"


def draws(roles, config):
  """Follows the keys of `generator_step`."""
  index = jnp.asarray(SAMPLE_INDEX)
  noise = lambda key: torch.tensor(np.array(sample_noise(key, index, roles.latent_shape)))  # noqa: E731
  rollout_key, _, loss_key, _ = jax.random.split(KEY, 4)
  start_key, step_key, stop_key = jax.random.split(rollout_key, 3)
  level_key, renoise_key, transition_key = jax.random.split(loss_key, 3)
  stop = int(random_stop(stop_key, len(SIGMAS) - 1))
  objective = AmbientDMD(config, jnp.array(SIGMAS))
  level = objective.renoise_sigma(jnp.float32(SIGMAS[stop]), index, level_key)
  return Draws(
    noise(start_key),
    [noise(jax.random.fold_in(step_key, i)) for i in range(len(SIGMAS) - 1)],
    stop,
    torch.tensor(np.array(level)).reshape(-1, 1, 1, 1),
    noise(renoise_key),
    noise(transition_key),
  )


def torch_step(x, v, sigma, next_sigma, noise):
  """A coefficient-preserving transition."""
  clean, eps = x - sigma * v, x + (1 - sigma) * v
  angle = ETA * math.pi / 2
  return (1 - next_sigma) * clean + next_sigma * (math.cos(angle) * eps + math.sin(angle) * noise)


def torch_loss(generator, fake, teacher, d):
  """Sub-interval distribution matching after a rollout of which the last step is differentiated."""
  x, last = d.start, d.stop - 1
  with torch.no_grad():
    for i in range(last):
      x = torch_step(x, generator(x, SIGMAS[i]), SIGMAS[i], SIGMAS[i + 1], d.steps[i])
  s = SIGMAS[d.stop]
  x_s = torch_step(x, generator(x, SIGMAS[last]), SIGMAS[last], s, d.steps[last])
  with torch.no_grad():
    keep = (1 - d.level) / (1 - s)
    x_t = keep * x_s + (d.level**2 - (keep * s) ** 2).sqrt() * d.renoise
    wrong, real = (
      torch_step(x_t, velocity(x_t, d.level), d.level, s, d.transition)
      for velocity in (fake, teacher)
    )
    aim = x_s - (wrong - real) / (x_s - real).abs().mean(dim=(1, 2, 3), keepdim=True)
  return 0.5 * (x_s - aim).square().mean()


def torch_velocity(backbone, model, tokens, pooled, *, empty=None, scale=1.0, embedded=False):
  """Conditional velocity, or with `empty` (tokens, pooled) the guided one."""

  def velocity(x, sigma):
    sigma = torch.as_tensor(sigma, dtype=torch.float32).reshape(-1).expand(len(x))
    guidance = torch.full((len(x),), scale) if embedded else None
    v = backbone.run(model, x, sigma, tokens, pooled, guidance)
    if empty is None or embedded:
      return v
    rows = [None if a is None else np.repeat(a, len(x), 0) for a in empty]
    plain = backbone.run(model, x, sigma, *rows, None)
    return plain + scale * (v - plain)

  return velocity


def add_adapter(model, name, targets, directory, seed, transformer, params):
  """Adds random adapters, both factors non-zero; returns them as our tree, scale not folded."""
  torch.manual_seed(seed)
  # PEFT itself cannot tell FLUX.2's `attn.to_out` of single blocks from the double blocks' list.
  entries = target_entries(params, transformer.table, targets)
  layers = [layer for entry in entries for layer in module_names(entry)]
  config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=layers, init_lora_weights=False)
  model.add_adapter(config, adapter_name=name)
  model.save_lora_adapter(str(directory / name), adapter_name=name)
  adapters, alpha = load_peft(directory / name, params, transformer.table)
  assert alpha == ALPHA and all(np.any(leaf) for leaf in jax.tree.leaves(adapters))
  return adapters


class Case(NamedTuple):
  """One backbone's roles in both programs; adapters have no scale folded in."""

  transformer: object
  bases: dict
  adapters: dict
  models: dict


def make_case(backbone, targets, directory):
  """Generator (with an earlier stage's adapters), fake score, and a teacher of other weights."""
  base = backbone.reference()
  models = {"teacher": backbones.varied(base)}
  _, teacher = backbones.loaded(models["teacher"], directory / "teacher")
  transformer, student = backbones.loaded(base, directory / "student")
  adapters = {}
  layers = {"fake": ("fake",), "generator": ("earlier", "trained")}
  for seed, (role, names) in enumerate(layers.items()):
    models[role] = copy.deepcopy(base)
    for name in names:
      adapters[name] = add_adapter(
        models[role], name, targets, directory, seed, transformer, student
      )
    models[role].set_adapter(list(names))
  return Case(transformer, {"student": student, "teacher": teacher}, adapters, models)


def generator_gradient(case, roles, config, texts, empty):
  """What `generator_step` hands to its optimizer, by layer, and the step's metrics."""
  trained, fake = case.adapters["trained"], case.adapters["fake"]
  state = TrainState(jnp.zeros((), jnp.int32), trained, fake, trained, KEEP.init(trained), None)
  conditioning, unconditional = (
    Conditioning(*jax.tree.map(jnp.asarray, pair)) for pair in (texts, empty)
  )
  batch = Batch(conditioning, jnp.array(PROMPT_INDEX), jnp.array(SAMPLE_INDEX), unconditional)
  frozen = Frozen(case.bases, fold_scale(case.adapters["earlier"], ALPHA), {}, {}, {})
  stage = Stage1(roles, config, Optimizers(KEEP, KEEP))
  new, metrics = jax.jit(stage.generator_step)(state, frozen, batch, KEY)
  return adapter_layers(new.generator_opt, case.transformer.table), metrics


@pytest.mark.parametrize("name", BACKBONES)
def test_the_generators_gradient_equals_torchs(name, tmp_path):
  backbone = BACKBONES[name]
  published = backbone.stage1()
  case = make_case(backbone, published.lora.targets, tmp_path)
  latents, *texts = backbones.inputs(case.transformer)
  _, *empty = backbones.inputs(case.transformer, batch=1, seed=2)
  embedded, scale = case.transformer.embedded_guidance, published.dmd.guidance_low
  config = DMDConfig(eta=ETA, guidance_low=scale, guidance_high=scale)
  roles = Roles(
    case.transformer.apply, "student", "student", "teacher", ALPHA, jnp.array(SIGMAS),
    latents.shape[1:], embedded,
  )  # fmt: skip
  got, metrics = generator_gradient(case, roles, config, texts, empty)

  d = draws(roles, config)
  assert d.stop == 2  # a step without gradient before, noise at the end of the one with
  tokens, pooled = (None if a is None else a[PROMPT_INDEX] for a in texts)
  velocity = partial(torch_velocity, backbone, tokens=tokens, pooled=pooled, embedded=embedded)
  loss = torch_loss(
    velocity(case.models["generator"]),
    velocity(case.models["fake"]),
    velocity(case.models["teacher"], empty=empty, scale=scale),
    d,
  )
  loss.backward()
  np.testing.assert_allclose(metrics["loss/generator"], loss.item(), rtol=1e-4)
  assert metrics["generator/skipped"] == 0
  compare(got, dict(case.models["generator"].named_parameters()))


def compare(got, parameters):
  """Every LoRA tensor to 1e-4 of its largest entry."""
  assert {f"{module}.lora_A.trained.weight" for module in got} == {
    key for key in parameters if ".lora_A.trained" in key
  }
  zero, worst = [], 0.0
  for module, pair in got.items():
    for part, ours in zip("AB", pair, strict=True):
      want = parameters[f"{module}.lora_{part}.trained.weight"].grad.numpy().T
      largest = np.abs(want).max()
      error = np.abs(ours - want).max()
      assert error <= 1e-4 * largest, (module, part)
      if largest:
        worst = max(worst, error / largest)
      else:
        zero.append(module)
  print(f"{len(got)} layers, largest relative error {worst:.1e}")
  # Of the last joint block's text only keys and values are used (SD3).
  assert all(module.endswith("attn.add_q_proj") for module in zero) and len(zero) in (0, 2)
