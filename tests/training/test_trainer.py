from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM, AutoTokenizer

from circuit_breakers.errors import ConfigError, DataError, ModelError
from circuit_breakers_training.batch_losses import batch_losses
from circuit_breakers_training.batches import pad_rows
from circuit_breakers_training.config import DataRecipe, LoraRecipe, ObjectiveRecipe, Recipe
from circuit_breakers_training.data.jsonl import Conversation, write_conversations
from circuit_breakers_training.render import Rendered, render
from circuit_breakers_training.run_log import read_metrics
from circuit_breakers_training.streams import Streams
from circuit_breakers_training.trainer import TrainingRows, train_adapter

Conversations = dict[str, list[Conversation]]

LLAMA = Recipe(
    model="tiny-llama",
    steps=60,
    batch_size=8,
    max_length=64,
    learning_rate=5e-3,
    precision="fp32",
    objective=ObjectiveRecipe(retain_weight=10.0),
    lora=LoraRecipe(rank=8, b_init_std=0.02),
)
GPT2 = LLAMA.model_copy(
    update={
        "model": "tiny-gpt2",
        "lora": LoraRecipe(rank=8, b_init_std=0.02, target_modules=("c_attn", "c_proj", "c_fc")),
    }
)

pytestmark = pytest.mark.usefixtures("one_thread")


def rendered(model_dir: Path, conversations: list[Conversation]) -> list[Rendered]:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    return [render(tokenizer, c.messages, max_length=64) for c in conversations]


def without_time(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in entry.items() if k not in ("seconds", "peak_rss_mib")}
        for entry in metrics
    ]


# --- the objective against the published one ---------------------------------------------------


def reference_losses(
    model: Any, retain: list[Rendered], harmful: list[Rendered], layers: list[int]
) -> tuple[Tensor, Tensor]:
    """The published step: four forward passes of the whole model, hidden_states[layer + 1].

    Written from Algorithm 1 of arXiv 2406.04313, one conversation at a time, without padding.
    """

    def states(row: Rendered) -> Tensor:
        ids = torch.tensor([row.ids])
        out = model(ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
        return torch.stack([out.hidden_states[layer + 1][0] for layer in layers])

    retain_errors, cosines = [], []
    for row in retain:
        with torch.no_grad(), model.disable_adapter():
            base = states(row)
        retain_errors.append((states(row) - base).norm(dim=-1, p=2))
    for row in harmful:
        with torch.no_grad(), model.disable_adapter():
            base = states(row)[:, row.num_prompt_tokens :]
        adapted = states(row)[:, row.num_prompt_tokens :]
        cosines.append(cosine_similarity(adapted, base, dim=-1).relu())
    return torch.cat(retain_errors, dim=1).mean(), torch.cat(cosines, dim=1).mean()


@pytest.mark.parametrize("first_depth", [0.0, 0.25])
def test_losses_and_gradients_equal_the_published_step(
    tiny_llama: Path, conversations: Conversations, tmp_path: Path, first_depth: float
) -> None:
    recipe = LLAMA.model_copy(
        update={
            "layers": (1, 2),
            "objective": ObjectiveRecipe(retain="absolute", retain_weight=1.0),
            "lora": LLAMA.lora.model_copy(update={"first_depth": first_depth}),
        }
    )
    retain = rendered(tiny_llama, conversations["retain"][:3])
    harmful = rendered(tiny_llama, conversations["harmful"][:3])
    streams = Streams(recipe, tiny_llama, torch.device("cpu"))
    with torch.no_grad():
        for parameter in streams.parameters.values():
            # The adapter is stored in bfloat16; both sides get the same numbers.
            parameter.copy_((parameter * 3).bfloat16().float())
    ours = batch_losses(recipe, streams, retain, harmful, step=30)
    ours.loss.backward()

    streams.save_adapter(tmp_path, base_name="tiny-llama")
    whole = AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation="eager").eval()
    reference = PeftModel.from_pretrained(whole, tmp_path, is_trainable=True).eval()
    retain_loss, reroute_loss = reference_losses(reference, retain, harmful, [1, 2])
    # alpha 10, t = 30 of T = 60: 10 * 30 / 120 and 10 * (1 - 30 / 120).
    loss = 2.5 * retain_loss + 7.5 * reroute_loss
    loss.backward()

    # Same formula, same weights, float32, other order of sums.
    assert ours.retain_loss.item() == pytest.approx(retain_loss.item(), rel=1e-5)
    assert ours.reroute_loss.item() == pytest.approx(reroute_loss.item(), rel=1e-5)
    assert ours.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    gradients = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    assert len(gradients) == (14 * (2 if first_depth else 3))  # A and B of 7 modules a block
    for name, parameter in streams.parameters.items():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5)


