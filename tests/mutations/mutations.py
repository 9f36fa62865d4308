"""Small wrong edits of the product, each a fault that users would suffer; the default tests notice them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One edit of one file.

    Args:
        old: stands once in the file.
        new: stands there instead.
        harm: what a user would suffer.
        tests: files, or tests of a file that takes longer, of which at least one fails.
    """

    name: str
    file: str
    old: str
    new: str
    harm: str
    tests: tuple[str, ...]


MUTATIONS = (
    Mutation(
        name="end_token_not_trained",
        file="capas/chat/scaffold.py",
        old="return found.end() if name in planner.ends.stops else found.start()",
        new="return found.start()",
        harm="The tuned model never learns to stop.",
        tests=("tests/chat/test_chat.py",),
    ),
    Mutation(
        name="control_token_parsed_from_content",
        file="capas/chat/tokenizer.py",
        old="self._built[key].encode_special_tokens = True",
        new="self._built[key].encode_special_tokens = False",
        harm="A content that holds <|im_end|> forges the end of its turn.",
        tests=("tests/chat/test_chat.py",),
    ),
    Mutation(
        name="mask_shifted_by_one",
        file="capas/chat/formatting.py",
        old="labels = np.where(columns.trained.values,",
        new="labels = np.where(np.roll(columns.trained.values, 1),",
        harm="The first token of every answer carries no loss, and the token after its end does.",
        tests=("tests/chat/test_format.py",),
    ),
    Mutation(
        name="padding_masked_by_token_id",
        file="capas/training/batches.py",
        old='batch["attention_mask"][row, :length] = 1',
        new='batch["attention_mask"][row, :length] = (example["input_ids"] != self.pad_token_id).long()',
        harm="Where the pad token is the end token, the ends of earlier turns are hidden in the training.",
        tests=(
            "tests/training/test_train.py::test_padding_carries_no_loss_and_is_masked_by_position",
        ),
    ),
    Mutation(
        name="record_dropped_without_being_counted",
        file="capas/dataset/selection.py",
        old="            self.dropped[reason] = marks\n",
        new="",
        harm="Duplicates and leaks vanish from the data, and no report says so.",
        tests=("tests/dataset/test_fetch_sources.py",),
    ),
    Mutation(
        name="arguments_of_a_call_lost",
        file="capas/dataset/calls.py",
        old="    if not given and others:\n",
        new="    if not given and others and False:\n",
        harm="A call whose arguments have an unknown name is trained as one without arguments.",
        tests=("tests/dataset/test_tool_calls.py",),
    ),
    Mutation(
        name="untrained_answer_trained",
        file="capas/dataset/message.py",
        old='    return role not in ("assistant", TEXT) or all(trained.values())\n',
        new="    return True\n",
        harm="Answers marked as wrong (loss: false, weight: 0) are trained.",
        tests=("tests/dataset/test_names.py",),
    ),
    Mutation(
        name="leak_into_test_kept",
        file="capas/dataset/splits.py",
        old="np.concatenate([of[VALIDATION], of[TEST]])",
        new="of[VALIDATION]",
        harm="Prompts of the test split are trained on, and the scores are too good.",
        tests=("tests/dataset/test_splits.py",),
    ),
    Mutation(
        name="undeclared_param_readable",
        file="capas/core/stage.py",
        old="return select(read_yaml(root / PARAMS), keys) if keys else {}",
        new="return read_yaml(root / PARAMS)",
        harm="A stage computes with a value whose change does not rerun it.",
        tests=("tests/core/test_stage.py",),
    ),
    Mutation(
        name="edited_inputs_not_noticed",
        file="capas/core/stage.py",
        old="        _check_unchanged(before, _state(spec, root, CodeReader(root)))\n",
        new="",
        harm="DVC records an old result under inputs that were edited while the stage ran.",
        tests=("tests/core/test_stage.py",),
    ),
    Mutation(
        name="half_written_output_in_place",
        file="capas/core/stage.py",
        old='partial = final.with_name(f".{final.name}.partial")',
        new="partial = final",
        harm="A stage that fails leaves half of an output where the old one was.",
        tests=("tests/core/test_stage.py",),
    ),
    Mutation(
        name="checkpoint_of_other_inputs_resumed",
        file="capas/core/stage.py",
        old='parent / f"{self.name}-{self.key()}"',
        new='parent / f"{self.name}-last"',
        harm="A training on new data goes on from a checkpoint of the old data.",
        tests=("tests/core/test_stage.py",),
    ),
    Mutation(
        name="half_written_checkpoint_resumed",
        file="capas/training/checkpoints.py",
        old="return mark.exists() and json.loads(mark.read_text()) == _digests(checkpoint)",
        new="return mark.exists()",
        harm="A training goes on from a checkpoint that a kill or a full disk cut short.",
        tests=("tests/training/test_train.py::test_half_written_checkpoint_is_passed_over",),
    ),
    Mutation(
        name="loss_not_weighted_by_tokens",
        file="capas/training/objective.py",
        old='return {"loss": float(loss / count),',
        new='rows = prediction.predictions\n        return {"loss": float((rows[:, 0] / rows[:, 2]).mean()),',
        harm="Short answers count as much as long ones, and another checkpoint is the best one.",
        tests=(
            "tests/training/test_train.py::test_validation_loss_is_the_mean_over_supervised_tokens",
        ),
    ),
    Mutation(
        name="interval_too_narrow",
        file="capas/evaluation/comparison.py",
        old="inv_cdf((1 + confidence_fraction) / 2), len(weight))",
        new="inv_cdf(confidence_fraction), len(weight))",
        harm="An interval of 95% holds 90%, and chance passes for a gain.",
        tests=("tests/evaluation/test_metrics.py",),
    ),
    Mutation(
        name="gate_passes_without_gain",
        file="capas/evaluation/gate.py",
        old='"passed": low > 0}',
        new='"passed": high > 0}',
        harm="A model that is not shown to be better than its base is registered.",
        tests=("tests/evaluation/test_gate.py",),
    ),
    Mutation(
        name="forgetting_by_its_better_end",
        file="capas/evaluation/gate.py",
        old='forgotten["high"]',
        new='forgotten["low"]',
        harm="A model that may have forgotten more than the limit is registered.",
        tests=("tests/evaluation/test_gate.py",),
    ),
    Mutation(
        name="noise_in_one_direction_is_chance",
        file="capas/evaluation/noise.py",
        old="if is_proven else 0.0",
        new="if False else 0.0",
        harm="A gain that wrong padding makes passes.",
        tests=("tests/evaluation/test_noise.py",),
    ),
    Mutation(
        name="merged_model_not_compared",
        file="capas/use/merge.py",
        old='if not facts["difference"] <= facts["tolerance"]:',
        new='if facts["difference"] > facts["tolerance"] * float("inf"):',
        harm="A merged model that answers otherwise than the tuned one is handed on.",
        tests=("tests/use/test_merge.py::test_a_model_that_differs_is_not_written",),
    ),
    Mutation(
        name="base_weights_trained",
        file="capas/training/adapted_model.py",
        old="    lora.check_untied(model)\n",
        new="    lora.check_untied(model)\n    model.get_input_embeddings().weight.requires_grad_(True)\n",
        harm="The adapter fits a base that nobody has: its weights moved in the training and are lost.",
        tests=("tests/training/test_train.py::test_training_leaves_the_base_bit_identical",),
    ),
    Mutation(
        name="seed_not_used",
        file="capas/training/adapted_model.py",
        old="set_seed(params.trainer.seed)",
        new="set_seed(0)",
        harm="Replicates with other seeds begin with the same adapter, and their spread is too small.",
        tests=("tests/training/test_lora.py",),
    ),
    Mutation(
        name="lora_b_not_zero",
        file="capas/training/lora.py",
        old='LoraConfig(task_type="CAUSAL_LM", **lora.without(*OWN))',
        new='LoraConfig(task_type="CAUSAL_LM", **{**lora.without(*OWN), "init_lora_weights": False})',
        harm="The training begins with a damaged model instead of the base.",
        tests=("tests/training/test_lora.py",),
    ),
    Mutation(
        name="quantization_silently_none",
        file="stages/quantize_model.py",
        old='quantize = not stored and (asked["load_in_4bit"] or asked["load_in_8bit"])',
        new="quantize = False",
        harm="quantization=nf4 trains and evaluates a base in full precision.",
        tests=("tests/models/test_quantize.py::test_method_and_sizes_are_measured",),
    ),
    Mutation(
        name="sweep_point_run_twice",
        file="capas/sweep/point.py",
        old="        status = CACHED if found else DONE\n",
        new="        found, status = None, DONE\n",
        harm="The same sweep again trains for hours what it has already.",
        tests=("tests/sweep/test_sweep.py::test_a_point_without_overrides_is_one",),
    ),
    Mutation(
        name="scores_of_another_record",
        file="capas/training/record_scores.py",
        old="rows = dict(zip(order, scores, strict=True))",
        new="rows = dict(enumerate(scores))",
        harm="A sweep pairs the scores of different records, and sees no difference between its settings.",
        tests=(
            "tests/training/test_train.py::test_scores_of_records_go_back_to_the_order_of_the_split",
        ),
    ),
    Mutation(
        name="records_do_not_count",
        file="capas/sweep/ranking.py",
        old="    records = sign * stacked(scores) if by_record else None\n",
        new="    records = sign * 0 * stacked(scores) if by_record else None\n",
        harm="A sweep promotes a setting that only these few records favour.",
        tests=("tests/sweep/test_records.py::test_seeds_and_records_are_covered_together",),
    ),
    Mutation(
        name="publish_makes_a_second_run",
        file="stages/publish_run.py",
        old="found = store.find_or_create(\n                key,",
        new='found = store.find_or_create(\n                f"{key}-{time.time_ns()}",',
        harm="Every `dvc repro` leaves one more run of the same training in MLflow.",
        tests=("tests/tracking/test_publish.py::test_a_second_publish_changes_nothing",),
    ),
    Mutation(
        name="hand_edit_of_params_lost",
        file="capas/config/adoption.py",
        old="    if written_by_dvc or conf_unchanged or options.keep:\n        return True\n",
        new="    if written_by_dvc or conf_unchanged or options.keep:\n        return False\n",
        harm="A value edited in params.yaml is overwritten without a word.",
        tests=(
            "tests/config/test_compose.py::test_an_adopted_key_is_named_when_its_file_is_edited",
        ),
    ),
    Mutation(
        name="near_duplicates_split",
        file="capas/dataset/splits.py",
        old="    return of_cluster[labels]\n",
        new="    return of_cluster[np.arange(len(labels)) % len(of_cluster)]\n",
        harm="Nearly the same question is trained and tested: the score is memory.",
        tests=("tests/dataset/test_similar.py",),
    ),
    Mutation(
        name="gate_without_the_copies",
        file="capas/evaluation/gate.py",
        old='    if name in evaluation["difference_to_nearest"]:\n',
        new="    if False:\n",
        harm="A model that is no better than copying training answers is registered.",
        tests=("tests/evaluation/test_gate.py",),
    ),
    Mutation(
        name="copies_another_answer",
        file="capas/evaluation/nearest.py",
        old="best = similarities.argmax(axis=1)",
        new="best = similarities.argmin(axis=1)",
        harm="The baseline copies the least similar answer, and every model beats it.",
        tests=("tests/evaluation/test_nearest.py",),
    ),
    Mutation(
        name="a_value_inside_a_number",
        file="capas/evaluation/copied.py",
        old="    return re.search(pattern, text) is not None\n",
        new="    return value in text\n",
        harm="410 EUR counts as the 41 EUR that were asked about.",
        tests=("tests/evaluation/test_nearest.py",),
    ),
    Mutation(
        name="answers_cut_at_the_longest_reference",
        file="capas/evaluation/prompts.py",
        old="    return longest + max(8, longest // 4)\n",
        new="    return longest // 2\n",
        harm="Right answers are cut off, and the model looks worse than it is.",
        tests=("tests/evaluation/test_evaluate.py",),
    ),
    Mutation(
        name="results_paired_by_id_alone",
        file="capas/compare/scores.py",
        old='if same_prompts else ("id", "reference")',
        new='if same_prompts is None else ("id",)',
        harm="Two data sets with equal ids are compared as if their test records were the same.",
        tests=("tests/compare/test_compare.py::test_other_test_records_are_not_compared",),
    ),
    Mutation(
        name="answers_of_another_result",
        file="capas/compare/outputs.py",
        old="return here if here.is_file() and md5(here) == wanted else None",
        new="return here if here.is_file() else None",
        harm="The answers in the workspace are taken for those of another commit.",
        tests=(
            "tests/compare/test_compare.py::test_a_file_of_the_workspace_counts_if_it_is_the_recorded_one",
        ),
    ),
    Mutation(
        name="cut_lock_believed",
        file="capas/core/lockfile.py",
        old="    return md5 is not None and all(isinstance(item.get(count), int) for count in counts)",
        new="    return all(isinstance(item.get(count), int) for count in counts)",
        harm="DVC takes a result for recorded whose digest was cut when it was killed.",
        tests=("tests/core/test_lockfile.py",),
    ),
    Mutation(
        name="stashed_edits_forgotten",
        file="capas/workspace/experiment_recovery.py",
        old="*(_reset_by_dvc(root, before, then) if before.phase == PREPARING else [])",
        new="*[]",
        harm="Edits in conf/ that DVC had stashed when it was killed are gone.",
        tests=("tests/workspace/test_restore.py::test_edits_that_dvc_holds_in_a_stash_come_back",),
    ),
    Mutation(
        name="lock_of_the_other_side_ignored",
        file="capas/workspace/conflict.py",
        old="chosen[spec.name] = (fits or candidates)[0]",
        new="chosen[spec.name] = candidates[0]",
        harm="After a merge every stage runs again, though the other side has its result.",
        tests=(
            "tests/workspace/test_conflict.py::test_both_values_are_there_and_one_stage_runs_again",
        ),
    ),
)
