"""PyTorch back ends of rewards on tiny random models."""

import numpy as np
import pytest

from rtdmd_jax.errors import UserError
from rtdmd_jax.rewards.backends import mask2former, qwen3_vl
from rtdmd_jax.rewards.geneval2 import GenEval2, Query, instruction, variants

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def _vocabulary(directory, specials, end=False):
  """A byte-level tokenizer without merges; with `end` the first special token ends texts."""
  from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens([AddedToken(s, special=True) for s in specials])
  if end:
    tokenizer.post_processor = processors.TemplateProcessing(
      single=f"$A {specials[0]}", special_tokens=[(specials[0], len(alphabet))]
    )
  fast = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token=specials[0], eos_token=specials[0], model_max_length=77
  )
  fast.save_pretrained(directory)
  return fast


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  directory = tmp_path_factory.mktemp("clip")
  tokenizer = _vocabulary(directory, ["<|endoftext|>"], end=True)
  small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
  config = transformers.CLIPConfig(
    text_config=small
    | dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, projection_dim=8),
    vision_config=small | dict(image_size=224, patch_size=56, projection_dim=8),
    projection_dim=8,
  )
  torch.manual_seed(0)
  transformers.CLIPModel(config).save_pretrained(directory)
  return str(directory)


def _mask2former(directory, labels=80):
  backbone = transformers.SwinConfig(
    embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2,
    out_features=["stage1", "stage2", "stage3", "stage4"],
  )  # fmt: skip
  config = transformers.Mask2FormerConfig(
    backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32,
    encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1, decoder_layers=2,
    num_attention_heads=2, num_queries=6, num_labels=labels,
  )  # fmt: skip
  torch.manual_seed(0)
  transformers.Mask2FormerForUniversalSegmentation(config).save_pretrained(directory)
  return str(directory)


@pytest.fixture
def detector(tmp_path, clip, monkeypatch):
  monkeypatch.setattr(mask2former, "_SHORT_EDGE", 64)
  # Random models are sure of nothing.
  monkeypatch.setattr(mask2former, "SCORE_THRESHOLD", 0.0)
  return mask2former.Mask2FormerDetector(directory=_mask2former(tmp_path), clip=clip, batch=2)


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
    mask2former.Mask2FormerDetector(directory=_mask2former(tmp_path, 5), clip=clip)


def test_a_missing_folder_is_named(clip):
  with pytest.raises(UserError, match="nowhere is no folder"):
    mask2former.Mask2FormerDetector(directory="nowhere", clip=clip)


SPECIALS = [
  "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
  "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
  directory = tmp_path_factory.mktemp("qwen")
  tokenizer = _vocabulary(directory, SPECIALS)
  tokens = dict(zip(SPECIALS, tokenizer.convert_tokens_to_ids(SPECIALS), strict=True))
  config = transformers.Qwen3VLConfig(
    text_config=dict(
      vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
      num_attention_heads=2, num_key_value_heads=1, head_dim=16,
      rope_parameters={"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 1e4},
    ),
    vision_config=dict(
      depth=2, hidden_size=16, intermediate_size=32, num_heads=2, out_hidden_size=32, patch_size=4,
      spatial_merge_size=2, temporal_patch_size=2, num_position_embeddings=16,
      deepstack_visual_indexes=[0],
    ),
    image_token_id=tokens["<|image_pad|>"], video_token_id=tokens["<|video_pad|>"],
    vision_start_token_id=tokens["<|vision_start|>"],
    vision_end_token_id=tokens["<|vision_end|>"],
  )  # fmt: skip
  torch.manual_seed(0)
  model = transformers.Qwen3VLForConditionalGeneration(config)
  with torch.no_grad():
    model.lm_head.weight.mul_(20.0)
  model.save_pretrained(directory)
  from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

  size = {"shortest_edge": 256, "longest_edge": 4096}
  Qwen2VLImageProcessorPil(size=size, patch_size=4).save_pretrained(directory)
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
