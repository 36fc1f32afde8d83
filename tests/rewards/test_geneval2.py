import json
import math
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from rtdmd_jax import rewards
from rtdmd_jax.errors import UserError
from rtdmd_jax.rewards.host.geneval2 import (
  GenEval2,
  aggregate,
  answer_probability,
  instruction,
  variants,
)
from rtdmd_jax.rewards.host.openai_vqa import OpenAIAnswerer
from tests.support.reward_faults import numbered, running

COUNTING, YES = "How many teapots are in the image?", "Is the teapot blue?"


@pytest.mark.parametrize(
  ("question", "answer", "expected"),
  [
    (COUNTING, "seven", {"seven", "Seven", " seven", " Seven", "7", " 7"}),
    (COUNTING, "Two", {"Two", " Two", "2", " 2"}),
    (COUNTING, "several", {"several", "Several", " several", " Several"}),
    (YES, "Yes", {"Yes", "yes", " Yes", " yes"}),
    ("Does it say how many?", "three", {"Yes", "yes", " Yes", " yes"}),
  ],
)
def test_variants_of_an_answer(question, answer, expected):
  assert set(variants(question, answer)) == expected


def test_the_probability_of_an_answer_sums_its_variants_and_may_exceed_one():
  assert answer_probability([0.5, 0.25, 0.0, 0.0]) == 0.75
  assert answer_probability([0.75, 0.75]) == 1.5


@pytest.mark.parametrize(
  ("values", "how", "expected"),
  [
    ([1.0, 1.0], "geometric", 1.0),
    ([0.25, 1.0], "geometric", 0.5),  # partial credit
    ([0.25, 1.0], "arithmetic", 0.625),
    ([0.5, 0.5, 0.064], "geometric", 0.016 ** (1 / 3)),
    ([0.0, 1.0], "geometric", 0.0),  # one impossible answer
    ([0.9], "geometric", 0.9),
    ([0.5, math.nan], "geometric", math.nan),
    ([], "geometric", math.nan),
  ],
)
def test_scores_of_a_prompt(values, how, expected):
  np.testing.assert_allclose(aggregate(values, how), expected)


RECORDS = [
  {"prompt": "two blue teapots", "vqa_list": [[COUNTING, "two"], [YES, "yes"]]},
  {"prompt": "a teapot", "vqa_list": [[COUNTING, "one"]]},
  {"prompt": "anything", "vqa_list": []},
]
PROMPTS = [record["prompt"] for record in RECORDS]


def table_answerer(images, queries):
  """Image 0: 'two' at .6 and '2' at .2, 'Yes' at .45; image 1: failed."""
  table = {"two": 0.6, "2": 0.2, "Yes": 0.45}
  return [
    [table.get(v, 0.0) if query.image == 0 else math.nan for v in query.variants]
    for query in queries
  ]


def test_images_are_scored_by_their_own_questions():
  scores = GenEval2(table_answerer)(numbered(3), PROMPTS, RECORDS)
  np.testing.assert_allclose(scores, [math.sqrt(0.8 * 0.45), np.nan, np.nan], rtol=1e-6)
  scores = GenEval2(table_answerer, aggregate="arithmetic")(numbered(3), PROMPTS, RECORDS)
  np.testing.assert_allclose(scores[0], 0.625)


def Table():
  return table_answerer


def test_questions_from_a_file(tmp_path):
  file = tmp_path / "questions.jsonl"
  file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS[:2] + RECORDS[:1]))
  options = {"answerer": f"{__name__}:Table", "questions": str(file)}
  scorer = rewards.make({"geneval2": 1.0}, options={"geneval2": options})
  np.testing.assert_allclose(scorer(numbered(1), PROMPTS[:1])["geneval2"], [0.6], rtol=1e-6)
  with pytest.raises(UserError, match="no questions for the prompt 'a kettle'"):
    scorer(numbered(1), ["a kettle"], [{"prompt": "a kettle"}])
  changed = RECORDS[0] | {"vqa_list": [[YES, "yes"]]}
  file.write_text("".join(json.dumps(record) + "\n" for record in [RECORDS[0], changed]))
  with pytest.raises(UserError, match="'two blue teapots' has other questions than before"):
    rewards.make({"geneval2": 1.0}, options={"geneval2": options})


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({}, "needs one of the options url, openai_url"),
    ({"answerer": f"{__name__}:Table", "aggregate": "median"}, "aggregate is 'median'"),
    ({"answerer": f"{__name__}:Table", "wrong": 1}, "unexpected keyword argument 'wrong'"),
    ({"answerer": f"{__name__}:Table", "questions": "nowhere.jsonl"}, "nowhere.jsonl"),
    ({"openai_url": "http://h/v1"}, "missing a required argument: 'model'"),
    ({"openai_url": "http://h/v1", "model": "m", "top": 0}, "top"),
    ({"openai_url": "http://h/v1", "model": "m", "tokenizer": "nowhere"}, "nowhere"),
  ],
)
def test_mistakes_are_user_errors(options, message):
  with pytest.raises(UserError, match=message):
    rewards.make({"geneval2": 1.0}, options={"geneval2": options})


@pytest.mark.parametrize("pairs", [None, "text", [["only a question"]], [["q", 2]], [["", "a"]]])
def test_malformed_questions_are_named(pairs):
  with pytest.raises(UserError, match="^'a teapot': "):
    GenEval2(table_answerer)(numbered(1), ["a teapot"], [{"vqa_list": pairs}])


