"""llama.cpp as a peer of our text model: the same quantised weights, through `llama-cpp-python`."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.scenario import Scenario
from mllama.quantized_modules import Quantized

NAME = "llama.cpp"
# Of the logits' norm: it rounds what it multiplies to 8 bits, in every projection one after another.
TOLERANCE = 0.1
_FILE_TYPES = {"q8_0": "MOSTLY_Q8_0", "q6_k": "MOSTLY_Q6_K", "q4_k": "MOSTLY_Q4_K_S"}
_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def missing() -> str | None:
    """Why it cannot run here, if it cannot."""
    for package in ("llama_cpp", "gguf"):
        try:
            importlib.import_module(package)
        except (ImportError, OSError, RuntimeError) as error:  # a library that does not load
            return f"{NAME}: {type(error).__name__}: {error}"
    return None


@contextmanager
def model(quantised: Any, encoding: str, scenario: Scenario) -> Iterator[LlamaCpp]:
    """The model of a `MllamaForCausalLM`, by a file that is there only while it is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write(path, quantised, encoding)
        loaded = LlamaCpp(path, scenario.prompt, scenario.prompt + scenario.new)
    try:
        yield loaded
    finally:
        loaded.close()


def write(path: Path, quantised: Any, encoding: str) -> None:
    """A GGUF of a `MllamaForCausalLM` without a tokenizer, each quantised weight byte for byte."""
    import gguf

    config = quantised.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(quantised.lm_head.out_features)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPES[encoding]))
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, module in _named(quantised):
        if not isinstance(module, Quantized):
            writer.add_tensor(f"{name}.weight", module.weight.detach().float().cpu().numpy())
            continue
        blocks = _interleaved(module.weight.blocks(), heads.get(name.rpartition(".")[2]))
        if name == "token_embd":  # which has rows of images as well, no tokens to llama.cpp
            blocks = blocks[: quantised.lm_head.out_features]
        kind = getattr(gguf.GGMLQuantizationType, module.weight.encoding.upper())
        writer.add_tensor(f"{name}.weight", blocks.cpu().numpy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _named(quantised: Any) -> Iterator[tuple[str, Any]]:
    """The modules that have weights, by the names of GGUF."""
    text = quantised.model
    yield "token_embd", text.embed_tokens
    yield "output_norm", text.norm
    yield "output", quantised.lm_head
    for number, layer in enumerate(text.layers):
        for ours, theirs in _PARTS.items():
            yield f"blk.{number}.{theirs}", layer.get_submodule(ours)


def _interleaved(rows: Tensor, heads: int | None) -> Tensor:
    """Rows of q and k (N, bytes) from halves to the pairs that llama.cpp rotates."""
    if heads is None:
        return rows
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


class LlamaCpp:
    """As much of a model as `benchmarks.model` calls: logits of a prompt, and tokens one after another."""

    def __init__(self, path: Path, prompt: int, context: int) -> None:
        import llama_cpp

        self._library = llama_cpp
        llama_cpp.llama_backend_init()
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)  # kept alive: C calls it
        llama_cpp.llama_log_set(self._quiet, None)
        self._model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp did not load {path.name}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = context, prompt, prompt
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            raise RuntimeError("llama.cpp made no context")
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._tokens = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def close(self) -> None:
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)

    def _decode(self, ids: list[int]) -> np.ndarray:
        """Logits (V,) after the last token, in llama.cpp's own memory."""
        library = self._library
        tokens = (library.llama_token * len(ids))(*ids)
        status = library.llama_decode(self._context, library.llama_batch_get_one(tokens, len(ids)))
        if status:
            raise RuntimeError(f"llama_decode of {len(ids)} tokens gave {status}")
        logits = library.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, (self._tokens,))

    def _prompt(self, input_ids: Tensor) -> np.ndarray:
        """Logits (V,) after a prompt (1, T) in an empty cache."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        return self._decode(input_ids[0].tolist())

    def __call__(self, input_ids: Tensor, **_: Any) -> Any:
        logits = torch.from_numpy(self._prompt(input_ids).copy())
        return SimpleNamespace(logits=logits.view(1, 1, -1))

    def generate(self, input_ids: Tensor, max_new_tokens: int, streamer: Any, **_: Any) -> None:
        """The most likely tokens, each put when it is there."""
        streamer.put(input_ids)
        logits = self._prompt(input_ids)
        for left in reversed(range(max_new_tokens)):
            token = int(logits.argmax())
            streamer.put(torch.tensor([token]))
            if left:
                logits = self._decode([token])
        streamer.end()
