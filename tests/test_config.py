import pytest
from ml_collections import ConfigDict, config_dict

from rtdmd_jax.config import apply_override, load_config, shipped_configs, with_current_names
from rtdmd_jax.errors import UserError

SOURCE = """
from ml_collections import ConfigDict
def get_config(arg="small"):
  return ConfigDict({
    "seed": 1, "name": arg, "optim": {"lr": 1e-4, "betas": (0.9, 0.99)},
    "ema": True, "resume": None, "sizes": (1, 2),
  })
"""


@pytest.fixture
def path(tmp_path):
  (tmp_path / "tiny.py").write_text(SOURCE)
  return str(tmp_path / "tiny.py")


def test_overrides_keep_the_type_of_the_default(path):
  config = load_config(
    path + ":big",
    ["seed=7", "optim.lr=3", "optim.betas=0.5,1", "ema=False", "resume=a/b", "sizes=(4, 5, 6)"],
  )
  assert config.to_dict() == {
    "seed": 7,
    "name": "big",
    "optim": {"lr": 3.0, "betas": (0.5, 1.0)},
    "ema": False,
    "resume": "a/b",
    "sizes": (4, 5, 6),
  }
  assert isinstance(config.optim.lr, float) and isinstance(config.optim.betas[1], float)


def test_locked_and_arguments(path):
  config = load_config(path)
  assert config.is_locked and config.name == "small"
  with pytest.raises(AttributeError):
    config.optim.unknown = 1


def test_placeholder_has_a_type():
  config = ConfigDict({"steps": config_dict.placeholder(int)})
  apply_override(config, "steps=5")
  assert config.steps == 5
  config = ConfigDict({"steps": config_dict.placeholder(int)})
  with pytest.raises(UserError, match="steps=x must be a whole number"):
    apply_override(config, "steps=x")


@pytest.mark.parametrize(
  "override, message",
  [
    ("optim.lrr=1", r"no key optim.lrr; did you mean optim.lr\?"),
    ("optin.lr=1", r"no key optin; did you mean optim.lr\?"),
    ("model.betas=1", r"did you mean optim.betas\?"),
    ("qqqqqqqq=1", "sections: ema, name, optim, resume, seed, sizes"),
    ("optim=1", "is a section; set one of its keys: betas, lr"),
    ("optim.lr.x=1", "no key optim.lr"),
    ("seed=1.5", "seed=1.5 must be a whole number"),
    ("optim.lr=fast", "optim.lr=fast must be a number"),
    ("ema=maybe", "must be true or false"),
    ("sizes=1,b", "sizes=b must be a whole number"),
    ("seed", "has no value"),
  ],
)
def test_bad_overrides(path, override, message):
  with pytest.raises(UserError, match=message):
    load_config(path, [override])


@pytest.mark.parametrize(
  "source, message",
  [
    ("def get_config(:\n", "line 1 does not load"),
    ("import nothing_of_this_name\n", "does not load: No module named 'nothing_of_this_name'"),
    ("x = 1\n", "defines no function get_config"),
    ("def get_config():\n  return {}\n", "must return a ml_collections.ConfigDict, not dict"),
  ],
)
def test_bad_files(tmp_path, source, message):
  path = tmp_path / "bad.py"
  path.write_text(source)
  with pytest.raises(UserError, match=message):
    load_config(str(path))


def test_missing_file_wrong_suffix_and_unwanted_argument(tmp_path, path):
  with pytest.raises(UserError, match=r"tinny.py does not exist; did you mean .*tiny.py\?"):
    load_config(str(tmp_path / "tinny.py"))
  with pytest.raises(UserError, match="must name a .py file"):
    load_config("config.yaml")
  plain = tmp_path / "plain.py"
  plain.write_text(
    "from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict()"
  )
  with pytest.raises(UserError, match="takes no argument"):
    load_config(f"{plain}:x")


def test_siblings_of_two_folders_do_not_mix(tmp_path):
  for name, value in (("a", 1), ("b", 2)):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "base_of_test.py").write_text(f"VALUE = {value}\n")
    (folder / "top.py").write_text(
      "from ml_collections import ConfigDict\nimport base_of_test\n"
      "def get_config():\n  return ConfigDict({'value': base_of_test.VALUE})\n"
    )
  assert load_config(str(tmp_path / "a/top.py")).value == 1
  assert load_config(str(tmp_path / "b/top.py")).value == 2


