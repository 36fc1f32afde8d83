"""The charts of the report as small inline SVG; colours come from its style sheet."""

import math
from collections.abc import Sequence
from html import escape

import numpy as np

_WIDTH, _HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 8, 22
_MAX_BUCKETS = 300


def line_chart(steps: Sequence[int], values: Sequence[float], label: str) -> str:
  """A curve over training: every value faint, the smoothed curve on top.

  The vertical range leaves out the most extreme half per cent at either end, so that one outlier
  does not flatten the curve. Values that are not finite are red marks on the axis.

  Args:
    steps: ascending training steps.
    values: one number a step, NaN or infinity allowed.
    label: what the chart shows, for screen readers.
  """
  x, y = np.asarray(steps, np.float64), np.asarray(values, np.float64)
  finite = np.isfinite(y)
  low, high = _value_range(y[finite])
  first, last = float(x[0]), float(max(x[-1], x[0] + 1))

  def place(px: np.ndarray, py: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    across = _LEFT + (px - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)
    up = np.clip((py - low) / (high - low), -0.02, 1.02)
    return across, _TOP + (1 - up) * (_HEIGHT - _TOP - _BOTTOM)

  parts = [_axes(first, last, low, high, place)]
  if finite.any():
    raw_x, raw_y = thin(x[finite], y[finite])
    smooth_x, smooth_y = x[finite], smooth(y[finite])
    keep = np.unique(np.linspace(0, len(smooth_x) - 1, _MAX_BUCKETS).astype(int))
    parts.append(_polyline("raw", *place(raw_x, raw_y)))
    parts.append(_polyline("smooth", *place(smooth_x[keep], smooth_y[keep])))
    end_x, end_y = place(smooth_x[-1:], smooth_y[-1:])
    parts.append(f'<circle class="point" cx="{end_x[0]:.1f}" cy="{end_y[0]:.1f}" r="2.5"/>')
  base = _HEIGHT - _BOTTOM
  for across in place(x[~finite], np.zeros((~finite).sum()))[0]:
    parts.append(
      f'<line class="nonfinite" x1="{across:.1f}" x2="{across:.1f}" y1="{base - 6}" y2="{base}"/>'
    )
  return _svg(_WIDTH, _HEIGHT, label, parts)


def interval_chart(
  rows: Sequence[tuple[str, float, float]], limits: tuple[float, float], label: str
) -> str:
  """Means with their confidence intervals, one line each, on a common scale.

  Args:
    rows: `(colour, mean, half width)`, the colour any CSS value.
    limits: ends of the scale.
    label: what the chart shows, for screen readers.
  """
  width, pitch = 210, 13
  low, high = limits
  scale = (width - 16) / (high - low or 1.0)
  parts = []
  for row, (colour, mean, half) in enumerate(rows):
    y = pitch * row + pitch / 2 + 1
    x0, x, x1 = (8 + (value - low) * scale for value in (mean - half, mean, mean + half))
    parts.append(f'<line class="axis" x1="0" x2="{width}" y1="{y}" y2="{y}"/>')
    parts.append(
      f'<line class="interval" style="stroke:{colour}" '
      f'x1="{x0:.1f}" x2="{x1:.1f}" y1="{y}" y2="{y}"/>'
    )
    parts.append(f'<circle style="fill:{colour}" cx="{x:.1f}" cy="{y}" r="4"/>')
  return _svg(width, pitch * len(rows) + 2, label, parts)


def smooth(values: np.ndarray) -> np.ndarray:
  """Exponential average over about a twentieth of the curve, without bias to its start."""
  decay = 1 - 2 / (max(len(values) / 20, 1) + 1)
  total = weight = 0.0
  result = np.empty(len(values))
  for index, value in enumerate(values):
    total = decay * total + (1 - decay) * value
    weight = decay * weight + (1 - decay)
    result[index] = total / weight
  return result


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """At most the lowest and highest point of each of 300 stretches, so that peaks stay visible."""
  if len(x) <= 2 * _MAX_BUCKETS:
    return x, y
  edges = np.linspace(0, len(x), _MAX_BUCKETS + 1).astype(int)
  keep = set()
  for start, stop in zip(edges[:-1], edges[1:], strict=True):
    keep |= {start + int(np.argmin(y[start:stop])), start + int(np.argmax(y[start:stop]))}
  index = np.array(sorted(keep))
  return x[index], y[index]


def ticks(low: float, high: float, count: int) -> list[float]:
  """Round numbers inside `[low, high]`, about `count` of them."""
  rough = (high - low) / count
  magnitude = 10.0 ** math.floor(math.log10(rough))
  step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough * 0.999)
  start, stop = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
  return [index * step for index in range(start, stop + 1)]


def short(value: float) -> str:
  """A number for an axis: `25k`, `0.015`, `2e-06`."""
  for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
    if abs(value) >= size:
      return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
  return f"{value:.4g}"


def _value_range(finite: np.ndarray) -> tuple[float, float]:
  if not len(finite):
    return 0.0, 1.0
  smoothed = smooth(finite)
  low = min(np.percentile(finite, 0.5), smoothed.min())
  high = max(np.percentile(finite, 99.5), smoothed.max())
  pad = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
  return float(low - pad), float(high + pad)


def _axes(first: float, last: float, low: float, high: float, place) -> str:
  parts = []
  for value in ticks(low, high, 4):
    _, (y,) = place(np.array([first]), np.array([value]))
    parts.append(
      f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
      f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>'
    )
  for value in ticks(first, last, 4):
    (x,), _ = place(np.array([value]), np.array([low]))
    anchor = "end" if x > _WIDTH - 30 else "middle"
    parts.append(
      f'<text x="{x:.1f}" y="{_HEIGHT - 6}" text-anchor="{anchor}">{short(value)}</text>'
    )
  return "".join(parts)


def _polyline(name: str, x: np.ndarray, y: np.ndarray) -> str:
  points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
  return f'<polyline class="{name}" points="{points}"/>'


def _svg(width: int, height: int, label: str, parts: Sequence[str]) -> str:
  return (
    f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
    f"{''.join(parts)}</svg>"
  )
