"""Models in GGUF files: loaded, trained and exported as any other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from opd_lightning import export
from opd_lightning.modalities.autoregressive import PromptView
from opd_lightning.pretrained import Lora, Pretrained
from opd_lightning.teacher import Live, Teacher
from tests.exported import exportable
from tests.tiny import fit, make_module

gguf = pytest.importorskip("gguf")
LAYERS, WIDTH, HEADS, INNER = 2, 32, 4, 64
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}<s>assistant\n"


def save_gguf(
    path: Path,
    quantized: bool = False,
    template: str | None = TEMPLATE,
    without: str = " ",
    more: Callable[[Any], None] = lambda writer: None,
) -> Path:
    """Writes a Llama with random weights, whose tokenizer has a token for each byte and one for `th`."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int):
        return (torch.randn(shape, generator=generator) * 0.2).numpy()

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    bytes_as_text = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    tokens = ["<pad>", "<s>", "</s>", *(chr(b) if b in bytes_as_text else chr(next(others)) for b in range(256)), "th"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 257)
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    if template is not None:
        writer.add_chat_template(template)
    tensors = {"token_embd.weight": draw(len(tokens), WIDTH), "output_norm.weight": draw(WIDTH) + 1}
    for layer in range(LAYERS):
        names = {
            "attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH, WIDTH), "attn_v": (WIDTH, WIDTH), "attn_output": (WIDTH, WIDTH),
            "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER),
        }  # fmt: skip
        tensors |= {f"blk.{layer}.{name}.weight": draw(*shape) for name, shape in names.items()}
        tensors |= {f"blk.{layer}.{name}.weight": draw(WIDTH) + 1 for name in ("attn_norm", "ffn_norm")}
    for name, values in ((name, values) for name, values in tensors.items() if without not in name):
        if quantized and values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module", params=[False, True], ids=["float32", "q8_0"])
def packed(request, tmp_path_factory) -> Path:
    return save_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", request.param)


def test_weights_are_unpacked_into_a_plain_model(packed):
    model = Pretrained(str(packed)).load(AutoModelForCausalLM, trained=True)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model.config, "quantization_config")
    down = next(t for t in gguf.GGUFReader(packed).tensors if t.name == "blk.1.ffn_down.weight")
    expected = torch.tensor(gguf.dequantize(down.data, down.tensor_type))
    torch.testing.assert_close(model.model.layers[1].mlp.down_proj.weight.detach(), expected)


def test_a_file_in_a_folder_is_named_beside_it(packed):
    by_path, by_name = Pretrained(str(packed)), Pretrained(str(packed.parent), gguf_file=packed.name)
    one, other = (spec.load(AutoModelForCausalLM, trained=False) for spec in (by_path, by_name))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert by_path.tokenizer().chat_template == by_name.tokenizer().chat_template == TEMPLATE


