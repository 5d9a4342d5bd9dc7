// The C functions of one instruction set: MS_EXPORT gives their names, MS_ISA their namespace. Each
// opens a team of `threads` and calls the kernel. dtype: 0 float32, 1 bfloat16.

// Run `call` with T as the dtype's type, by all threads of a team.
#define MS_TEAM(call)                                \
    do {                                             \
        using namespace ms;                          \
        using namespace MS_ISA;                      \
        if (dtype == 0) {                            \
            using T = float;                         \
            _Pragma("omp parallel num_threads(threads)") call; \
        } else {                                     \
            using T = bf16;                          \
            _Pragma("omp parallel num_threads(threads)") call; \
        }                                            \
    } while (0)

MS_VISIBLE int64_t MS_EXPORT(packed_elements)(
    int32_t dtype, int64_t out_features, int64_t in_features) {
    using namespace MS_ISA;
    const int64_t tile =
        dtype == 0 ? tile_elements<float>(in_features) : tile_elements<bf16>(in_features);
    return ceil_div(out_features, kTile) * tile;
}

MS_VISIBLE void MS_EXPORT(pack_linear)(
    int32_t threads, int32_t dtype, const void* weight, int64_t out_features, int64_t in_features,
    void* packed) {
    MS_TEAM(pack_linear((const T*)weight, out_features, in_features, (T*)packed));
}

MS_VISIBLE void MS_EXPORT(gather_packed)(
    int32_t threads, int32_t dtype, const void* packed, int64_t in_features, const int64_t* ids,
    int64_t num_ids, void* out) {
    MS_TEAM(gather_packed((const T*)packed, in_features, ids, num_ids, (T*)out));
}

MS_VISIBLE void MS_EXPORT(linear)(
    int32_t threads, int32_t dtype, const void* rows, int64_t num_rows, int64_t in_features,
    const void* packed, int64_t out_features, const void* bias, void* out) {
    MS_TEAM(linear((const T*)rows, num_rows, in_features, (const T*)packed, out_features,
                   (const T*)bias, (T*)out));
}

// dtype: of the rows; weight, bias and out are float32.
MS_VISIBLE void MS_EXPORT(router_linear)(
    int32_t threads, int32_t dtype, const void* rows, int64_t num_rows, int64_t in_features,
    const float* packed, int64_t out_features, const float* bias, float* out) {
    MS_TEAM(linear((const T*)rows, num_rows, in_features, packed, out_features, bias, out));
}

MS_VISIBLE void MS_EXPORT(add_rms_norm)(
    int32_t threads, int32_t dtype, const void* rows, const void* residual, const void* weight,
    int64_t num_rows, int64_t size, float eps, void* out, void* total) {
    MS_TEAM(add_rms_norm((const T*)rows, (const T*)residual, (const T*)weight, num_rows, size, eps,
                         (T*)out, (T*)total));
}

MS_VISIBLE void MS_EXPORT(rope_write_kv)(
    int32_t threads, int32_t dtype, const ms::HeadsArguments* how, void* qkv, int64_t num_tokens,
    const int64_t* positions, const int64_t* slots, void* key_cache, void* value_cache,
    int64_t num_slots) {
    MS_TEAM(rotate_and_write(*how, (T*)qkv, num_tokens, positions, slots, (T*)key_cache,
                             (T*)value_cache, num_slots));
}

MS_VISIBLE void MS_EXPORT(silu_and_mul)(
    int32_t threads, int32_t dtype, const void* gate_up, int64_t num_rows, int64_t size, void* out) {
    MS_TEAM(silu_and_mul((const T*)gate_up, num_rows, size, (T*)out));
}

MS_VISIBLE void MS_EXPORT(combine)(
    int32_t threads, int32_t dtype, const void* rows, const int64_t* pair_of_choice,
    const float* weights, int64_t num_tokens, int64_t top_k, int64_t size, const void* shared,
    const float* shared_weights, void* out) {
    MS_TEAM(combine((const T*)rows, pair_of_choice, weights, num_tokens, top_k, size,
                    (const T*)shared, shared_weights, (T*)out));
}

MS_VISIBLE void MS_EXPORT(shared_weights)(
    int32_t threads, int32_t dtype, const void* rows, const float* gate, int64_t num_tokens,
    int64_t size, float* out) {
    MS_TEAM(shared_weights((const T*)rows, gate, num_tokens, size, out));
}

MS_VISIBLE void MS_EXPORT(route)(
    int32_t threads, const ms::RouterArguments* how, const float* logits, int64_t num_tokens,
    int64_t* ids, float* weights) {
    using namespace MS_ISA;
#pragma omp parallel num_threads(threads)
    route(*how, logits, num_tokens, ids, weights);
}

