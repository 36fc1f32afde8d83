import jax
import numpy as np
import pytest

from rtdmd_jax.algo import schedules

STEPS = [1000, 750, 500, 250]


def test_sd3_values():
  sigmas = schedules.sd3_sigmas(STEPS)
  assert sigmas.dtype == np.float32
  np.testing.assert_allclose(sigmas, [1.0, 0.9, 0.75, 0.5], rtol=1e-7)


@pytest.mark.parametrize(
  ("tokens", "expected"),
  [(1024, [1, 0.8492, 0.6525, 0.3849]), (4096, [1, 0.9045, 0.7595, 0.5128])],
)
def test_flux1_values(tokens, expected):
  np.testing.assert_allclose(
    schedules.flux1_sigmas(STEPS, image_tokens=tokens), expected, atol=5.1e-5
  )


@pytest.mark.parametrize(
  ("tokens", "expected"),
  [(1024, [1, 0.9581, 0.8840, 0.7175]), (4096, [1, 0.9674, 0.9081, 0.7672])],
)
def test_flux2_values(tokens, expected):
  np.testing.assert_allclose(
    schedules.flux2_sigmas(STEPS, image_tokens=tokens), expected, atol=5.1e-5
  )


def test_mu_values():
  np.testing.assert_allclose(schedules.flux1_mu(256), 0.5, rtol=1e-6)
  np.testing.assert_allclose(schedules.flux1_mu(4096), 1.15, rtol=1e-6)
  np.testing.assert_allclose(schedules.flux2_mu(1024, 4), 2.0307, atol=5e-5)
  np.testing.assert_allclose(schedules.flux2_mu(4096, 4), 2.2912, atol=5e-5)
  # Past 4300 tokens the step count no longer matters.
  np.testing.assert_allclose(schedules.flux2_mu(5000, 4), 0.00016927 * 5000 + 0.45666666, rtol=1e-6)


def test_flux2_schedule_depends_on_the_length_of_the_list():
  full = schedules.flux2_sigmas(STEPS, image_tokens=1024)
  cut = schedules.flux2_sigmas(STEPS[:2], image_tokens=1024)
  assert abs(float(full[1] - cut[1])) > 1e-4


def test_linear_shift_and_terminal():
  np.testing.assert_allclose(schedules.dynamic_shift(0.5, 2.0, "linear"), 2.0 / 3.0, rtol=1e-6)
  stretched = schedules.flux1_sigmas(STEPS, image_tokens=1024, shift_terminal=0.02)
  plain = np.asarray(schedules.flux1_sigmas(STEPS, image_tokens=1024))
  np.testing.assert_allclose(stretched[-1], 0.02, rtol=1e-4)
  np.testing.assert_allclose(1 - stretched, (1 - plain) * 0.98 / (1 - plain[-1]), atol=1e-6)


def test_jit():
  jitted = jax.jit(lambda s, n: schedules.flux2_sigmas(s, image_tokens=n))
  np.testing.assert_allclose(
    jitted(np.array(STEPS), 1024), schedules.flux2_sigmas(STEPS, image_tokens=1024), rtol=1e-6
  )


def test_errors():
  with pytest.raises(ValueError, match="non-empty"):
    schedules.sd3_sigmas([])
  with pytest.raises(ValueError, match="cosine"):
    schedules.flux1_sigmas(STEPS, image_tokens=64, time_shift="cosine")
