// From a router's logits to experts and weights; see RouterRecipe in types.py.

// log(1 + x) for x in 0 .. 1, within 3 units in the last place: the series of atanh.
static inline Floats log_1_plus(Floats x) {
    Floats ratio = x / (x + 2.0f);  // at most 1/3
    Floats square = ratio * ratio;
    Floats series = splat(2.0f / 15.0f);
    series = fma(series, square, splat(2.0f / 13.0f));
    series = fma(series, square, splat(2.0f / 11.0f));
    series = fma(series, square, splat(2.0f / 9.0f));
    series = fma(series, square, splat(2.0f / 7.0f));
    series = fma(series, square, splat(2.0f / 5.0f));
    series = fma(series, square, splat(2.0f / 3.0f));
    return fma(series * square, ratio, ratio + ratio);
}

// exp(values - their largest) / sum, over `count` floats padded to whole vectors.
static inline void softmax(float* values, int64_t count) {
    float largest = values[0];
    for (int64_t at = 1; at < count; at++)
        if (values[at] > largest || values[at] != values[at]) largest = values[at];
    Floats sums{};
    for (int64_t at = 0; at < count; at += kLanes) {
        Floats value = exp(load(values + at, count - at) - splat(largest));
        store(values + at, value, count - at);
        sums = sums + load(values + at, count - at);  // lanes beyond the end add zero
    }
    const Floats total = splat(sum_of(sums));
    for (int64_t at = 0; at < count; at += kLanes)
        store(values + at, load(values + at, count - at) / total, count - at);
}

static inline void score_experts(RouterScore score, float* values, int64_t count) {
    if (score == kSoftmax) softmax(values, count);
    for (int64_t at = 0; at < count; at += kLanes) {
        Floats logit = load(values + at, count - at);
        Floats size = larger(logit, -logit);
        if (score == kSigmoid)
            store(values + at, splat(1.0f) / (exp(-logit) + 1.0f), count - at);
        else if (score == kSqrtSoftplus)
            store(values + at, square_root(larger(logit, splat(0.0f)) + log_1_plus(exp(-size))),
                  count - at);
    }
}

// Index of the largest, the lower one of equals. A NaN is larger than all numbers, as for a sort.
static inline int32_t best_of(const float* values, int64_t count) {
    int64_t best = 0;
    for (int64_t at = 1; at < count; at++) {
        if (values[best] != values[best]) break;
        if (values[at] > values[best] || values[at] != values[at]) best = at;
    }
    return int32_t(best);
}

// Set the choice of all experts outside the best groups to -inf.
static inline void mask_groups(const RouterArguments& how, float* choice, float* buffer) {
    const int64_t size = how.num_experts / how.num_groups;
    float* scores = buffer;             // [num_groups]
    float* group = buffer + how.num_groups;  // [size]
    for (int64_t index = 0; index < how.num_groups; index++) {
        memcpy(group, choice + index * size, size * sizeof(float));
        scores[index] = 0;
        for (int64_t turn = 0; turn < std::min<int64_t>(how.group_score_top, size); turn++) {
            const int32_t best = best_of(group, size);
            scores[index] += group[best];
            group[best] = -__builtin_inff();
        }
    }
    char* is_kept = (char*)(group + size);  // [num_groups]
    memset(is_kept, 0, how.num_groups);
    for (int64_t turn = 0; turn < how.top_k_groups; turn++) {
        int64_t best = -1;
        for (int64_t index = 0; index < how.num_groups; index++) {
            if (is_kept[index]) continue;
            const bool is_nan = scores[index] != scores[index];
            if (best < 0 || scores[index] > scores[best]
                || (is_nan && scores[best] == scores[best]))
                best = index;
        }
        is_kept[best] = 1;
    }
    for (int64_t index = 0; index < how.num_groups; index++)
        if (!is_kept[index])
            for (int64_t at = 0; at < size; at++) choice[index * size + at] = -__builtin_inff();
}

