// A whole forward pass in one parallel region: the kernels of the other files, one after the other,
// as models/decoder.py calls them. Same functions, so the same bits.

template <class T>
static inline void multiply(const LinearWeights& weights, const T* rows, int64_t num_rows, T* out) {
    linear(rows, num_rows, weights.in_features, (const T*)weights.packed, weights.out_features,
           (const T*)weights.bias, out);
}

// Cuts a block of memory into pieces; without a block it only counts.
class Pieces {
  public:
    explicit Pieces(void* memory) : memory_((char*)memory) {}

    template <class T>
    T* get(int64_t count) {
        char* piece = memory_ ? memory_ + size_ : nullptr;
        size_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
        return (T*)piece;
    }

    int64_t size() const { return size_; }

  private:
    char* memory_;
    int64_t size_ = 0;
};

// What one layer leaves to the next, and work space that all layers use in turn.
template <class T>
struct Workspace {
    T *residual, *hidden, *delta, *qkv, *attended, *both, *inner, *pair_rows, *shared;
    float *logits, *weights, *shared_weights, *attention;
    int64_t *ids, *row_of_pair, *pair_of_choice, *counts, *num_chunks, *must_stop, *num_ready;
    uint8_t* ready;
    PairChunk* chunks;
    int64_t size;

    Workspace(const ModelArguments& model, const StepArguments& step, void* memory) {
        const int64_t tokens = step.num_tokens, hidden_size = model.hidden_size;
        int64_t qkv_width = 0, query_width = 0, both_width = 0, shared_width = 0, experts = 0;
        int64_t top_k = 0, inner_width = 0, attention_floats = 0;
        for (int64_t index = 0; index < model.num_layers; index++) {
            const LayerArguments& layer = model.layers[index];
            qkv_width = std::max(qkv_width, layer.qkv.out_features);
            query_width = std::max(query_width, layer.output.in_features);
            both_width = std::max(both_width, layer.gate_up.out_features);
            const int64_t pairs = layer.is_moe ? layer.router.top_k : 1;
            top_k = std::max(top_k, pairs);
            inner_width = std::max(inner_width, layer.down.in_features);
            if (layer.is_moe) {
                experts = std::max(experts, layer.experts.num_experts);
                shared_width = hidden_size;
                inner_width = std::max(
                    inner_width, pairs * inner_stride(layer.experts.intermediate_size));
            }
            attention_floats = std::max(
                attention_floats,
                attention_workspace(step.plans[layer.group], layer.heads.num_heads,
                                    layer.heads.num_kv_heads, layer.heads.head_dim));
        }
        Pieces pieces(memory);
        residual = pieces.get<T>(tokens * hidden_size);
        hidden = pieces.get<T>(tokens * hidden_size);
        delta = pieces.get<T>(tokens * hidden_size);
        qkv = pieces.get<T>(tokens * qkv_width);
        attended = pieces.get<T>(tokens * query_width);
        both = pieces.get<T>(tokens * both_width);
        inner = pieces.get<T>(tokens * inner_width);
        pair_rows = pieces.get<T>(experts ? tokens * top_k * hidden_size : 0);
        shared = pieces.get<T>(tokens * shared_width);
        logits = pieces.get<float>(tokens * experts);
        weights = pieces.get<float>(tokens * top_k);
        shared_weights = pieces.get<float>(tokens);
        attention = pieces.get<float>(attention_floats);
        ids = pieces.get<int64_t>(tokens * top_k);
        row_of_pair = pieces.get<int64_t>(tokens * top_k);
        pair_of_choice = pieces.get<int64_t>(tokens * top_k);
        counts = pieces.get<int64_t>(experts);
        num_chunks = pieces.get<int64_t>(1);
        must_stop = pieces.get<int64_t>(1);
        num_ready = pieces.get<int64_t>(1);
        ready = pieces.get<uint8_t>(experts);
        chunks = pieces.get<PairChunk>(experts + tokens * top_k / kChunkRows + 1);
        size = pieces.size();
    }
};

template <class T>
static void dense_mlp(
    const LayerArguments& layer, const Workspace<T>& work, int64_t num_tokens, T* out) {
    multiply(layer.gate_up, work.hidden, num_tokens, work.both);
    silu_and_mul(work.both, num_tokens, layer.down.in_features, work.inner);
    multiply(layer.down, work.inner, num_tokens, out);
}

// A layer's shared expert, and which experts its tokens go to. Returns whether to stop there.
template <class T>
static bool route_layer(
    const LayerArguments& layer, int64_t index, const Workspace<T>& work, int64_t num_tokens,
    const Progress& progress) {
    const int64_t hidden_size = layer.experts.hidden_size, top_k = layer.router.top_k;
    if (layer.gate_up.packed) {
        dense_mlp(layer, work, num_tokens, work.shared);
        if (layer.shared_gate)
            shared_weights(
                work.hidden, layer.shared_gate, num_tokens, hidden_size, work.shared_weights);
    }
    linear(work.hidden, num_tokens, hidden_size, (const float*)layer.router_weights.packed,
           layer.router_weights.out_features, (const float*)layer.router_weights.bias, work.logits);
    route(layer.router, work.logits, num_tokens, work.ids, work.weights);
#pragma omp single
    {
        const int64_t size = num_tokens * top_k;
        if (progress.is_forced) {
            memcpy(work.ids, progress.ids + index * size, size * sizeof(int64_t));
            memcpy(work.weights, progress.weights + index * size, size * sizeof(float));
        }
        sort_pairs(work.ids, num_tokens, top_k, layer.experts.num_experts, work.counts,
                   work.row_of_pair, work.pair_of_choice);
        if (progress.ids && !progress.is_forced)
            memcpy(progress.ids + index * size, work.ids, size * sizeof(int64_t));
        if (progress.weights && !progress.is_forced)
            memcpy(progress.weights + index * size, work.weights, size * sizeof(float));
        *work.must_stop = progress.stops == 2
            || (progress.stops == 1 && is_any_missing(layer.experts, work.counts));
    }
    return *work.must_stop != 0;
}

