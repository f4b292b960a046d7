"""The methods of TRL and transformers that the trainers override or call: a change of one must be noticed at once."""

import inspect

import pytest
import trl
from transformers import GenerationMixin
from trl import GRPOTrainer, SFTTrainer
from trl.trainer import utils

SIGNATURES = {
    (GRPOTrainer, "_generate_and_score_completions"): "self inputs",
    (GRPOTrainer, "_tokenize_prompts"): "self prompts",
    (
        GRPOTrainer,
        "_generate_single_turn",
    ): "self prompt_ids images multimodal_fields num_generations has_tool_images",
    (GRPOTrainer, "_calculate_rewards"): "self inputs prompts completions completion_ids_list",
    (GRPOTrainer, "_compute_loss"): "self model inputs",
    (GRPOTrainer, "_log_completion_extra"): "self column values",
    (GRPOTrainer, "log"): "self logs start_time",
    (SFTTrainer, "log"): "self logs start_time",
    (GenerationMixin, "prepare_inputs_for_generation"): "self input_ids next_sequence_length past_key_values "
    "attention_mask inputs_embeds is_first_iteration kwargs",
}
# The first parameters, which the override names; stock TRL adds those of images, which it takes as keywords.
SCORING = "self model input_ids attention_mask logits_to_keep batch_size compute_entropy"


def test_trl_is_the_minor_the_hooks_were_written_for():
    assert trl.__version__.startswith("1.16.")


@pytest.mark.parametrize(("owner", "name"), SIGNATURES)
def test_signature(owner, name):
    assert " ".join(inspect.signature(getattr(owner, name)).parameters) == SIGNATURES[owner, name]


def test_signature_of_the_scoring_pass():
    names = list(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)
    assert " ".join(names[:7]) == SCORING


def test_where_each_hook_is_called():
    """The order in which TRL's own code reaches the hooks, on which the trainer's notes of rows and banks rest."""
    generate = inspect.getsource(GRPOTrainer._generate)
    assert generate.index("self._tokenize_prompts(prompts)") < generate.index("self._generate_single_turn(")
    scoring = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    places = ["self._generate(prompts)", "self.ref_model,", "self._calculate_rewards(", "output = {"]
    assert [scoring.index(place) for place in places] == sorted(scoring.index(place) for place in places)
    prepare = inspect.getsource(GRPOTrainer._prepare_inputs)
    assert "shuffle_sequence_dict(" in prepare and "split_tensor_dict(" in prepare
    loss = inspect.getsource(GRPOTrainer._compute_loss)
    assert "self._get_per_token_logps_and_entropies(" in loss


def test_the_fused_head_passes_unknown_inputs_to_the_backbone():
    source = inspect.getsource(utils.add_fused_lm_head)
    assert "getattr(self, backbone_attr)(*args, **kwargs)" in source
    assert "last_hidden_state[:, :-1]" in source and "labels[:, 1:]" in source


def test_rows_survive_shuffling_and_splitting():
    import torch

    rows = {"prompt_rows": torch.arange(8), "prompt_ids": torch.arange(8)[:, None]}
    for part in utils.split_tensor_dict(utils.shuffle_sequence_dict(rows), 2):
        assert torch.equal(part["prompt_rows"], part["prompt_ids"][:, 0])
