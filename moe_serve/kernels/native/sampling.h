// From logits to tokens. What is chosen is reference.py's: the same survivors of the filters, the
// same uniform numbers; exp and log differ from torch's in the last bits. Ties go to the lower id.

#include "token_order.h"
#include "noise.h"

constexpr int64_t kGreedyPiece = 16384;  // tokens of a row that one thread looks at in one go
constexpr int64_t kGreedyBlock = 64 * kLanes;

// The greedy choice

static inline void lower_to(int64_t* least, int64_t value) {
    int64_t seen = __atomic_load_n(least, __ATOMIC_RELAXED);
    while (value < seen
           && !__atomic_compare_exchange_n(
               least, &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}

// Key of the first token of a piece whose ids start at first_id. is_finite: made false where a
// value is NaN or infinite.
static inline int64_t greedy_key(
    const float* values, int64_t count, int64_t first_id, bool* is_finite) {
    const Floats zero = splat(0.0f);
    Floats checks[4] = {zero, zero, zero, zero};  // NaN once a value was not finite
    float best = -kInfinity;
    int64_t best_block = 0;
    for (int64_t block = 0; block < count; block += kGreedyBlock) {
        const int64_t end = std::min(block + kGreedyBlock, count);
        Floats most[4] = {
            splat(-kInfinity), splat(-kInfinity), splat(-kInfinity), splat(-kInfinity)};
        int64_t at = block;
        for (; at + 4 * kLanes <= end; at += 4 * kLanes)
            for (int part = 0; part < 4; part++) {
                Floats value = load(values + at + part * kLanes);
                most[part] = larger(value, most[part]);
                checks[part] = fma(value, zero, checks[part]);
            }
        for (; at < end; at += kLanes) {
            most[0] = larger(load_or(values + at, end - at, -kInfinity), most[0]);
            checks[0] = fma(load(values + at, end - at), zero, checks[0]);
        }
        float largest =
            largest_of(larger(larger(most[0], most[1]), larger(most[2], most[3])));
        if (largest > best) {
            best = largest;
            best_block = block;
        }
    }
    Floats check = (checks[0] + checks[1]) + (checks[2] + checks[3]);
    if (is_any(~is_equal(check, check))) *is_finite = false;
    const int64_t end = std::min(best_block + kGreedyBlock, count);
    int64_t at = best_block;
    while (at < end && values[at] != best) at++;
    if (at == end) at = best_block;  // nothing but NaN
    return order_key(order_of(splat(best))[0], first_id + at);
}

// ids: [num_rows], the most likely token of each row; is_finite: whether it holds neither NaN nor
// an infinity. Rows start every row_stride floats.
static void greedy(
    const float* logits, int64_t num_rows, int64_t row_stride, int64_t vocab_size, int64_t* ids,
    uint8_t* is_finite) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < num_rows; row++) {
        ids[row] = INT64_MAX;
        is_finite[row] = 1;
    }
    const int64_t pieces = ceil_div(vocab_size, kGreedyPiece);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < num_rows * pieces; item++) {
        const int64_t row = item / pieces, first_id = item % pieces * kGreedyPiece;
        const int64_t count = std::min(kGreedyPiece, vocab_size - first_id);
        bool is_ok = true;
        lower_to(
            ids + row,
            greedy_key(logits + row * row_stride + first_id, count, first_id, &is_ok));
        if (!is_ok) __atomic_store_n(is_finite + row, 0, __ATOMIC_RELAXED);
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < num_rows; row++) ids[row] = id_of_key(ids[row]);
}

// Sampling

// A sum of many floats in double precision, in one order.
class WideSum {
  public:
    void add(Floats values) {
        Half halves[2];
        memcpy(halves, &values, sizeof values);
        low_ += __builtin_convertvector(halves[0], Doubles);
        high_ += __builtin_convertvector(halves[1], Doubles);
    }

    double total() const {
        Doubles both = low_ + high_;
        for (int half = 4; half > 0; half /= 2)
            for (int lane = 0; lane < half; lane++) both[lane] += both[lane + half];
        return both[0];
    }

  private:
    typedef float Half __attribute__((vector_size(32)));
    typedef double Doubles __attribute__((vector_size(64)));
    Doubles low_{}, high_{};
};

// The token of the highest value plus noise among those before `end`; -1 if there is none.
static inline int64_t noisy_best(
    const float* scaled, int64_t vocab_size, Place end, NoiseKey key, const int32_t* hashes) {
    float best = -kInfinity;
    int64_t best_id = -1;
    for (int64_t at = 0; at < vocab_size; at += kLanes) {
        Floats values = load_or(scaled + at, vocab_size - at, -kInfinity);
        Ints is_open = are_before(end, values, at) & is_more(values + kMostNoise, splat(best));
        if (!is_any(is_open)) continue;
        Words words = (Words)load((const float*)hashes + at, vocab_size - at);
        Floats uniform = uniform_numbers(key, words);
        is_open &= is_more(values + most_gumbel(uniform), splat(best));
        if (!is_any(is_open)) continue;
        Floats scores = selected(is_open, values + gumbel(uniform), splat(-kInfinity));
        for (int lane = 0; lane < kLanes; lane++)
            if (scores[lane] > best) {
                best = scores[lane];
                best_id = at + lane;
            }
    }
    return best_id;
}

