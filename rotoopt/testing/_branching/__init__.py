"""Models that branch in different ways, as real models do. The library has no special case for any of them."""

from rotoopt.testing._branching import batches, head_inputs, per_head

BRANCHING = (
    head_inputs.unet_skips,
    head_inputs.detr_decoder,
    head_inputs.self_attention_heads,
    head_inputs.keyword_attention_heads,
    head_inputs.list_of_levels,
    head_inputs.nested_inputs,
    head_inputs.condition_first,
    head_inputs.lstm_state,
    head_inputs.siamese,
    per_head.pooled_and_dense,
    per_head.dropout_per_head,
    per_head.cast_per_head,
    per_head.auxiliary_head,
    per_head.sequence_and_last_state,
    per_head.encoder_and_decoder,
    per_head.experts_and_gates,
    per_head.attention_per_task,
    per_head.distillation,
    per_head.pyramid_with_shared_heads,
    per_head.actor_and_critic,
    per_head.variational,
    per_head.nodes_and_graph,
    per_head.other_sizes,
    per_head.detached_and_not,
    per_head.losses_as_heads,
    batches.batch_per_domain,
    batches.rows_per_task,
    batches.one_tensor,
)