// logits: [num_tokens, num_experts]; ids, weights: [num_tokens, top_k], heaviest first.
static void route(
    const RouterArguments& how, const float* logits, int64_t num_tokens, int64_t* ids,
    float* weights) {
    static thread_local Scratch scratch;
    const int64_t num_experts = how.num_experts;
#pragma omp for schedule(static)
    for (int64_t token = 0; token < num_tokens; token++) {
        float* scores = scratch.get<float>(3 * num_experts + 2 * how.num_groups);
        float* choice = scores + num_experts;
        memcpy(scores, logits + token * num_experts, num_experts * sizeof(float));
        score_experts(RouterScore(how.score), scores, num_experts);
        for (int64_t at = 0; at < num_experts; at++)
            choice[at] = how.selection_bias ? scores[at] + how.selection_bias[at] : scores[at];
        const bool is_grouped = how.top_k_groups < how.num_groups;
        if (is_grouped) mask_groups(how, choice, choice + num_experts);
        int64_t* chosen = ids + token * how.top_k;
        float* weight = weights + token * how.top_k;
        char* is_taken = (char*)(choice + num_experts);
        memset(is_taken, 0, num_experts);
        for (int64_t turn = 0; turn < how.top_k; turn++) {
            int64_t best = -1;
            for (int64_t at = 0; at < num_experts; at++) {
                if (is_taken[at]) continue;
                const bool is_nan = choice[at] != choice[at];
                if (best < 0 || choice[at] > choice[best] || (is_nan && choice[best] == choice[best]))
                    best = at;
            }
            is_taken[best] = 1;
            chosen[turn] = best;
            weight[turn] = scores[best];
        }
        if (how.score == kSoftmaxAfterTopK) softmax(weight, how.top_k);
        if (how.selection_bias || is_grouped) {
            // a bias may choose in another order than the weights have: sort, equals as chosen
            for (int64_t end = 1; end < how.top_k; end++)
                for (int64_t at = end; at > 0 && weight[at] > weight[at - 1]; at--) {
                    std::swap(weight[at], weight[at - 1]);
                    std::swap(chosen[at], chosen[at - 1]);
                }
        }
        if (how.renormalise) {
            float total = 0;
            for (int64_t turn = 0; turn < how.top_k; turn++) total += weight[turn];
            total += how.renormalise_eps;
            for (int64_t turn = 0; turn < how.top_k; turn++) weight[turn] /= total;
        }
        if (how.scale != 1.0f)
            for (int64_t turn = 0; turn < how.top_k; turn++) weight[turn] *= how.scale;
    }
}

// Sort the pairs (token, choice) by expert, tokens in order within one.
// counts: [num_experts]; row_of_pair: [num_pairs]; pair_of_choice: [num_tokens, top_k].
static inline void sort_pairs(
    const int64_t* ids, int64_t num_tokens, int64_t top_k, int64_t num_experts, int64_t* counts,
    int64_t* row_of_pair, int64_t* pair_of_choice) {
    static thread_local Scratch scratch;
    int64_t* next = scratch.get<int64_t>(num_experts);
    const int64_t num_pairs = num_tokens * top_k;
    memset(counts, 0, num_experts * sizeof(int64_t));
    for (int64_t pair = 0; pair < num_pairs; pair++) counts[ids[pair]]++;
    int64_t total = 0;
    for (int64_t expert = 0; expert < num_experts; expert++) {
        next[expert] = total;
        total += counts[expert];
    }
    for (int64_t pair = 0; pair < num_pairs; pair++) {
        const int64_t place = next[ids[pair]]++;
        row_of_pair[place] = pair / top_k;
        pair_of_choice[pair] = place;
    }
}

// sigmoid(row . gate) for each token: what a shared expert's result is weighed by.
template <class T>
static void shared_weights(
    const T* rows, const float* gate, int64_t num_tokens, int64_t size, float* out) {
#pragma omp for schedule(static)
    for (int64_t token = 0; token < num_tokens; token++) {
        Floats sums{};
        for (int64_t at = 0; at < size; at += kLanes)
            sums = fma(load(rows + token * size + at, size - at), load(gate + at, size - at), sums);
        Floats result = splat(1.0f) / (exp(-splat(sum_of(sums))) + 1.0f);
        store(out + token, result, 1);
    }
}
