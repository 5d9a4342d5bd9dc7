// Included by exports.h.

// See exchange.h.
MS_VISIBLE void MS_EXPORT(pack_rows)(
    int64_t num_ranks, int64_t capacity, int64_t rounds, int64_t width, const char* hidden,
    int64_t hidden_bytes, const int64_t* ids, int64_t num_tokens, int64_t top_k,
    const int64_t* replicas, int64_t most_replicas, const int64_t* num_replicas, char* out,
    int64_t* places, int64_t* rows_of_rank, int64_t* pairs_of_rank) {
    MS_ISA::pack_rows(
        {num_ranks, capacity, rounds, width}, hidden, hidden_bytes, ids, num_tokens, top_k,
        replicas, most_replicas, num_replicas, out, places, rows_of_rank, pairs_of_rank);
}

MS_VISIBLE int32_t MS_EXPORT(unpack_rows)(
    const char* packed, int64_t num_rows, int64_t hidden_bytes, int64_t top_k, int64_t num_experts,
    const int64_t* rows_of_rank, int64_t num_ranks, int64_t width, char* rows, int64_t* counts,
    int64_t* row_of_pair, int64_t* place_of_pair, int64_t* pairs_of_rank, int64_t* totals) {
    return MS_ISA::unpack_rows(
        packed, num_rows, hidden_bytes, top_k, num_experts, rows_of_rank, num_ranks, width, rows,
        counts, row_of_pair, place_of_pair, pairs_of_rank, totals);
}

MS_VISIBLE int32_t MS_EXPORT(scatter_rows)(
    const char* rows, int64_t num_rows, int64_t row_bytes, const int64_t* places, char* out,
    int64_t out_rows) {
    return MS_ISA::scatter_rows(rows, num_rows, row_bytes, places, out, out_rows);
}
