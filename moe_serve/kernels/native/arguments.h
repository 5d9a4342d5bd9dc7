// What is handed over in structures: plain C, the same for all instruction sets. Python's copies
// are in the cpu.py of each kernel, and in forward/cpu.py; ms_sizes lets it check that they agree.
#pragma once

namespace ms {

// A weight packed by linear.h, [out_features, in_features]; bias: [out_features], or null.
struct LinearWeights {
    const void* packed;
    const void* bias;
    int64_t out_features, in_features;
};

// How a layer's projection becomes what attention reads.
struct HeadsArguments {
    int64_t num_heads, num_kv_heads, head_dim;
    const void *query_norm, *key_norm;  // weights, or null
    const float *cos, *sin;             // [max_model_len, head_dim / 2]
    int32_t is_norm_full;               // over all heads at once, not over each
    float norm_eps;
    float clip;  // bounds of what the projection gave; 0: none
};

enum RouterScore : int32_t { kSoftmax, kSigmoid, kSoftmaxAfterTopK, kSqrtSoftplus };

// RouterRecipe of types.py.
struct RouterArguments {
    int32_t score;
    int32_t num_experts, top_k;
    int32_t num_groups, top_k_groups, group_score_top;
    int32_t renormalise;
    float renormalise_eps;
    float scale;
    const float* selection_bias;  // [num_experts], or null
};

// One layer's experts: where their records are, and counts of their use.
struct ExpertTable {
    const char* records;
    int64_t record_bytes;
    const int32_t* slot_of_expert;  // [num_experts]
    int64_t* uses;                  // [num_experts], or null
    int64_t num_experts, hidden_size, intermediate_size;
};

// Queries of one sequence that are computed together: tokens first_row .. + count of the batch, at
// positions first_position .. + count.
struct AttentionTile {
    int32_t sequence, first_row, first_position, count;
};

// What all layers of a cache group share in a step.
struct AttentionPlan {
    int64_t num_tiles;
    const AttentionTile* tiles;
    const int32_t* block_table;  // [num_seqs, table_stride]
    int64_t table_stride;
    int32_t block_size;
    int32_t window;  // 0: none
};

struct LayerArguments {
    const void* attention_norm;
    const void* mlp_norm;
    LinearWeights qkv, output;
    HeadsArguments heads;
    void *key_cache, *value_cache;  // [num_kv_heads, num_slots, head_dim]
    int64_t num_slots;
    float scale;
    int32_t group;  // cache group
    int32_t is_moe;
    LinearWeights gate_up, down;  // a dense MLP, or the shared expert (packed null: none)
    LinearWeights router_weights;  // float
    RouterArguments router;
    ExpertTable experts;
    const float* shared_gate;  // [hidden_size], or null
};

struct ModelArguments {
    int64_t num_layers;
    const LayerArguments* layers;
    const void* embedding;
    const void* norm;
    int64_t hidden_size;
    float norm_eps;
    int32_t is_embedding_packed;
};

// token_ids, positions: [num_tokens]; slots and plans: one for each cache group.
struct StepArguments {
    int64_t num_tokens;
    const int64_t *token_ids, *positions;
    const int64_t* const* slots;
    const AttentionPlan* plans;
};

constexpr int64_t kMostChoices = 64, kMostStages = 16;

// The state of predictor learned_ids for a step. padded: num_layers + reach.
struct LearnedIds {
    float *table, *scale;  // [rows, num_experts], [rows]
    int64_t num_experts, num_layers, top_k;
    int64_t reach, near;  // layers that an observed one speaks about; distances with a stage
    int64_t num_rows;     // that make a guess
    int64_t num_sequences;
    int64_t pad;                  // the first of `reach` rows that are zeros
    const int32_t* stage_of_row;  // [num_rows]
    float* logits;                // [num_sequences, padded, num_experts]
    float* guesses;               // [learned, padded, near + 1, num_experts]
    int64_t* rows;                // [learned, padded, num_rows]
    float rate, last_scale;
};

struct Arrivals;  // of transfers.h

// Where a forward pass stands that stops for experts which are not resident, and what it is told.
struct Progress {
    int64_t layer;          // where to begin or go on; afterwards where it stopped, or num_layers
    int32_t is_routed;      // that layer's tokens are routed: its experts are next
    int32_t stops;          // 0: never; 1: where an expert is missing; 2: after every router
    int32_t is_last;        // of the calls for this layer's experts: combine, and go on
    int32_t is_forced;      // ids and weights are read, not written: routing as once recorded
    const uint8_t* only;    // [num_experts], the experts to run in this call, or null: all
    int64_t* ids;           // [num_layers, num_tokens, top_k], to note each router's choice, or null
    float* weights;         // the same for the weights
    Arrivals* arrivals;     // experts to run in this call, after those in `only`, or null
};

}  // namespace ms