@pytest.mark.parametrize("lora", [None, Lora(r=2)], ids=["whole", "lora"])
def test_it_is_trained(packed, lora, tmp_path):
    module = make_module(Pretrained(str(packed), lora=lora), {"teacher": Teacher(Live(), PromptView("1{{ prompt }}"))})
    trained = [p for p in module.student.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    fit(module, tmp_path, steps=2)
    assert any(not torch.equal(was, now) for was, now in zip(before, trained, strict=True))


@pytest.mark.parametrize("lora", [None, {"r": 2}], ids=["whole", "lora"])
def test_it_is_exported_with_its_tokenizer(packed, lora, tmp_path):
    export.write(exportable(tmp_path / "a.ckpt", packed, lora=lora), tmp_path / "out")  # which compares the two
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.decode(tokenizer("4+4")["input_ids"]) == "4+4"
    assert f"`{packed.name}`" in (tmp_path / "out/README.md").read_text(encoding="utf-8"), (
        "the card names the base without its folder"
    )


def test_what_is_no_such_model_is_refused(tmp_path, packed):
    cut, text = tmp_path / "cut.gguf", tmp_path / "text.gguf"
    cut.write_bytes(packed.read_bytes()[: packed.stat().st_size // 2])
    text.write_text("hello", encoding="utf-8")
    with pytest.raises(ValueError, match=r"path: cut\.gguf can't be read as a GGUF file .*is it whole"):
        Pretrained(str(cut)).load(AutoModelForCausalLM, trained=True)
    with pytest.raises(ValueError, match=r"text\.gguf is no GGUF file: it begins with b'hell'"):
        Pretrained(str(text)).load(AutoModelForCausalLM, trained=True)
    for place, what in ((8, "tensors"), (16, "keys")):
        header = bytearray(packed.read_bytes())
        header[place : place + 8] = (2**62).to_bytes(8, "little")
        cut.write_bytes(header)
        with pytest.raises(
            ValueError, match=f"claims 4,611,686,018,427,387,904 {what}, more than its .* it is damaged"
        ):
            Pretrained(str(cut)).load(AutoModelForCausalLM, trained=True)
    for spec in ({"path": str(tmp_path / "none.gguf")}, {"path": str(tmp_path), "gguf_file": "none.gguf"}):
        with pytest.raises(FileNotFoundError, match=r"path: there is no file .*none\.gguf"):
            Pretrained(**spec).load(AutoModelForCausalLM, trained=True)
    with pytest.raises(ValueError, match="which AutoModelForImageTextToText can't load"):
        Pretrained(str(packed)).load(AutoModelForImageTextToText, trained=True)


def test_a_file_without_some_weights_is_refused(tmp_path):
    """transformers would draw them, and train another model."""
    path = save_gguf(tmp_path / "part.gguf", without="blk.1.ffn_up")
    with pytest.raises(ValueError, match=r"part\.gguf lacks 1 of the model's weights, .*layers\.1\.mlp\.up_proj"):
        Pretrained(str(path)).load(AutoModelForCausalLM, trained=True)


def scaled(writer: Any) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(8.0)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (lambda w: w.add_tensor("rope_freqs.weight", numpy.ones(4, "f4")), "holds 4 numbers .* rope_freqs"),
        (lambda w: w.add_tensor("blk.0.attn_q.bias", numpy.ones(WIDTH, "f4")), f"holds {WIDTH} numbers that transf"),
        (scaled, r"scales rotary positions \(linear\), which transformers leaves out"),
    ],
)
def test_a_file_of_which_something_is_left_out_is_refused(more, message, tmp_path):
    """It would be another model, silently."""
    path = save_gguf(tmp_path / "more.gguf", more=more)
    with pytest.raises(ValueError, match=rf"path: more\.gguf {message}"):
        Pretrained(str(path)).load(AutoModelForCausalLM, trained=True)


def test_an_ending_in_capitals_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"TINY\.GGUF is no GGUF file to transformers: rename it to end with \.gguf"):
        Pretrained(str(save_gguf(tmp_path / "TINY.GGUF")))


def test_an_adapter_names_the_file_as_its_base(packed):
    assert Pretrained(str(packed)).load(AutoModelForCausalLM, trained=True).name_or_path == str(packed)


def test_settings_that_do_not_go_with_it_are_refused(packed):
    with pytest.raises(ValueError, match=r"gguf_file=model\.bin: the name of such a file ends with \.gguf"):
        Pretrained("folder", gguf_file="model.bin")
    with pytest.raises(ValueError, match="a GGUF file itself; leave one out"):
        Pretrained(str(packed), gguf_file="other.gguf")
    with pytest.raises(ValueError, match=r"quantization=4bit: tiny\.gguf is a GGUF file"):
        Pretrained(str(packed), quantization="4bit")


def test_the_missing_package_is_named(packed, monkeypatch):
    monkeypatch.setattr("opd_lightning.gguf.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'opd-lightning\[gguf\]'"):
        Pretrained(str(packed)).load(AutoModelForCausalLM, trained=True)