def test_reroute_gradient_is_not_zero_at_the_start(
    tiny_llama: Path, conversations: Conversations
) -> None:
    streams = Streams(LLAMA, tiny_llama, torch.device("cpu"))
    retain = rendered(tiny_llama, conversations["retain"][:4])
    harmful = rendered(tiny_llama, conversations["harmful"][:4])
    losses = batch_losses(LLAMA, streams, retain, harmful, step=0)
    losses.loss.backward()
    # At step 0 the retain coefficient is 0: all of the gradient is the reroute loss's.
    norms = {n: p.grad.norm().item() for n, p in streams.parameters.items() if p.grad is not None}
    assert len(norms) == len(streams.parameters)
    assert all(norm > 0 for norm in norms.values())


def test_company_and_padding_of_a_row_change_nothing(
    tiny_llama: Path, conversations: Conversations
) -> None:
    streams = Streams(LLAMA, tiny_llama, torch.device("cpu"))
    rows = sorted(rendered(tiny_llama, conversations["retain"]), key=lambda r: len(r.ids))
    short, long = rows[0], rows[-1]
    alone = streams.forward(torch.tensor([short.ids])).adapted[0][0]
    padded = pad_rows([short, long], ["response", "response"])
    together = streams.forward(padded.ids_BT).adapted[0][0, : len(short.ids)]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


# --- whole runs --------------------------------------------------------------------------------


def assert_reroutes(recipe: Recipe, model_dir: Path, rows: Conversations, out: Path) -> None:
    recipe = recipe.model_copy(update={"steps": 300})
    result = train_adapter(recipe, model_dir=model_dir, rows=TrainingRows(**rows), out=out)
    assert result.benign_cosine is not None
    assert result.harmful_cosine is not None
    # Both are 1 before training.
    assert result.benign_cosine > 0.9
    assert result.harmful_cosine < 0.3
    assert set(result.benign_cosine_by_source) == {"even", "odd"}
    layers = [str(layer) for layer in result.target_layers]
    for overall, by_layer in (
        (result.benign_cosine, result.benign_cosine_by_layer),
        (result.harmful_cosine, result.harmful_cosine_by_layer),
    ):
        assert list(by_layer) == layers
        # Each conversation counts as much at each layer.
        assert sum(by_layer.values()) / len(layers) == pytest.approx(overall, abs=1e-9)
    metrics = read_metrics(result.metrics_path)
    assert [entry["step"] for entry in metrics] == list(range(1, recipe.steps + 1))
    assert metrics[-1]["reroute_cosine"] < metrics[0]["reroute_cosine"]
    assert metrics[0]["retain_coefficient"] == 0.0
    assert 0 <= metrics[0]["padding_share"] < 0.6
    assert not (out / "checkpoint.safetensors").exists()


