"""transformers' common model tests on tiny models, run by `run_transformers_tests.py`.

There the name "sdpa", which every model takes by default, leads to one of our implementations: the whole
suite runs on it, and the tests that compare sdpa with eager compare ours with eager.
"""

import re
import unittest

import transformers as tf
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssPreTrainedModel
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_modeling_common import ModelTesterMixin, ids_tensor

from hf_longattn import (
    BlockTransformerConfig,
    BlockTransformerForCausalLM,
    BlockTransformerModel,
    LightningConfig,
    LightningForCausalLM,
    LightningModel,
)

# transformers never gives GPT-OSS sdpa, which drops its sinks. Here the name leads to ours, which keep them.
GptOssPreTrainedModel._supports_sdpa = True

# Tests that are about something that our implementations refuse by name, and why.
REFUSED = {
    "output_attentions|test_capture_outputs_decorator|test_model_outputs_equivalence": (
        "asks for attention weights, which are never built: `output_attentions=True` is refused"
    ),
}

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LAYER_TYPES = ["sliding_attention", "full_attention"]


class Tester:
    """What the common tests ask of a model tester: a tiny config, a batch, and the sizes they read."""

    batch_size, seq_length, is_training, num_labels, num_choices = 5, 9, True, 3, 4

    def __init__(self, parent, config_class, changes):
        self.parent, self.config_class = parent, config_class
        self.changes = {name: value for name, value in {**SMALL, **changes}.items() if value is not None}
        self.num_hidden_layers = self.changes["num_hidden_layers"]
        self.hidden_size, self.vocab_size = self.changes["hidden_size"], self.changes["vocab_size"]
        self.num_attention_heads = self.changes["num_attention_heads"]

    def get_config(self):
        return self.config_class(**self.changes, num_labels=self.num_labels)

    def prepare_config_and_inputs_for_common(self):
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        # Rows of growing length, padded on the right.
        attention_mask = input_ids.new_ones(input_ids.shape).tril(self.seq_length - self.batch_size)
        return self.get_config(), {"input_ids": input_ids, "attention_mask": attention_mask}

    prepare_config_and_inputs = prepare_config_and_inputs_for_common


class Common(ModelTesterMixin, GenerationTesterMixin):
    """The common tests on one family; a subclass names its config and its classes."""

    config_class = None
    changes: dict = {}
    # What a model of ours is not, and why.
    different: dict = {}

    def setUp(self):
        for pattern, reason in {**REFUSED, **self.different}.items():
            if re.search(pattern, self._testMethodName):
                self.skipTest(reason)
        self.model_tester = Tester(self, self.config_class, self.changes)


class LlamaTest(Common, unittest.TestCase):
    config_class = tf.LlamaConfig
    all_model_classes = (tf.LlamaModel, tf.LlamaForCausalLM, tf.LlamaForSequenceClassification)


class Qwen3Test(Common, unittest.TestCase):
    config_class, changes = tf.Qwen3Config, {"head_dim": 12}
    all_model_classes = (tf.Qwen3Model, tf.Qwen3ForCausalLM, tf.Qwen3ForTokenClassification)


class MistralTest(Common, unittest.TestCase):
    config_class, changes = tf.MistralConfig, {"sliding_window": 4}
    all_model_classes = (tf.MistralModel, tf.MistralForCausalLM, tf.MistralForSequenceClassification)


class Gemma2Test(Common, unittest.TestCase):
    config_class = tf.Gemma2Config
    changes = {"head_dim": 8, "sliding_window": 4, "layer_types": LAYER_TYPES, "query_pre_attn_scalar": 8}
    all_model_classes = (tf.Gemma2Model, tf.Gemma2ForCausalLM, tf.Gemma2ForSequenceClassification)


class GPTNeoXTest(Common, unittest.TestCase):
    # Heads of 16, a quarter of them rotary: less leaves the scaled rotary embeddings nothing to scale.
    config_class, changes = tf.GPTNeoXConfig, {"hidden_size": 64}
    all_model_classes = (tf.GPTNeoXModel, tf.GPTNeoXForCausalLM, tf.GPTNeoXForSequenceClassification)


class GptOssTest(Common, unittest.TestCase):
    config_class = tf.GptOssConfig
    changes = {
        "head_dim": 8, "sliding_window": 4, "layer_types": LAYER_TYPES, "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }  # fmt: skip
    all_model_classes = (tf.GptOssModel, tf.GptOssForCausalLM, tf.GptOssForSequenceClassification)


class LightningTest(Common, unittest.TestCase):
    config_class, changes = LightningConfig, {"num_key_value_heads": None}
    different = {
        "test_attention_outputs|test_retain_grad": "a lightning layer has no attention weights",
        "test_model_rope_scaling": "no layer is rotary",
    }
    all_model_classes = (LightningModel, LightningForCausalLM)


class LightningHybridTest(LightningTest):
    changes = {"num_key_value_heads": None, "lightning_layers": [0]}
    different = {"test_attention_outputs|test_retain_grad": "a lightning layer has no attention weights"}


class BlockTransformerTest(Common, unittest.TestCase):
    config_class, changes = BlockTransformerConfig, {"decoder_type": "llama"}
    different = {
        "test_attention_outputs": "attention maps are of blocks and inside blocks, not of T x T tokens",
        "test_retain_grad": "reads the first token's logits, which are uniform and depend on nothing",
    }
    all_model_classes = (BlockTransformerModel, BlockTransformerForCausalLM)
