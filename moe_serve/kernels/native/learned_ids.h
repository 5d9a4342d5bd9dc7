// What predictor learned_ids does at a layer, in one call: predictors/learned_ids.py has the method,
// and does the same with numpy where there is no native library.

// out += the sum of `count` rows of the table, [width].
static inline void add_rows(
    const float* table, int64_t width, const int64_t* rows, int64_t count, float* out) {
    for (int64_t row = 0; row < count; row++) {
        const float* from = table + rows[row] * width;
        for (int64_t at = 0; at < width; at++) out[at] += from[at];
    }
}

static inline void sigmoids(const float* logits, int64_t count, float* out) {
    for (int64_t at = 0; at < count; at += kLanes) {
        const Floats logit = larger(load(logits + at, count - at), splat(-30.0f));
        store(out + at, splat(1.0f) / (exp(-logit) + 1.0f), count - at);
    }
}

// One step down the gradient of a sequence's guesses about a layer; returns the loss one ahead.
static inline float learn_layer(
    const LearnedIds& how, int64_t sequence, int64_t layer, const int64_t* ids, float* errors) {
    const int64_t experts = how.num_experts, stages = how.near + 1;
    const int64_t place = sequence * (how.num_layers + how.reach) + layer;
    const float* guesses = how.guesses + place * stages * experts;
    const int64_t* rows = how.rows + place * how.num_rows;
    for (int64_t row = 0; row < how.num_rows; row++)
        __builtin_prefetch(how.table + rows[row] * experts, 1);
    float squares[kMostStages];
    for (int64_t stage = 0; stage < stages; stage++) {
        float* error = errors + stage * experts;
        sigmoids(guesses + stage * experts, experts, error);
        for (int64_t choice = 0; choice < how.top_k; choice++) error[ids[choice]] -= 1;
        float square = 0;
        for (int64_t expert = 0; expert < experts; expert++) square += error[expert] * error[expert];
        squares[stage] = square / float(experts);
    }
    for (int64_t row = 0; row < how.num_rows; row++) {
        if (rows[row] >= how.pad && rows[row] < how.pad + how.reach) continue;  // stays zero
        const int32_t stage = how.stage_of_row[row];
        float& scale = how.scale[rows[row]];
        scale = std::min(scale + squares[stage], how.last_scale);
        const float step = how.rate / __builtin_sqrtf(scale);
        float* weights = how.table + rows[row] * experts;
        const float* error = errors + stage * experts;
        for (int64_t expert = 0; expert < experts; expert++) weights[expert] -= step * error[expert];
    }
    return squares[0];
}

// Show a layer of a step. ids: [num_sequences, top_k]; learned: [num_learned], the sequences that
// are learned from; errors: [near + 1, num_experts], work space; losses: [num_learned].
static inline void see_layer(
    const LearnedIds& how, int64_t layer, const int64_t* ids, const int64_t* learned,
    int64_t num_learned, float* errors, float* losses) {
    const int64_t experts = how.num_experts, padded = how.num_layers + how.reach;
    const int64_t top_k = how.top_k, width = how.reach * experts;
    for (int64_t index = 0; index < num_learned; index++)
        losses[index] = learn_layer(how, index, layer, ids + learned[index] * top_k, errors);
    if (layer + 1 == how.num_layers) return;
    for (int64_t sequence = 0; sequence < how.num_sequences; sequence++) {
        int64_t blocks[kMostChoices];
        for (int64_t choice = 0; choice < top_k; choice++)
            blocks[choice] = ids[sequence * top_k + choice] + layer * experts;
        add_rows(how.table, width, blocks, top_k,
                 how.logits + (sequence * padded + layer + 1) * experts);
    }
    const int64_t stages = how.near + 1;
    for (int64_t index = 0; index < num_learned; index++) {
        const float* ahead = how.logits + (learned[index] * padded + layer + 1) * experts;
        float* guesses = how.guesses + (index * padded + layer + 1) * stages * experts;
        for (int64_t distance = 0; distance < how.near; distance++)
            memcpy(guesses + (distance * stages + distance) * experts, ahead + distance * experts,
                   experts * sizeof(float));
        int64_t* rows = how.rows + (index * padded + layer + 1) * how.num_rows;
        for (int64_t distance = 0; distance < how.reach; distance++)
            for (int64_t choice = 0; choice < top_k; choice++)
                rows[distance * (how.num_rows + top_k) + choice] =
                    (ids[learned[index] * top_k + choice] + layer * experts) * how.reach + distance;
    }
}
