// The C functions of sampling.h. One thread does what is one piece of work.

MS_VISIBLE void MS_EXPORT(greedy)(
    int32_t threads, const float* logits, int64_t num_rows, int64_t row_stride,
    int64_t vocab_size, int64_t* ids, uint8_t* is_finite) {
    using namespace MS_ISA;
    if (num_rows * vocab_size <= kGreedyPiece) threads = 1;
#pragma omp parallel num_threads(threads)
    greedy(logits, num_rows, row_stride, vocab_size, ids, is_finite);
}

MS_VISIBLE void MS_EXPORT(sample)(
    int32_t threads, const float* logits, int64_t num_rows, int64_t row_stride,
    int64_t vocab_size, const float* temperature, const float* min_p, const int64_t* top_k,
    const double* top_p, const int32_t* keys, const int32_t* hashes, int64_t* ids) {
    using namespace MS_ISA;
    if (num_rows == 1) threads = 1;
#pragma omp parallel num_threads(threads)
    sample(logits, num_rows, row_stride, vocab_size, temperature, min_p, top_k, top_p, keys, hashes,
           ids);
}

MS_VISIBLE void MS_EXPORT(chosen_logprobs)(
    int32_t threads, const float* logits, int64_t num_rows, int64_t row_stride,
    int64_t vocab_size, const int64_t* token_ids, int64_t top, float* logprobs, int64_t* ranks,
    int64_t* top_ids, float* top_logprobs) {
    using namespace MS_ISA;
    if (num_rows == 1) threads = 1;
#pragma omp parallel num_threads(threads)
    chosen_logprobs(logits, num_rows, row_stride, vocab_size, token_ids, top, logprobs, ranks,
                    top_ids, top_logprobs);
}

MS_VISIBLE void MS_EXPORT(row_keys)(
    const uint64_t* seeds, const int64_t* positions, int64_t num_rows, int32_t* keys) {
    using namespace MS_ISA;
    row_keys(seeds, positions, num_rows, keys);
}