def _sections():
  reward = {"weight": 1.0}
  return ConfigDict(
    {
      "rewards": {"ocr": reward, "geneval": reward, "mine:make": reward},
      "eval": {"every": 5, "rewards": {"aesthetic": reward}},
      "systems": {"base": {"steps": 50}},
      "prompts": {"ocr": "prompts/ocr"},
      "data": {"prompts": "prompts/ocr"},
    }
  )


def test_none_removes_an_entry():
  config = _sections()
  for key in ("rewards.ocr", "rewards.mine:make", "eval.rewards.aesthetic", "systems.base"):
    apply_override(config, f"{key}=none")
  apply_override(config, "prompts.ocr=None")
  assert config.to_dict() == {
    "rewards": {"geneval": {"weight": 1.0}},
    "eval": {"every": 5, "rewards": {}},
    "systems": {},
    "prompts": {},
    "data": {"prompts": "prompts/ocr"},
  }
  with pytest.raises(UserError, match="no key rewards.ocr"):
    apply_override(config, "rewards.ocr=none")
  with pytest.raises(UserError, match="no key rewards.ocr"):
    apply_override(config, "rewards.ocr.weight=2")


@pytest.mark.parametrize(
  "override, message",
  [
    (
      "rewards.ocr=off",
      "is a section; set one of its keys: weight, or remove it with --config.rewards.ocr=none$",
    ),
    ("eval.rewards.aesthetic=0", "remove it with --config.eval.rewards.aesthetic=none$"),
    ("rewards=none", "is a section; set one of its keys: geneval, mine:make, ocr$"),
    ("eval.rewards=none", "set one of its keys: aesthetic$"),
    ("eval=none", "set one of its keys: every, rewards$"),
    ("eval.every=none", "must be a whole number"),
  ],
)
def test_what_none_does_not_remove(override, message):
  with pytest.raises(UserError, match=message):
    apply_override(_sections(), override)


def test_a_text_may_be_called_none():
  config = _sections()
  apply_override(config, "data.prompts=none")
  assert config.data.prompts == "none"


def test_keys_of_the_release_before_are_read_with_a_warning(tmp_path, capsys):
  file = tmp_path / "own.py"
  file.write_text(
    "from ml_collections import ConfigDict\n"
    "def get_config():\n"
    "  c = ConfigDict()\n"
    "  c.batch = ConfigDict(dict(prompts=2, images_per_prompt=24))\n"
    "  c.policy = ConfigDict(dict(dmd_weight=1.0))\n"
    "  c.batch.repeats = 8\n"
    "  return c\n"
  )
  config = load_config(str(file), ["policy.dm_weight=0.5"])
  assert config.batch.to_dict() == {"prompts": 2, "images_per_prompt": 8}
  assert config.policy.to_dict() == {"dmd_weight": 0.5}
  first, second = capsys.readouterr().err.splitlines()
  assert "batch.repeats is called batch.images_per_prompt" in first and str(file) in first
  assert "--config.policy.dm_weight is called policy.dmd_weight" in second
  with pytest.raises(UserError, match=r"no key batch\.repeatz"):
    load_config(str(file), ["batch.repeatz=8"])


def test_stored_configurations_get_current_names():
  stored = {"dmd": {"steps": [1000], "consistency": {"moves": 2}}, "batch": {"prompts": 1}}
  assert with_current_names(stored) == {
    "dmd": {"timesteps": [1000], "consistency": {"transitions": 2}},
    "batch": {"prompts": 1},
  }
  assert "steps" in stored["dmd"]


def test_shipped_configurations_have_names(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  config = load_config("rtdmd_jax:tiny_stage2", ["seed=7"])
  assert (config.stage, config.seed) == ("stage2", 7)
  assert load_config("rtdmd_jax:sd3_stage1:scored").stage == "stage1"
  assert {"flux2_9b_eval", "sd35_stage2"} < shipped_configs().keys()
  assert not {"common", "families", "gpus"} & shipped_configs().keys()
  with pytest.raises(UserError, match="no configuration 'sd36_stage2'; it has sd3"):
    load_config("rtdmd_jax:sd36_stage2")