// The rows of a layer's experts, or of those in `only`.
template <class T>
static void run_experts(
    const LayerArguments& layer, const Workspace<T>& work, const uint8_t* only) {
#pragma omp single
    *work.num_chunks = list_chunks(layer.experts, work.counts, only, work.chunks);
    moe(layer.experts, work.chunks, *work.num_chunks, work.hidden, work.row_of_pair, work.inner,
        work.pair_rows);
}

// The rows of experts that are on their way, each as soon as it is there. Returns whether all came.
template <class T>
static bool run_arrivals(
    const LayerArguments& layer, const Workspace<T>& work, Arrivals& arrivals) {
    while (true) {
#pragma omp single
        *work.num_ready = await_arrivals(arrivals, layer.experts, work.ready);
        const int64_t num_ready = *work.num_ready;
        if (num_ready <= 0) return num_ready == 0;
        run_experts(layer, work, work.ready);
    }
}

template <class T>
static void combine_layer(
    const LayerArguments& layer, const Workspace<T>& work, int64_t num_tokens) {
    combine<T>(
        work.pair_rows, work.pair_of_choice, work.weights, num_tokens, layer.router.top_k,
        layer.experts.hidden_size, layer.gate_up.packed ? work.shared : nullptr,
        layer.shared_gate ? work.shared_weights : nullptr, work.delta);
}

// Norm, attention, norm: everything of a layer before its MLP.
template <class T>
static void attend(
    const ModelArguments& model, const StepArguments& step, int64_t index,
    const Workspace<T>& work) {
    const int64_t tokens = step.num_tokens, hidden_size = model.hidden_size;
    const LayerArguments& layer = model.layers[index];
    if (index == 0)
        add_rms_norm<T>(work.residual, nullptr, (const T*)layer.attention_norm, tokens,
                        hidden_size, model.norm_eps, work.hidden, nullptr);
    else
        add_rms_norm(work.delta, work.residual, (const T*)layer.attention_norm, tokens,
                     hidden_size, model.norm_eps, work.hidden, work.residual);
    multiply(layer.qkv, work.hidden, tokens, work.qkv);
    rotate_and_write(layer.heads, work.qkv, tokens, step.positions, step.slots[layer.group],
                     (T*)layer.key_cache, (T*)layer.value_cache, layer.num_slots);
    paged_attention<T>(
        step.plans[layer.group], work.qkv, layer.qkv.out_features, (const T*)layer.key_cache,
        (const T*)layer.value_cache, layer.num_slots, layer.heads.num_heads,
        layer.heads.num_kv_heads, layer.heads.head_dim, layer.scale, nullptr, work.attended,
        work.attention);
    multiply(layer.output, work.attended, tokens, work.delta);
    add_rms_norm(work.delta, work.residual, (const T*)layer.mlp_norm, tokens, hidden_size,
                 model.norm_eps, work.hidden, work.residual);
}

// out: [num_tokens, hidden_size], after the last norm, once progress.layer is num_layers. A pass
// that stopped is called again with the same model, step and work space.
template <class T>
static void forward(
    const ModelArguments& model, const StepArguments& step, const Workspace<T>& work,
    Progress& told, T* out) {
    const Progress progress = told;  // each thread its own, before anyone writes there
    const int64_t tokens = step.num_tokens, hidden_size = model.hidden_size;
    const T* table = (const T*)model.embedding;
    bool is_routed = progress.is_routed;
    if (progress.layer == 0 && !is_routed) {
        if (model.is_embedding_packed)
            gather_packed(table, hidden_size, step.token_ids, tokens, work.residual);
        else
            gather_rows(table, hidden_size, step.token_ids, tokens, work.residual);
    }
    for (int64_t index = progress.layer; index < model.num_layers; index++) {
        const LayerArguments& layer = model.layers[index];
        if (!is_routed) attend(model, step, index, work);
        if (!layer.is_moe) {
            dense_mlp(layer, work, tokens, work.delta);
            continue;
        }
        if (is_routed) {
            run_experts(layer, work, progress.only);
            if (progress.arrivals && !run_arrivals(layer, work, *progress.arrivals)) return;
            if (!progress.is_last) return;
            is_routed = false;
        } else {
            if (route_layer(layer, index, work, tokens, progress)) {
#pragma omp single
                {
                    told.layer = index;
                    told.is_routed = 1;
                }
                return;
            }
            run_experts(layer, work, nullptr);
        }
        combine_layer(layer, work, tokens);
    }
    add_rms_norm(work.delta, work.residual, (const T*)model.norm, tokens, hidden_size,
                 model.norm_eps, out, work.residual);
#pragma omp single
    told.layer = model.num_layers;
}
