"""PyTorch back ends of rewards on tiny random models."""

import numpy as np
import pytest

from rtdmd_jax.errors import UserError
from rtdmd_jax.rewards.backends import mask2former, qwen3_vl
from rtdmd_jax.rewards.host.geneval2 import GenEval2, Query, instruction, variants
from tests.support import judge_files

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  directory = tmp_path_factory.mktemp("clip")
  judge_files.write_clip(directory)
  return str(directory)


@pytest.fixture
def detector(tmp_path, clip, monkeypatch):
  monkeypatch.setattr(mask2former, "_SHORT_EDGE", 64)
  # Random models are sure of nothing.
  monkeypatch.setattr(mask2former, "SCORE_THRESHOLD", 0.0)
  return mask2former.Mask2FormerDetector(
    directory=judge_files.write_mask2former(tmp_path), clip=clip, batch=2
  )


def test_detections_equal_transformers_post_processing(detector):
  images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
  found = detector(images)
  inputs = torch.from_numpy(mask2former.resized(images)[0]).permute(0, 3, 1, 2)
  with torch.inference_mode():
    output = detector._model(pixel_values=inputs)
  for i, detections in enumerate(found):
    probabilities = output.class_queries_logits[i].softmax(-1)[:, :-1]
    masks = torch.nn.functional.interpolate(
      output.masks_queries_logits[i][None], size=(64, 64), mode="bilinear"
    )[0]
    expected = []
    for query in range(6):
      inside = masks[query] > 0
      if inside.any():
        quality = masks[query][inside].sigmoid().mean()
        expected += [float(p * quality) for p in probabilities[query]]
    scores = np.array([d.score for d in detections])
    # All of the 100 likeliest classes, of the queries that have a mask.
    assert 0 < len(scores) <= 100
    assert np.abs(scores[:, None] - np.array(expected)).min(1).max() < 1e-5
    for d in detections:
      assert d.name in mask2former.CLASSES and d.color in mask2former.COLORS
      assert 0 <= d.box[0] < d.box[2] <= 64 and 0 <= d.box[1] < d.box[3] <= 64


def test_a_sure_query_becomes_one_detection(detector, monkeypatch):
  monkeypatch.setattr(mask2former, "SCORE_THRESHOLD", 0.3)
  probabilities = torch.zeros(2, 80)
  probabilities[1, mask2former.CLASSES.index("teddy bear")] = 0.9
  probabilities[0, 3] = 0.4  # too little after its vague mask
  masks = torch.full((2, 10, 12), -5.0)
  masks[1, 2:5, 3:9] = 20.0
  masks[0, 0, 0] = 0.1
  (only,) = detector._objects(np.zeros((10, 12, 3), np.uint8), probabilities, masks)
  assert only.name == "teddy bear" and only.box == (3.0, 2.0, 9.0, 5.0)
  assert only.score == pytest.approx(0.9)


def test_colours_equal_clips_own_features(detector):
  crop = np.full((30, 20, 3), (200, 30, 40), np.uint8)
  features = detector._color_features("dog")
  texts = [
    [f"a photo of a {c} dog", f"a photo of a {c}-colored dog", f"a photo of a {c} object"]
    for c in mask2former.COLORS
  ]
  rows = []
  for of_color in texts:
    ids = detector._tokenizer(of_color, padding=True, return_tensors="pt")
    output = detector._clip.get_text_features(**ids)
    each = output if torch.is_tensor(output) else output.pooler_output
    mean = (each / each.norm(dim=-1, keepdim=True)).mean(0)
    rows.append(mean / mean.norm())
  torch.testing.assert_close(features, torch.stack(rows), atol=1e-5, rtol=0)
  pixels = torch.from_numpy(mask2former.clip_input(crop)).permute(2, 0, 1)[None]
  output = detector._clip.get_image_features(pixel_values=pixels)
  image = (output if torch.is_tensor(output) else output.pooler_output)[0]
  expected = mask2former.COLORS[int((torch.stack(rows) @ image).argmax())]
  assert detector._color([crop], ["dog"]) == [expected]


def test_another_number_of_classes_is_refused(tmp_path, clip):
  with pytest.raises(UserError, match="has 5 classes, not COCO's 80"):
    mask2former.Mask2FormerDetector(directory=judge_files.write_mask2former(tmp_path, 5), clip=clip)


def test_a_missing_folder_is_named(clip):
  with pytest.raises(UserError, match="nowhere is no folder"):
    mask2former.Mask2FormerDetector(directory="nowhere", clip=clip)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
  directory = tmp_path_factory.mktemp("qwen")
  judge_files.write_qwen3_vl(directory)
  return qwen3_vl.Qwen3VLAnswerer(directory=str(directory), device="cpu", dtype="float32")


def test_batched_questions_equal_questions_one_by_one(judge):
  images = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), dtype=np.uint8)
  long, short = "How many teapots are in the image?", "Is it red?"
  queries = [
    Query(i, question, variants(question, "two")) for i in (1, 0) for question in (long, short)
  ]
  together = judge(images, queries)
  for query, found in zip(queries, together, strict=True):
    np.testing.assert_allclose(judge(images, [query])[0], found, rtol=1e-3)
  ratio = np.divide(together[0], together[2])
  assert np.abs(np.log(ratio)).max() > 0.1  # the images differ
  # In bytes "two" begins with "t" and " two" with the space.
  rows = dict(zip(variants(long, "two"), together[0], strict=True))
  assert rows[" two"] == rows[" 2"] == rows[" Two"] != rows["two"]


def test_probabilities_equal_the_models_own_generation(judge):
  image = np.random.default_rng(1).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
  vision = judge._processor(images=[image[0]], return_tensors="pt")
  count = int(vision["image_grid_thw"].prod()) // 4
  text = qwen3_vl._CHAT.format(image="<|image_pad|>" * count, text=instruction("Is it red?"))
  ids = judge._tokenizer(text, return_tensors="pt")
  kinds = (ids["input_ids"] == judge._model.config.image_token_id).int()
  generated = judge._model.generate(
    **ids, **vision, mm_token_type_ids=kinds, max_new_tokens=1, do_sample=False,
    return_dict_in_generate=True, output_logits=True,
  )  # fmt: skip
  expected = generated.logits[0][0].softmax(-1).numpy()
  found = judge._probabilities(vision, ["Is it red?"])[0]
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-9)
  scores = GenEval2(judge)(image, ["x"], [{"vqa_list": [["Is it red?", "Yes"]]}])
  tokens = [judge._first_token(v) for v in variants("Is it red?", "Yes")]
  np.testing.assert_allclose(scores, [expected[tokens].sum()], rtol=1e-4)
