import json
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from rtdmd_jax import cli
from rtdmd_jax.errors import UserError
from rtdmd_jax.report import charts, page
from rtdmd_jax.report.page import write_report

PROMPTS = ["a red cube <left of> a blue sphere", "two green cones", "a photo of a yellow cup"]
SYSTEMS = [("teacher", 40, 4.5, 0.8), ("cold start", 4, None, 0.7), ("result", 4, None, 0.9)]


def score(mean, n):
  return {"mean": round(mean, 4), "ci95": 0.012, "n": n}


def evaluation():
  def scores(base, n):
    return {"clip": score(base * 0.4, n), "shapes": score(base, n)}

  return {
    "systems": [
      {
        "name": name,
        "steps": steps,
        "guidance": guidance,
        "scores": scores(base, 300),
        "per_tag": {"counting": scores(base - 0.1, 120), "position": scores(base - 0.2, 180)},
      }
      for name, steps, guidance, base in SYSTEMS
    ],
    "prompts": PROMPTS,
    "differences": {"teacher": scores(0.1, 300), "cold start": scores(0.2, 300)},
  }


def write_metrics(path, count=900):
  rng = np.random.default_rng(0)
  with path.open("w") as file:
    for step in range(1, count + 1):
      done = step / count
      scalars = {
        "loss/generator": 0.3 * np.exp(-3 * done) + 0.03 * abs(rng.normal()),
        "loss/fake_score": 0.8 - 0.2 * done + 0.05 * rng.normal(),
        "reward/clip": 0.25 + 0.1 * done + 0.02 * rng.normal(),
        "reward/shapes": 0.6 + 0.3 * done + 0.05 * rng.normal(),
        "ratio/mean": 1 + 0.002 * rng.normal(),
        "ratio/clip_fraction": 0.1 * abs(rng.normal()),
        "grad_norm": 1 + rng.gamma(2) * (30 if step == 500 else 1),
        "images_per_second": 210 + rng.normal(),
      }
      if step in (200, 210):
        scalars["loss/generator"] = None
      if step % 100 == 0:
        scalars["eval/shapes"] = 0.6 + 0.3 * done
      file.write(json.dumps({"step": step, "time": 1.79e9 + 9 * step, "scalars": scalars}) + "\n")


