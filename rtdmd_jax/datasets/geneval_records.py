"""GenEval's records, one function a tag (Ghosh et al. 2023, arXiv 2310.11513).

A record is `{"tag", "include": [{"class", "count", "color"?, "position"?: [relation, index]}],
"exclude"?, "prompt"}`; `position` relates the entry to the include entry at `index`, and `exclude`
stands on counting records only.
"""

import json

# COCO's classes in their order, under GenEval's names.
CLASSES = tuple(
  "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,"
  "stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,"
  "backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,"
  "baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,"
  "banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,"
  "bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,"
  "microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,"
  "toothbrush".split(",")
)
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
COUNTS = {2: "two", 3: "three", 4: "four"}
_OPPOSITE = {"right of": "left of", "below": "above"}


def single_object(name: str) -> dict:
  """`a photo of a bench`."""
  return _record("single_object", [_one(name)], _article(name))


def two_object(first: str, second: str) -> dict:
  """`a photo of a bench and a sports ball`."""
  return _record(
    "two_object", [_one(first), _one(second)], f"{_article(first)} and {_article(second)}"
  )


def counting(name: str, count: int) -> dict:
  """`a photo of three benchs`: the published plural adds `s`, after an `s` `es`."""
  plural = name + ("es" if name.endswith("s") else "s")
  record = _record("counting", [{"class": name, "count": count}], f"{COUNTS[count]} {plural}")
  prompt = record.pop("prompt")
  return record | {"exclude": [{"class": name, "count": count + 1}], "prompt": prompt}


def colors(name: str, color: str) -> dict:
  """`a photo of an orange bench`."""
  return _record("colors", [_one(name, color=color)], f"{_article(color)} {name}")


def position(subject: str, relation: str, other: str) -> dict:
  """`a photo of a bench left of a sports ball`."""
  return _record(
    "position",
    [_one(other), _one(subject, position=[relation, 0])],
    f"{_article(subject)} {relation} {_article(other)}",
  )


def color_attr(first: str, color: str, second: str, second_color: str) -> dict:
  """`a photo of a red bench and a blue sports ball`."""
  return _record(
    "color_attr",
    [_one(first, color=color), _one(second, color=second_color)],
    f"{_article(color)} {first} and {_article(second_color)} {second}",
  )


def scene_key(record: dict) -> str:
  """A key shared by records that describe the same scenes in another order of words."""
  include = record["include"]
  if record["tag"] == "position":
    other, subject = include[0]["class"], include[1]["class"]
    relation = include[1]["position"][0]
    if relation in _OPPOSITE:
      subject, other, relation = other, subject, _OPPOSITE[relation]
    return json.dumps([record["tag"], subject, relation, other])
  return json.dumps([record["tag"], sorted(json.dumps(i, sort_keys=True) for i in include)])


def _record(tag: str, include: list[dict], phrase: str) -> dict:
  return {"tag": tag, "include": include, "prompt": f"a photo of {phrase}"}


def _one(name: str, **extra) -> dict:
  return {"class": name, "count": 1, **extra}


def _article(name: str) -> str:
  return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
