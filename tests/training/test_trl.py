"""A prepared model under trl's SFTTrainer: the losses of the same model unprepared."""

import pytest
import tiny
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

import hf_longattn

trl = pytest.importorskip("trl", reason="trl is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")
CHAT = (
    "{% for m in messages %}{{ m.role == 'user' and 'w90 ' or 'w91 ' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }} {% endgeneration %}{% else %}{{ m.content }} {% endif %}{% endfor %}"
)


def words(generator, count):
    return " ".join(f"w{i}" for i in torch.randint(3, 90, (count,), generator=generator).tolist())


def rows(kind, count=16):
    """Short texts of several lengths: plain, with a prompt, or as turns of a chat."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for index in range(count):
        parts = [words(generator, 4 + (3 * index + turn) % 7) for turn in range(4)]
        made = {
            "text": {"text": " ".join(parts)},
            "completion": {"prompt": parts[0] + " ", "completion": " ".join(parts[1:])},
            "chat": {
                "messages": [
                    {"role": ("user", "assistant")[turn % 2], "content": part}
                    for turn, part in enumerate(parts)
                ]
            },
        }
        found.append(made[kind])
    return datasets.Dataset.from_list(found)


@pytest.fixture(scope="module")
def tokenizer():
    kernel = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w1"))
    kernel.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "w0", "eos_token": "w2", "unk_token": "w1"}
    fast = tf.PreTrainedTokenizerFast(tokenizer_object=kernel, **names)
    fast.chat_template = CHAT
    return fast


class Losses(tf.TrainerCallback):
    def __init__(self):
        self.values = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in {"loss", "eval_loss", "grad_norm", "mean_token_accuracy"} & {*(logs or {})}:
            self.values[name, state.global_step] = logs[name]


def train(folder, tokenizer, kind, fields=None, adapter=None, resume=None, **changes):
    """Losses and gradient norms by step; `fields` of `prepare_training`, or None to leave the model plain."""
    # Eager attention forgets about packing.
    model, losses = tiny.build("llama", "blockwise_attention"), Losses()
    if fields is not None:
        hf_longattn.prepare_training(model, block_size=16, loss_chunk_size=20, **fields)
    options = {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3,
        "per_device_eval_batch_size": 4, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 3,
        "save_strategy": "no", "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True,
        "dataloader_pin_memory": False, "max_length": 64, "loss_type": "nll",
    }  # fmt: skip
    trainer = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(**{**options, **changes}),
        train_dataset=rows(kind),
        eval_dataset=rows(kind, 4),
        processing_class=tokenizer,
        callbacks=[losses],
        peft_config=adapter,
    )
    trainer.train(resume_from_checkpoint=resume)
    return losses.values


def assert_close(result, expected):
    assert result.keys() == expected.keys() and len(result) >= 8
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, rel=1e-4), name


PACKING = {"packing": True, "eval_packing": True}
CASES = {
    "completion": ("completion", {}),
    "packed": ("text", {**PACKING, "packing_strategy": "bfd"}),
    "packed-and-cut": ("text", {**PACKING, "packing_strategy": "wrapped", "max_length": 32}),
    "padding-free": ("completion", {"padding_free": True, "max_length": None}),
    "assistant": ("chat", {"assistant_only_loss": True}),
    "dft": ("completion", {"loss_type": "dft"}),
    "label-smoothing": ("completion", {"label_smoothing_factor": 0.2}),
    "accumulation": ("completion", {"gradient_accumulation_steps": 2}),
}
FAST = ("packed", "assistant")


@pytest.mark.parametrize(
    "case", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_losses_equal_those_of_the_plain_model(case, tmp_path, tokenizer):
    kind, changes = CASES[case]
    expected = train(tmp_path, tokenizer, kind, **changes)
    assert_close(train(tmp_path, tokenizer, kind, {}, **changes), expected)


@pytest.mark.slow
def test_lora_by_the_trainer(tmp_path, tokenizer):
    adapter = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    results = []
    for fields in (None, {}):
        torch.manual_seed(0)
        results.append(train(tmp_path, tokenizer, "completion", fields, adapter))
    assert_close(results[1], results[0])


@pytest.mark.slow
def test_a_resumed_run_repeats_the_losses(tmp_path, tokenizer):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_steps": 4}
    whole = train(tmp_path / "whole", tokenizer, "text", {}, **PACKING, **options)
    resumed = train(
        tmp_path / "again", tokenizer, "text", {}, resume=str(tmp_path / "whole" / "checkpoint-2"),
        **PACKING, **options,
    )  # fmt: skip
    tail = {name: value for name, value in whole.items() if name[1] > 2}
    assert tail and {name: value for name, value in resumed.items() if name[1] > 2} == tail