class Endpoint(ThreadingHTTPServer):
  """Chat completions whose probabilities follow from the question; may spoil the n-th answer."""

  def __init__(self, tables, spoil=lambda n, answer: answer):
    super().__init__(("127.0.0.1", 0), Completions)
    self.tables, self.spoil, self.requests = tables, spoil, []
    self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Completions(BaseHTTPRequestHandler):
  def do_GET(self):
    assert self.path == "/v1/models"
    self.reply({"object": "list", "data": [{"id": "judge"}]})

  def do_POST(self):
    assert self.path == "/v1/chat/completions"
    request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    self.server.requests.append(request)
    text = request["messages"][0]["content"][1]["text"]
    top = [{"token": t, "logprob": math.log(p)} for t, p in self.server.tables[text].items()]
    content = [{"token": top[0]["token"], "logprob": 0.0, "top_logprobs": top}]
    answer = {"choices": [{"message": {"content": ""}, "logprobs": {"content": content}}]}
    self.reply(self.server.spoil(len(self.server.requests), answer))

  def reply(self, value):
    data = json.dumps(value).encode()
    self.send_response(200)
    self.send_header("Content-Length", str(len(data)))
    self.end_headers()
    self.wfile.write(data)

  def log_message(self, *args):
    pass


TABLES = {
  instruction(COUNTING): {"two": 0.5, "2": 0.25, "Two": 0.125, "three": 0.1, " ": 0.02},
  instruction(YES): {"Yes": 0.7, "No": 0.2, "yes": 0.02},
}


def test_an_endpoint_with_log_probabilities():
  with running(Endpoint(TABLES)) as endpoint:
    options = {"openai_url": endpoint.url, "model": "judge", "backoff": 0.01}
    scorer = rewards.make({"geneval2": 1.0}, options={"geneval2": options})
    scores = scorer(numbered(3), PROMPTS, RECORDS)["geneval2"]
  # "one" is not among the likeliest answers to the second prompt's question.
  np.testing.assert_allclose(scores, [math.sqrt(0.875 * 0.72), 0.0, np.nan], rtol=1e-6)
  assert len(endpoint.requests) == 3
  for request in endpoint.requests:
    assert (request["max_tokens"], request["temperature"], request["top_logprobs"]) == (1, 0, 20)
    assert request["logprobs"] is True and request["model"] == "judge"
    image, text = request["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert text["text"].endswith(" Answer in one word.")


def test_the_tokenizer_tells_the_first_tokens(tmp_path):
  # As in Qwen's vocabulary " 2" begins with a space of its own, whose probability then counts.
  vocabulary = {t: i for i, t in enumerate(["two", "Two", "Ġ", "2", "t", "w", "o", "T"])}
  merges = [("t", "w"), ("tw", "o"), ("T", "w"), ("Tw", "o")]
  vocabulary |= {"tw": 8, "Tw": 9}
  tokenizer = Tokenizer(models.BPE(vocabulary, merges))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  with running(Endpoint(TABLES)) as endpoint:
    answerer = OpenAIAnswerer(url=endpoint.url, model="judge", tokenizer=str(tmp_path))
    scores = GenEval2(answerer)(numbered(1), ["x"], [{"vqa_list": [[COUNTING, "two"]]}])
  # " two", " Two" and " 2" all begin with the lone space.
  np.testing.assert_allclose(scores, [0.5 + 0.125 + 0.25 + 3 * 0.02], rtol=1e-6)


BAD = [{}, [], {"choices": []}, {"choices": [{"logprobs": None}]}, {"choices": [{"logprobs": {}}]}]


def _with(entry):
  return {"choices": [{"logprobs": {"content": [{"top_logprobs": [entry]}]}}]}


@pytest.mark.parametrize(
  "bad",
  [
    *BAD,
    _with({"token": "two", "logprob": 3.0}),
    _with({"token": "two", "logprob": float("nan")}),
    _with({"token": 3, "logprob": -1.0}),
    _with({"token": "two", "logprob": "-1"}),
    _with({"token": "two"}),
  ],
)
def test_garbage_is_asked_for_again_and_never_scored(bad, caplog):
  record = [{"vqa_list": [[COUNTING, "two"]]}]
  with running(Endpoint(TABLES, lambda n, answer: bad if n < 3 else answer)) as endpoint:
    answerer = OpenAIAnswerer(url=endpoint.url, model="judge", attempts=3, backoff=0.01)
    np.testing.assert_allclose(GenEval2(answerer)(numbered(1), ["x"], record), [0.875])
    assert len(endpoint.requests) == 3
  with running(Endpoint(TABLES, lambda n, answer: bad)) as endpoint:
    answerer = OpenAIAnswerer(url=endpoint.url, model="judge", attempts=2, backoff=0.01)
    # One question that fails leaves the whole image without a score.
    both = [{"vqa_list": [[COUNTING, "two"], [YES, "yes"]]}]
    assert np.isnan(GenEval2(answerer)(numbered(1), ["x"], both)).all()
    assert len(endpoint.requests) == 4 and "log-probabilities" in caplog.text


def test_the_endpoint_lacks_the_model():
  with running(Endpoint(TABLES)) as endpoint, pytest.raises(UserError, match="'other', only judge"):
    OpenAIAnswerer(url=endpoint.url, model="other")
