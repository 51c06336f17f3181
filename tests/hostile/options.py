"""Options of a call that ask for too much, or for nonsense."""

import time

from common import peak, processor, told
from PIL import Image

from mllama import MllamaProcessor
from mllama.demo import checkpoint_path
from mllama.limits import REQUESTS

image = Image.new("RGB", (8, 8))
turn = [{"role": "user", "content": [{"type": "image", "image": image}]}]


def both(**options):
    said = told(processor, image, "<|image|>hi", **options)
    again = told(processor.apply_chat_template, turn, tokenize=True, return_dict=True, **options)
    assert said == again, (said, again)
    inner = told(
        processor.apply_chat_template,
        turn,
        tokenize=True,
        return_dict=True,
        processor_kwargs=options,
    )
    assert said == inner, (said, inner)
    return said


ones = [1.0] * 10**6
cases = [
    ({"size": 4000}, "size must be up to 2048 (max_tile_side), got 4000"),
    ({"size": 10**400}, "size must be up to 2048"),
    ({"size": -1}, "size must be square and positive"),
    ({"size": True}, "size must be"),
    ({"size": 0}, "size must be square and positive"),
    ({"size": "560"}, "size must be"),
    ({"size": {"height": 10**9, "width": 10**9}}, "(max_tile_side)"),
    ({"size": [4000, 4000]}, "(max_tile_side)"),
    ({"size": {"height": "a" * 10**6, "width": 5}}, "size must be square"),
    ({"size": ones}, "size must be an int"),
    ({"max_image_tiles": 10**6}, "max_image_tiles must be up to 64 (max_tiles), got 1000000"),
    ({"max_image_tiles": 10**400}, "an integer of"),
    ({"max_image_tiles": 1.5}, "max_image_tiles must be a positive"),
    ({"max_image_tiles": "4" * 10**6}, "max_image_tiles must be"),
    ({"resample": 99}, "resample: 99 is not a valid"),
    ({"resample": True}, "resample: True"),
    ({"resample": "x" * 10**6}, "resample: "),
    ({"resample": 10**400}, "resample: "),
    ({"resample": [2]}, "resample: "),
    ({"image_mean": ones}, "image_mean must be a number, or one per channel"),
    ({"image_mean": range(10**12)}, "image_mean must be"),
    ({"image_mean": 10**400}, "image_mean must be"),
    ({"image_std": [10**400] * 3}, "image_std must be"),
    ({"image_std": [0, 1, 1]}, "image_std must be a number, not 0"),
    ({"image_mean": [[0.5]] * 3}, "image_mean must be"),
    ({"image_mean": "0.5" * 10**6}, "image_mean must be"),
    ({"image_mean": float("nan")}, "image_mean must be"),
    ({"image_mean": []}, "image_mean must be"),
    ({"rescale_factor": float("inf")}, "rescale_factor must be"),
    ({"rescale_factor": 10**400}, "rescale_factor must be"),
    ({"rescale_factor": "x" * 10**6}, "rescale_factor must be"),
    (
        {"max_length": 10**9, "padding": "max_length"},
        "max_length must be 0 to 1048576 (max_tokens), got 1000000000",
    ),
    ({"max_length": 10**9}, "max_length must be"),
    ({"max_length": -1}, "max_length must be"),
    ({"max_length": "9" * 10**6}, "max_length must be an integer"),
    ({"max_length": True}, "max_length must be an integer"),
    ({"max_length": 1e9}, "max_length must be an integer"),
    ({"max_length": 10**29}, "max_length must be"),
    (
        {"pad_to_multiple_of": 10**9, "padding": True},
        "pad_to_multiple_of must be 1 to 1048576 (max_tokens)",
    ),
    ({"pad_to_multiple_of": 0, "padding": True}, "pad_to_multiple_of must be 1"),
    ({"pad_to_multiple_of": -4}, "pad_to_multiple_of must be 1"),
    ({"pad_to_multiple_of": 2.0}, "pad_to_multiple_of must be an"),
    ({"padding": "x" * 10**6}, "padding must be"),
    ({"padding_side": "x" * 10**6, "padding": True}, "padding_side must be"),
    ({"truncation": "x" * 10**6}, "truncation must be"),
    ({"device": "x" * 10**6}, "device must name"),
    ({"device": [1]}, "device must name"),
    ({"input_data_format": "x" * 10**6}, None),
    ({"text_kwargs": 5}, "text_kwargs must be a dict"),
    ({"images_kwargs": {"size": 4000}}, "(max_tile_side)"),
    ({"common_kwargs": {"max_length": 10**9}}, "max_length must be"),
    ({"common_kwargs": ["x" * 10**6]}, "must be a dict"),
    ({"images_kwargs": {"x" * 10**6: 1}}, "unknown option"),
    ({"videos": ["x" * 10**6]}, "videos="),
    ({"crop_size": "x" * 10**6}, "crop_size="),
]
before, start = peak(), time.process_time()
for options, said in cases:
    text = both(**options)
    assert said is None or said in text, (str(options)[:80], text)
for kind in ("tf", ["pt"], "x" * 10**6, 5):
    assert "return_tensors must be" in told(processor, image, "<|image|>", return_tensors=kind)
for limits in (5, {}, "x", type("Limits", (), {})):
    assert "limits must be mllama.limits.Limits" in told(
        processor, image, "<|image|>", limits=limits
    )
# The same with bounds for requests, and in the class.
assert "1024 (max_tile_side)" in told(processor, image, "<|image|>", size=1120, limits=REQUESTS)
assert "16 (max_tiles)" in told(processor, image, "<|image|>", max_image_tiles=17, limits=REQUESTS)
assert "131072 (max_tokens)" in told(processor, text="x", max_length=2**17 + 1, limits=REQUESTS)
for options in ({"size": 10**6}, {"max_image_tiles": 10**7}, {"image_mean": [10**400]}):
    assert told(type(processor.image_processor), **options) != "accepted"
    assert told(MllamaProcessor.from_pretrained, checkpoint_path(), **options) != "accepted"
wide = MllamaProcessor.from_pretrained(checkpoint_path(), model_max_length=10**9)
assert "model_max_length, 1000000000" in told(wide, text="x", padding="max_length")
assert (
    told(wide, text="x", padding="max_length", max_length=int(1e30)) == "accepted"
)  # no bound, as transformers has it
assert told(wide, text="x", truncation=True) == "accepted"
several = told(processor, text=["a" * 2**20] + ["a"] * 60_000, padding=True)
assert "the padded batch of shape" in several and "(max_mask_values)" in several, several
# Within bounds they are honoured.
assert processor(
    image, "<|image|>", size=112, max_image_tiles=9, return_tensors="pt"
).pixel_values.shape[2:4] == (9, 3)
assert peak() - before < 1000 and time.process_time() - start < 60, (
    peak() - before,
    time.process_time() - start,
)
