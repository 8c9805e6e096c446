"""Students of diffusion, written and read with diffusers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from opd_lightning import export
from opd_lightning.modalities.diffusion.models import Transformer
from opd_lightning.policy import Policy
from tests.exported import exportable
from tests.tiny_diffusion import PIPELINES, save_pipeline

SETTING = "opd_lightning.modalities.diffusion.DiffusionDistillation"
OWN = {"height": 16, "width": 16, "max_sequence_length": 16}
QUERIES = {"r": 2, "alpha": 5, "target_modules": ["to_q", "to_v"]}


def said(checkpoint: Path, transformer: Any = None) -> torch.Tensor:
    """Velocities of the trained student, or of another transformer in its place."""
    module, _, _ = export.load_module(checkpoint)
    student = module.policies["student"]
    return module.probe(student if transformer is None else Policy(transformer.eval(), student.processor))


@pytest.mark.parametrize("kind", sorted(PIPELINES))
@pytest.mark.parametrize("student", [{}, {"lora": QUERIES}], ids=["full", "lora"])
def test_the_pipeline_in_the_folder_is_the_student(kind, student, tmp_path):
    base = save_pipeline(tmp_path / "base", kind)
    checkpoint = exportable(tmp_path / "x.ckpt", base, SETTING, own=OWN, **student)
    export.write(checkpoint, tmp_path / "out")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(said(checkpoint, pipe.transformer), said(checkpoint), atol=1e-4, rtol=1e-4)
    untrained = DiffusionPipeline.from_pretrained(base).transformer
    assert (said(checkpoint, untrained) - said(checkpoint)).abs().max() > 0.003


@pytest.mark.parametrize("kind", sorted(PIPELINES))
def test_an_adapter_is_what_diffusers_loads(kind, tmp_path):
    base = save_pipeline(tmp_path / "base", kind)
    checkpoint = exportable(tmp_path / "x.ckpt", base, SETTING, own=OWN, lora=QUERIES)
    export.write(checkpoint, tmp_path / "out", merge=False)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"README.md", "pytorch_lora_weights.safetensors"}
    assert all(".lora_" in name for name in load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors"))
    pipe = DiffusionPipeline.from_pretrained(base)
    pipe.load_lora_weights(tmp_path / "out")
    torch.testing.assert_close(said(checkpoint, pipe.transformer), said(checkpoint), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_rslora": True, "rank_pattern": {"to_q": 3}}, None),
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "bia"),
    ],
    ids=["patterns", "dora", "bias"],
)
def test_other_adapters_are_loaded_too_or_refused_by_name(settings, message, tmp_path):
    base = save_pipeline(tmp_path / "base", "stable_diffusion_3")
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["to_q", "to_v"], **settings)
    get_peft_model(Transformer.from_pretrained(str(base)), config).save_pretrained(tmp_path / "start")
    lora = {"adapter": str(tmp_path / "start")}
    checkpoint = exportable(tmp_path / "x.ckpt", base, SETTING, own=OWN, lora=lora)
    if message is not None:
        with pytest.raises(
            ValueError, match=rf"{message}.* are nothing that diffusers loads; export with --merge=true"
        ):
            export.write(checkpoint, tmp_path / "out", merge=False)
        assert not (tmp_path / "out").exists()
    else:
        export.write(checkpoint, tmp_path / "out", merge=False)
        pipe = DiffusionPipeline.from_pretrained(base)
        pipe.load_lora_weights(tmp_path / "out")
        torch.testing.assert_close(said(checkpoint, pipe.transformer), said(checkpoint), atol=1e-4, rtol=1e-4)
    export.write(checkpoint, tmp_path / "merged")


@pytest.mark.parametrize("student", [{}, {"lora": QUERIES}], ids=["full", "lora"])
def test_every_part_is_of_the_bases_dtype(student, tmp_path, capsys):
    base = save_pipeline(tmp_path / "base", "stable_diffusion_3")
    pipe = DiffusionPipeline.from_pretrained(base)
    for part in ("transformer", "text_encoder_3"):
        getattr(pipe, part).to(torch.bfloat16).save_pretrained(base / part)
    export.write(exportable(tmp_path / "x.ckpt", base, SETTING, own=OWN, **student), tmp_path / "out")
    for part, dtype in {"transformer": "bfloat16", "text_encoder_3": "bfloat16", "vae": "float32"}.items():
        assert str(Transformer.stored_dtype(str(tmp_path / "out"), part=part)) == f"torch.{dtype}"
    assert "of what training changed" in capsys.readouterr().out


def test_a_pipeline_imports_nothing_that_its_index_names(tmp_path, monkeypatch):
    base = save_pipeline(tmp_path / "base", "stable_diffusion_3")
    checkpoint = exportable(tmp_path / "x.ckpt", base, SETTING, own=OWN)
    (tmp_path / "stranger.py").write_text(
        f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Thing: pass\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    index = json.loads((base / "model_index.json").read_text(encoding="utf-8"))
    (base / "model_index.json").write_text(json.dumps(index | {"scheduler": ["stranger", "Thing"]}), encoding="utf-8")
    with pytest.raises(ValueError, match="base: its scheduler is code of stranger, which is not imported"):
        export.write(checkpoint, tmp_path / "out")
    assert not (tmp_path / "executed").exists()
