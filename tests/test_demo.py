"""The demo: images, questions, the shipped checkpoint's format, and whether the model answers rightly."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mllama_kernels._library as library
from mllama import MllamaForConditionalGeneration, MllamaImageProcessor, MllamaProcessor
from mllama.demo import checkpoint_path, is_right, questions_for, sample_picture
from mllama.demo.questions import QUESTION_KINDS, Question, sample_questions
from mllama.demo.shapes import COLORS, IMAGE_SIZE, KINDS, LAYOUTS, PLACES, SIZES, Scene, Shape
from mllama.training.log import Log, read_log

sys.path.insert(0, str(Path(__file__).parents[1]))
from tools.demo_model import train as training
from tools.demo_model.evaluate import Report, answer, evaluate
from tools.demo_model.seeing import patch_targets

IMAGES = 200
ANSWERS = pytest.mark.skipif(
    library.simulated, reason="thousands of tokens take hours on simulated CUDA kernels"
)


@pytest.fixture
def scenes(seed: int) -> list[Scene]:
    return [sample_picture(seed + i)[1] for i in range(400)]


@pytest.fixture(scope="session")
def first_seed(request: pytest.FixtureRequest) -> int:
    """Of images nobody has seen: fresh in every run, printed in its header."""
    return 10_000_000 + request.config.getoption("--seed")


def test_a_seed_gives_one_image_and_its_questions(seed: int) -> None:
    (one, scene), (again, same) = sample_picture(seed), sample_picture(seed)
    other, _ = sample_picture(seed + 1)
    assert one.tobytes() == again.tobytes() and scene == same
    assert (one.size, one.tobytes()) != (other.size, other.tobytes())
    assert questions_for(scene, seed) == questions_for(scene, seed)
    assert any(questions_for(scene, seed) != questions_for(scene, seed + i) for i in range(1, 6))


def test_scenes_hold_everything_that_is_promised(scenes: list[Scene]) -> None:
    shapes = [shape for scene in scenes for shape in scene.shapes]
    assert {len(scene.shapes) for scene in scenes} == {1, 2, 3, 4}
    assert {s.kind for s in shapes} == set(KINDS) and {s.color for s in shapes} == set(COLORS)
    assert {s.size for s in shapes} == set(SIZES) and {s.place for s in shapes} == set(PLACES)
    for scene in scenes:
        places = [PLACES.index(s.place) for s in scene.shapes]
        assert places == sorted(set(places)), "one shape per place, in reading order"
        for shape in scene.shapes:
            (x, y), r = shape.center, shape.radius
            left = 0 if shape.place.endswith("left") else scene.width / 2
            top = 0 if shape.place.startswith("top") else scene.height / 2
            assert left <= x - r and x + r <= left + scene.width / 2, shape
            assert top <= y - r and y + r <= top + scene.height / 2, shape


def test_a_drawn_shape_has_its_colour_at_its_centre(seed: int) -> None:
    for i in range(50):
        image, scene = sample_picture(seed + i)
        assert image.size == (scene.width, scene.height) and image.mode == "RGB"
        for shape in scene.shapes:
            x, y = shape.center
            assert image.getpixel((round(x), round(y))) == shape.rgb
        assert image.getpixel((0, 0)) == scene.rgb


def test_every_tile_grid_occurs_and_is_the_one_the_processor_chooses(seed: int) -> None:
    process = MllamaImageProcessor.from_pretrained(checkpoint_path())
    drawn = [sample_picture(seed + i) for i in range(200)]
    encoded = process([[image] for image, _ in drawn])
    assert encoded["aspect_ratio_ids"][:, 0].tolist() == [
        LAYOUTS.index(scene.layout) + 1 for _, scene in drawn
    ]
    assert {n for (n,) in encoded["num_tiles"]} == {1, 2, 3, 4}
    assert {scene.layout for _, scene in drawn} == set(LAYOUTS)


def test_patch_targets_name_what_covers_a_patch(scenes: list[Scene]) -> None:
    side = IMAGE_SIZE // 14
    for scene in scenes:
        rows, columns = scene.layout
        targets = patch_targets(scene, 4)
        assert targets.shape == (4, side * side, 5)
        assert (targets[rows * columns :] == -100).all() and (
            targets[: rows * columns, :, 3:] >= 0
        ).all()
        for shape in scene.shapes:
            x, y = (int(c * columns * IMAGE_SIZE / scene.width) for c in shape.center)
            tile = y // IMAGE_SIZE * columns + x // IMAGE_SIZE
            patch = y % IMAGE_SIZE // 14 * side + x % IMAGE_SIZE // 14
            kind, color, size, _, _ = targets[tile, patch].tolist()
            assert kind == KINDS.index(shape.kind)
            assert color == sorted(COLORS).index(shape.color)
            assert size == sorted(SIZES).index(shape.size)
        assert (targets[..., 0] >= 0).sum() < 16 * len(scene.shapes), "most patches show no shape"


def test_answers_are_what_the_scene_says(scenes: list[Scene], seed: int) -> None:
    """Every answer is worked out a second time, from the words of the question alone."""
    rng = random.Random(seed)
    asked = [(scene, q) for scene in scenes for q in sample_questions(scene, rng)]
    for scene, question in asked:
        assert is_right(question.answer, _worked_out(scene, question)), (scene, question)
    kinds = [q.kind for _, q in asked]
    assert set(kinds) == set(QUESTION_KINDS)
    assert all(kinds.count(kind) == len(scenes) for kind in QUESTION_KINDS if kind != "where")
    said = [q.answer for _, q in asked if q.kind == "yes_no"]
    assert 0.35 < said.count("yes") / len(said) < 0.65


def _matches(words: str) -> Callable[[Shape], bool]:
    """Whether a shape is all that the words say of it."""
    place = next((p for p in PLACES if p in words), None)
    named = set(re.findall(r"[a-z]+", words.replace(place or "\0", "")))
    named |= {word.removesuffix("es" if word == "crosses" else "s") for word in named}
    return lambda s: (
        (place is None or s.place == place)
        and named & set(COLORS) <= {s.color}
        and named & set(KINDS) <= {s.kind}
        and named & set(SIZES) <= {s.size}
    )


def _worked_out(scene: Scene, question: Question) -> str:
    text, shapes = question.text, scene.shapes
    if question.kind == "describe":
        articles = (("an" if s.size[0] in "aeiou" else "a") for s in shapes)
        return ", ".join(
            f"{a} {s.size} {s.color} {s.kind}" for a, s in zip(articles, shapes, strict=True)
        )
    if question.kind == "color" and "background" in text:
        return scene.background
    if "Is the " in text:
        kind = next(k for k in KINDS if k in text)
        (shape,) = (s for s in shapes if s.kind == kind)
        return "yes" if shape.color in text.split() or f"{shape.color}?" in text else "no"
    found = [s for s in shapes if _matches(text)(s)]
    if question.kind == "count":
        return str(len(found))
    if question.kind == "yes_no":
        return "yes" if found else "no"
    (shape,) = found
    return {"color": shape.color, "shape": shape.kind, "where": shape.place}[question.kind]


@pytest.mark.parametrize(
    ("said", "expected", "right"),
    [
        (" Red. ", "red", True),
        ("a small red cross, a large  blue circle", "a large blue circle, a small red cross", True),
        ("a red cross", "a red cross, a red cross", False),
        ("top left", "top right", False),
        ("", "2", False),
    ],
)
def test_is_right(said: str, expected: str, right: bool) -> None:
    assert is_right(said, expected) == right


def test_checkpoint_has_the_published_files_and_size() -> None:
    folder = checkpoint_path()
    for name in (
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.json",
    ):
        json.loads((folder / name).read_text(encoding="utf-8"))
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 5_000_000


def test_checkpoint_is_the_real_architecture() -> None:
    model = MllamaForConditionalGeneration.from_pretrained(checkpoint_path(), backend="reference")
    config = model.config
    text, vision = config.text_config, config.vision_config
    assert 300_000 <= sum(p.numel() for p in model.parameters()) <= 2_000_000
    assert model.semantics.vision_taps == "input" and model.semantics.imageless_rows == "zero"
    assert {text.head_dim, vision.head_dim} <= {64, 80, 128}, "what the CUDA kernels have"
    assert text.num_attention_heads > text.num_key_value_heads
    assert text.rope_scaling["rope_type"] == "llama3"
    assert vision.num_hidden_layers and vision.num_global_layers
    assert vision.intermediate_layers_indices and vision.max_num_tiles == 4
    assert config.image_token_index == text.vocab_size == model.lm_head.out_features
    assert model.model.language_model.embed_tokens.num_embeddings == text.vocab_size + 8
    gates = {n: p.item() for n, p in model.named_parameters() if p.shape == (1,)}
    assert len(gates) == 3 + 2 * vision.num_global_layers + 2 * len(text.cross_attention_layers)
    assert all(abs(gate) > 0.1 for gate in gates.values()), gates


def test_tokenizer_and_template_are_llama_3s() -> None:
    processor = MllamaProcessor.from_pretrained(checkpoint_path())
    image, question = {"type": "image"}, {"type": "text", "text": "What do you see?"}
    ask = {"role": "user", "content": [image, question]}
    prompt = processor.apply_chat_template([ask], add_generation_prompt=True)
    assert prompt == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<|image|>What do you see?"
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    ids = processor(sample_picture(0)[0], prompt)["input_ids"][0]
    assert ids.count(processor.tokenizer.bos_token_id) == 1 == ids.count(processor.image_token_id)
    assert processor.decode(ids) == prompt
    text = "Any text at all: naïve, 東京, \U0001f600!"
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert processor.decode(ids) == text
    with pytest.raises(Exception, match="images is incompatible with system messages"):
        processor.apply_chat_template([{"role": "system", "content": "Be brief."}, ask])
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert "system<|end_header_id|>\n\nBe brief.<|eot_id|>" in processor.apply_chat_template(system)


def test_checkpoint_loads_in_transformers(seed: int) -> None:
    transformers = pytest.importorskip("transformers")
    folder = checkpoint_path()
    image, _ = sample_picture(seed)
    theirs = transformers.MllamaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    ours = MllamaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, backend="reference", semantics="transformers"
    )
    question = {"type": "text", "text": "What do you see?"}
    conversation = [{"role": "user", "content": [{"type": "image"}, question]}]
    inputs = []
    for kind in (MllamaProcessor, transformers.MllamaProcessor):
        processor = kind.from_pretrained(folder)
        prompt = processor.apply_chat_template(conversation, add_generation_prompt=True)
        options = {"add_special_tokens": False, "return_tensors": "pt"}
        inputs.append(dict(processor(images=[[image]], text=[prompt], **options)))
    assert inputs[0].keys() == inputs[1].keys()
    for name in ("input_ids", "aspect_ratio_ids", "cross_attention_mask"):
        assert torch.equal(inputs[0][name], inputs[1][name]), name
    with torch.no_grad():
        expected = theirs(**inputs[0]).logits
        torch.testing.assert_close(ours(**inputs[0]).logits, expected, rtol=1e-4, atol=1e-3)


def test_training_writes_a_checkpoint_and_repeats(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(training, "_IMAGES", 4)
    weights, logs = [], []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several sum some gradients in any order, and wait on a busy machine
    try:
        for folder in (tmp_path / "one", tmp_path / "two"):
            log = Log(tmp_path / f"{folder.name}.jsonl", 0)
            training.train(folder, steps=5, seed=7, backend="reference", log=log)
            logs.append(read_log(tmp_path / f"{folder.name}.jsonl"))
            model = MllamaForConditionalGeneration.from_pretrained(folder, backend="reference")
            weights.append(dict(model.named_parameters()))
        report = evaluate(tmp_path / "one", range(2))
    finally:
        torch.set_num_threads(threads)
    assert model.dtype == torch.bfloat16
    assert [entry["step"] for entry in logs[0]] == list(range(1, 7)) and logs[0] == logs[1]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    assert len(report.answers) >= 10 and report.accuracy() < 0.9, "nothing is learned in five steps"


@pytest.fixture(scope="module")
def kernel_report(first_seed: int) -> Report:
    device = "cuda" if torch.cuda.is_available() and library.has_cuda else "cpu"
    seeds = range(first_seed, first_seed + IMAGES)
    return evaluate(checkpoint_path(), seeds, backend="kernels", device=device)


@ANSWERS
def test_answers_are_right_through_the_kernels(kernel_report: Report) -> None:
    print(kernel_report)
    wrong = [a for a in kernel_report.answers if not a.right]
    assert kernel_report.accuracy() >= 0.9, wrong
    assert all(kernel_report.accuracy(kind) >= 0.7 for kind in QUESTION_KINDS), wrong


@ANSWERS
def test_the_reference_gives_the_same_answers(kernel_report: Report, first_seed: int) -> None:
    seeds = range(first_seed, first_seed + IMAGES // 4)
    reference = evaluate(checkpoint_path(), seeds, backend="reference")
    kernels = [a for a in kernel_report.answers if a.seed in seeds]
    differ = [pair for pair in zip(kernels, reference.answers, strict=True) if pair[0] != pair[1]]
    assert not differ


@ANSWERS
def test_answers_are_right_in_bfloat16(device: torch.device, first_seed: int) -> None:
    report = evaluate(
        checkpoint_path(),
        range(first_seed, first_seed + 50),
        backend="kernels",
        dtype=torch.bfloat16,
        device=device,
    )
    print(report)
    assert report.accuracy() >= 0.9, [a for a in report.answers if not a.right]


@ANSWERS
def test_another_image_gets_another_answer(device: torch.device, first_seed: int) -> None:
    """Every image keeps its own description when the images of a batch change places."""
    model = MllamaForConditionalGeneration.from_pretrained(
        checkpoint_path(), backend="kernels", device=device, dtype=torch.float32
    )
    processor = MllamaProcessor.from_pretrained(checkpoint_path())
    images = [sample_picture(first_seed + i)[0] for i in range(40)]
    questions = ["What do you see?"] * len(images)
    said = answer(model, processor, images, questions)
    swapped = answer(model, processor, images[1:] + images[:1], questions)
    assert swapped == said[1:] + said[:1]
    assert sum(a != b for a, b in zip(said, swapped, strict=True)) >= len(said) - 3