MS_VISIBLE void MS_EXPORT(sort_pairs)(
    const int64_t* ids, int64_t num_tokens, int64_t top_k, int64_t num_experts, int64_t* counts,
    int64_t* row_of_pair, int64_t* pair_of_choice) {
    MS_ISA::sort_pairs(
        ids, num_tokens, top_k, num_experts, counts, row_of_pair, pair_of_choice);
}

// Bytes of one expert record, header included.
MS_VISIBLE int64_t MS_EXPORT(record_bytes)(
    int32_t dtype, int64_t hidden_size, int64_t intermediate_size) {
    using namespace ms;
    using namespace MS_ISA;
    const int64_t bytes =
        dtype == 0 ? (gate_up_elements<float>(hidden_size, intermediate_size)
                      + down_elements<float>(hidden_size, intermediate_size)) * 4
                   : (gate_up_elements<bf16>(hidden_size, intermediate_size)
                      + down_elements<bf16>(hidden_size, intermediate_size)) * 2;
    return kRecordHeader + bytes;
}

// Returns 0, or 1 where there is no memory for a copy of one record.
MS_VISIBLE int32_t MS_EXPORT(pack_records)(
    int32_t threads, int32_t dtype, void* records, int64_t record_bytes, int64_t num_records,
    int64_t hidden_size, int64_t intermediate_size) {
    int32_t failed = 0;
    MS_TEAM(pack_records<T>(
        (char*)records, record_bytes, num_records, hidden_size, intermediate_size, &failed));
    return failed;
}

// out: [num_pairs, hidden_size]. counts: [num_experts], of the pairs, which are sorted by expert;
// only: [num_experts], those whose pairs are computed, or null. Returns 0, or 1 where there is no
// memory for the work space.
MS_VISIBLE int32_t MS_EXPORT(moe)(
    int32_t threads, int32_t dtype, const ms::ExpertTable* experts, const int64_t* counts,
    const uint8_t* only, const void* rows, const int64_t* row_of_pair, int64_t num_pairs,
    void* out) {
    using namespace ms;
    using namespace MS_ISA;
    const int64_t stride = inner_stride(experts->intermediate_size);
    PairChunk* chunks =
        (PairChunk*)malloc((experts->num_experts + num_pairs / kChunkRows + 1) * sizeof(PairChunk));
    void* inner = malloc(num_pairs * stride * (dtype == 0 ? 4 : 2) + 64);
    const bool has_memory = chunks && inner;
    if (has_memory) {
        const int64_t num_chunks = list_chunks(*experts, counts, only, chunks);
        MS_TEAM(moe(*experts, chunks, num_chunks, (const T*)rows, row_of_pair, (T*)inner, (T*)out));
    }
    free(inner);
    free(chunks);
    return has_memory ? 0 : 1;
}

MS_VISIBLE int64_t MS_EXPORT(forward_bytes)(
    int32_t dtype, const ms::ModelArguments* model, const ms::StepArguments* step) {
    using namespace ms;
    using namespace MS_ISA;
    return dtype == 0 ? Workspace<float>(*model, *step, nullptr).size
                      : Workspace<bf16>(*model, *step, nullptr).size;
}

// Where a stopped pass left things in `memory`: bytes from its beginning to residual, weights, ids
// and counts.
MS_VISIBLE void MS_EXPORT(forward_places)(
    int32_t dtype, const ms::ModelArguments* model, const ms::StepArguments* step, char* memory,
    int64_t* places) {
    using namespace ms;
    using namespace MS_ISA;
    const auto fill = [&](const auto& work) {
        places[0] = (char*)work.residual - memory;
        places[1] = (char*)work.weights - memory;
        places[2] = (char*)work.ids - memory;
        places[3] = (char*)work.counts - memory;
    };
    if (dtype == 0)
        fill(Workspace<float>(*model, *step, memory));
    else
        fill(Workspace<bf16>(*model, *step, memory));
}

// memory: forward_bytes of it, aligned to 64; out: [num_tokens, hidden_size].
MS_VISIBLE void MS_EXPORT(forward)(
    int32_t threads, int32_t dtype, const ms::ModelArguments* model, const ms::StepArguments* step,
    void* memory, ms::Progress* progress, void* out) {
    MS_TEAM(forward(*model, *step, Workspace<T>(*model, *step, memory), *progress, (T*)out));
}

// See see_layer.
MS_VISIBLE void MS_EXPORT(learned_ids_see)(
    const ms::LearnedIds* how, int64_t layer, const int64_t* ids, const int64_t* learned,
    int64_t num_learned, float* errors, float* losses) {
    MS_ISA::see_layer(*how, layer, ids, learned, num_learned, errors, losses);
}

#include "attention_exports.h"
#include "exchange_exports.h"
#include "sampling_exports.h"

#undef MS_TEAM