// Sum of exp(value) over the tokens before `end`. It never falls when `end` moves back: each sum
// has the same order, with zeros for what is left out.
static inline double mass_before(const float* scaled, int64_t vocab_size, Place end) {
    WideSum sum;
    for (int64_t at = 0; at < vocab_size; at += kLanes) {
        Floats values = load_or(scaled + at, vocab_size - at, -kInfinity);
        Ints is_before = are_before(end, values, at);
        if (is_any(is_before)) sum.add(selected(is_before, exp(values), splat(0.0f)));
    }
    return sum.total();
}

struct Filters {
    float temperature, min_p;
    int64_t top_k;
    double top_p;
};

// Less the maximum first: a tiny temperature then cannot give inf, and so NaN.
static inline void scale_logits(
    const float* logits, int64_t vocab_size, const Filters& filters, float* scaled) {
    const Floats largest = splat(largest_value(logits, vocab_size));
    const Floats temperature = splat(filters.temperature);
    const Floats least = splat(float(__builtin_log(double(filters.min_p))));
    for (int64_t at = 0; at < vocab_size; at += kLanes) {
        Floats value = (load(logits + at, vocab_size - at) - largest) / temperature;
        value = selected(is_more(least, value), splat(-kInfinity), value);
        store(scaled + at, value, vocab_size - at);
    }
}

// The highest value plus noise of all tokens is looked at first. Where top-p does not keep its
// token it keeps none that comes after it either, so the next to look at is among those before.
static inline int64_t sampled_token(
    const float* logits, int64_t vocab_size, const Filters& filters, NoiseKey key,
    const int32_t* hashes) {
    static thread_local Scratch scratch;
    float* scaled = scratch.get<float>(vocab_size);
    scale_logits(logits, vocab_size, filters, scaled);
    Place end = kAfterAll;
    if (filters.top_k < vocab_size) {
        int64_t last = id_of_key(first_keys(scaled, vocab_size, filters.top_k)[filters.top_k - 1]);
        end = {scaled[last], last + 1};
    }
    const bool has_top_p = filters.top_p < 1;
    const double kept = has_top_p ? filters.top_p * mass_before(scaled, vocab_size, end) : 0;
    int64_t token = 0;
    for (;;) {
        int64_t next = noisy_best(scaled, vocab_size, end, key, hashes);
        if (next < 0) return token;  // only where no logit is finite
        token = next;
        end = {scaled[token], token};
        if (!has_top_p || mass_before(scaled, vocab_size, end) < kept) return token;
    }
}

// temperature, min_p, top_k, top_p, ids: [num_rows]; keys: [num_rows]; hashes: [vocab_size].
static void sample(
    const float* logits, int64_t num_rows, int64_t row_stride, int64_t vocab_size,
    const float* temperature, const float* min_p, const int64_t* top_k, const double* top_p,
    const int32_t* keys, const int32_t* hashes, int64_t* ids) {
#pragma omp for schedule(dynamic, 1)
    for (int64_t row = 0; row < num_rows; row++) {
        Filters filters = {temperature[row], min_p[row], top_k[row], top_p[row]};
        NoiseKey key = {uint32_t(keys[2 * row]), uint32_t(keys[2 * row + 1])};
        ids[row] = sampled_token(logits + row * row_stride, vocab_size, filters, key, hashes);
    }
}

// Logprobs

// For each row: the logprob and rank (1 is the best) of the token token_ids[row], and the first
// `top` (at most vocab_size) tokens with their logprobs, [num_rows, top].
static void chosen_logprobs(
    const float* logits, int64_t num_rows, int64_t row_stride, int64_t vocab_size,
    const int64_t* token_ids, int64_t top, float* logprobs, int64_t* ranks, int64_t* top_ids,
    float* top_logprobs) {
#pragma omp for schedule(dynamic, 1)
    for (int64_t row = 0; row < num_rows; row++) {
        const float* values = logits + row * row_stride;
        const float largest = largest_value(values, vocab_size);
        const Place place = {values[token_ids[row]], token_ids[row]};
        WideSum sum;
        Ints num_before{};
        for (int64_t at = 0; at < vocab_size; at += kLanes) {
            Floats value = load_or(values + at, vocab_size - at, -kInfinity);
            sum.add(exp(value - splat(largest)));
            num_before -= are_before(place, value, at);
        }
        const double log_sum = __builtin_log(sum.total());
        logprobs[row] = float(double(place.value) - double(largest) - log_sum);
        ranks[row] = 1;
        for (int lane = 0; lane < kLanes; lane++) ranks[row] += num_before[lane];
        int64_t* keys = top ? first_keys(values, vocab_size, top) : nullptr;
        std::sort(keys, keys + top);
        for (int64_t index = 0; index < top; index++) {
            const int64_t id = id_of_key(keys[index]);
            top_ids[row * top + index] = id;
            top_logprobs[row * top + index] =
                float(double(values[id]) - double(largest) - log_sum);
        }
    }
}