def assert_peft_reproduces(model_dir: Path, out: Path, recipe: Recipe) -> None:
    """A stock PEFT model with the saved adapter has the hidden states that training saw."""
    streams = Streams(recipe, model_dir, torch.device("cpu"))
    saved = load_file(out / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.bfloat16}
    with torch.no_grad():
        for name, parameter in streams.parameters.items():
            parameter.copy_(saved[name.replace(".default", "")])
    ids = torch.tensor([[5, 6, 40, 41, 12, 70]])
    ours = streams.forward(ids)
    whole = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="eager").eval()
    peft = PeftModel.from_pretrained(whole, out / "adapter").eval()
    with torch.no_grad():
        states = peft(ids, output_hidden_states=True).hidden_states
    target = streams.targets[0]
    torch.testing.assert_close(ours.adapted[0], states[target + 1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours.base[0], states[target + 1], rtol=1e-2, atol=1e-2)
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == recipe.model
    assert config["layers_to_transform"] == list(range(target + 1))
    assert config["inference_mode"] is True


def test_tiny_llama_is_rerouted_and_benign_stays(
    tiny_llama: Path, conversations: Conversations, tmp_path: Path
) -> None:
    assert_reroutes(LLAMA, tiny_llama, conversations, tmp_path)
    assert_peft_reproduces(tiny_llama, tmp_path, LLAMA)


def test_tiny_gpt2_with_conv1d_is_rerouted(
    tiny_gpt2: Path, conversations: Conversations, tmp_path: Path
) -> None:
    assert_reroutes(GPT2, tiny_gpt2, conversations, tmp_path)
    assert_peft_reproduces(tiny_gpt2, tmp_path, GPT2)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True


def test_bfloat16_run_with_progress_bar(
    tiny_llama: Path, conversations: Conversations, tmp_path: Path
) -> None:
    recipe = LLAMA.model_copy(update={"precision": "bf16", "steps": 8})
    with (tmp_path / "console").open("w") as file:
        console = Console(file=file, force_terminal=True, width=120)
        train_adapter(
            recipe,
            model_dir=tiny_llama,
            rows=TrainingRows(**conversations),
            out=tmp_path / "run",
            console=console,
        )
    shown = (tmp_path / "console").read_text()
    assert "8/8" in shown
    assert "cosine benign" in shown
    assert "eta" in shown


def test_complete_run_returns_its_result_again(
    tiny_llama: Path, conversations: Conversations, tmp_path: Path
) -> None:
    recipe = LLAMA.model_copy(update={"steps": 3})
    rows = TrainingRows(**conversations)
    first = train_adapter(recipe, model_dir=tiny_llama, rows=rows, out=tmp_path)
    written = first.metrics_path.stat().st_mtime_ns
    assert train_adapter(recipe, model_dir=tiny_llama, rows=rows, out=tmp_path) == first
    assert first.metrics_path.stat().st_mtime_ns == written
    other = recipe.model_copy(update={"seed": 1})
    with pytest.raises(ConfigError, match="trained with other settings or data"):
        train_adapter(other, model_dir=tiny_llama, rows=rows, out=tmp_path)


def test_blank_prompts_change_harmful_rows_alone(
    tiny_llama: Path, conversations: Conversations, tmp_path: Path
) -> None:
    rows = TrainingRows(retain=conversations["retain"], harmful=conversations["harmful"])
    recipe = LLAMA.model_copy(update={"steps": 2})
    blanked = recipe.model_copy(update={"data": DataRecipe(blank_prompt_share=1.0)})
    whole = train_adapter(recipe, model_dir=tiny_llama, rows=rows, out=tmp_path / "whole")
    blank = train_adapter(blanked, model_dir=tiny_llama, rows=rows, out=tmp_path / "blank")
    assert (whole.num_blanked, blank.num_blanked) == (0, len(rows.harmful))
    # The same conversations in the same order, each harmful one without its 3 to 5 words.
    for before, after in zip(
        read_metrics(whole.metrics_path), read_metrics(blank.metrics_path), strict=True
    ):
        fewer = before["num_tokens"] - after["num_tokens"]
        assert 3 * recipe.batch_size <= fewer <= 5 * recipe.batch_size
    # The result says what it was trained on.
    with pytest.raises(ConfigError, match="trained with other settings or data"):
        train_adapter(recipe, model_dir=tiny_llama, rows=rows, out=tmp_path / "blank")


def test_a_model_without_a_template_trains_on_the_plain_one(
    tiny_gpt2: Path, conversations: Conversations, tmp_path: Path
) -> None:
    model_dir = tmp_path / "model"
    shutil.copytree(tiny_gpt2, model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.chat_template = None
    (model_dir / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(model_dir)
    rows = TrainingRows(retain=conversations["retain"], harmful=conversations["harmful"])
    recipe = GPT2.model_copy(update={"steps": 2})
    with pytest.raises(ModelError, match="has no chat template"):
        train_adapter(recipe, model_dir=model_dir, rows=rows, out=tmp_path / "none")
    plain = recipe.model_copy(update={"chat_template": "plain"})
    result = train_adapter(plain, model_dir=model_dir, rows=rows, out=tmp_path / "plain")
    assert result.steps == 2


# --- killed and resumed ------------------------------------------------------------------------

RESUMABLE = LLAMA.model_copy(
    update={
        "steps": 80,
        "checkpoint_every": 5,
        "lora": LLAMA.lora.model_copy(update={"dropout": 0.1}),
    }
)
CHILD = """
import sys, torch
from pathlib import Path
from circuit_breakers_training.config import Recipe
from circuit_breakers_training.data.jsonl import read_conversations
from circuit_breakers_training.trainer import TrainingRows, train_adapter

torch.set_num_threads(1)
data = Path(sys.argv[3])
train_adapter(
    Recipe.model_validate_json(sys.argv[1]),
    model_dir=Path(sys.argv[2]),
    rows=TrainingRows(
        retain=read_conversations(data / "retain"), harmful=read_conversations(data / "harmful")
    ),
    out=Path(sys.argv[4]),
)
"""


@pytest.fixture(scope="module")
def killed(
    tiny_llama: Path, conversations: Conversations, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The output directory of a run that SIGKILL stopped between two checkpoints."""
    base = tmp_path_factory.mktemp("killed")
    for name in ("retain", "harmful"):
        write_conversations(base / name, conversations[name])
    out = base / "out"
    command = [sys.executable, "-c", CHILD, RESUMABLE.model_dump_json(), tiny_llama, base, out]
    child = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while len(read_metrics(metrics)) < 12:
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert (out / "checkpoint.safetensors").exists()
    return out


def copied(run: Path, to: Path) -> Path:
    for file in run.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_resumed_run_has_the_losses_of_an_uninterrupted_one(
    tiny_llama: Path, conversations: Conversations, killed: Path, tmp_path: Path
) -> None:
    rows = TrainingRows(retain=conversations["retain"], harmful=conversations["harmful"])
    (tmp_path / "resumed").mkdir()
    (tmp_path / "whole").mkdir()
    out = copied(killed, tmp_path / "resumed")
    # A kill may leave half a line and a half-written checkpoint.
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9')
    (out / ".checkpoint.safetensors.partial").write_bytes(b"half")
    before = read_metrics(out / "metrics.jsonl")
    resumed = train_adapter(RESUMABLE, model_dir=tiny_llama, rows=rows, out=out)
    whole = train_adapter(RESUMABLE, model_dir=tiny_llama, rows=rows, out=tmp_path / "whole")

    ours = read_metrics(resumed.metrics_path)
    # The first checkpoints' steps were not run again: even their times are as they were.
    assert ours[:10] == before[:10]
    assert without_time(ours) == without_time(read_metrics(whole.metrics_path))
    a = load_file(resumed.adapter_dir / "adapter_model.safetensors")
    b = load_file(whole.adapter_dir / "adapter_model.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("change", ["recipe", "data"])
def test_checkpoint_of_another_run_is_refused(
    tiny_llama: Path, conversations: Conversations, killed: Path, tmp_path: Path, change: str
) -> None:
    out = copied(killed, tmp_path)
    recipe, harmful = RESUMABLE, conversations["harmful"]
    if change == "recipe":
        recipe = recipe.model_copy(update={"learning_rate": 2e-2})
    else:
        harmful = harmful[1:]
    rows = TrainingRows(retain=conversations["retain"], harmful=harmful)
    with pytest.raises(ConfigError, match="run with other settings or data"):
        train_adapter(recipe, model_dir=tiny_llama, rows=rows, out=out)


def test_damaged_checkpoint_is_refused(
    tiny_llama: Path, conversations: Conversations, killed: Path, tmp_path: Path
) -> None:
    out = copied(killed, tmp_path)
    checkpoint = out / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    rows = TrainingRows(retain=conversations["retain"], harmful=conversations["harmful"])
    with pytest.raises(ConfigError, match=r"is damaged .* delete it to train from the start"):
        train_adapter(RESUMABLE, model_dir=tiny_llama, rows=rows, out=out)


# --- what a user can get wrong -----------------------------------------------------------------


def test_no_conversation_of_a_kind_is_refused(
    tiny_llama: Path, conversations: Conversations, tmp_path: Path
) -> None:
    rows = TrainingRows(retain=conversations["retain"], harmful=[])
    with pytest.raises(DataError, match="got 0 harmful conversations"):
        train_adapter(LLAMA, model_dir=tiny_llama, rows=rows, out=tmp_path)


def test_module_that_the_model_lacks_is_refused(tiny_gpt2: Path) -> None:
    lora = LLAMA.lora.model_copy(update={"target_modules": ("q_proj",)})
    recipe = LLAMA.model_copy(update={"model": "tiny-gpt2", "lora": lora})
    with pytest.raises(ConfigError, match=r"expected some of .*c_attn"):
        Streams(recipe, tiny_gpt2, torch.device("cpu"))


def test_all_linear_finds_the_modules_of_every_block(tiny_gpt2: Path) -> None:
    recipe = LLAMA.model_copy(update={"model": "tiny-gpt2"})
    streams = Streams(recipe, tiny_gpt2, torch.device("cpu"))
    modules = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in streams.parameters}
    assert modules == {"c_attn", "c_proj", "c_fc"}


def test_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot load"):
        Streams(LLAMA, tmp_path, torch.device("cpu"))


def test_loss_that_is_not_finite_stops_the_run(
    tiny_llama: Path, conversations: Conversations, tmp_path: Path
) -> None:
    recipe = LLAMA.model_copy(update={"learning_rate": 1e30})
    with pytest.raises(ConfigError, match="expected a finite number; lower learning_rate"):
        train_adapter(
            recipe, model_dir=tiny_llama, rows=TrainingRows(**conversations), out=tmp_path
        )
    assert all(math.isfinite(e["loss"]) for e in read_metrics(tmp_path / "metrics.jsonl"))