def picture(path, size, seed):
  path.parent.mkdir(parents=True, exist_ok=True)
  colours = np.random.default_rng(seed).integers(60, 230, (4, 4, 3), np.uint8)
  Image.fromarray(colours).resize((size, size), Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def workdir(run, tmp_path):
  return shutil.copytree(run, tmp_path / run.name)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "tiny_stage2"
  workdir.mkdir()
  write_metrics(workdir / "metrics.jsonl")
  (workdir / "evaluation.json").write_text(json.dumps(evaluation()))
  config = {
    "name": "tiny",
    "stage": 2,
    "seed": 42,
    "lora": {"rank": 32, "alpha": 64},
    "optim": {"learning_rate": 1e-4, "betas": [0.9, 0.999], "warmup": None},
    "rewards": {"clip": 0.5, "shapes": 1.0},
  }
  (workdir / "config.json").write_text(json.dumps(config))
  (workdir / "versions.json").write_text(json.dumps({"jax": "0.10.2", "git": "abc123"}))
  for index in range(3):
    for number, (name, *_) in enumerate(SYSTEMS):
      picture(workdir / f"evaluation/{name}/{index}.png", 64, 10 * index + number)
  for step in range(0, 900, 75):
    picture(workdir / f"previews/step_{step:06d}.png", 300, step)
  return workdir


class Page(HTMLParser):
  """Collects sources, links, headings and text; complains about unbalanced tags."""

  VOID = {"meta", "img", "br", "line", "circle", "polyline"}

  def __init__(self, html):
    super().__init__()
    self.sources, self.links, self.open, self.words, self.images = [], [], [], [], []
    self.feed(html)
    assert not self.open
    self.text = " ".join(self.words)

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.sources += [attrs["src"]] if "src" in attrs else []
    self.links += [attrs["href"]] if "href" in attrs else []
    self.images += [attrs["alt"]] if tag == "img" else []
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    if tag not in self.VOID:
      assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open[-1:] != ["style"]:
      self.words.append(data.strip())


def test_everything_is_in_one_file(workdir):
  html = write_report(workdir).read_text()
  page = Page(html)
  assert all(source.startswith("data:image/") for source in page.sources)
  assert all(link.startswith("#") for link in page.links)
  assert "http" not in html and "url(" not in html and "@import" not in html
  for part in (
    "tiny_stage2",
    "samples in 4 steps and is compared with teacher (40 steps, guidance 4.5), cold start (4",
    "training steps 900",
    "0.900 ± 0.012",
    "cold start 0.700 (+0.200 ± 0.012)",
    "clip by tag",
    "a red cube <left of> a blue sphere",
    "2 not finite",
    "Policy ratio, clipping and advantages",
    "learning_rate 0.0001",
    "git abc123",
  ):
    assert part in page.text, part
  assert [alt for alt in page.images if alt.startswith("result")] == [
    f"result, image {index}" for index in range(3)
  ]
  previews = [alt for alt in page.images if alt.startswith("preview")]
  assert len(previews) == 8
  assert previews[0].endswith("step 0") and previews[-1].endswith("step 825")
  assert html.count("<polyline") == 2 * 9
  assert html.count('class="nonfinite"') == 2


def test_captions_that_could_not_be_drawn_stand_below_the_previews(workdir):
  (workdir / "previews/step_000825.txt").write_text("prompt 0: 猫 <a>\nprompt 3: قطة\n", "utf-8")
  words = Page(write_report(workdir).read_text("utf-8")).words
  assert "prompt 0: 猫 <a>" in words and "prompt 3: قطة" in words


def test_best_is_bold_per_reward(workdir):
  html = write_report(workdir).read_text()
  assert html.count('class="best"') == 2 + 4
  assert '<td class="best">0.900 <small>± 0.012</small></td>' in html


def test_missing_parts_are_left_out(workdir):
  for name in ("evaluation.json", "config.json", "versions.json"):
    (workdir / name).unlink()
  page = Page(write_report(workdir).read_text())
  assert "Training curves" in page.text and "Held-out scores" not in page.text.replace(
    "Held-out scores during training", ""
  )
  (workdir / "metrics.jsonl").unlink()
  with pytest.raises(UserError, match="holds neither metrics.jsonl nor evaluation.json"):
    write_report(workdir)
  with pytest.raises(UserError, match="does not exist"):
    write_report(workdir / "absent")


def test_grids_of_whole_systems(workdir):
  for name, *_ in SYSTEMS:
    for path in (workdir / "evaluation" / name).iterdir():
      path.unlink()
    picture(workdir / f"evaluation/{name}.png", 500, 1)
  page = Page(write_report(workdir).read_text())
  assert [a for a in page.images if a.startswith("images of")] == [
    f"images of {name}" for name, *_ in SYSTEMS
  ]


def test_failed_reward_is_a_dash(workdir):
  data = evaluation()
  data["systems"][2]["scores"]["clip"] = {"mean": None, "ci95": None, "n": 0}
  del data["systems"][0]["scores"]["clip"]
  (workdir / "evaluation.json").write_text(json.dumps(data))
  assert "<td>–</td>" in write_report(workdir).read_text()


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda d: d.update(systems=[]), "'systems' is empty"),
    (lambda d: d.pop("prompts"), "the file needs 'prompts'"),
    (lambda d: d["systems"][1].pop("steps"), r"system 'cold start' needs 'steps' \(int\)"),
    (
      lambda d: d["systems"][0]["scores"]["clip"].pop("ci95"),
      "system 'teacher', reward 'clip' needs 'ci95'",
    ),
    (
      lambda d: d["systems"][0]["per_tag"]["counting"]["clip"].update(n="x"),
      "system 'teacher', tag 'counting', reward 'clip' needs 'n'",
    ),
    (lambda d: d["systems"][0].update(per_tag={"counting": 3}), "must be an object of rewards"),
  ],
)
def test_broken_evaluation_names_the_key(workdir, change, message):
  data = evaluation()
  change(data)
  (workdir / "evaluation.json").write_text(json.dumps(data))
  with pytest.raises(UserError, match=message):
    write_report(workdir)


@pytest.mark.parametrize(
  "name, text, message",
  [
    ("evaluation.json", "{", "evaluation.json is not readable JSON"),
    ("config.json", "[]", "config.json must hold a JSON object, not list"),
    ("versions.json", "x", "versions.json is not readable JSON"),
    ("metrics.jsonl", "x\n", "metrics.jsonl, line 1"),
    ("previews/step_000000.png", "x", "step_000000.png is not a readable image"),
  ],
)
def test_broken_files(workdir, name, text, message):
  (workdir / name).write_text(text)
  with pytest.raises(UserError, match=message):
    write_report(workdir)


def test_command_line(workdir, capsys):
  assert cli.run(page.main, ["report", str(workdir)], positional=True) == 0
  assert capsys.readouterr().out.strip() == str(workdir / "report.html")
  assert cli.run(page.main, ["report"]) == 2
  assert "give one folder" in capsys.readouterr().err


def test_warnings_are_listed(tmp_path):
  lines = [{"step": 1, "time": 0, "scalars": {"loss": 1.0}}]
  _lines(tmp_path, lines)
  assert "Warnings" not in page.write_report(tmp_path).read_text()
  _lines(tmp_path, [*lines, {"step": 1, "time": 0, "warning": "a rose, <b> fell"}])
  assert "<li>a rose, &lt;b&gt; fell</li>" in page.write_report(tmp_path).read_text()


def _lines(workdir, lines):
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (workdir / "metrics.jsonl").write_text(text)


def test_groups():
  names = [
    "loss/generator",
    "reward/clip",
    "ratio/mean",
    "clip_fraction",
    "images/saturation",
    "lr",
  ]
  assert [page.group(name).split()[0] for name in names] == [
    "Losses",
    "Rewards",
    "Policy",
    "Policy",
    "Held-out",
    "Optimization",
  ]


def test_smooth_is_unbiased_and_follows():
  np.testing.assert_allclose(charts.smooth(np.full(50, 3.0)), 3.0)
  assert charts.smooth(np.array([2.0, 5.0]))[-1] == 5.0  # a short curve is left alone
  noisy = np.random.default_rng(0).normal(size=2000)
  assert charts.smooth(noisy)[500:].std() < 0.2


def test_thin_keeps_peaks():
  y = np.zeros(10_000)
  y[1234], y[7777] = 9, -9
  x, kept = charts.thin(np.arange(10_000), y)
  assert len(x) <= 600 and (np.diff(x) > 0).all()
  assert kept[x == 1234] == 9 and kept[x == 7777] == -9


def test_ticks_and_short_numbers():
  assert charts.ticks(0, 100, 4) == [0, 25, 50, 75, 100]
  assert charts.ticks(0.11, 0.29, 4) == pytest.approx([0.15, 0.2, 0.25])
  assert [charts.short(v) for v in (25000, 2.5e6, 0.015, 0, 2e-6, 900)] == [
    "25k",
    "2.5M",
    "0.015",
    "0",
    "2e-06",
    "900",
  ]


def test_chart_of_nothing_finite_and_of_one_point():
  assert "<polyline" not in charts.line_chart([1, 2], [np.nan, np.inf], "x")
  assert "<polyline" in charts.line_chart([5], [1.0], "x")
  assert "nan" not in charts.line_chart([5], [0.0], "x")
